"""Rows of token ids within the length limits, as a table: what training and measuring read."""

import json
from itertools import islice
from typing import Any

from dpo_pipeline.data.lengths import LengthLimits
from dpo_pipeline.data.sources import Row
from dpo_pipeline.data.tokens import BATCH, EncodedRow, encode_rows


def tokenize(
    rows: list[Row], columns: tuple[str, ...], tokenizer: Any, eos_ids: list[int], limits: LengthLimits
) -> Any:
    """A `datasets.Dataset` with `prompt_ids`, the ids of each of the completion `columns` (`chosen_ids`), and `row`.

    The prompt's ids are those of the prompt alone, as sampling sees it; a completion's are what prompt and completion
    tokenized together have after them, ended by exactly one end token (`length.completion=cut` aside). `row` is the
    place in `rows`. The description of the table is JSON: what `DataReport.add_table` counts.
    """
    import numpy as np
    import pyarrow as pa
    from datasets import Dataset, DatasetInfo
    from tqdm.auto import tqdm

    names = [f"{name}_ids" for name in ("prompt", *columns)]
    schema = pa.schema([(name, pa.list_(pa.int32())) for name in names] + [("row", pa.int32())])
    tables, lengths, dropped, cuts, retokenized = [schema.empty_table()], [], [], [], 0
    encoded_rows = enumerate(encode_rows(rows, columns, tokenizer, eos_ids))
    bar = tqdm(total=len(rows), desc="tokenizing", leave=False, disable=len(rows) < 10 * BATCH)
    while batch := list(islice(encoded_rows, BATCH)):
        fitted = []
        for number, row in batch:
            if not row.problem:
                lengths.append(len(row.prompt) + max(map(len, row.completions)))
            prompt, completions, cut, problem = fit_row(row, limits, tokenizer.bos_token_id, eos_ids)
            if problem:
                dropped.append((number, problem))
                continue
            if cut:
                cuts.append((number, cut))
            retokenized += row.retokenized
            fitted.append((prompt, *completions, number))
        values = zip(*fitted, strict=True) if fitted else [[]] * len(schema)
        tables.append(pa.table(dict(zip(schema.names, values, strict=True)), schema))
        bar.update(len(batch))
    bar.close()
    p99_length = int(np.quantile(lengths, 0.99, method="inverted_cdf")) if lengths else 0
    facts = {"dropped": dropped, "cut": cuts, "retokenized": retokenized}
    facts |= {"rows_measured": len(lengths), "p99_length": p99_length}
    return Dataset(pa.concat_tables(tables), info=DatasetInfo(description=json.dumps(facts)))


def fit_row(
    row: EncodedRow, limits: LengthLimits, bos_id: int | None, eos_ids: list[int]
) -> tuple[list[int], list[list[int]], str, str]:
    """Prompt and completions within the limits, what was cut, and the reason to drop the row; both may be empty."""
    if row.problem:
        return row.prompt, row.completions, "", row.problem
    bos_count = int(row.prompt[0] == bos_id)
    prompt, completions, cut, problem = limits.fit(row.prompt, row.completions, bos_count, eos_ids[0])
    if not problem and any(not ids or ids[0] in eos_ids for ids in completions):
        problem = "no completion token left" if cut else "empty completion"
    elif not problem and len(completions) > 1 and completions[0] == completions[1]:
        problem = "identical after cutting" if cut else "identical completions"
    return prompt, completions, cut, problem
