"""Rows of token ids within the length limits, as a table: what training and measuring read."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from dpo_pipeline.data.files import Row
from dpo_pipeline.data.report import INVALID, SINGLE, TOO_LONG, mark
from dpo_pipeline.data.tokens import BATCH, Columns, EncodedRow, Ids, encode_rows
from dpo_pipeline.data.turns import cut_dialogue, mark_replies
from dpo_pipeline.errors import PipelineError

Shorten = Callable[[int], Ids]

MAX_UNKNOWN = 0.1  # share of unknown tokens above which the tokenizer is that of another language


@dataclass(frozen=True)
class LengthLimits:
    """Limits in tokens: `max` of a prompt with its longer completion, `max_prompt` of a prompt if the row exceeds it.

    `prompt`: left | drop, cut it to `max_prompt`, or drop the row. `completion`: drop | keep_eos | cut, drop the row,
    or cut its completions, with or without the end token.
    """

    max: int
    max_prompt: int
    prompt: str = "left"
    completion: str = "drop"

    @classmethod
    def resolve(cls, length: Any, context: int) -> "LengthLimits":
        """The limits of a config's `length`, or their defaults; raises PipelineError beyond the model's `context`."""
        longest = length.max or min(512, context)
        if longest > context:
            raise PipelineError(f"length.max={longest} exceeds the model's context of {context} tokens: lower it")
        max_prompt = length.max_prompt or longest // 2
        if max_prompt >= longest:
            no_room = f"leaves no room for a completion in length.max={longest}"
            raise PipelineError(f"length.max_prompt={max_prompt} {no_room}: lower it")
        return cls(longest, max_prompt, length.prompt, length.completion)

    def fit(self, prompt: Ids, completions: list[Ids], end: int, shorten: Shorten) -> tuple[Ids, list[Ids], str, str]:
        """Prompt and completions within the limits, what was cut, and the reason to drop them; both may be empty.

        `shorten` gives the prompt in a number of tokens, or an empty one where it cannot be cut to that.
        """
        cut, longest = "", max(map(len, completions))
        if len(prompt) + longest > self.max and len(prompt) > self.max_prompt:
            prompt, cut = [] if self.prompt == "drop" else shorten(self.max_prompt), "prompt cut"
        room = self.max - len(prompt)
        if not prompt or (longest > room and self.completion == "drop"):
            return prompt, completions, "", "too long"
        if longest <= room:
            return prompt, completions, cut, ""
        last = [end] if self.completion == "keep_eos" else []
        completions = [ids if len(ids) <= room else ids[: room - len(last)] + last for ids in completions]
        return prompt, completions, "completion cut", ""


def tokenize(
    rows: list[Row], columns: Columns, tokenizer: Any, eos_ids: Ids, limits: LengthLimits, all_turns: bool = False
) -> Any:
    """A `datasets.Dataset` with `prompt_ids`, the ids of each of the completion `columns` (`chosen_ids`), and `row`.

    The prompt's ids are those of the prompt alone, as sampling sees it; a completion's are what prompt and completion
    tokenized together have after them, ended by exactly one end token (`length.completion=cut` aside). `row` is the
    place in `rows`, whose `reason`, `cut`, token counts and `retokenized` are filled in. With `all_turns` there is
    `prompt_mask`: whether a token of the prompt is learned. Pairs of which some have a `weight` have it as a column.
    """
    import pyarrow as pa
    from datasets import Dataset
    from tqdm.auto import tqdm

    names = ("prompt", *columns)
    fields = [(f"{name}_ids", pa.list_(pa.int32())) for name in names]
    fields += [("prompt_mask", pa.list_(pa.bool_()))] if all_turns else []
    schema = pa.schema([*fields, ("row", pa.int32())])
    batches, fitted = [schema.empty_table()], []
    encoded_rows = encode_rows(rows, columns, tokenizer, eos_ids)
    bar = tqdm(encoded_rows, total=len(rows), desc="tokenizing", leave=False, disable=len(rows) < 10 * BATCH)
    for number, encoded in enumerate(bar):
        ids = fit_row(rows[number], names, encoded, limits, tokenizer, eos_ids)
        if ids and all_turns:
            ids.append(mark_replies(rows[number], encoded[0], ids[0], tokenizer, eos_ids))
        if None in ids:
            rows[number] |= mark("earlier reply without an end token in the rendered dialogue", SINGLE)
        elif ids:
            fitted.append((*ids, number))
        if len(fitted) == BATCH or (fitted and number == len(rows) - 1):
            batches.append(pa.table(dict(zip(schema.names, zip(*fitted, strict=True), strict=True)), schema))
            fitted = []
    table = Dataset(pa.concat_tables(batches))
    if len(columns) < 2 or not any("weight" in row for row in rows):
        return table
    return table.add_column("weight", [rows[number].get("weight", 1.0) for number in table["row"]])


def fit_row(
    row: Row, names: tuple[str, ...], encoded: EncodedRow, limits: LengthLimits, tokenizer: Any, eos_ids: Ids
) -> list[Any]:
    """The ids of prompt and completions within the limits, or none where the row is dropped; marks the row."""
    prompt, completions, retokenized, problem = encoded
    if problem:
        row |= mark(problem, SINGLE)
        return []
    counts = [len(ids) for ids in (prompt, *completions)]
    row |= {f"{name}_tokens": count for name, count in zip(names, counts, strict=True)}
    row |= {"tokens": counts[0] + max(counts[1:]), "retokenized": retokenized}
    shorten = partial(cut_dialogue, row, tokenizer)
    if isinstance(row["prompt"], str):
        shorten = partial(cut_text, prompt, int(prompt[0] == tokenizer.bos_token_id))
    prompt, completions, cut, problem = limits.fit(prompt, completions, eos_ids[0], shorten)
    if problem:
        row |= mark(problem, TOO_LONG)
    elif any(not ids or ids[0] in eos_ids for ids in completions):
        row |= mark("no completion token left", TOO_LONG) if cut else mark("empty completion", INVALID)
    elif len(completions) > 1 and completions[0] == completions[1]:
        row |= mark("identical after cutting", TOO_LONG) if cut else mark("identical completions", INVALID)
    else:
        row["cut"] = cut or None
    return [] if row["reason"] else [prompt, *completions]


def cut_text(prompt: Ids, bos: int, size: int) -> Ids:
    """The last `size` tokens of a prompt, as in the DPO authors' code; its first `bos` tokens stay."""
    return prompt[:bos] + prompt[bos + len(prompt) - size :]


def check_ids(tables: dict[str, Any], tokenizer: Any, vocabulary: int, name: str) -> None:
    """Raise PipelineError where tables hold a token that the base model `name` lacks, or many unknown words."""
    from pyarrow import compute

    columns = [table.data.column(column) for table in tables.values() for column in ids_columns(table)]
    ids, unknown = [compute.list_flatten(column) for column in columns], tokenizer.unk_token_id
    largest = max([tokenizer.pad_token_id, *(compute.max(each).as_py() or 0 for each in ids)])
    if largest >= vocabulary:
        token = f"token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r})"
        known = f"the base {name} knows {vocabulary} tokens"
        raise PipelineError(f"the rows hold {token}, and {known}: give the tokenizer that it was trained with")
    count = sum(compute.sum(compute.equal(each, -1 if unknown is None else unknown)).as_py() or 0 for each in ids)
    if unknown != tokenizer.eos_token_id and count > MAX_UNKNOWN * (total := sum(map(len, ids))):
        share = f"{count / total:.0%} of the tokens of these rows"
        raise PipelineError(f"{share} are unknown to the tokenizer of {name}: type model=... of their language")


def table_fingerprint(table: Any) -> str:
    """sha256 of the token ids of a table."""
    from pyarrow import compute

    digest = hashlib.sha256()
    for name in ids_columns(table):
        column = table.data.column(name)
        for numbers in (compute.list_value_length(column), compute.list_flatten(column)):
            digest.update(numbers.to_numpy().tobytes())
    return digest.hexdigest()


def ids_columns(table: Any) -> list[str]:
    """The columns of a table that hold token ids."""
    return sorted(name for name in table.column_names if name.endswith("_ids"))
