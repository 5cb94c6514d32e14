"""See what is wrong with the data before GPU hours are burnt: `python -m dpo_pipeline.inspect_data key=value ...`."""

import dataclasses
import math
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dpo_pipeline import run_folder
from dpo_pipeline.config import Run, main
from dpo_pipeline.distributed import processes
from dpo_pipeline.errors import PipelineError

SHOWN = {"A short row": 0.1, "A row of median length": 0.5, "The longest row": 1.0}  # at these quantiles of length


def run_inspect(run: Run) -> Path:
    """Print what there is to see of the pairs and write it to `report/` of the run's name; the page.

    Where SFT learns from a set of its own, that is looked at too, in `report/sft/`. No weights are loaded.
    """
    from dpo_pipeline.models import load_tokenizer
    from dpo_pipeline.training.fetch import with_base_model

    if processes() > 1:
        raise PipelineError("one process is enough to look at data: type the command without the launcher")
    # Of the embedded model all that is needed is its tokenizer, so it is made untrained.
    with run_folder.run_logging(None), with_base_model(run) if run.model.builder else nullcontext(run) as run:
        tokenizer = load_tokenizer(run.model)
        page = inspect(run, "dpo", tokenizer, run.home / "report")
        if run.sft_dataset:
            inspect(run, "sft", tokenizer, run.home / "report" / "sft")
    return page


def inspect(run: Run, stage: str, tokenizer: Any, folder: Path) -> Path:
    """Print what there is to see of the rows of a stage and write it into `folder`; the page."""
    from dpo_pipeline.data import length_stats, prepare
    from dpo_pipeline.evaluation import data_page

    names = prepare.learned_columns(run, stage)
    rows, data_report = prepare.load_rows(run, stage, tokenizer, strict=False)
    tables = prepare.tokenize_splits(run, stage, tokenizer, rows, data_report, *rows, strict=False)
    eos_ids, lengths = prepare.ends_and_lengths(run, tokenizer)
    context, cut_to = prepare.context_length(run), run.length.max_prompt
    sizes = length_stats.measure_sizes(uncut_rows(rows["train"], names, tokenizer, eos_ids), len(names))
    if not len(sizes.row):
        reasons = "; ".join(f"{reason} ({origins[0]})" for reason, origins in data_report.examples.items())
        raise PipelineError(
            f"no row is left to look at: {reasons}: correct the rows, or give the model's own tokenizer"
        )
    limits = [
        length_stats.apply_limits(sizes, dataclasses.replace(lengths, max=limit, max_prompt=cut_to or limit // 2))
        for limit in length_stats.candidate_limits(sizes, lengths.max, (cut_to or 0) + 1, context)
    ]
    counted = {"prompt": sizes.prompt, **dict(zip(names, sizes.completions, strict=True)), "together": sizes.total}
    left = {split: [rows[split][i] for i in table["row"]] for split, table in tables.items()}
    steps, batch = math.ceil(len(left["train"]) / run.batch.global_size), run.batch.global_size
    summary = {
        "tokenizer": "the embedded model" if run.model.builder else run.model.path,
        **data_report.as_json(),
        "examples": dict(data_report.examples),
        "rows": {split: len(of) for split, of in left.items()},
        "lengths": {name: length_stats.summarize(values) for name, values in counted.items()},
        "longer_chosen": length_stats.longer_chosen(sizes) if len(names) == 2 else None,
        "overlap": length_stats.summarize(sizes.overlap) if len(names) == 2 else None,
        "length": {**dataclasses.asdict(run.length), "max": lengths.max, "context": context},
        "limits": limits,
        "epoch": {"tokens": length_stats.apply_limits(sizes, lengths)["tokens"], "steps": steps, "batch": batch},
        "repeats": length_stats.count_repeats(left["train"], names),
        "leaked": {split: length_stats.leaked_prompts(left["train"], left[split]) for split in ("validation", "test")},
    }
    stops = [f"training would stop: {sentence}" for sentence in data_report.errors(context)]
    summary["warnings"] = [*stops, *data_report.warnings(context), *data_page.data_warnings(summary)]
    kept, completions = tables["train"], [f"{name}_ids" for name in names] if len(names) == 2 else ["completion_ids"]
    examples = []
    for title, (i, tokens) in zip(
        SHOWN, length_stats.rows_at_quantiles(sizes, kept["row"], SHOWN.values()), strict=False
    ):
        ids = {
            name: kept[i][column]
            for name, column in zip(("prompt", *names), ("prompt_ids", *completions), strict=True)
        }
        examples.append(data_page.example(title, left["train"][i], ids, tokens, tokenizer))
    data_page.write_data_page(folder, summary, sizes, examples)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(data_page.page_text(summary, examples, colour), f"\n{folder / 'data.html'}", sep="\n")
    return folder / "data.html"


def uncut_rows(
    rows: list[dict[str, Any]], names: tuple[str, ...], tokenizer: Any, eos_ids: list[int]
) -> Iterator[Any]:
    """Of each row that can be learnt from its place, the ids of its prompt and those of its completions, uncut."""
    from tqdm.auto import tqdm

    from dpo_pipeline.data.tokens import BATCH, encode_rows

    bar = tqdm(rows, desc="measuring", leave=False, disable=len(rows) < 10 * BATCH)
    for place, (_, (prompt, ids, _, fault)) in enumerate(
        zip(bar, encode_rows(rows, names, tokenizer, eos_ids), strict=True)
    ):
        if not fault:
            yield place, prompt, ids


if __name__ == "__main__":
    main(run_inspect)
