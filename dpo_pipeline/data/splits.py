"""Train, validation and test of a data set: what each stage may read."""

import json
import logging
import random
from collections import Counter
from typing import Any

from dpo_pipeline.config import SPLIT_KEYS, build
from dpo_pipeline.data.files import require
from dpo_pipeline.data.tokens import text
from dpo_pipeline.errors import PipelineError

log = logging.getLogger(__name__)

DEBUG_ROWS = 100
DROPPED = 0.05  # the share of rows that teach nothing above which a set is not what it is taken for


def load_splits(node: dict[str, Any], answers: tuple[str, ...], debug: bool = False) -> dict[str, list[dict]]:
    """Rows `train`, `validation` and `test` of the data set that a config node names, no prompt in two of them.

    Test is the set's own, else `test_rows` held out by prompt; validation is 5% of the rest, at most 500 rows, by
    prompt too; both are drawn with `split_seed`, from all rows, so that every stage has the same. Only then are rows
    dropped, and counted in the log: those of train whose prompt is in test, and those that teach nothing: `answers`,
    the columns that a stage learns from, hold an empty one, or several that are the same; more than 5% of these raise
    PipelineError. `debug` keeps 100 rows.
    """
    options = {key: node[key] for key in SPLIT_KEYS}
    for name in ("test_rows", "split_seed"):
        if not isinstance(options[name], int) or options[name] < 0:
            raise PipelineError(
                f"dataset.{name}={options[name]} is no whole number from 0 on: type dataset.{name}=100"
            )
    splits = build({key: value for key, value in node.items() if key not in SPLIT_KEYS})
    if "train" not in splits:
        raise PipelineError(f"this data set has no split train (found {', '.join(splits)}): give a file of its own")
    for split, rows in splits.items():
        for column in answers:
            if rows and column not in rows[0]:
                found = ", ".join(rows[0])
                raise PipelineError(
                    f"this data set has no column {column!r} in {split} (found {found}): set sft_target=chosen"
                )
        if rows:
            require(rows, ("prompt", *answers), f"{node.get('path', 'this data set')} ({split})", chat=True)
    counts: Counter[str] = Counter()
    rng = random.Random(options["split_seed"])
    train, test = splits["train"], splits.get("test")
    if test is None:
        train, test = hold_out(train, options["test_rows"], rng)
    else:
        rng.shuffle(test)  # so that the first n of a file sorted by something stand for all
        tested = {key(row) for row in test}
        counts["prompt also in test"] = sum(key(row) in tested for row in train)
        train = [row for row in train if key(row) not in tested]
    train, validation = hold_out(train, min(500, max(1, len(train) // 20)), rng)
    parts = {"train": train, "validation": validation, "test": test}
    parts = {split: [row for row in rows if sound(row, answers, counts)] for split, rows in parts.items()}
    read = sum(map(len, splits.values()))
    reasons = ", ".join(f"{n} {reason}" for reason, n in counts.most_common() if n)
    if reasons:
        log.warning("%d of %d rows dropped: %s", counts.total(), read, reasons)
    useless = counts.total() - counts["prompt also in test"]
    form = "check that dataset= fits the form of this file and that chosen and rejected are the columns meant"
    for split in ("train", "validation"):
        if not parts[split]:
            held = "" if "test" in splits else f", dataset.test_rows={options['test_rows']} held out"
            gone = f", {counts.total()} dropped ({reasons})" if reasons else ""
            fix = form if useless > DROPPED * read else "lower dataset.test_rows or give more"
            raise PipelineError(f"no rows are left for {split}, of {read} read{held}{gone}: {fix}")
    if useless > DROPPED * read:
        raise PipelineError(
            f"{useless} of {read} rows teach nothing, more than {DROPPED:.0%} ({reasons}): {form}, or take them out"
        )
    if debug:
        # Drawn, not the first: of a set in several files those would be of one.
        parts = {split: rng.sample(rows, min(DEBUG_ROWS, len(rows))) for split, rows in parts.items()}
    return parts


def key(row: dict) -> str:
    """What tells prompts apart, of text or messages."""
    return json.dumps(row["prompt"])


def sound(row: dict, answers: tuple[str, ...], counts: Counter[str]) -> bool:
    """Whether a row can be learnt from; if not, its reason is counted."""
    given = [row[column] for column in answers]
    if row.get("problem"):
        counts[row["problem"]] += 1
    elif any(not text(answer).strip() for answer in given):
        counts["empty answer"] += 1
    elif len(given) > 1 and given[0] == given[1]:
        counts["identical answers"] += 1
    else:
        return True
    return False


def hold_out(rows: list[dict], size: int, rng: random.Random) -> tuple[list[dict], list[dict]]:
    """The rows left and at least `size` held out (if there are), whole prompts at a time: no prompt is in both."""
    by_prompt: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        by_prompt.setdefault(key(row), []).append(i)
    prompts = list(by_prompt)
    rng.shuffle(prompts)
    held: list[int] = []
    for prompt in prompts:
        if len(held) >= size:
            break
        held += by_prompt[prompt]
    out = set(held)
    return [row for i, row in enumerate(rows) if i not in out], [rows[i] for i in held]
