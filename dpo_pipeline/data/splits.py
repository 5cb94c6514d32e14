"""Train, validation and test of a data set: what each stage may read."""

import json
import logging
import random
from collections import Counter
from typing import Any

from dpo_pipeline.config import SPLIT_KEYS, build
from dpo_pipeline.data.tokens import text
from dpo_pipeline.errors import PipelineError

log = logging.getLogger(__name__)

DEBUG_ROWS = 100


def load_splits(node: dict[str, Any], answers: tuple[str, ...], debug: bool = False) -> dict[str, list[dict]]:
    """Rows `train`, `validation` and `test` of the data set that a config node names, no prompt in two of them.

    `answers` are the columns that a stage learns from: rows in which one is empty, or in which all of several are the
    same, are dropped and counted in the log. Test is the set's own, else `test_rows` held out by prompt; validation
    is 5% of the rest, at most 500 rows, by prompt too; both drawn with `split_seed`. `debug` keeps 100 train rows.
    """
    options = {key: node[key] for key in SPLIT_KEYS}
    splits = build({key: value for key, value in node.items() if key not in SPLIT_KEYS})
    missing = [column for column in answers if column not in splits["train"][0]]
    if missing:
        found = ", ".join(splits["train"][0])
        raise PipelineError(f"this data set has no column {missing[0]!r} (found {found}): set sft_target=chosen")
    counts: Counter[str] = Counter()
    kept = {split: [row for row in rows if sound(row, answers, counts)] for split, rows in splits.items()}
    if counts:
        reasons = ", ".join(f"{n} {reason}" for reason, n in counts.most_common())
        log.warning("%d of %d rows dropped: %s", counts.total(), sum(map(len, splits.values())), reasons)
    rng = random.Random(options["split_seed"])
    train, test = kept["train"], kept.get("test")
    if test is None:
        train, test = hold_out(train, options["test_rows"], rng)
    else:
        rng.shuffle(test)  # so that the first n of a file sorted by something stand for all
    train, validation = hold_out(train, min(500, max(1, len(train) // 20)), rng)
    if not train:
        raise PipelineError(f"no rows are left to train on: {sum(map(len, splits.values()))} were read")
    if debug:
        train, validation = train[:DEBUG_ROWS], validation[:DEBUG_ROWS]
    return {"train": train, "validation": validation, "test": test}


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
        by_prompt.setdefault(json.dumps(row["prompt"]), []).append(i)
    prompts = list(by_prompt)
    rng.shuffle(prompts)
    held: list[int] = []
    for prompt in prompts:
        if len(held) >= size:
            break
        held += by_prompt[prompt]
    out = set(held)
    return [row for i, row in enumerate(rows) if i not in out], [rows[i] for i in held]
