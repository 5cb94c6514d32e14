"""Where the earlier replies of a dialogue lie among the tokens of its prompt: `sft_loss=all` learns them too."""

import os
import re
from typing import Any

from dpo_pipeline.data.files import Row
from dpo_pipeline.data.messages import is_trained
from dpo_pipeline.data.tokens import Ids, render_chat

GENERATION = re.compile(r"\{%-?\s*generation\b")  # how a template marks what the assistant says

Span = tuple[int, int]


def mark_replies(row: Row, whole_prompt: Ids, prompt: Ids, tokenizer: Any, eos_ids: Ids) -> list[bool] | None:
    """For each token of a prompt whether it belongs to an earlier reply, its end token included.

    `whole_prompt` are the ids before a cut: a reply that the cut has reached is not marked, nor is one whose message
    says `weight: 0` or `train: false`. None where a reply cannot be found, or has no end token.
    """
    spans = reply_spans(row, whole_prompt, tokenizer, eos_ids)
    if spans is None:
        return None
    shorter = min(len(whole_prompt), len(prompt))
    equal = next((n for n in range(shorter) if whole_prompt[-1 - n] != prompt[-1 - n]), shorter)
    shift, marks = len(whole_prompt) - len(prompt), [False] * len(prompt)
    for start, end in spans:
        if start >= len(whole_prompt) - equal:
            marks[start - shift : end - shift] = [True] * (end - start)
    return marks


def reply_spans(row: Row, ids: Ids, tokenizer: Any, eos_ids: Ids) -> list[Span] | None:
    """First token and end of each earlier reply that is learned, or None where one cannot be found."""
    messages, tools = row["prompt"], row.get("tools")
    numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    spans = (
        template_spans(messages, tools, tokenizer, eos_ids) if GENERATION.search(str(tokenizer.chat_template)) else []
    )
    if len(spans) != len(numbers):  # a template without marks, or with others than one for each reply
        spans = [find_reply(messages, i, tools, tokenizer, eos_ids) for i in numbers]
    if None in spans:
        return None
    return [span for i, span in zip(numbers, spans, strict=True) if is_trained(messages[i])]


def template_spans(messages: list[Row], tools: Any, tokenizer: Any, eos_ids: Ids) -> list[Span | None]:
    """The replies as the template marks them, each to its first end token, which may follow the mark."""
    encoded = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask, spans = encoded["input_ids"], [0, *encoded["assistant_masks"], 0], []
    edges = [i for i in range(len(ids) + 1) if mask[i] != mask[i + 1]]
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        ends = [i + 1 for i in range(start, min(end + 1, len(ids))) if ids[i] in eos_ids]
        spans.append((start, ends[0]) if ends else None)
    return spans


def find_reply(messages: list[Row], number: int, tools: Any, tokenizer: Any, eos_ids: Ids) -> Span | None:
    """A reply from where the generation prompt of the messages before it ends, to its first end token."""
    text = render_chat(messages, tokenizer, ask=True, tools=tools)
    before = render_chat(messages[:number], tokenizer, ask=True, tools=tools) if number else ""
    # A generation prompt may write more than a reply has in the dialogue, such as the tag that opens its reasoning.
    place = len(os.path.commonprefix([before, text]))  # noqa: RUF071 of characters, as meant
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    start = next(i for i, (_, end) in enumerate(offsets) if end > place)
    last = next((i for i in range(start, len(ids)) if ids[i] in eos_ids), None)
    if last is None or not place:
        return None
    reply, content = text[place : offsets[last][0]].strip(), messages[number]["content"].strip()
    is_whole = reply.endswith(content) or content.endswith(reply)  # a template may leave reasoning out
    return (start, last + 1) if reply and (is_whole or messages[number].get("tool_calls")) else None
