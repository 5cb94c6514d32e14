"""Messages, read from the forms that data sets have, and compared."""

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from dpo_pipeline.data.files import Row, check_text, decode, show_value
from dpo_pipeline.distributed import on_main_process
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.record import read_json, write_json

Message = dict[str, Any]
Prompt = str | list[Message]

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "developer": "system", "human": "user"}
ROLES |= dict.fromkeys(("gpt", "bot", "chatbot", "model"), "assistant")
ROLES |= dict.fromkeys(("tool", "function", "observation"), "tool")
CALLS = ("tools", "tool_calls", "reasoning_content")  # what no base model reads, and not every chat template


def parse_messages(value: Any, label: str) -> Prompt:
    """Text unchanged, messages of any form with role and content; raises PipelineError for anything else."""
    value = decode(value)
    if isinstance(value, str):
        if re.match(r"\[\{'(role|content|from|value)'", value):
            raise PipelineError(f"{label} is {show_value(value)}, messages that cannot be read: save them as JSON")
        return value
    messages = [value] if isinstance(value, dict) else value  # ShareGPT has a single message as completion
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        form = "text or messages with role and content"
        raise PipelineError(f"{label} is {show_value(value)}, not {form}: correct it or take it out")
    return [parse_message(message, f"{label}, message {number}") for number, message in enumerate(messages, 1)]


def parse_message(message: Row, label: str) -> Message:
    """A message with role, content and its other fields, from that form, ShareGPT's, or OpenAI's with parts."""
    role_key, content_key = ("role", "content") if "role" in message else ("from", "value")
    role, content = message.get(role_key), message.get(content_key)
    fields = {key: value for key, value in message.items() if key not in (role_key, content_key) and value is not None}
    if str(role) not in ROLES:
        raise PipelineError(f"{label}: its role is {role!r}, none of {', '.join(ROLES)}: correct it")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        if any(part.get("type", "text") != "text" for part in content):
            raise PipelineError(f"{label} holds images or sound, which no text model reads: take such rows out")
        content = "".join(check_text(part.get("text"), f"{label}: a part of its content") for part in content)
    if content is None and fields.get("tool_calls"):
        content = ""
    return {"role": ROLES[role], "content": check_text(content, f"{label}: its content"), **fields}


def meanings(prompt: Prompt | None) -> Any:
    """What a prompt says, without the ids or times that its messages may have."""
    if not isinstance(prompt, list):
        return prompt
    return [
        {field: message[field] for field in ("role", "content", *CALLS) if message.get(field)} for message in prompt
    ]


def is_trained(message: Message) -> bool:
    """Whether a message is one to learn: not marked by `weight: 0` or `train: false`."""
    return message.get("weight", 1) != 0 and message.get("train", True) is not False


def prompt_to_text(prompt: Prompt) -> str:
    """A prompt as a person reads it."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def fix_date(tokenizer: Any, home: Path, check: bool) -> str:
    """Have a chat template write one date as today's, the same every day; empty if it writes none.

    It is that of the first run of a name, kept in `chat_date.json` in its folder `home` unless only `check`.
    """
    if "strftime_now" not in str(tokenizer.chat_template):
        return ""
    file, today = home / "chat_date.json", {"date": datetime.now().date().isoformat()}

    def read_or_write() -> str:
        if not (check or file.is_file()):
            write_json(file, today)
        return (read_json(file, "date") or today)["date"]

    date, get_chat_template = on_main_process(read_or_write), tokenizer.get_chat_template

    def dated_template(*args: Any, **options: Any) -> str:  # the library takes no function for today's date
        call = r"""strftime_now\(\s*(['"])(.*?)\1\s*\)"""
        day = datetime.fromisoformat(date)
        return re.sub(call, lambda match: json.dumps(day.strftime(match[2])), get_chat_template(*args, **options))

    tokenizer.get_chat_template = dated_template
    return date
