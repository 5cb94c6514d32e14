"""A judge that asks a model behind any OpenAI-compatible chat endpoint, with a wording from the config."""

import json
import os
import re
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from typing import Any

from dpo_pipeline.data.normalize import prompt_to_text
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.judges.judge import Completion, Judge, Results

PLAIN_URL = re.compile(r"https?://(\[[\w:]+\]|[^\s/?@:]+)(:\d+)?(/[^\s?]*)?")  # leaves no place for a key
PLAIN_KEY = re.compile(r"[!#-&(-\[\]-~]+")  # a message may escape quotes and backslashes, and so show the key
PLACEHOLDER = re.compile(r"\{(prompt|answer|a|b)\}")
QUESTION_REFUSED = (200, 400, 413, 422)  # mostly since it exceeds the context; 200: a reply without text
REMEDIES = dict.fromkeys(QUESTION_REFUSED, "correct its model, sampling or base_url (most end in /v1)")
REMEDIES |= dict.fromkeys((401, 403), "set the environment variable OPENAI_API_KEY to a key that it accepts")
REMEDIES |= {404: "correct its model or base_url (most end in /v1)"}
RETRY = "start it, raise timeout or lower concurrency; results so far are kept, and the same command continues there"


class QuestionRefused(PipelineError):
    """The endpoint refuses one question."""


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
    """Scores if its wording has {answer}, chooses if it has {a} and {b}; {prompt} may stand in both.

    `verdict` is a regular expression whose one group is A, B or a number; a reply without a match, or with two that
    differ, is unreadable (None). `sampling` goes into each request, except nulls; `timeout` is in seconds. The key is
    read from OPENAI_API_KEY. Raises PipelineError for options that cannot be used and, while it judges, if the
    endpoint cannot be used, after the requests under way have ended.
    """
    slots, pattern = check_wording(wording), compile_verdict(verdict)
    if concurrency < 1 or timeout <= 0 or retries < 0:
        raise PipelineError("the judge needs a concurrency of at least 1, a timeout above 0 and retries of at least 0")
    client = make_client(base_url, timeout, retries)
    body = {name: value for name, value in sampling.items() if value is not None}
    scores = slots == ["answer"]

    def ask(question: str) -> float | None:
        return parse_verdict(pattern, request_reply(client, model, question, body), scores)

    def ask_each(items: list[Any]) -> Results:
        groups = [(completion,) for completion in items] if scores else items
        questions = [fill_wording(wording, dict(zip(slots, group, strict=True))) for group in groups]
        return ask_all(ask, questions, concurrency)

    version = {"base_url": str(client.base_url), "model": model, "wording": wording, "verdict": verdict}
    return Judge(
        score=ask_each if scores else None,
        choose=None if scores else ask_each,
        version=json.dumps({**version, "sampling": body}, indent=1, sort_keys=True),
        post_training_only=True,
    )


def check_wording(wording: str) -> list[str]:
    """The placeholders of the completions; raises PipelineError unless they are {answer}, or {a} and {b}."""
    slots = sorted(set(PLACEHOLDER.findall(wording)) - {"prompt"})
    if slots not in (["answer"], ["a", "b"]):
        raise PipelineError(f"the judge's wording holds {slots}: type {{answer}} for a score, or {{a}} and {{b}}")
    return slots


def compile_verdict(verdict: str) -> re.Pattern[str]:
    """The compiled expression; raises PipelineError unless it is one with exactly one group."""
    try:
        pattern = re.compile(verdict)
        if pattern.groups == 1:
            return pattern
        reason = f"{pattern.groups} groups"
    except re.error as error:
        reason = str(error)
    raise PipelineError(f"the judge's verdict={verdict} ({reason}): type an expression of one group, as (A|B)")


def parse_verdict(pattern: re.Pattern[str], reply: str, is_score: bool) -> float | None:
    """The one verdict in a reply as a number, A as 1 and B as 0; None if there is none, or several."""
    try:
        (verdict,) = set(pattern.findall(reply))
        return float(verdict) if is_score else {"A": 1.0, "B": 0.0}[verdict]
    except (ValueError, LookupError):
        return None


def fill_wording(wording: str, completions: dict[str, Completion]) -> str:
    """The question about one completion or two, which share a prompt; no text is filled in twice."""
    texts = {slot: completion.text for slot, completion in completions.items()}
    texts["prompt"] = prompt_to_text(next(iter(completions.values())).prompt)
    return PLACEHOLDER.sub(lambda match: texts[match[1]].strip(), wording)


def make_client(base_url: str | None, timeout: float, retries: int) -> Any:
    """The client of the endpoint, which retries; raises PipelineError if the package, address or key is unusable."""
    try:
        import openai
    except ImportError as error:
        raise PipelineError('judge=[openai] needs the package openai: type pip install -e ".[openai]"') from error
    url = base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    if not PLAIN_URL.fullmatch(url):
        raise PipelineError(
            "the judge's base_url is not a plain address: type one like http://127.0.0.1:8000/v1, and put a key into "
            "the environment variable OPENAI_API_KEY"
        )
    key = os.environ.get("OPENAI_API_KEY") or "no-key"  # the client insists on one where the server does not
    if not PLAIN_KEY.fullmatch(key):
        raise PipelineError("OPENAI_API_KEY holds a space, quote, line end or letter that no key has: set it again")
    return openai.OpenAI(api_key=key, base_url=url, timeout=timeout, max_retries=retries)


def request_reply(client: Any, model: str, question: str, body: dict[str, Any]) -> str:
    """The text of the reply; raises QuestionRefused or PipelineError, without the key, if there is none."""
    import openai

    status, reason = 200, "the reply holds no text"
    try:
        messages = [{"role": "user", "content": question}]
        reply = client.chat.completions.create(model=model, messages=messages, extra_body=body)
        if isinstance(text := reply.choices[0].message.content, str):
            return text
    except openai.APIStatusError as error:
        is_key_refused = error.status_code in (401, 403)  # the body may repeat a part of the key
        status, reason = error.status_code, "the key is refused" if is_key_refused else str(error.body)
    except openai.APIConnectionError as error:
        status, reason = 0, f"{error} {error.__cause__}"
    except (AttributeError, LookupError, TypeError, ValueError):
        pass  # JSON of another form
    # Raised outside of `except`: the traceback must not hold an error that repeats the key.
    reason = " ".join(reason.replace(client.api_key, "***").split())[:300]
    kind = QuestionRefused if status in QUESTION_REFUSED else PipelineError
    raise kind(f"the judge {model} at {client.base_url} fails ({reason}): {REMEDIES.get(status, RETRY)}")


def ask_all(ask: Callable[[str], float | None], questions: list[str], concurrency: int) -> Results:
    """The index and result of each question as its reply arrives; at the end None for each refused question.

    Raises PipelineError if a request fails, or if the endpoint refuses all questions and a short one too.
    """
    refused: list[int] = []
    failures: list[PipelineError] = []

    def attempt(index: int) -> tuple[int, float | None] | None:
        try:
            return None if failures else (index, ask(questions[index]))
        except QuestionRefused:
            refused.append(index)
        except PipelineError as error:
            failures.append(error)
        return None

    with ThreadPool(concurrency) as pool:  # its threads end with the process, even if a reply is still awaited
        yield from filter(None, pool.imap_unordered(attempt, range(len(questions))))
    if failures:
        raise failures[0]
    if refused and len(refused) == len(questions):
        ask("Hello")  # raises if it is not these questions that the endpoint refuses
    yield from ((index, None) for index in refused)
