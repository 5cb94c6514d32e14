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

    A reply goes from where the generation prompt of the messages before it ends to its end token. `whole_prompt` are
    the ids before a cut: a reply that it reached is not marked, nor one not to be trained on. None where a reply
    cannot be found, or has no end token.
    """
    messages, tools = row["prompt"], row.get("tools")
    text = render_chat(messages, tokenizer, ask=True, tools=tools)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    shift, marks, shorter = len(whole_prompt) - len(prompt), [False] * len(prompt), min(len(whole_prompt), len(prompt))
    equal = next((n for n in range(shorter) if whole_prompt[-1 - n] != prompt[-1 - n]), shorter)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render_chat(messages[:i], tokenizer, ask=True, tools=tools) if i else ""
        # A generation prompt may write more than a dialogue has before a reply, such as a tag that opens reasoning.
        place = len(os.path.commonprefix([before, text]))  # noqa: RUF071 of characters, as meant
        start = next(n for n, (_, end) in enumerate(offsets) if end > place)
        last = next((n for n in range(start, len(whole_prompt)) if whole_prompt[n] in eos_ids), start)
        reply, content = text[place : offsets[last][0]].strip(), message["content"].strip()
        rest = reply[reply.rfind(content) + len(content) :]  # such as calls, or the tag that closes a response
        is_whole = content in reply or content.endswith(reply)  # a template may leave reasoning out
        has_next = any(following["content"] and following["content"] in rest for following in messages[i + 1 : i + 2])
        if not (before and reply and is_whole) or has_next:
            return None
        if start >= len(whole_prompt) - equal and is_trained(message):
            marks[start - shift : last + 1 - shift] = [True] * (last + 1 - start)
    return marks
