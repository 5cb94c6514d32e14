"""The one shape of a row: a prompt and its completions, as text for a base model or as messages for a chat model.

Values come in many forms: text; messages (role and content, or ShareGPT's from and value); a whole dialogue in place
of a completion, as messages or as HH-RLHF's text. A row has `prompt` (text, or a list of messages with role and
content), its completions as text (`chosen`, `rejected`, `demonstration`, as far as it has them), `source` and
`origin`, `problem` where it cannot be learnt from, and `left_out` where it is not to be.
"""

import re
from typing import Any

from dpo_pipeline.data.sources import json_type
from dpo_pipeline.errors import PipelineError

COMPLETIONS = ("chosen", "rejected", "demonstration")
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
ROLES |= {"developer": "system", "bot": "assistant", "chatbot": "assistant", "model": "assistant"}
ASK, REPLY = "\n\nHuman:", "\n\nAssistant:"
TURN = re.compile("(\n\nHuman:|\n\nAssistant:)")


def normalize_row(origin: str, source: str, chat: bool, prompt: Any, completions: dict[str, Any]) -> dict[str, Any]:
    """A row of values in any of the forms, as messages where `chat`, else as text.

    `prompt` may be None where every completion is a whole dialogue. A completion of None is left out. Raises
    PipelineError that names the origin where a value is none of the forms.
    """
    row: dict[str, Any] = {"prompt": prompt if prompt is None else parse_messages(prompt, "prompt", origin)}
    prefixes = []
    for name, value in completions.items():
        if value is None:
            continue
        found = parse_messages(value, name, origin)
        if isinstance(found, list):
            if not found or found[-1]["role"] != "assistant":
                last = found[-1]["role"] if found else "no message"
                raise PipelineError(f"{origin}: {name} ends with {last}, not with a reply of the assistant")
            if found[:-1] or prompt is None:
                prefixes.append(found[:-1])
            elif isinstance(row["prompt"], str):
                row["prompt"] = [{"role": "user", "content": row["prompt"]}]
            row[name] = found[-1]["content"]
        elif prompt is None:
            at = found.rfind(REPLY) + len(REPLY) if REPLY in found else None
            prefixes.append(found[:at] if at else None)
            row[name] = found[at:] if at else found
        else:
            row[name] = found
    problem = ""
    if prefixes:  # a prompt beside whole dialogues repeats a part of them
        row["prompt"] = prefixes[0] or ""
        if None in prefixes:
            problem = "no reply"
        elif any(prefix != prefixes[0] for prefix in prefixes):
            problem = "prompt differs"
    if row["prompt"] is None:
        raise PipelineError(f"{origin} has no prompt, and its completions are no whole dialogues")
    row = as_messages(row) if chat else as_text(row)
    return {**row, "source": source, "origin": origin, **({"problem": problem} if problem else {})}


def parse_messages(value: Any, name: str, origin: str) -> str | list[dict[str, str]]:
    """Text as it is, messages with role and content whatever their form; raises PipelineError for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):  # ShareGPT's single completion
        value = [value]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise PipelineError(
            f"{origin}: {name} is {json_type(value)}, not text or messages with role and content: correct it or take "
            "it out"
        )
    messages = []
    for number, message in enumerate(value, 1):
        role, content = (
            (message["role"], message.get("content"))
            if "role" in message
            else (message.get("from"), message.get("value"))
        )
        if not isinstance(role, str) or role not in ROLES:
            raise PipelineError(
                f"{origin}: {name}, message {number}: its role is {role!r}, none of {', '.join(ROLES)}: correct it"
            )
        if isinstance(content, list) and all(isinstance(each, dict) and "text" in each for each in content):
            content = "".join(each["text"] for each in content)  # in parts, as OpenAI's
        if not isinstance(content, str):
            raise PipelineError(f"{origin}: {name}, message {number}: its content is {json_type(content)}, not text")
        messages.append({"role": ROLES[role], "content": content})
    return messages


def as_messages(row: dict[str, Any]) -> dict[str, Any]:
    """A row for a chat model: text in HH-RLHF's form becomes its turns, any other what the user says."""
    if isinstance(row["prompt"], list):
        return row
    completions = {name: row[name].strip() for name in COMPLETIONS if name in row}
    prompt = row["prompt"]
    if not prompt.endswith(REPLY):
        return {**row, **completions, "prompt": [{"role": "user", "content": prompt.strip()}]}
    opening, *turns = TURN.split(prompt.removesuffix(REPLY))
    messages = [{"role": "system", "content": opening.strip()}] if opening.strip() else []
    for mark, said in zip(turns[::2], turns[1::2], strict=True):
        role = "user" if mark == ASK else "assistant"
        if messages and messages[-1]["role"] == role:  # templates want the turns to alternate
            messages[-1]["content"] += f"\n\n{said.strip()}"
        else:
            messages.append({"role": role, "content": said.strip()})
    return {**row, **completions, "prompt": messages}


def as_text(row: dict[str, Any]) -> dict[str, Any]:
    """A row for a base model: messages become turns in HH-RLHF's form (arXiv:2204.05862)."""
    if isinstance(row["prompt"], str):
        return row
    heads = {"system": "", "user": f"{ASK} ", "assistant": f"{REPLY} "}
    prompt = "".join(heads[message["role"]] + message["content"] for message in row["prompt"]) + REPLY
    return {**row, "prompt": prompt, **{name: f" {row[name]}" for name in COMPLETIONS if name in row}}


def prompt_to_text(prompt: str | list[dict[str, str]]) -> str:
    """A prompt as a person reads it."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
