"""The one form of a row: a prompt and its completions, as text for a base model or as messages for a chat model.

Data sets hold text, messages (role and content, or ShareGPT's from and value), or a whole dialogue in the place of a
completion, as messages or as HH-RLHF's text. A row has `prompt` (text, or a list of messages with role and content),
its completions as text (those of `chosen`, `rejected`, `demonstration` that the set has), `source` and `origin`,
`problem` if nothing can be learned from it, and `left_out` if an option excludes it.
"""

import hashlib
import json
import re
from typing import Any

from dpo_pipeline.data.sources import Row, check_text, show_value
from dpo_pipeline.errors import PipelineError

Message = dict[str, str]
Prompt = str | list[Message]

COMPLETIONS = ("chosen", "rejected", "demonstration")
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "developer": "system", "human": "user"}
ROLES |= dict.fromkeys(("gpt", "bot", "chatbot", "model"), "assistant")
ASK, REPLY = "\n\nHuman:", "\n\nAssistant:"
TURN = re.compile(f"({ASK}|{REPLY})")


def normalize_row(origin: str, source: str, chat: bool, prompt: Any, completions: Row) -> Row:
    """A row of values in any of the forms, as messages if `chat`, else as text.

    `prompt` may be None if every completion is a whole dialogue. A completion of None is left out. Raises
    PipelineError that names the origin if a value has none of the forms.
    """
    row: Row = {"prompt": prompt if prompt is None else parse_messages(prompt, f"{origin}: prompt")}
    dialogue_prompts: list[Any] = []  # of the completions that are whole dialogues; None: text without a reply
    for name, completion in completions.items():
        if completion is None:
            continue
        value = parse_messages(completion, f"{origin}: {name}")
        if isinstance(value, list):
            opening, row[name] = split_dialogue(value, f"{origin}: {name}")
            if opening or prompt is None:
                dialogue_prompts.append(opening)
            elif isinstance(row["prompt"], str):
                row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        elif prompt is None:
            text, mark, row[name] = value.rpartition(REPLY)
            dialogue_prompts.append(text + mark if mark else None)
        else:
            row[name] = value
    problem = {}
    if dialogue_prompts:  # a prompt beside whole dialogues only repeats a part of them
        row["prompt"] = dialogue_prompts[0] or ""
        if None in dialogue_prompts:
            problem = {"problem": "no reply"}
        elif any(opening != dialogue_prompts[0] for opening in dialogue_prompts):
            problem = {"problem": "prompt differs"}
    if row["prompt"] is None:
        raise PipelineError(f"{origin} has no prompt, and its completions are no whole dialogues")
    row = as_messages(row) if chat else as_text(row)
    return {**row, "source": source, "origin": origin, **problem}


def parse_messages(value: Any, label: str) -> Prompt:
    """Text unchanged, messages of any form with role and content; raises PipelineError for anything else."""
    if isinstance(value, str):
        return value
    messages = [value] if isinstance(value, dict) else value  # ShareGPT has a single message as completion
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise PipelineError(
            f"{label} is {show_value(value)}, not text or messages with role and content: correct it or take it out"
        )
    return [parse_message(message, f"{label}, message {number}") for number, message in enumerate(messages, 1)]


def parse_message(message: Row, label: str) -> Message:
    """A message with role and content, from that form, ShareGPT's, or OpenAI's with content in parts."""
    role_key, content_key = ("role", "content") if "role" in message else ("from", "value")
    role, content = message.get(role_key), message.get(content_key)
    if str(role) not in ROLES:
        raise PipelineError(f"{label}: its role is {role!r}, none of {', '.join(ROLES)}: correct it")
    if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
        content = "".join(check_text(part["text"], f"{label}: a part of its content") for part in content)
    return {"role": ROLES[role], "content": check_text(content, f"{label}: its content")}


def split_dialogue(messages: list[Message], label: str) -> tuple[list[Message], str]:
    """The messages before the last, and the text of the last, which must be the assistant's."""
    if not messages or messages[-1]["role"] != "assistant":
        raise PipelineError(f"{label} does not end with a reply of the assistant: correct it or take it out")
    return messages[:-1], messages[-1]["content"]


def as_messages(row: Row) -> Row:
    """A row for a chat model: text in HH-RLHF's form becomes its turns, any other text what the user says."""
    if isinstance(row["prompt"], list):
        return row
    completions = {name: row[name].strip() for name in COMPLETIONS if name in row}
    prompt = row["prompt"]
    if not prompt.endswith(REPLY):
        return {**row, **completions, "prompt": [{"role": "user", "content": prompt.strip()}]}
    opening, *turns = TURN.split(prompt.removesuffix(REPLY))
    messages = [{"role": "system", "content": opening.strip()}] if opening.strip() else []
    for mark, text in zip(turns[::2], turns[1::2], strict=True):
        role = "user" if mark == ASK else "assistant"
        if messages and messages[-1]["role"] == role:  # chat templates want the roles to alternate
            messages[-1]["content"] += f"\n\n{text.strip()}"
        else:
            messages.append({"role": role, "content": text.strip()})
    return {**row, **completions, "prompt": messages}


def as_text(row: Row) -> Row:
    """A row for a base model: messages become turns in HH-RLHF's form (arXiv:2204.05862)."""
    if isinstance(row["prompt"], str):
        return row
    heads = {"system": "", "user": f"{ASK} ", "assistant": f"{REPLY} "}
    prompt = "".join(heads[message["role"]] + message["content"] for message in row["prompt"]) + REPLY
    return {**row, "prompt": prompt, **{name: f" {row[name]}" for name in COMPLETIONS if name in row}}


def prompt_to_text(prompt: Prompt) -> str:
    """A prompt as a person reads it."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def is_blank(prompt: Prompt) -> bool:
    """Whether a prompt holds nothing but white space."""
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    return not any(text.strip() for text in texts)


def prompt_key(row: Row) -> str:
    """What tells prompts apart: text itself, a hash of messages."""
    if isinstance(row["prompt"], str):
        return row["prompt"]
    return hashlib.sha256(json.dumps(row["prompt"]).encode()).hexdigest()
