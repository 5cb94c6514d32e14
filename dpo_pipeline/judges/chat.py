"""A judge that asks a model behind any OpenAI-compatible chat endpoint, in words that the config gives."""

import json
import os
import re
from collections.abc import Callable, Iterator
from multiprocessing.pool import ThreadPool
from typing import Any

from dpo_pipeline.data.normalize import prompt_to_text
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.judges.judge import Completion, Judge

ADDRESS = re.compile(r"https?://(\[[\w:]+\]|[^\s/?@:]+)(:\d+)?(/[^\s?]*)?")  # with no place for a key
KEY = re.compile(r"[!#-&(-\[\]-~]+")  # a message may show quotes and backslashes in another form
PART = re.compile(r"\{(prompt|answer|a|b)\}")
REFUSALS = (200, 400, 413, 422)  # of one question, mostly since it exceeds the context; 200: a reply without text


class Refused(PipelineError):
    """One question has no reply."""


def chat(
    base_url: str | None,
    model: str,
    wording: str,
    verdict: str,
    sampling: dict[str, Any],
    concurrency: int,
    timeout: float,
    retries: int,
) -> Judge:
    """Scores where its wording has {answer}, chooses where it has {a} and {b}; {prompt} is what was asked.

    `verdict` is a regular expression whose one group is the verdict, A or B or a number; a reply in which it finds
    none, or two that differ, gives None. `sampling` goes into each request, but for nulls; `timeout` is in seconds.
    The key is OPENAI_API_KEY's and stands nowhere else. Raises PipelineError for options that cannot be and, asked,
    where the endpoint cannot be used, once what is under way has come.
    """
    import openai

    parts = set(PART.findall(wording)) - {"prompt"}
    if parts not in ({"answer"}, {"a", "b"}):
        raise PipelineError(
            f"the judge's wording holds {' and '.join(f'{{{part}}}' for part in sorted(parts)) or 'no completion'}: "
            "it takes {answer} to have a score, or {a} and {b} to have one chosen"
        )
    try:
        pattern = re.compile(verdict)
    except re.error as error:
        raise PipelineError(f"the judge's verdict={verdict} is no regular expression: {error}") from error
    if pattern.groups != 1:
        raise PipelineError(
            f"the judge's verdict={verdict} has {pattern.groups} groups: it takes one, (A|B) or ([1-5])"
        )
    if concurrency < 1 or timeout <= 0 or retries < 0:
        raise PipelineError(
            f"the judge's concurrency={concurrency}, timeout={timeout}, retries={retries}: the first must be at least "
            "1, the second above 0, the third not below 0"
        )
    address = base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    if not ADDRESS.fullmatch(address):
        raise PipelineError(
            "the judge's base_url is no plain address: type one such as http://127.0.0.1:8000/v1, and put a key into "
            "the environment variable OPENAI_API_KEY, not into it"
        )
    key = os.environ.get("OPENAI_API_KEY") or "no-key"  # the client insists on one where the server does not
    if not KEY.fullmatch(key):
        raise PipelineError("OPENAI_API_KEY holds a space, quote, line end or letter that no key has: set it anew")
    client = openai.OpenAI(api_key=key, base_url=address, timeout=timeout, max_retries=retries)
    url, body = str(client.base_url), {name: value for name, value in sampling.items() if value is not None}
    names = sorted(parts)
    read = float if names == ["answer"] else {"A": 1.0, "B": 0.0}.get

    def question(*completions: Completion) -> str:
        values = {"prompt": prompt_to_text(completions[0].prompt)}
        values |= {name: completion.text for name, completion in zip(names, completions, strict=True)}
        return PART.sub(lambda part: values[part[1]].strip(), wording)

    def ask(content: str) -> float | None:
        messages = [{"role": "user", "content": content}]
        try:
            reply = client.chat.completions.create(model=model, messages=messages, extra_body=body)
            found = set(pattern.findall(reply.choices[0].message.content))
            return read(found.pop()) if len(found) == 1 else None
        except openai.APIStatusError as error:
            status, said = error.status_code, str(error.body)
        except openai.APIConnectionError as error:
            status, said = 0, f"{error} {error.__cause__}"
        except (AttributeError, LookupError, TypeError, ValueError):
            status, said = 200, "its reply holds no text"
        # Outside of `except`, so that no traceback holds what may repeat the key.
        said = " ".join(said.replace(key, "***").split())[:300]
        who = f"the judge {model} at {url}"
        if status in REFUSALS:
            raise Refused(
                f"{who} takes no question ({said}): correct its model, sampling or base_url, which mostly ends in /v1"
            )
        if status in (401, 403):
            raise PipelineError(f"{who} refuses the key: set the environment variable OPENAI_API_KEY to one it takes")
        if status == 404:
            raise PipelineError(
                f"{who} is not found ({said}): name a model that is served there, or correct base_url, which mostly "
                "ends in /v1"
            )
        raise PipelineError(
            f"{who} does not answer, asked {retries + 1} time(s) ({said}): start it, raise timeout or lower "
            "concurrency; what it has said is kept, and the same command goes on from there"
        )

    version = {"base_url": url, "model": model, "wording": wording, "verdict": verdict, "sampling": body}
    return Judge(
        score=(lambda completions: ask_all(ask, [question(a) for a in completions], concurrency))
        if len(names) == 1
        else None,
        choose=(lambda pairs: ask_all(ask, [question(*p) for p in pairs], concurrency)) if len(names) == 2 else None,
        version=json.dumps(version, indent=1, sort_keys=True),
        post_training_only=True,
    )


def ask_all(
    ask: Callable[[str], float | None], questions: list[str], concurrency: int
) -> Iterator[tuple[int, float | None]]:
    """The number and verdict of each question as it comes; those refused at the end, as None.

    Raises PipelineError as soon as one of them finds the endpoint unusable, or where all are refused and a short
    question is too.
    """
    refused: dict[int, Refused] = {}
    down: list[PipelineError] = []

    def attempt(numbered: tuple[int, str]) -> tuple[int, float | None] | None:
        number, content = numbered
        try:
            return None if down else (number, ask(content))
        except Refused as error:
            refused[number] = error
        except PipelineError as error:
            down.append(error)
        return None

    with ThreadPool(concurrency) as pool:  # its threads end with the process, however long a reply takes
        yield from filter(None, pool.imap_unordered(attempt, enumerate(questions)))
    if refused and len(refused) == len(questions):
        attempt((len(questions), "Hello"))
    if down or len(refused) > len(questions):
        raise [*down, *refused.values()][0]
    yield from ((number, None) for number in refused)
