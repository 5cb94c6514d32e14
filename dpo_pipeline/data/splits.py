"""Train, validation and test of a data set: what each stage may read."""

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_pipeline.config import ROW_KEYS, instantiate_node
from dpo_pipeline.data.report import DataReport
from dpo_pipeline.errors import PipelineError

Row = dict[str, Any]

DEBUG_ROWS = 100
HELD = ("test", "validation", "valid", "eval", "dev")
TESTING = re.compile(r"(^|[^a-z])(test|eval|validation|valid|dev)([^a-z]|$)", re.IGNORECASE)


def load_splits(
    node: dict[str, Any],
    completions: tuple[str, ...],
    chat: bool,
    debug: bool = False,
    strict: bool = True,
    exclude_prompts_of: dict[str, Any] | None = None,
) -> tuple[dict[str, list[Row]], DataReport]:
    """Rows `train`, `validation` and `test` of the data set that a config node names, and the account of all read.

    They are drawn from all rows, so that every stage has the same; only then are rows dropped, and counted: those that
    teach nothing in `completions`, the columns that a stage learns from; more than 5% of these raise PipelineError,
    unless not `strict`. One completion alone is learnt once for each prompt, as in the DPO authors' code. `chat`:
    prompts are messages, not text. `debug` keeps 100 rows. `held_for`: another data set, whose validation and test
    prompts are not trained on either.
    """
    data_report = DataReport(node["on_bad_row"], notes=test_split_warnings(node))
    parts = make_splits(node, completions, chat, data_report)
    tested = len(parts["test"])
    if exclude_prompts_of is not None:
        pairs = make_splits(exclude_prompts_of, (), chat, DataReport())
        held = {prompt_key(row) for split in ("validation", "test") for row in pairs[split]}
        for split in ("train", "validation"):
            parts[split] = filter_rows(
                parts[split], data_report, lambda row: prompt_key(row) in held and "prompt held out for DPO"
            )
    parts = {split: drop_invalid(rows, completions, data_report) for split, rows in parts.items()}
    if strict and (faults := data_report.invalid_sources()):
        raise PipelineError(faults[0])
    for split in ("train", "validation"):
        if not parts[split]:
            gone = Counter(reason for reasons in data_report.dropped.values() for reason in reasons.elements())
            why = "".join(f", {n} {reason} ({data_report.examples[reason][0]})" for reason, n in gone.items())
            raise PipelineError(
                f"no rows are left for {split}, of {data_report.read.total()} read: {tested} are held out as "
                f"test{why}: lower dataset.test_rows or give more"
            )
    if debug:
        rng = random.Random(node["split_seed"])
        for split, rows in parts.items():
            # Drawn, not the first: of a set in several files those would be of one.
            few = {id(row) for row in rng.sample(rows, min(DEBUG_ROWS, len(rows)))}
            parts[split] = filter_rows(rows, data_report, lambda row, few=few: id(row) not in few and "debug=true")
    for split, rows in parts.items():
        data_report.keep(split, rows)
    return parts, data_report


def make_splits(
    node: dict[str, Any], completions: tuple[str, ...], chat: bool, data_report: DataReport
) -> dict[str, list[Row]]:
    """All rows of a data set by split, no prompt in two of them; counted are those read, left out, and also in test.

    Test is the set's own, else `test_rows` held out by prompt; validation is 5% of the rest, at most 500 rows, by
    prompt too; both are drawn with `split_seed`. Raises PipelineError where no row has one of the `completions`.
    """
    train, test = read_splits(node, chat, source_of(node))
    for row in [*train, *test]:
        data_report.read[row["source"]] += 1
    train, test = (drop_excluded(rows, data_report) for rows in (train, test))
    for split, rows in (("train", train), ("test", test)):
        for name in completions:
            if rows and not any(name in row for row in rows):
                found = ", ".join(key for key in rows[0] if key not in ("source", "origin", "problem"))
                fix = "set sft_target=" + ("demonstration" if name == "chosen" else "chosen")
                if len(completions) > 1:
                    fix = "it teaches SFT alone, by dataset@sft_dataset=OPTION" if "demonstration" in rows[0] else ""
                raise PipelineError(
                    f"this data set has no column {name!r} in {split} (found {found}): "
                    f"{fix}{' or ' * bool(fix)}name it by dataset.columns"
                )
    rng = random.Random(node["split_seed"])
    rng.shuffle(test)  # so that the first n of a file sorted by something stand for all
    tested = {prompt_key(row) for row in test}
    train = filter_rows(train, data_report, lambda row: prompt_key(row) in tested and "prompt also in test")
    train, validation = hold_out(train, min(500, max(1, len(train) // 20)), rng)
    return {"train": train, "validation": validation, "test": test}


def test_split_warnings(node: dict[str, Any]) -> list[str]:
    """A sentence for each set that trains on what is named like a published test split."""
    sentences = []
    for each in node["sets"].values() if "sets" in node else (node,):
        file = Path(each["path"]) if "path" in each else Path()
        names = [str(each["splits"]["train"])] if each.get("splits") else []
        names += [file.name] if file.is_file() else []
        names = [name for name in names if TESTING.search(name)]
        names += [f"{file.parent.name}/{file.name}"] if file.is_file() and file.parent.name in HELD else []
        if names:
            sentences.append(
                f"{names[0]} is named like a published test split and is trained on: report no result on that split, "
                "or name the set's train file by dataset.path="
            )
    return sentences


def source_of(node: dict[str, Any]) -> str:
    """What the rows of a data set are called: the last part of its path, or its loader."""
    return Path(node["path"]).name if "path" in node else node["_target_"].split(".")[-2]


def read_splits(node: dict[str, Any], chat: bool, source: str) -> tuple[list[Row], list[Row]]:
    """Rows to learn from and test rows, the set's own or held out by prompt; all that were read are in one of them."""
    for name in ("test_rows", "split_seed"):
        if not isinstance(node[name], int) or node[name] < 0:
            raise PipelineError(f"dataset.{name}={node[name]} is no whole number from 0 on: type dataset.{name}=100")
    splits = instantiate_node(
        {key: value for key, value in node.items() if key not in ROW_KEYS}, chat=chat, source=source
    )
    if "test" in splits:
        return splits["train"], splits["test"]
    rows = splits["train"]
    live = [row for row in rows if "left_out" not in row]
    train, test = hold_out(live, node["test_rows"], random.Random(node["split_seed"]))
    return train + [row for row in rows if "left_out" in row], test


def filter_rows(rows: list[Row], data_report: DataReport, reason_of: Callable[[Row], Any]) -> list[Row]:
    """The rows for which `reason_of` gives no reason to drop them; the others are counted."""
    kept = []
    for row in rows:
        if reason := reason_of(row):
            data_report.drop(row, reason)
        else:
            kept.append(row)
    return kept


def drop_excluded(rows: list[Row], data_report: DataReport) -> list[Row]:
    """The rows that a loader did not leave out on purpose."""
    data_report.on_purpose |= {row["left_out"] for row in rows if "left_out" in row}
    return filter_rows(rows, data_report, lambda row: row.get("left_out"))


def drop_invalid(rows: list[Row], completions: tuple[str, ...], data_report: DataReport) -> list[Row]:
    """The rows that can be learnt from; of two alike the first, of a pair labelled both ways none."""
    rows = filter_rows(rows, data_report, lambda row: row_problem(row, completions))
    orders: dict[Any, set[bool]] = {}  # of each pair of completions to a prompt, the ways it is labelled
    last: dict[Any, Row] = {}  # of each prompt with pairs, its last row: SFT learns that completion
    for row in rows:
        if "chosen" in row and "rejected" in row:
            orders.setdefault(pair_key(row), set()).add(row["chosen"] < row["rejected"])
            last[prompt_key(row)] = row
    seen: set[Any] = set()

    def repetition_reason(row: Row) -> str | None:
        if len(completions) > 1 and len(orders[pair_key(row)]) > 1:
            return "contradiction"
        if len(completions) == 1 and last.get(prompt_key(row), row) is not row:
            return "another completion of its prompt"
        alike = (prompt_key(row), *(row[name] for name in completions))
        if alike in seen:
            return "exact duplicate"
        seen.add(alike)
        return None

    return filter_rows(rows, data_report, repetition_reason)


def row_problem(row: Row, completions: tuple[str, ...]) -> str | None:
    """Why a row teaches nothing, by itself."""
    if "problem" in row:
        return row["problem"]
    said = [row["prompt"]] if isinstance(row["prompt"], str) else [message["content"] for message in row["prompt"]]
    if not any(text.strip() for text in said):
        return "empty prompt"
    if missing := [name for name in completions if name not in row]:
        return f"no {missing[0]}"
    if not all(row[name].strip() for name in completions):
        return "empty completion"
    return "identical completions" if len(completions) > 1 and row["chosen"] == row["rejected"] else None


def prompt_key(row: Row) -> str:
    """What tells prompts apart: text itself, of messages a hash."""
    if isinstance(row["prompt"], str):
        return row["prompt"]
    return hashlib.sha256(json.dumps(row["prompt"]).encode()).hexdigest()


def pair_key(row: Row) -> tuple[str, str, str]:
    """A prompt with its two completions, whichever is chosen."""
    return (prompt_key(row), *sorted((row["chosen"], row["rejected"])))


def hold_out(rows: list[Row], size: int, rng: random.Random) -> tuple[list[Row], list[Row]]:
    """The rows left and at least `size` held out (if there are), whole prompts at a time: no prompt is in both."""
    by_prompt: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        by_prompt.setdefault(prompt_key(row), []).append(i)
    prompts = list(by_prompt)
    rng.shuffle(prompts)
    held: list[int] = []
    for prompt in prompts:
        if len(held) >= size:
            break
        held += by_prompt[prompt]
    out = set(held)
    return [row for i, row in enumerate(rows) if i not in out], [rows[i] for i in held]
