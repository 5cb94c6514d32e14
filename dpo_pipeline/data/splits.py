"""Train, validation and test of a data set: what each stage may read."""

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_pipeline.config import ROW_KEYS, build
from dpo_pipeline.data.account import Account
from dpo_pipeline.errors import PipelineError

Row = dict[str, Any]

DEBUG_ROWS = 100
HELD = ("test", "validation", "valid", "eval", "dev")
TESTING = re.compile(r"(^|[^a-z])(test|eval|validation|valid|dev)([^a-z]|$)", re.IGNORECASE)


def load_splits(
    node: dict[str, Any],
    answers: tuple[str, ...],
    chat: bool,
    debug: bool = False,
    strict: bool = True,
    held_for: dict[str, Any] | None = None,
) -> tuple[dict[str, list[Row]], Account]:
    """Rows `train`, `validation` and `test` of the data set that a config node names, and the account of all read.

    They are drawn from all rows, so that every stage has the same; only then are rows dropped, and counted: those that
    teach nothing in `answers`, the columns that a stage learns from; more than 5% of these raise PipelineError, unless
    not `strict`. One answer alone is learnt once for each prompt, as in the DPO authors' code. `chat`: prompts are
    messages, not text. `debug` keeps 100 rows. `held_for`: another data set, whose validation and test prompts are
    not trained on either.
    """
    account = Account(node["on_bad_row"], notes=pointed_at_test(node))
    parts = drawn(node, answers, chat, account)
    tested = len(parts["test"])
    if held_for is not None:
        pairs = drawn(held_for, (), chat, Account())
        held = {key(row) for split in ("validation", "test") for row in pairs[split]}
        for split in ("train", "validation"):
            parts[split] = dropped(parts[split], account, lambda row: key(row) in held and "prompt held out for DPO")
    parts = {split: sound(rows, answers, account) for split, rows in parts.items()}
    if strict and (faults := account.faults()):
        raise PipelineError(faults[0])
    for split in ("train", "validation"):
        if not parts[split]:
            gone = Counter(reason for reasons in account.dropped.values() for reason in reasons.elements())
            why = "".join(f", {n} {reason} ({account.examples[reason][0]})" for reason, n in gone.items())
            raise PipelineError(
                f"no rows are left for {split}, of {account.read.total()} read: {tested} are held out as test{why}: "
                "lower dataset.test_rows or give more"
            )
    if debug:
        rng = random.Random(node["split_seed"])
        for split, rows in parts.items():
            # Drawn, not the first: of a set in several files those would be of one.
            few = {id(row) for row in rng.sample(rows, min(DEBUG_ROWS, len(rows)))}
            parts[split] = dropped(rows, account, lambda row, few=few: id(row) not in few and "debug=true")
    for split, rows in parts.items():
        account.keep(split, rows)
    return parts, account


def drawn(node: dict[str, Any], answers: tuple[str, ...], chat: bool, account: Account) -> dict[str, list[Row]]:
    """All rows of a data set by split, no prompt in two of them; counted are those read, left out, and also in test.

    Test is the set's own, else `test_rows` held out by prompt; validation is 5% of the rest, at most 500 rows, by
    prompt too; both are drawn with `split_seed`. Raises PipelineError where no row has one of the `answers`.
    """
    train, test = with_test(node, chat, source_of(node))
    for row in [*train, *test]:
        account.read[row["source"]] += 1
    train, test = (deliberate(rows, account) for rows in (train, test))
    for split, rows in (("train", train), ("test", test)):
        for name in answers:
            if rows and not any(name in row for row in rows):
                found = ", ".join(key for key in rows[0] if key not in ("source", "origin", "problem"))
                fix = "set sft_target=" + ("demonstration" if name == "chosen" else "chosen")
                if len(answers) > 1:
                    fix = "it teaches SFT alone, by dataset@sft_dataset=OPTION" if "demonstration" in rows[0] else ""
                raise PipelineError(
                    f"this data set has no column {name!r} in {split} (found {found}): "
                    f"{fix}{' or ' * bool(fix)}name it by dataset.columns"
                )
    rng = random.Random(node["split_seed"])
    rng.shuffle(test)  # so that the first n of a file sorted by something stand for all
    tested = {key(row) for row in test}
    train = dropped(train, account, lambda row: key(row) in tested and "prompt also in test")
    train, validation = hold_out(train, min(500, max(1, len(train) // 20)), rng)
    return {"train": train, "validation": validation, "test": test}


def pointed_at_test(node: dict[str, Any]) -> list[str]:
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


def with_test(node: dict[str, Any], chat: bool, source: str) -> tuple[list[Row], list[Row]]:
    """Rows to learn from and test rows, the set's own or held out by prompt; all that were read are in one of them."""
    for name in ("test_rows", "split_seed"):
        if not isinstance(node[name], int) or node[name] < 0:
            raise PipelineError(f"dataset.{name}={node[name]} is no whole number from 0 on: type dataset.{name}=100")
    splits = build({key: value for key, value in node.items() if key not in ROW_KEYS}, chat=chat, source=source)
    if "test" in splits:
        return splits["train"], splits["test"]
    rows = splits["train"]
    live = [row for row in rows if "left_out" not in row]
    train, test = hold_out(live, node["test_rows"], random.Random(node["split_seed"]))
    return train + [row for row in rows if "left_out" in row], test


def dropped(rows: list[Row], account: Account, reason_of: Callable[[Row], Any]) -> list[Row]:
    """The rows for which `reason_of` gives no reason to drop them; the others are counted."""
    kept = []
    for row in rows:
        if reason := reason_of(row):
            account.drop(row, reason)
        else:
            kept.append(row)
    return kept


def deliberate(rows: list[Row], account: Account) -> list[Row]:
    """The rows that a loader did not leave out on purpose."""
    account.on_purpose |= {row["left_out"] for row in rows if "left_out" in row}
    return dropped(rows, account, lambda row: row.get("left_out"))


def sound(rows: list[Row], answers: tuple[str, ...], account: Account) -> list[Row]:
    """The rows that can be learnt from; of two alike the first, of a pair labelled both ways none."""
    rows = dropped(rows, account, lambda row: fault(row, answers))
    orders: dict[Any, set[bool]] = {}  # of each pair of answers to a prompt, the ways it is labelled
    last: dict[Any, Row] = {}  # of each prompt with pairs, its last row: SFT learns that answer
    for row in rows:
        if "chosen" in row and "rejected" in row:
            orders.setdefault(pair(row), set()).add(row["chosen"] < row["rejected"])
            last[key(row)] = row
    seen: set[Any] = set()

    def repeated(row: Row) -> str | None:
        if len(answers) > 1 and len(orders[pair(row)]) > 1:
            return "contradiction"
        if len(answers) == 1 and last.get(key(row), row) is not row:
            return "another answer of its prompt"
        alike = (key(row), *(row[name] for name in answers))
        if alike in seen:
            return "exact duplicate"
        seen.add(alike)
        return None

    return dropped(rows, account, repeated)


def fault(row: Row, answers: tuple[str, ...]) -> str | None:
    """Why a row teaches nothing, by itself."""
    if "problem" in row:
        return row["problem"]
    said = [row["prompt"]] if isinstance(row["prompt"], str) else [message["content"] for message in row["prompt"]]
    if not any(text.strip() for text in said):
        return "empty prompt"
    if missing := [name for name in answers if name not in row]:
        return f"no {missing[0]}"
    if not all(row[name].strip() for name in answers):
        return "empty answer"
    return "identical answers" if len(answers) > 1 and row["chosen"] == row["rejected"] else None


def key(row: Row) -> str:
    """What tells prompts apart: text itself, of messages a hash."""
    if isinstance(row["prompt"], str):
        return row["prompt"]
    return hashlib.sha256(json.dumps(row["prompt"]).encode()).hexdigest()


def pair(row: Row) -> tuple[str, str, str]:
    """A prompt with its two answers, whichever is chosen."""
    return (key(row), *sorted((row["chosen"], row["rejected"])))


def hold_out(rows: list[Row], size: int, rng: random.Random) -> tuple[list[Row], list[Row]]:
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
