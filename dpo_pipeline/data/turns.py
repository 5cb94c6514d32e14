"""The turns of a dialogue among the tokens of its prompt: the oldest are cut, `sft_loss=all` learns each reply."""

import os
from typing import Any

from dpo_pipeline.data.files import Row
from dpo_pipeline.data.messages import is_trained
from dpo_pipeline.data.tokens import Ids, render_chat, tokenize_texts


def cut_dialogue(row: Row, tokenizer: Any, size: int) -> Ids:
    """A prompt of messages in at most `size` tokens, or empty where it cannot be cut to that.

    The oldest turns go, and the beginning of the longest message of the next: system, roles and template stay whole.
    """
    messages = row["prompt"]
    while True:
        ids = tokenize_texts([render_chat(messages, tokenizer, ask=True, tools=row.get("tools"))], tokenizer)[0]
        if (excess := len(ids) - size) <= 0:
            return ids
        roles = [message["role"] for message in messages]
        first = next((i for i, role in enumerate(roles) if role != "system"), len(roles))
        end = roles.index("user", first + 1) if "user" in roles[first + 1 :] else len(roles)
        contents = [message["content"] for message in messages[first:end]]
        counts = list(map(len, tokenize_texts(contents, tokenizer)))
        longest = max(range(len(contents)), key=lambda i: len(contents[i]), default=0)
        if sum(counts) > excess + len(counts) and len(contents[longest]) > 1:
            about = len(contents[longest]) * excess // counts[longest]  # the next round cuts what is left
            content = contents[longest][min(max(1, about), len(contents[longest]) - 1) :]
            i = first + longest
            messages = [*messages[:i], {**messages[i], "content": content}, *messages[i + 1 :]]
        elif end < len(roles):
            messages = messages[:first] + messages[end:]
        else:
            return []


def mark_replies(row: Row, whole_prompt: Ids, prompt: Ids, tokenizer: Any, eos_ids: Ids) -> list[bool] | None:
    """For each token of a prompt whether it belongs to an earlier reply, its end token included.

    `whole_prompt` are the ids before a cut: a reply that it reached is not marked, nor one not to be trained on. None
    where a reply cannot be found, or has no end token.
    """
    replies = [i for i, message in enumerate(row["prompt"]) if message["role"] == "assistant"]
    spans = find_replies(row, replies, whole_prompt, tokenizer, eos_ids)
    if None in spans:
        return None
    shorter = min(len(whole_prompt), len(prompt))
    equal = next((n for n in range(shorter) if whole_prompt[-1 - n] != prompt[-1 - n]), shorter)
    shift, marks = len(whole_prompt) - len(prompt), [False] * len(prompt)
    for i, (start, end) in zip(replies, spans, strict=True):
        if start >= len(whole_prompt) - equal and is_trained(row["prompt"][i]):
            marks[start - shift : end - shift] = [True] * (end - start)
    return marks


def find_replies(row: Row, replies: list[int], ids: Ids, tokenizer: Any, eos_ids: Ids) -> list[tuple[int, int] | None]:
    """Each reply from where the generation prompt of the messages before it ends, to its end token."""
    spans, messages, tools = [], row["prompt"], row.get("tools")
    text = render_chat(messages, tokenizer, ask=True, tools=tools)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    for i in replies:
        before = render_chat(messages[:i], tokenizer, ask=True, tools=tools) if i else ""
        # A generation prompt may write more than a dialogue has before a reply, such as a tag that opens reasoning.
        place = len(os.path.commonprefix([before, text]))  # noqa: RUF071 of characters, as meant
        start = next(n for n, (_, end) in enumerate(offsets) if end > place)
        last = next((n for n in range(start, len(ids)) if ids[n] in eos_ids), start)
        reply, content = text[place : offsets[last][0]].strip(), messages[i]["content"].strip()
        rest = reply[reply.rfind(content) + len(content) :]  # such as calls, or the tag that closes a response
        is_whole = content in reply or content.endswith(reply)  # a template may leave reasoning out
        has_next = any(message["content"] and message["content"] in rest for message in messages[i + 1 : i + 2])
        spans.append((start, last + 1) if before and reply and is_whole and not has_next else None)
    return spans
