"""Train, validation and test of a data set: what each stage may read, and which rows teach nothing."""

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

from dpo_pipeline.config import ROW_KEYS, instantiate_node
from dpo_pipeline.data.files import Row, list_names
from dpo_pipeline.data.normalize import COMPLETIONS, reply_key
from dpo_pipeline.data.report import (
    INVALID,
    SINGLE,
    SURPLUS,
    drop_all_but,
    invalid_sentences,
    kept_rows,
    list_reasons,
    make_table,
    mark,
)
from dpo_pipeline.data.sources import SPLIT_OF_WORD, split_of
from dpo_pipeline.errors import PipelineError

DEBUG_ROWS = 100


def load_splits(
    node: dict[str, Any],
    completions: tuple[str, ...],
    chat: bool,
    debug: bool = False,
    strict: bool = True,
    exclude_prompts_of: dict[str, Any] | None = None,
) -> list[Row]:
    """Every row of the data set of a config node, with its `split`, and the `reason` of those that are not kept.

    Every stage splits all rows the same way; only then are rows dropped that teach nothing in its `completions`. SFT
    learns one completion of each prompt, as in the DPO authors' code. `debug` keeps 100 rows of a split.
    `exclude_prompts_of`: another data set, on whose validation and test prompts nothing is trained. Raises
    PipelineError if no rows are left and, if `strict`, if more than 5% teach nothing.
    """
    splits = make_splits(node, completions, chat)
    test_count = len(kept_rows(splits["test"]))
    if exclude_prompts_of is not None:
        pairs = make_splits(exclude_prompts_of, (), chat)
        held_out = kept_rows(pairs["validation"] + pairs["test"])
        drop_prompts(splits["train"] + splits["validation"], held_out, "prompt held out for DPO")
    for split, split_rows in splits.items():
        drop_invalid(split_rows, completions, SINGLE if node["on_contradiction"] == "drop" else INVALID)
        for row in split_rows:
            row["split"] = split
    rows = [row for split_rows in splits.values() for row in split_rows]
    table = make_table(rows)
    if strict and (sentences := invalid_sentences(table, node["on_bad_row"])):
        raise PipelineError(sentences[0])
    if empty := [split for split in ("train", "validation") if not kept_rows(splits[split])]:
        reasons = "; ".join([f"{test_count} are held out as test", *list_reasons(table)])
        raise PipelineError(f"no rows are left for {empty[0]}: {reasons}: lower dataset.test_rows or give more")
    rng = random.Random(node["split_seed"])
    for split_rows in splits.values() if debug else ():  # drawn: the first rows of several files would be of one
        drop_all_but(split_rows, DEBUG_ROWS, rng, "debug=true", SURPLUS)
    return rows


def make_splits(node: dict[str, Any], completions: tuple[str, ...], chat: bool) -> dict[str, list[Row]]:
    """All rows of a data set by split, no prompt in two; PipelineError if no row has one of the `completions`.

    Test is the set's own, else held out; validation is 5% of the rest, at most 500 rows. `split_seed` draws both.
    """
    source = Path(node["path"]).name if "path" in node else node["_target_"].split(".")[-2]
    train, test = read_splits(node, chat, source)
    for split, rows in (("train", kept_rows(train)), ("test", kept_rows(test))):
        for name in completions if rows else ():
            if not any(name in row for row in rows):
                columns = [*(column for column in COMPLETIONS if column in rows[0]), *rows[0].get("unused", ())]
                remedy = "use this set for SFT alone (dataset@sft_dataset=OPTION)"
                if len(completions) == 1:
                    remedy = f"set sft_target={'demonstration' if name == 'chosen' else 'chosen'}"
                absent = f"this data set has no column {name!r} in {split} (found {list_names(columns)})"
                raise PipelineError(f"{absent}: name it by dataset.columns, or {remedy}")
    rng, drawn = random.Random(node["split_seed"]), kept_rows(test)
    rng.shuffle(drawn)  # so that its first rows stand for all, even if the file is sorted
    test = drawn + [row for row in test if row["reason"]]
    drop_prompts(train, drawn, "prompt also in test")
    train, validation = hold_out(train, min(500, max(1, len(kept_rows(train)) // 20)), rng)
    return {"train": train, "validation": validation, "test": test}


def read_splits(node: dict[str, Any], chat: bool, source: str) -> tuple[list[Row], list[Row]]:
    """All rows of a data set as train and test: its own, else `test_rows` or a tenth of train, held out by prompt."""
    options = {key: value for key, value in node.items() if key not in ROW_KEYS}
    splits = instantiate_node(options, chat=chat, source=source)
    if "test" in splits:
        return splits["train"], splits["test"]
    test_rows = min(node["test_rows"], max(1, len(kept_rows(splits["train"])) // 10))
    return hold_out(splits["train"], test_rows, random.Random(node["split_seed"]))


def hold_out(rows: list[Row], size: int, rng: random.Random) -> tuple[list[Row], list[Row]]:
    """The rows left, and `size` or more held out, as far as there are: all rows of a prompt go together."""
    rows_of = defaultdict(list)
    for row in kept_rows(rows):
        rows_of[row["key"]].append(row)
    prompts = list(rows_of)
    rng.shuffle(prompts)
    held_out: list[Row] = []
    for prompt in prompts:
        if len(held_out) >= size:
            break
        held_out += rows_of[prompt]
    numbers = {id(row) for row in held_out}
    return [row for row in rows if id(row) not in numbers], held_out


def drop_prompts(rows: list[Row], excluded: list[Row], reason: str) -> None:
    """Drop the rows that have the prompt of an excluded one."""
    prompts = {row["key"] for row in excluded}
    for row in kept_rows(rows):
        if row["key"] in prompts:
            row |= mark(reason)


def drop_invalid(rows: list[Row], completions: tuple[str, ...], contradiction: str) -> None:
    """Drop what teaches nothing, all but the first of equal rows, and pairs labelled both ways, of that kind."""
    for row in kept_rows(rows):
        if problem := row_problem(row, completions):
            row |= mark(problem, SURPLUS if problem == "no demonstration" else INVALID)
    pairs = [row for row in kept_rows(rows) if "chosen" in row and "rejected" in row]
    labels = {(row["key"], reply_key(row, "chosen"), reply_key(row, "rejected")) for row in pairs}
    last_of_prompt = {row["key"]: row for row in pairs}  # SFT learns the completion of a prompt's last pair
    seen: set[tuple[str, ...]] = set()
    for row in kept_rows(rows):
        prompt, texts = row["key"], [reply_key(row, name) for name in completions]
        if len(texts) > 1 and (prompt, reply_key(row, "rejected"), reply_key(row, "chosen")) in labels:
            row |= mark("contradiction", contradiction)
        elif len(texts) == 1 and last_of_prompt.get(prompt, row) is not row:
            row |= mark("another completion of its prompt", SURPLUS)
        elif (prompt, *texts) in seen:
            row |= mark("exact duplicate", SINGLE)
        else:
            seen.add((prompt, *texts))


def row_problem(row: Row, completions: tuple[str, ...]) -> str | None:
    """Why a row by itself teaches nothing."""
    if "problem" in row:
        return row["problem"]
    texts = [row["prompt"]] if isinstance(row["prompt"], str) else [message["content"] for message in row["prompt"]]
    if not "".join(texts).strip():
        return "empty prompt"
    if missing := [name for name in completions if name not in row]:
        return f"no {missing[0]}"
    texts = [reply_key(row, name) for name in completions]
    if not all(text.strip() for text in texts):
        return "empty completion"
    return "identical completions" if len(texts) > 1 and texts[0] == texts[1] else None


def find_test_names(node: dict[str, Any]) -> list[str]:
    """A sentence for each file that is trained on and is named like a published test split, as may be its folder."""
    sentences = []
    for part in node["sets"].values() if "sets" in node else (node,):
        file = Path(part.get("path", ""))
        name = "/".join(file.parts[-2 if file.parent.name in SPLIT_OF_WORD else -1 :])
        if file.is_file() and split_of(tuple(name.split("/"))).startswith(("test", "valid", "eval", "dev")):
            remedy = "report no result on that split, or name the set's train file by dataset.path="
            sentences.append(f"{name} is named like a published test split and is trained on: {remedy}")
    return sentences
