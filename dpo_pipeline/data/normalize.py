"""The one form of a row: a prompt and its completions, as text for a base model or as messages for a chat model.

A row has `prompt` (text, or a list of messages), the text of its completions (`chosen`, `rejected`, `demonstration`),
`key` (what tells prompts apart), `source`, `origin` and `reason` (why it is not kept, or None). Where a set has them:
`problem` (why nothing can be learned from it), `tools` (functions that may be called), `extra` (by completion: the
further fields of its message, such as `tool_calls`), `unused` (columns that nothing reads).
"""

import hashlib
import json
import re
from typing import Any

from dpo_pipeline.data.files import Row
from dpo_pipeline.data.messages import CALLS, Message, Prompt, is_trained, meanings, parse_messages, prompt_to_text
from dpo_pipeline.errors import PipelineError

COMPLETIONS = ("chosen", "rejected", "demonstration")
ASK, REPLY = "\n\nHuman:", "\n\nAssistant:"
RENDERED = re.compile(r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]")  # by chat templates


def normalize_row(
    origin: str, source: str, chat: bool, prompt: Any, completions: Row, system: Any = None, tools: Any = None
) -> Row:
    """A row of values in any of the forms, as messages if `chat`, else as text; PipelineError names its origin.

    `prompt` may be None if every completion is a whole dialogue. A completion of None is left out.
    """
    row: Row = {"source": source, "origin": origin, "reason": None}
    prompt = None if prompt is None else parse_messages(prompt, f"{origin}: prompt")
    prompts: list[Any] = []  # of each completion; None: text without a reply
    for name, value in completions.items():
        if value is not None:
            opening, reply = split_reply(prompt, parse_messages(value, f"{origin}: {name}"), f"{origin}: {name}")
            prompts.append(opening)
            add_completion(row, name, reply)
    if any(isinstance(opening, list) for opening in prompts):
        prompts = [to_messages(opening) if isinstance(opening, str) else opening for opening in prompts]
    if None in prompts:
        row["problem"] = "no reply"
    elif any(meanings(opening) != meanings(prompts[0]) for opening in prompts):
        row["problem"] = "prompt differs"
    row["prompt"] = (prompts[0] or "") if prompts else prompt
    if row["prompt"] is None:
        raise PipelineError(f"{origin} has no prompt, and its completions are no whole dialogues")
    if system and system.strip():
        row["prompt"] = add_system(row["prompt"], system, origin)
    if tools := json.loads(tools) if isinstance(tools, str) and tools.strip() else tools:
        row["tools"] = tools
    row = as_messages(row) if chat else as_text(row)
    texts = [prompt_to_text(row["prompt"]), *(row[name] for name in COMPLETIONS if name in row)] if chat else ()
    if any(RENDERED.search(text) for text in texts):
        row["problem"] = "text that a chat template has written (give messages)"
    is_text = isinstance(row["prompt"], str)
    row["key"] = row["prompt"] if is_text else hashlib.sha256(json.dumps(meanings(row["prompt"])).encode()).hexdigest()
    return row


def split_reply(prompt: Prompt | None, value: Prompt, label: str) -> tuple[Prompt | None, str | Message]:
    """The whole prompt of a completion, and its reply: text, or the last message.

    Several messages, or text in HH-RLHF's form, are a whole dialogue, or go on behind the prompt.
    """
    if isinstance(value, str):
        repeats = isinstance(prompt, str) and prompt.endswith(REPLY) and value.startswith(prompt)
        if prompt is not None and not repeats:
            return prompt, value
        opening, mark, reply = value.rpartition(REPLY)
        return (opening + mark if mark else None), reply
    if not value or value[-1]["role"] != "assistant":
        raise PipelineError(f"{label} does not end with a reply of the assistant: correct it or take it out")
    opening, reply = value[:-1], value[-1]
    asked = prompt.strip() if isinstance(prompt, str) else None
    if prompt is None or any(m["role"] == "user" and m["content"].strip() == asked for m in opening):
        return opening, reply
    prompt = to_messages(prompt) if isinstance(prompt, str) else prompt
    if meanings(prompt) in (meanings(value), meanings(opening[: len(prompt)])) and opening:
        return opening, reply
    if not opening or opening[0]["role"] in ("assistant", "tool") or all(m["role"] == "system" for m in prompt):
        return prompt + opening, reply
    raise PipelineError(
        f"{label} is a whole dialogue that does not begin with the row's prompt: say which of the two is the "
        "prompt, such as 'dataset.columns={chosen: chosen, rejected: rejected}'"
    )


def add_completion(row: Row, name: str, reply: str | Message) -> None:
    """Give a row the completion, with the further fields of its message."""
    message = reply if isinstance(reply, dict) else {"content": reply}
    row[name] = message["content"]
    if extra := {key: value for key, value in message.items() if key not in ("role", "content", "weight", "train")}:
        row["extra"] = {**row.get("extra", {}), name: extra}
    if not is_trained(message):
        row["problem"] = "a completion that is marked as not trained on"


def add_system(prompt: Prompt, system: str, origin: str) -> list[Message]:
    """The prompt with this system message first; raises PipelineError where it has another."""
    messages = to_messages(prompt) if isinstance(prompt, str) else prompt
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"].strip() != system.strip():
        raise PipelineError(f"{origin}: its system differs from the system message of its prompt: take one out")
    return messages


def as_messages(row: Row) -> Row:
    """A row for a chat model: its prompt as messages, its completions without the space that begins a text."""
    if isinstance(row["prompt"], list):
        return row
    strip = str.strip if row["prompt"].endswith(REPLY) else trim
    completions = {name: strip(row[name]) for name in COMPLETIONS if name in row}
    return {**row, **completions, "prompt": to_messages(row["prompt"])}


def as_text(row: Row) -> Row:
    """A row for a base model: messages become turns in HH-RLHF's form (arXiv:2204.05862)."""
    messages = row["prompt"] if isinstance(row["prompt"], list) else []
    for message in (row, *messages, *row.get("extra", {}).values()):
        if message.get("role") == "tool" or any(map(message.get, CALLS)):
            raise PipelineError(f"{row['origin']}: only chat models read tools, calls and reasoning: type model=...")
    if isinstance(row["prompt"], str):
        return row
    heads = {"system": "", "user": f"{ASK} ", "assistant": f"{REPLY} "}
    prompt = "".join(heads[message["role"]] + message["content"] for message in messages) + REPLY
    return {**row, "prompt": prompt, **{name: f" {row[name]}" for name in COMPLETIONS if name in row}}


def to_messages(text: str) -> list[Message]:
    """Text as messages: HH-RLHF's form becomes its turns, any other text what the user says."""
    if not text.endswith(REPLY):
        return [{"role": "user", "content": trim(text)}]
    if text.startswith(ASK.lstrip()):
        text = f"\n\n{text}"  # whose first line break was stripped
    opening, *turns = re.split(f"({ASK}|{REPLY})", text.removesuffix(REPLY))
    messages = [{"role": "system", "content": opening.strip()}] if opening.strip() else []
    for mark, turn in zip(turns[::2], turns[1::2], strict=True):
        role = "user" if mark == ASK else "assistant"
        if messages and messages[-1]["role"] == role:  # chat templates want the roles to alternate
            messages[-1]["content"] += f"\n\n{turn.strip()}"
        else:
            messages.append({"role": role, "content": turn.strip()})
    return messages


def trim(text: str) -> str:
    """Text without the blank lines and the one space that may begin it, and without its end; indentation stays."""
    return re.sub(r"\A(?:\s*\n)?(?: (?!\s))?", "", text).rstrip()


def completion_message(row: Row, name: str) -> Message:
    """A completion of a row of messages as the assistant's message, with its further fields."""
    return {"role": "assistant", "content": row[name], **row.get("extra", {}).get(name, {})}


def reply_key(row: Row, name: str) -> str:
    """What tells completions apart: their text, and their calls and reasoning if any."""
    return json.dumps(meanings([completion_message(row, name)])) if name in row.get("extra", {}) else row[name]


def check_template(rows: list[Row], template: str, used: tuple[str, ...] = ()) -> None:
    """Note each field of messages that a template does not write, but those `used`; PipelineError for meaning lost."""
    for row in rows:
        messages = [*row["prompt"], *(completion_message(row, name) for name in row.get("extra", ()))]
        fields = {"tools"} & row.keys() | {name for message in messages for name in message}
        for name in sorted(fields - {"role", "content", *used}):
            if name not in template:
                if name in CALLS:
                    remedy = f"take a model whose template does, or take {name} out of the rows"
                    raise PipelineError(f"{row['origin']}: the model's chat template does not write {name}: {remedy}")
                row["unused"] = (*row.get("unused", ()), f"{name} of messages")
