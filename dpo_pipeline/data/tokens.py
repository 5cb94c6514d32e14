"""Rows of text or messages become token ids, once: what training, sampling and measuring all read."""

import os
import re
from collections.abc import Iterator
from typing import Any

from dpo_pipeline.data.files import Row
from dpo_pipeline.data.messages import CALLS, Message
from dpo_pipeline.data.normalize import completion_message
from dpo_pipeline.errors import PipelineError

BATCH = 1000
# A token that spans a line break, as vocabularies write it: as it is, or as byte-level BPE does.
SPANS_LINES = re.compile(r"[\n\u010a][^\s\u0120\u0109\u010d\u010a\u2581]")

Ids, Columns = list[int], tuple[str, ...]
EncodedRow = tuple[Ids, list[Ids], bool, str]


def eos_ids_of(tokenizer: Any, generation_config: Any) -> Ids:
    """Ids that end a completion: of the tokenizer (PipelineError: it has none), then of the generation config."""
    if tokenizer.eos_token_id is None:
        raise PipelineError(
            "the tokenizer has no end token, so no completion could end: set eos_token in its tokenizer_config.json"
        )
    model_ids = generation_config.eos_token_id or []
    return list(dict.fromkeys([tokenizer.eos_token_id, *([model_ids] if isinstance(model_ids, int) else model_ids)]))


def encode_rows(rows: list[Row], columns: Columns, tokenizer: Any, eos_ids: Ids) -> Iterator[EncodedRow]:
    """The ids of each row before any cut: of its prompt, and of each completion with its end token.

    Then whether the completions were tokenized alone, because the prompt's ids are no prefix of those of prompt and
    completion, and why nothing can be learned from the row, or empty. PipelineError: messages without a template.
    """
    opening = []
    if rows and isinstance(rows[0]["prompt"], str):  # what the tokenizer puts before every text, mostly BOS
        text_ids, ids = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
        opening = ids[: next(i for i in range(len(ids)) if ids[i : i + len(text_ids)] == text_ids)]
    elif rows and not tokenizer.chat_template:
        remedy = "take an instruction-tuned model, or set dataset.form=text"
        raise PipelineError(f"the rows are messages but the tokenizer has no chat template: {remedy}")
    by_line = not any(SPANS_LINES.search(token) for token in tokenizer.get_vocab())
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        prompts, completions = zip(*(render_row(row, columns, tokenizer) for row in batch), strict=True)
        prompt_ids = tokenize_texts(prompts, tokenizer)
        contexts = list(zip(prompts, prompt_ids, strict=True))
        if by_line:
            contexts = shorten_contexts(contexts, tokenizer)
        texts = [text + (reply or "") for (text, _), row in zip(contexts, completions, strict=True) for reply in row]
        ids = iter(tokenize_texts(texts, tokenizer))
        for row, prompt, (_, context), row_texts in zip(batch, prompt_ids, contexts, completions, strict=True):
            row_ids = [next(ids) for _ in columns]
            retokenized = None in row_texts or any(each[: len(context)] != context for each in row_ids)
            if retokenized:
                row_ids = tokenize_texts([row[name] for name in columns], tokenizer)
            else:
                row_ids = [each[len(context) :] for each in row_ids]
            encoded = opening + prompt, [append_eos_once(each, eos_ids) for each in row_ids], retokenized
            yield *encoded, token_problem(row, columns, encoded, tokenizer, eos_ids)


def token_problem(
    row: Row, columns: Columns, encoded: tuple[Ids, list[Ids], bool], tokenizer: Any, eos_ids: Ids
) -> str:
    """Why nothing can be learned from token ids, or empty."""
    prompt, completions, retokenized = encoded
    bos_id = None if tokenizer.bos_token_id in eos_ids else tokenizer.bos_token_id
    if not prompt:  # nothing would predict the first token of a completion
        return "prompt without a token"
    # A chat template may open every message with BOS, a text may not, and nothing starts with two.
    opening = prompt if isinstance(row["prompt"], str) else prompt[:2]
    if bos_id is not None and (opening.count(bos_id) > 1 or any(bos_id in ids for ids in completions)):
        return "more than one BOS"
    eos_tokens = tokenizer.convert_ids_to_tokens(eos_ids)
    for name in columns:
        if retokenized and not set(CALLS).isdisjoint(row.get("extra", {}).get(name, ())):
            return "calls or reasoning that the chat template writes before its generation prompt ends"
        text = row[name].rstrip()
        text = next((text.removesuffix(token) for token in eos_tokens if text.endswith(token)), text)
        if any(token in text for token in eos_tokens):
            return "completion without its one end token"
    return ""


def shorten_contexts(contexts: list[tuple[str, Ids]], tokenizer: Any) -> list[tuple[str, Ids]]:
    """For each prompt its last line and the ids of that, or all of the prompt where its ids do not end with them.

    If no token spans a line break, a completion has the same ids behind both, at a third of the work.
    """
    lines = []  # the last line of each that holds anything, with the line break before it
    for prompt, _ in contexts:
        start = prompt.rfind("\n", 0, len(prompt.rstrip("\n")))
        lines.append(prompt[start:] if start > 0 and not prompt[start + 1].isspace() else prompt)
    distinct = list(dict.fromkeys(["\n", *lines]))  # few in dialogues: `Assistant:`
    ids_of = dict(zip(distinct, tokenize_texts(distinct, tokenizer), strict=True))
    line_break, shortened = ids_of["\n"], []
    for (prompt, ids), line in zip(contexts, lines, strict=True):
        end = ids_of[line]
        if end[: len(line_break)] == line_break:
            end = end[len(line_break) :]
        shortened.append((line, ids_of[line]) if end and ids[-len(end) :] == end else (prompt, ids))
    return shortened


def tokenize_texts(texts: list[str], tokenizer: Any) -> list[Ids]:
    """Ids of each text, without the special tokens that a tokenizer puts around it; on every core."""
    if not texts:
        return []
    if not tokenizer.is_fast:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    finally:  # off elsewhere, since a process that forks after it would be warned
        os.environ["TOKENIZERS_PARALLELISM"] = "false"


def render_row(row: Row, columns: Columns, tokenizer: Any) -> tuple[str, list[str | None]]:
    """The prompt as text, and each completion behind it: None if the template then writes the prompt otherwise."""
    if isinstance(row["prompt"], str):
        return row["prompt"], [row[name] for name in columns]
    messages, tools = row["prompt"], row.get("tools")
    prompt = render_chat(messages, tokenizer, ask=True, tools=tools)
    replies = [[*messages, completion_message(row, name)] for name in columns]
    dialogues = [render_chat(dialogue, tokenizer, ask=False, tools=tools) for dialogue in replies]
    return prompt, [text.removeprefix(prompt) if text.startswith(prompt) else None for text in dialogues]


def render_chat(messages: list[Message], tokenizer: Any, ask: bool, tools: Any = None) -> str:
    """Messages as the tokenizer's chat template writes them; raises PipelineError if the template refuses them."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=ask)
    except TemplateError as error:
        dialogue = f"a dialogue of {', '.join(message['role'] for message in messages)} ({error.message})"
        remedy = "give the messages in the order and roles that it takes, or correct its chat_template.jinja"
        raise PipelineError(f"the tokenizer's chat template refuses {dialogue}: {remedy}") from error


def append_eos_once(ids: Ids, eos_ids: Ids) -> Ids:
    """The ids up to their first end token, or with the tokenizer's own appended."""
    end = min((ids.index(eos_id) for eos_id in eos_ids if eos_id in ids), default=None)
    return [*ids, eos_ids[0]] if end is None else ids[: end + 1]
