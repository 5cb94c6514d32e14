"""Train, validation and test of a data set: what each stage may read."""

import random
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from dpo_pipeline.config import ROW_KEYS, instantiate_node
from dpo_pipeline.data.invalid_rows import drop_invalid, filter_rows
from dpo_pipeline.data.normalize import prompt_key
from dpo_pipeline.data.report import DataReport
from dpo_pipeline.data.sources import Row
from dpo_pipeline.errors import PipelineError

DEBUG_ROWS = 100
TEST_FOLDERS = ("test", "validation", "valid", "eval", "dev")
TEST_NAME = re.compile(rf"(^|[^a-z])({'|'.join(TEST_FOLDERS)})([^a-z]|$)", re.IGNORECASE)


def load_splits(
    node: dict[str, Any],
    completions: tuple[str, ...],
    chat: bool,
    debug: bool = False,
    strict: bool = True,
    exclude_prompts_of: dict[str, Any] | None = None,
) -> tuple[dict[str, list[Row]], DataReport]:
    """Rows `train`, `validation` and `test` of the data set of a config node, and the report on all rows read.

    Every stage splits all rows the same way; only then are rows dropped and counted: those that teach nothing in
    `completions`, the columns that the stage learns from. One completion alone is learned once for each prompt, as in
    the DPO authors' code. `chat`: prompts are messages, not text. `debug` keeps 100 rows of a split.
    `exclude_prompts_of`: another data set, on whose validation and test prompts nothing is trained. Raises
    PipelineError if no rows are left and, if `strict`, if more than 5% teach nothing.
    """
    report = DataReport(node["on_bad_row"])
    splits = make_splits(node, completions, chat, report)
    report.notes = test_split_warnings(node)
    test_count = len(splits["test"])
    if exclude_prompts_of is not None:
        pairs = make_splits(exclude_prompts_of, (), chat, DataReport())
        prompts = {prompt_key(row) for split in ("validation", "test") for row in pairs[split]}
        for split in ("train", "validation"):
            splits[split] = drop_prompts(splits[split], prompts, "prompt held out for DPO", report)
    splits = {split: drop_invalid(rows, completions, report) for split, rows in splits.items()}
    if strict and (sentences := report.invalid_sources()):
        raise PipelineError(sentences[0])
    for split in ("train", "validation"):
        if not splits[split]:
            dropped = sum((counts.dropped for counts in report.sources.values()), Counter())
            reasons = f"{test_count} are held out as test" + (f"; {report.list_reasons(dropped)}" if dropped else "")
            raise PipelineError(f"no rows are left for {split}: {reasons}: lower dataset.test_rows or give more")
    rng = random.Random(node["split_seed"])
    for split, rows in splits.items():
        if debug:
            splits[split] = draw_debug_rows(rows, rng, report)
        report.keep(split, splits[split])
    return splits, report


def make_splits(
    node: dict[str, Any], completions: tuple[str, ...], chat: bool, report: DataReport
) -> dict[str, list[Row]]:
    """All rows of a data set by split, no prompt in two of them; `report` counts those read, left out, and in test.

    Test is the set's own, else `test_rows` held out by prompt; validation is 5% of the rest, at most 500 rows, by
    prompt too; both are drawn with `split_seed`. Raises PipelineError if no row has one of the `completions`.
    """
    train, test = read_splits(node, chat, source_of(node))
    for row in [*train, *test]:
        report.sources[row["source"]].read += 1
        if "left_out" in row:
            report.left_out.add(row["left_out"])
    train, test = (filter_rows(rows, report, lambda row: row.get("left_out")) for rows in (train, test))
    for split, rows in (("train", train), ("test", test)):
        check_columns_exist(rows, completions, split)
    rng = random.Random(node["split_seed"])
    rng.shuffle(test)  # so that its first rows stand for all, even if the file is sorted
    train = drop_prompts(train, {prompt_key(row) for row in test}, "prompt also in test", report)
    train, validation = hold_out(train, min(500, max(1, len(train) // 20)), rng)
    return {"train": train, "validation": validation, "test": test}


def check_columns_exist(rows: list[Row], completions: tuple[str, ...], split: str) -> None:
    """Raises PipelineError if no row has one of the completions."""
    for name in completions:
        if rows and not any(name in row for row in rows):
            remedy = "use this set for SFT alone (dataset@sft_dataset=OPTION)"
            if len(completions) == 1:
                remedy = f"set sft_target={'demonstration' if name == 'chosen' else 'chosen'}"
            columns = ", ".join(key for key in rows[0] if key not in ("source", "origin", "problem"))
            raise PipelineError(
                f"this data set has no column {name!r} in {split} (found {columns}): name it by dataset.columns, or "
                f"{remedy}"
            )


def test_split_warnings(node: dict[str, Any]) -> list[str]:
    """A sentence for each set that trains on what is named like a published test split."""
    sentences = []
    for part in node["sets"].values() if "sets" in node else (node,):
        file = Path(part["path"]) if "path" in part else Path()
        if file.is_file():
            name = f"{file.parent.name}/{file.name}" if file.parent.name in TEST_FOLDERS else file.name
        else:
            name = part["splits"].get("train", "") if part.get("splits") else ""
        if TEST_NAME.search(name):
            sentences.append(
                f"{name} is named like a published test split and is trained on: report no result on that split, or "
                "name the set's train file by dataset.path="
            )
    return sentences


def source_of(node: dict[str, Any]) -> str:
    """What the rows of a data set are called: the last part of its path, or its loader."""
    return Path(node["path"]).name if "path" in node else node["_target_"].split(".")[-2]


def read_splits(node: dict[str, Any], chat: bool, source: str) -> tuple[list[Row], list[Row]]:
    """All rows of a data set as train and test; test is its own, else `test_rows` of train held out by prompt."""
    options = {key: value for key, value in node.items() if key not in ROW_KEYS}
    splits = instantiate_node(options, chat=chat, source=source)
    if "test" in splits:
        return splits["train"], splits["test"]
    available = [row for row in splits["train"] if "left_out" not in row]
    left_out = [row for row in splits["train"] if "left_out" in row]
    train, test = hold_out(available, node["test_rows"], random.Random(node["split_seed"]))
    return train + left_out, test


def drop_prompts(rows: list[Row], prompts: set[str], reason: str, report: DataReport) -> list[Row]:
    """The rows without those that have one of these prompts."""
    return filter_rows(rows, report, lambda row: reason if prompt_key(row) in prompts else None)


def draw_debug_rows(rows: list[Row], rng: random.Random, report: DataReport) -> list[Row]:
    """100 rows, drawn: the first ones of a set in several files would be of one file."""
    sample = {id(row) for row in rng.sample(rows, min(DEBUG_ROWS, len(rows)))}
    return filter_rows(rows, report, lambda row: None if id(row) in sample else "debug=true")


def hold_out(rows: list[Row], size: int, rng: random.Random) -> tuple[list[Row], list[Row]]:
    """The rows left, and `size` or more held out, as far as there are: all rows of a prompt go together."""
    numbers_of = defaultdict(list)
    for number, row in enumerate(rows):
        numbers_of[prompt_key(row)].append(number)
    prompts = list(numbers_of)
    rng.shuffle(prompts)
    held_out: list[int] = []
    for prompt in prompts:
        if len(held_out) >= size:
            break
        held_out += numbers_of[prompt]
    remaining = sorted(set(range(len(rows))) - set(held_out))
    return [rows[number] for number in remaining], [rows[number] for number in held_out]
