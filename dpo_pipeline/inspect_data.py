"""See what is wrong with the data before GPU hours are burnt: `python -m dpo_pipeline.inspect_data key=value ...`."""

import dataclasses
import math
import os
import sys
from collections.abc import Iterator
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
            sft = prepare(run, "sft", SPLITS["dpo"], strict=False)
            inspect_stage(run, sft, run.home / "report" / "sft")
    return page


def inspect_stage(run: Run, data: "Prepared", folder: Path) -> Path:
    """Print what the rows of a stage look like and write it into `folder`; the page."""
    from dpo_pipeline.data import length_stats
    from dpo_pipeline.evaluation import data_page

    sizes = length_stats.measure_sizes(uncut_rows(data), len(data.columns))
    if not len(sizes.row):
        reasons = "; ".join(f"{reason} ({origins[0]})" for reason, origins in data.report.examples.items())
        raise PipelineError(f"no row is left to look at: {reasons}: correct the rows, or give the model's tokenizer")
    summary = summarize_rows(run, data, sizes)
    table, examples = data.tables["train"], []
    quantiles = length_stats.rows_at_quantiles(sizes, table["row"], EXAMPLES.values())
    for title, (number, tokens) in zip(EXAMPLES, quantiles, strict=False):
        row = table[number]
        columns = ["completion_ids"] if len(data.columns) == 1 else [f"{name}_ids" for name in data.columns]
        ids = dict(zip(("prompt", *data.columns), (row[name] for name in ("prompt_ids", *columns)), strict=True))
        text = data.rows["train"][row["row"]]
        examples.append(data_page.example(title, text, ids, tokens, data.tokenizer))
    data_page.write_data_page(folder, summary, sizes, examples)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(data_page.page_text(summary, examples, colour), f"\n{folder / 'data.html'}", sep="\n")
    return folder / "data.html"


def summarize_rows(run: Run, data: "Prepared", sizes: Any) -> dict[str, Any]:
    """What the page says of the rows in numbers: counts, lengths, limits, biases, repeats, leakage and warnings."""
    from dpo_pipeline.data import length_stats
    from dpo_pipeline.evaluation import data_page

    report, limits, context, names = data.report, data.limits, data.context, data.columns
    rows = {split: [data.rows[split][i] for i in table["row"]] for split, table in data.tables.items()}
    max_prompt, batch, is_pair = run.length.max_prompt, run.batch.global_size, len(names) == 2
    alternatives = [
        dataclasses.replace(limits, max=limit, max_prompt=max_prompt or limit // 2)
        for limit in length_stats.candidate_limits(sizes, limits.max, (max_prompt or 0) + 1, context)
    ]
    lengths = {"prompt": sizes.prompt, **dict(zip(names, sizes.completions, strict=True)), "together": sizes.total}
    summary = {
        "tokenizer": "the embedded model" if run.model.builder else run.model.path,
        **report.as_json(),
        "examples": dict(report.examples),
        "rows": {split: len(kept_rows) for split, kept_rows in rows.items()},
        "lengths": {name: length_stats.summarize(values) for name, values in lengths.items()},
        "longer_chosen": length_stats.longer_chosen(sizes) if is_pair else None,
        "overlap": length_stats.summarize(sizes.overlap) if is_pair else None,
        "length": {**run.length.model_dump(), "max": limits.max, "context": context},
        "limits": [length_stats.apply_limits(sizes, each) for each in alternatives],
        "epoch": {
            "tokens": length_stats.apply_limits(sizes, limits)["tokens"],
            "steps": math.ceil(len(rows["train"]) / batch),
            "batch": batch,
        },
        "repeats": length_stats.count_repeats(rows["train"], names),
        "leaked": {split: length_stats.leaked_prompts(rows["train"], rows[split]) for split in ("validation", "test")},
    }
    errors = [f"training would stop: {sentence}" for sentence in report.errors(context)]
    summary["warnings"] = [*errors, *report.warnings(context), *data_page.data_warnings(summary)]
    return summary


def uncut_rows(data: "Prepared") -> Iterator[tuple[int, list[int], list[list[int]]]]:
    """The number of each valid train row, the token ids of its prompt and of its completions, before any cut."""
    from tqdm.auto import tqdm

    from dpo_pipeline.data.tokens import BATCH, encode_rows

    rows = data.rows["train"]
    encoded = encode_rows(rows, data.columns, data.tokenizer, data.eos_ids)
    bar = tqdm(encoded, total=len(rows), desc="measuring", leave=False, disable=len(rows) < 10 * BATCH)
    for number, (prompt, ids, _, problem) in enumerate(bar):
        if not problem:
            yield number, prompt, ids


if __name__ == "__main__":
    main(run_inspect)
