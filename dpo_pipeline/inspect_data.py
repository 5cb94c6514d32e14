"""See what is wrong with the data before GPU hours are burnt: `python -m dpo_pipeline.inspect_data key=value ...`."""

import dataclasses
import math
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dpo_pipeline import runs
from dpo_pipeline.config import Run, main
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.machine import processes

SHOWN = {"A short row": 0.1, "A row of median length": 0.5, "The longest row": 1.0}  # at these quantiles of length


def run_inspect(run: Run) -> Path:
    """Print what there is to see of the pairs and write it to `report/` of the run's name; the page.

    Where SFT learns from a set of its own, that is looked at too, in `report/sft/`. No weights are loaded.
    """
    from dpo_pipeline.policies import load_tokenizer
    from dpo_pipeline.training.fetch import base_at_hand

    if processes() > 1:
        raise PipelineError("one process is enough to look at data: type the command without the launcher")
    # Of the embedded model all that is needed is its tokenizer, so it is made untrained.
    with runs.logged(None), base_at_hand(run) if run.model.builder else nullcontext(run) as run:
        tokenizer = load_tokenizer(run.model)
        page = inspect(run, "dpo", tokenizer, run.home / "report")
        if run.sft_dataset:
            inspect(run, "sft", tokenizer, run.home / "report" / "sft")
    return page


def inspect(run: Run, stage: str, tokenizer: Any, folder: Path) -> Path:
    """Print what there is to see of the rows of a stage and write it into `folder`; the page."""
    from dpo_pipeline.data import statistics
    from dpo_pipeline.evaluation import data_page
    from dpo_pipeline.training import start

    names = start.answers(run, stage)
    rows, account = start.load_rows(run, stage, tokenizer, strict=False)
    tables = start.tokenized(run, stage, tokenizer, rows, account, *rows, strict=False)
    ends, lengths = start.ends_and_lengths(run, tokenizer)
    context, cut_to = start.context(run), run.length.max_prompt
    sizes = statistics.sizes(whole(rows["train"], names, tokenizer, ends), len(names))
    if not len(sizes.row):
        reasons = "; ".join(f"{reason} ({origins[0]})" for reason, origins in account.examples.items())
        raise PipelineError(
            f"no row is left to look at: {reasons}: correct the rows, or give the model's own tokenizer"
        )
    limits = [
        statistics.under(sizes, dataclasses.replace(lengths, max=limit, max_prompt=cut_to or limit // 2))
        for limit in statistics.candidates(sizes, lengths.max, (cut_to or 0) + 1, context)
    ]
    counted = {"prompt": sizes.prompt, **dict(zip(names, sizes.answers, strict=True)), "together": sizes.together}
    left = {split: [rows[split][i] for i in table["row"]] for split, table in tables.items()}
    steps, batch = math.ceil(len(left["train"]) / run.batch.global_size), run.batch.global_size
    summary = {
        "tokenizer": "the embedded model" if run.model.builder else run.model.path,
        **account.as_json(),
        "examples": dict(account.examples),
        "rows": {split: len(of) for split, of in left.items()},
        "lengths": {name: statistics.spread(values) for name, values in counted.items()},
        "longer_chosen": statistics.longer_chosen(sizes) if len(names) == 2 else None,
        "overlap": statistics.spread(sizes.overlap) if len(names) == 2 else None,
        "length": {**dataclasses.asdict(run.length), "max": lengths.max, "context": context},
        "limits": limits,
        "epoch": {"tokens": statistics.under(sizes, lengths)["tokens"], "steps": steps, "batch": batch},
        "repeats": statistics.repeats(left["train"], names),
        "leaked": {split: statistics.leaked(left["train"], left[split]) for split in ("validation", "test")},
    }
    stops = [f"training would stop: {sentence}" for sentence in account.stops(context)]
    summary["warnings"] = [*stops, *account.doubts(context), *data_page.warnings(summary)]
    kept, answers = tables["train"], [f"{name}_ids" for name in names] if len(names) == 2 else ["answer_ids"]
    examples = []
    for title, (i, tokens) in zip(SHOWN, statistics.at(sizes, kept["row"], SHOWN.values()), strict=False):
        ids = {
            name: kept[i][column] for name, column in zip(("prompt", *names), ("prompt_ids", *answers), strict=True)
        }
        examples.append(data_page.example(title, left["train"][i], ids, tokens, tokenizer))
    data_page.write(folder, summary, sizes, examples)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(data_page.text(summary, examples, colour), f"\n{folder / 'data.html'}", sep="\n")
    return folder / "data.html"


def whole(rows: list[dict[str, Any]], names: tuple[str, ...], tokenizer: Any, ends: list[int]) -> Iterator[Any]:
    """Of each row that can be learnt from its place, the ids of its prompt and those of its answers, uncut."""
    from tqdm.auto import tqdm

    from dpo_pipeline.data.tokens import BATCH, encoded

    bar = tqdm(rows, desc="measuring", leave=False, disable=len(rows) < 10 * BATCH)
    for place, (_, (prompt, ids, _, fault)) in enumerate(zip(bar, encoded(rows, names, tokenizer, ends), strict=True)):
        if not fault:
            yield place, prompt, ids


if __name__ == "__main__":
    main(run_inspect)
