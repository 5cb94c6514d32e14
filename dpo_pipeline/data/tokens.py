"""Rows of text or messages become token ids, once: what training, sampling and measuring all read."""

import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from dpo_pipeline.data.lengths import LengthLimits
from dpo_pipeline.data.report import DataReport
from dpo_pipeline.errors import PipelineError

BATCH = 1000
# A token that goes over a line break, as vocabularies write it: as it is, or as byte-level BPE does.
OVER_A_LINE = re.compile(r"[\n\u010a][^\s\u0120\u0109\u010d\u010a\u2581]")

Encoded = tuple[list[int], list[list[int]], bool]
Checked = tuple[list[int], list[list[int]], bool, str]


def eos_ids_of(tokenizer: Any, generation_config: Any) -> list[int]:
    """Ids that end a completion: the tokenizer's end token first, then those of the model's generation config.

    Raises PipelineError where the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise PipelineError(
            "the tokenizer has no end token, so no completion could end: set eos_token in its tokenizer_config.json"
        )
    also = generation_config.eos_token_id
    also = [] if also is None else [also] if isinstance(also, int) else also
    return list(dict.fromkeys([tokenizer.eos_token_id, *also]))


def tokenize(
    rows: list[dict], completions: tuple[str, ...], tokenizer: Any, eos_ids: list[int], lengths: LengthLimits
) -> Any:
    """A `datasets.Dataset` with `prompt_ids`, for each of the columns `completions` its ids (`chosen_ids`), and `row`.

    The prompt's ids are those of the prompt alone, as sampling sees it; a completion's are what prompt and completion
    tokenized together have after them, ended by exactly one end token (`length.completion=cut` aside). `row` is the
    place among `rows`. The table's description is what the account of its rows tells, as JSON.
    """
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset, DatasetInfo
    from tqdm.auto import tqdm

    data_report, longest, chunks = DataReport(), [], []
    names = ["prompt_ids", *(f"{name}_ids" for name in completions)]
    bar = tqdm(total=len(rows), desc="tokenizing", leave=False, disable=len(rows) < 10 * BATCH)
    types = [*[pa.list_(pa.int32())] * len(names), pa.int32()]
    found = enumerate(encode_rows(rows, completions, tokenizer, eos_ids))
    for start in range(0, max(1, len(rows)), BATCH):  # one table at least
        columns: list[list[Any]] = [[] for _ in types]
        for i, (prompt, ids, merged, reason) in islice(found, BATCH):
            row = rows[i]
            if reason:
                data_report.drop(row, reason)
                continue
            longest.append(len(prompt) + max(map(len, ids)))
            opening = 1 if prompt[0] == tokenizer.bos_token_id else 0
            prompt, ids, cut, reason = lengths.fit(prompt, ids, opening, eos_ids[0])
            if not reason and any(not completion or completion[0] in eos_ids for completion in ids):
                reason = "no completion token left" if cut else "empty completion"
            elif not reason and len(ids) > 1 and ids[0] == ids[1]:
                reason = "identical after cutting" if cut else "identical completions"
            if reason:
                data_report.drop(row, reason)
                continue
            if cut:
                data_report.mark_cut(row, cut)
            data_report.retokenized += merged
            for column, value in zip(columns, (prompt, *ids, i), strict=True):
                column.append(value)
        arrays = [pa.array(column, type=kind) for column, kind in zip(columns, types, strict=True)]
        chunks.append(pa.table(dict(zip((*names, "row"), arrays, strict=True))))
        bar.update(min(BATCH, len(rows) - start))
    bar.close()
    data_report.rows_measured = len(longest)
    data_report.p99_length = int(np.quantile(longest, 0.99, method="inverted_cdf")) if longest else 0
    return Dataset(pa.concat_tables(chunks), info=DatasetInfo(description=json.dumps(data_report.to_dict())))


def token_problem(
    row: dict,
    completions: tuple[str, ...],
    prompt: list[int],
    ids: list[list[int]],
    ending: list[str],
    bos: int | None,
) -> str:
    """Why token ids cannot be learnt from, or nothing."""
    if not prompt:  # the first token of a completion would have nothing to be predicted from
        return "prompt without a token"
    # A chat template may open every message with it, a text may not, and nothing starts with two.
    opening = prompt if isinstance(row["prompt"], str) else prompt[:2]
    if bos is not None and (opening.count(bos) > 1 or any(bos in completion for completion in ids)):
        return "more than one BOS"
    for name in completions:
        text = row[name].rstrip()
        text = next((text.removesuffix(end) for end in ending if text.endswith(end)), text)
        if any(end in text for end in ending):
            return "completion without its one end token"
    return ""


def encode_rows(
    rows: list[dict], completions: tuple[str, ...], tokenizer: Any, eos_ids: list[int]
) -> Iterator[Checked]:
    """For each row the ids of its prompt, those of each of its `completions`, whole, whether they were merged, its
    fault.

    Merged: the prompt's ids are not a prefix of those of prompt and completion, so the completion was tokenized alone.
    The fault is empty where there is none.
    """
    if not rows:
        return
    text = isinstance(rows[0]["prompt"], str)
    if not text and not tokenizer.chat_template:
        raise PipelineError(
            "the rows are messages but the tokenizer has no chat template: take an instruction-tuned model, or set "
            "dataset.form=text"
        )
    opening = opening_ids(tokenizer) if text else []
    ending = [tokenizer.convert_ids_to_tokens(end) for end in eos_ids]
    bos = None if tokenizer.bos_token_id in eos_ids else tokenizer.bos_token_id
    by_line = not any(OVER_A_LINE.search(token) for token in tokenizer.get_vocab())
    with ThreadPoolExecutor(1) as ahead:  # the next batch is tokenized while this one is looked through
        batches = [(rows[at : at + BATCH], completions, tokenizer, text, by_line) for at in range(0, len(rows), BATCH)]
        coming = ahead.submit(encode_batch, *batches[0])
        for now, following in zip(batches, [*batches[1:], None], strict=True):
            batch = coming.result()
            if following:
                coming = ahead.submit(encode_batch, *following)
            for row, (prompt, own, merged) in zip(now[0], batch, strict=True):
                prompt, own = opening + prompt, [append_eos_once(ids, eos_ids) for ids in own]
                yield prompt, own, merged, token_problem(row, completions, prompt, own, ending, bos)


def encode_batch(
    rows: list[dict], completions: tuple[str, ...], tokenizer: Any, text: bool, by_line: bool
) -> list[Encoded]:
    """What `encoded` gives of a few rows, without what opens and ends them.

    Where no token goes over a line break (`by_line`) a completion is tokenized behind its prompt's last line, which
    makes the same ids of it as the whole prompt does, at a third of the work.
    """
    if text:
        prompts, behind = [row["prompt"] for row in rows], [row[name] for name in completions for row in rows]
    else:
        prompts, behind = render_prompts_and_completions(rows, completions, tokenizer)
    tails = [last_line(prompt) for prompt in prompts] if by_line else prompts
    different = list(dict.fromkeys(["\n", *tails]))  # of dialogues they are few: `Assistant:`
    prompt_ids, heads = (
        tokenize_texts(prompts, tokenizer),
        dict(zip(different, tokenize_texts(different, tokenizer), strict=True)),
    )
    break_ids = heads["\n"]
    before = []  # each completion's: the text that it is tokenized behind, and the ids of that
    for prompt, ids, tail in zip(prompts, prompt_ids, tails, strict=True):
        head = heads[tail]
        own = head[len(break_ids) :] if head[: len(break_ids)] == break_ids else head
        agree = tail is not prompt and own and ids[-len(own) :] == own
        before.append((tail, head) if agree else (prompt, ids))
    before *= len(completions)
    full = tokenize_texts(
        [text + (completion or "") for (text, _), completion in zip(before, behind, strict=True)], tokenizer
    )
    found = []
    for i, (row, prompt) in enumerate(zip(rows, prompt_ids, strict=True)):
        places = range(i, len(full), len(rows))
        merged = any(behind[at] is None or full[at][: len(before[at][1])] != before[at][1] for at in places)
        own = [full[at][len(before[at][1]) :] for at in places]
        found.append(
            (prompt, tokenize_texts([row[name] for name in completions], tokenizer) if merged else own, merged)
        )
    return found


def last_line(prompt: str) -> str:
    """A prompt's last line that holds anything, with the line break before it; the whole where it has only one."""
    at = prompt.rfind("\n", 0, len(prompt.rstrip("\n")))
    return prompt[at:] if at > 0 and not prompt[at + 1].isspace() else prompt


def opening_ids(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before every text, mostly BOS."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return full[: next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)]


def tokenize_texts(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Ids of each text, without the special tokens that a tokenizer puts around it; on every core."""
    if not texts:
        return []
    if not tokenizer.is_fast:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    was = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    finally:  # off elsewhere, since a process that forks after it would be warned
        os.environ.pop("TOKENIZERS_PARALLELISM") if was is None else os.environ.update(TOKENIZERS_PARALLELISM=was)


def render_prompts_and_completions(
    rows: list[dict], completions: tuple[str, ...], tokenizer: Any
) -> tuple[list[str], list[str | None]]:
    """The prompts of rows as the chat template writes them, and what it writes behind each with its completions."""
    prompts = [render_chat(row["prompt"], tokenizer, ask=True) for row in rows]
    behind: list[str | None] = []
    for name in completions:
        for row, prompt in zip(rows, prompts, strict=True):
            reply = {"role": "assistant", "content": row[name]}
            whole = render_chat([*row["prompt"], reply], tokenizer, ask=False)
            behind.append(whole.removeprefix(prompt) if whole.startswith(prompt) else None)
    return prompts, behind


def render_chat(messages: list[dict[str, str]], tokenizer: Any, ask: bool) -> str:
    """Messages as the tokenizer's chat template writes them; raises PipelineError where the template refuses them."""
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except TemplateSyntaxError as error:
        raise PipelineError(
            f"the tokenizer's chat template cannot be read (line {error.lineno}: {error.message}): correct its "
            "chat_template.jinja, or take the one of the model's own page"
        ) from error
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise PipelineError(
            f"the tokenizer's chat template refuses a dialogue of {roles} ({error.message}): give the messages in the "
            "order and roles that it takes"
        ) from error


def append_eos_once(ids: list[int], eos_ids: list[int]) -> list[int]:
    """The ids up to their first end token, or with the tokenizer's own appended."""
    at = min((ids.index(end) for end in eos_ids if end in ids), default=None)
    return [*ids, eos_ids[0]] if at is None else ids[: at + 1]
