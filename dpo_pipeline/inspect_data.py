"""See what is wrong with the data before GPU hours are burnt: `python -m dpo_pipeline.inspect_data key=value ...`."""

import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_pipeline.cli import main
from dpo_pipeline.distributed import processes
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.record import run_logging
from dpo_pipeline.schema import Run

if TYPE_CHECKING:
    from dpo_pipeline.data.prepare import Prepared

EXAMPLES = {"A short row": 0.1, "A row of median length": 0.5, "The longest row": 1.0}  # at these length quantiles


def run_inspect(run: Run) -> Path:
    """Print what the pairs look like and write it to `report/` of the run's name; the page.

    Where SFT learns from a set of its own, that set gets a page too, in `report/sft/`. No weights are loaded.
    """
    from dpo_pipeline.base_model import base_model
    from dpo_pipeline.data.prepare import SPLITS, prepare

    if processes() > 1:
        raise PipelineError("one process is enough to look at data: type the command without the launcher")
    with run_logging(None), base_model(run, trained=False) as run:
        page = inspect_stage(run, prepare(run, "dpo", strict=False), run.home / "report")
        if run.sft_dataset:
            inspect_stage(run, prepare(run, "sft", SPLITS["dpo"], strict=False), run.home / "report" / "sft")
    return page


def inspect_stage(run: Run, data: "Prepared", folder: Path) -> Path:
    """Print what the rows of a stage look like and write it into `folder`; the page."""
    import pandas as pd

    from dpo_pipeline.data.statistics import overlap
    from dpo_pipeline.report import data_page, token_view

    rows = pd.DataFrame(data.all_rows)
    if "tokens" not in rows or not (is_measured := rows["tokens"].notna() & (rows["split"] == "train")).any():
        reasons = "; ".join(f"{reason} ({origins[0]})" for reason, origins in data.report["examples"].items())
        raise PipelineError(f"no row is left to look at: {reasons}: correct the rows, or give the model's tokenizer")
    sizes = rows.loc[is_measured, [*(f"{name}_tokens" for name in ("prompt", *data.columns)), "tokens"]].astype(int)
    sizes.columns = ["prompt", *data.columns, "total"]
    table, train = data.tables["train"], data.rows["train"]
    ids = zip(table["chosen_ids"], table["rejected_ids"], strict=True) if len(data.columns) == 2 else ()
    overlaps = pd.Series([overlap(*pair) for pair in ids], dtype=float)
    summary = summarize_rows(run, data, sizes, overlaps)
    examples, order = [], sorted(range(len(table)), key=lambda i: train[table[i]["row"]]["tokens"])
    for title, quantile in EXAMPLES.items() if order else ():
        row = table[order[int(quantile * (len(order) - 1))]]
        examples.append(token_view.show_tokens(title, train[row["row"]], row, data.columns, data.tokenizer))
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    text = data_page.write_data_page(folder, summary, sizes, overlaps, examples, colour)
    texts = pd.DataFrame(map(text_fields, data.all_rows))
    rows = rows.drop(columns=[*texts.columns, "key", "extra", "unused"], errors="ignore").join(texts)
    rows.to_parquet(folder / "rows.parquet")
    print(text, folder / "data.html", sep="\n")
    return folder / "data.html"


def text_fields(row: dict[str, Any]) -> dict[str, str]:
    """The prompt and completions of a row as text; lists of messages, and tools, as JSON."""
    from dpo_pipeline.data.normalize import COMPLETIONS, completion_message

    fields = {name: row[name] for name in ("prompt", *COMPLETIONS, "tools") if name in row}
    if isinstance(row["prompt"], list):
        fields |= {name: [completion_message(row, name)] for name in COMPLETIONS if name in row}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}


def summarize_rows(run: Run, data: "Prepared", sizes: Any, overlaps: Any) -> dict[str, Any]:
    """What the page says of the rows in numbers: counts, lengths, limits, biases, repeats, leakage and warnings."""
    from dpo_pipeline.data import statistics
    from dpo_pipeline.estimates import accuracy
    from dpo_pipeline.report.data_page import data_warnings

    limits, context, max_prompt, batch = data.limits, data.context, run.length.max_prompt, run.batch.global_size
    rows = {split: [data.rows[split][i] for i in table["row"]] for split, table in data.tables.items()}
    candidates = statistics.candidate_limits(sizes, limits.max, (max_prompt or 0) + 1, context)
    alternatives = [dataclasses.replace(limits, max=n, max_prompt=max_prompt or n // 2) for n in candidates]
    epoch = {"tokens": statistics.apply_limits(sizes, limits)["tokens"], "batch": batch}
    is_pair = len(data.columns) == 2
    summary = {
        "tokenizer": "the embedded model" if run.model.builder else run.model.path,
        **data.report,
        "rows": {split: len(kept_rows) for split, kept_rows in rows.items()},
        "lengths": {name: statistics.summarize(values) for name, values in sizes.items()},
        "longer_chosen": accuracy((sizes["chosen"] - sizes["rejected"]).tolist()) if is_pair else None,
        "leading_block": statistics.leading_block(rows["train"]) if is_pair else None,
        "overlap": statistics.summarize(overlaps) if len(overlaps) else None,
        "length": {**run.length.model_dump(), "max": limits.max, "context": context},
        "limits": [statistics.apply_limits(sizes, each) for each in alternatives],
        "epoch": {**epoch, "steps": math.ceil(len(rows["train"]) / batch)},
        **statistics.find_repeats(rows, data.columns),
        "odd": statistics.odd_completions(rows["train"], data.columns),
    }
    errors = [f"training would stop: {sentence}" for sentence in data.list_errors()]
    return summary | {"warnings": [*errors, *data.list_warnings(), *data_warnings(summary)]}


if __name__ == "__main__":
    main(run_inspect)
