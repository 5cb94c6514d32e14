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
PLAIN_KEY = re.compile(r"[!#-&(-\[\]-~]+")  # others are escaped in messages, which then show the key
PLACEHOLDER = re.compile(r"\{(prompt|answer|a|b)\}")
KEY_REFUSED = (401, 403)
QUESTION_REFUSED = (200, 400, 413, 422)  # mostly since it exceeds the context; 200: a reply without text
REMEDIES = dict.fromkeys((*QUESTION_REFUSED, 404), "correct its model, sampling or base_url (most end in /v1)")
REMEDIES |= dict.fromkeys(KEY_REFUSED, "set the environment variable OPENAI_API_KEY to a key that it accepts")
RETRY = "start it, raise timeout or lower concurrency; results so far are kept, and the same command continues there"


class QuestionRefused(PipelineError):
    """The endpoint refuses one question."""


def chat(
    base_url: str | None,
    model: str | None,
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
    slots, pattern = sorted(set(PLACEHOLDER.findall(wording)) - {"prompt"}), re.compile(verdict)
    if slots not in (["answer"], ["a", "b"]):
        raise PipelineError(f"the judge's wording holds {slots}: type {{answer}} for a score, or {{a}} and {{b}}")
    if pattern.groups != 1:
        raise PipelineError(f"the judge's verdict={verdict} has {pattern.groups} groups: type one group, as (A|B)")
    if model is None:
        raise PipelineError("the judge has no model: type judge.common.model=NAME, as its server calls it")
    client = make_client(base_url, timeout, retries)
    body = {name: value for name, value in sampling.items() if value is not None}
    version = {"base_url": str(client.base_url), "model": model, "wording": wording, "verdict": verdict}
    version_text = json.dumps({**version, "sampling": body}, indent=1, sort_keys=True)
    is_score = slots == ["answer"]

    def ask(question: str) -> float | None:
        return parse_verdict(pattern, request_reply(client, model, question, body), is_score)

    def ask_each(items: list[Any]) -> Results:
        groups = [(item,) for item in items] if is_score else items
        return ask_all(ask, [fill_wording(wording, slots, group) for group in groups], concurrency)

    return Judge(**{"score" if is_score else "choose": ask_each}, version=version_text, post_training_only=True)


def fill_wording(wording: str, slots: list[str], completions: tuple[Completion, ...]) -> str:
    """The question about one completion or two, which share a prompt; no text is filled in twice."""
    texts = {slot: completion.text for slot, completion in zip(slots, completions, strict=True)}
    texts["prompt"] = prompt_to_text(completions[0].prompt)
    return PLACEHOLDER.sub(lambda match: texts[match[1]].strip(), wording)


def parse_verdict(pattern: re.Pattern[str], reply: str, is_score: bool) -> float | None:
    """The one verdict in a reply as a number, A as 1 and B as 0; None if there is none, or several."""
    try:
        (verdict,) = set(pattern.findall(reply))
        return float(verdict) if is_score else {"A": 1.0, "B": 0.0}[verdict]
    except (ValueError, LookupError):
        return None


def make_client(base_url: str | None, timeout: float, retries: int) -> Any:
    """The client of the endpoint, which retries; raises PipelineError if the package, address or key is unusable."""
    try:
        import openai
    except ImportError as error:
        raise PipelineError('judge=[openai] needs the package openai: type pip install -e ".[openai]"') from error
    url = base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    # Only OpenAI's own server is known to need a key; the client insists on one.
    key = os.environ.get("OPENAI_API_KEY") or ("" if "api.openai.com" in url else "no-key")
    if not PLAIN_URL.fullmatch(url):
        raise PipelineError(
            "the judge's base_url must be as http://127.0.0.1:8000/v1; a key belongs in OPENAI_API_KEY"
        )
    if not PLAIN_KEY.fullmatch(key):
        raise PipelineError(f"{url} needs a key of letters and digits: set the environment variable OPENAI_API_KEY")
    return openai.OpenAI(api_key=key, base_url=url, timeout=timeout, max_retries=retries)


def request_reply(client: Any, model: str, question: str, body: dict[str, Any], growth: int = 4) -> str:
    """The text of the reply; raises QuestionRefused or PipelineError, without the key, if there is none.

    A reply that its token limit cuts short is asked for once more, with `growth` times that limit. Where the server
    wants `max_completion_tokens` for `max_tokens`, `body` is changed so, for the later questions too.
    """
    import openai

    status, reason, sent = 200, "the reply holds no text", dict(body)
    try:
        messages = [{"role": "user", "content": question}]
        choice = client.chat.completions.create(model=model, messages=messages, extra_body=sent).choices[0]
        limits = {name: sent[name] * growth for name in ("max_tokens", "max_completion_tokens") if name in sent}
        if choice.finish_reason == "length" and limits and growth > 1:
            return request_reply(client, model, question, sent | limits, growth=1)
        if isinstance(text := choice.message.content, str):
            return text
    except openai.APIStatusError as error:
        status = error.status_code
        reason = "the key is refused" if status in KEY_REFUSED else str(error.body)  # may repeat a part of the key
    except openai.APIConnectionError as error:
        status, reason = 0, f"{error} {error.__cause__}"
    except (AttributeError, LookupError, TypeError, ValueError):
        pass  # JSON of another form
    if status == 400 and "max_completion_tokens" in reason and "max_tokens" in sent:
        body["max_completion_tokens"] = sent["max_tokens"]
        body.pop("max_tokens", None)  # another thread may have done so
        return request_reply(client, model, question, body, growth)
    # Raised outside of `except`: the traceback must not hold an error that repeats the key.
    reason = " ".join(reason.replace(client.api_key, "***").split())[:300]
    error_type = QuestionRefused if status in QUESTION_REFUSED else PipelineError
    raise error_type(f"the judge {model} at {client.base_url} fails ({reason}): {REMEDIES.get(status, RETRY)}")


def ask_all(ask: Callable[[str], float | None], questions: list[str], concurrency: int) -> Results:
    """The index and result of each question as its reply arrives; None for a question that is refused.

    Raises PipelineError if a request fails, or if the endpoint refuses all questions and a short one too.
    """
    refused: list[int] = []
    failures: list[PipelineError] = []

    def attempt(index: int) -> tuple[int, float | None] | None:
        try:
            return None if failures else (index, ask(questions[index]))
        except QuestionRefused:
            refused.append(index)
            return index, None
        except PipelineError as error:
            failures.append(error)
            return None

    with ThreadPool(concurrency) as pool:  # its threads end with the process, even if a reply is still awaited
        yield from filter(None, pool.imap_unordered(attempt, range(len(questions))))
    if failures:
        raise failures[0]
    if refused and len(refused) == len(questions):
        ask("Hello")  # raises if it is not these questions that the endpoint refuses
