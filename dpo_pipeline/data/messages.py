"""Messages, read from the forms that data sets have, and compared."""

import ast
import hashlib
import json
import re
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from dpo_pipeline.data.files import Row, check_text, is_dialogue, is_message, show_value
from dpo_pipeline.distributed import on_main_process
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.record import read_json, write_json

Message = dict[str, Any]
Prompt = str | list[Message]

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "developer": "system", "human": "user"}
ROLES |= dict.fromkeys(("gpt", "bot", "chatbot", "model"), "assistant")
ROLES |= dict.fromkeys(("tool", "function", "observation"), "tool")
DATE_CALL = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
MEANING = ("role", "content", "tool_calls", "reasoning_content")  # the fields that tell messages apart


def parse_messages(value: Any, label: str) -> Prompt:
    """Text unchanged, messages of any form with role and content; raises PipelineError for anything else."""
    value = decode(value)
    if isinstance(value, str):
        if re.match(r"\[\{'(role|content|from|value)'", value):
            raise PipelineError(f"{label} is {show_value(value)}, messages that cannot be read: save them as JSON")
        return value
    messages = [value] if isinstance(value, dict) else value  # ShareGPT has a single message as completion
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise PipelineError(
            f"{label} is {show_value(value)}, not text or messages with role and content: correct it or take it out"
        )
    return [parse_message(message, f"{label}, message {number}") for number, message in enumerate(messages, 1)]


def decode(value: Any) -> Any:
    """The messages that a text holds as JSON or as Python writes them; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        for parse in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                messages = parse(value.strip())
                if is_dialogue(messages) or is_message(messages):
                    return messages
    return value


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
    return [{field: message[field] for field in MEANING if message.get(field)} for message in prompt]


def is_trained(message: Message) -> bool:
    """Whether a message is one to learn: not marked by `weight: 0` or `train: false`."""
    return message.get("weight", 1) != 0 and message.get("train", True) is not False


def prompt_key(prompt: Prompt) -> str:
    """What tells prompts apart: text itself, a hash of messages."""
    return prompt if isinstance(prompt, str) else hashlib.sha256(json.dumps(meanings(prompt)).encode()).hexdigest()


def prompt_texts(prompt: Prompt) -> list[str]:
    """The text, or that of each message."""
    return [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]


def fix_date(tokenizer: Any, home: Path, check: bool) -> str:
    """Have a chat template write one date as today's, else rows would differ from day to day; empty if it writes none.

    That is the date of the first run of a name, kept in `chat_date.json` in its folder `home` unless only `check`.
    """
    if "strftime_now" not in str(tokenizer.chat_template):
        return ""
    file, today = home / "chat_date.json", datetime.now().date().isoformat()

    def read_or_write() -> str:
        if not (check or file.is_file()):
            write_json(file, {"date": today})
        return (read_json(file, "date") or {"date": today})["date"]

    date = on_main_process(read_or_write)
    tokenizer.get_chat_template = partial(dated_template, tokenizer.get_chat_template, datetime.fromisoformat(date))
    return date


def dated_template(get_chat_template: Any, date: datetime, *args: Any, **options: Any) -> str:
    """What `get_chat_template` gives, with this date where it writes today's; the library takes no function for it."""
    return DATE_CALL.sub(lambda call: json.dumps(date.strftime(call[2])), get_chat_template(*args, **options))
