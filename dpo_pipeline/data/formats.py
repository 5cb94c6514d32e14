"""Any file, folder or set of the hub: by `columns`, which say where the parts of a row are, or by a common form."""

import math
import re
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, validate_call

from dpo_pipeline.data.columns import (
    FIELD,
    LABELLED,
    LISTS,
    PARTS,
    PROMPTS,
    check_columns,
    detect_form,
    get_list,
    get_path,
    unused_columns,
)
from dpo_pipeline.data.files import Row, check_text, show_value, to_number
from dpo_pipeline.data.messages import decode, parse_messages
from dpo_pipeline.data.normalize import COMPLETIONS, normalize_row
from dpo_pipeline.data.ranked import pair_completions
from dpo_pipeline.data.report import filtered
from dpo_pipeline.data.sources import read_source
from dpo_pipeline.errors import PipelineError

MEDIA = ("image", "images", "video", "videos", "audio", "audios")


@validate_call
def load(
    path: str,
    test_path: str | None,
    data_dir: str | None,
    subsets: list[str] | None,
    revision: str | None,
    config: str | None,
    splits: dict[Literal["train", "test"], str] | None,
    rows: NonNegativeInt,
    columns: Row | None,
    at_least: dict[str, float] | None,
    pairs: Literal["best_worst", "all"],
    min_score_gap: NonNegativeFloat,
    per_prompt: NonNegativeInt,
    prompt_words: PositiveInt,
    chat: bool,
    source: str,
) -> dict[str, list[Row]]:
    """Rows of each split; conf/dataset/json.yaml says what the options mean.

    A row that an option excludes has a `reason`, one that teaches nothing a `problem`. PipelineError: it has no form.
    """
    columns, local = check_columns(columns or {}), Path(path).expanduser()
    if subsets and local.exists() and not any((local / subset).is_dir() for subset in subsets):
        subsets = None  # a copy without the folders of the published set
    loaded: dict[str, list[Row]] = defaultdict(list)
    options = (at_least or {}, (pairs, min_score_gap), prompt_words, chat)
    sources = [(name, read_source(path, name or data_dir, revision, splits, config)) for name in subsets or [None]]
    if test_path:
        test = read_source(test_path)
        sources = [(subset, {"train": parts["train"]}) for subset, parts in sources]
        sources.append((None, {"test": test["test" if "test" in test else "train"]}))
    for subset, parts in sources:
        for split, raw_rows in parts.items():
            for origin, raw in islice(raw_rows, rows or None):
                loaded[split] += build_rows(origin, raw, columns, *options, f"{source}/{subset}" if subset else source)
    for split_rows in loaded.values():
        limit_pairs(split_rows, per_prompt or len(split_rows))
        share_demonstrations(split_rows)
    return dict(loaded)


def build_rows(
    origin: str, raw: Row, columns: Row, at_least: Row, pairing: tuple, prompt_words: int, chat: bool, source: str
) -> list[Row]:
    """The row that the columns make of a raw one, or one for each pair of its scored completions."""
    names = tuple(name for name, value in raw.items() if value is not None)
    if media := [name for name in MEDIA if raw.get(name)]:
        raise PipelineError(f"{origin} has {', '.join(media)}: no text model learns from a vision set, take another")
    columns = columns or detect_form(origin, raw, names)
    parts, fault = read_parts(origin, raw, columns)
    rows, pairs = [], [("", {}, {})] if parts["completions"] is None else pair_completions(parts, *pairing)
    for place, completions, marks in pairs:
        row = build_row(origin + place, {**parts, **completions}, prompt_words, chat, source)
        row |= {**fault, **marks, "unused": unused_columns(names, {**columns, "at_least": [*at_least]})}
        row |= {"is_further_pair": True} if rows else {}  # the raw row is counted once
        exclude_low_values(row, raw, at_least)
        rows.append(row)
    return rows


def build_row(origin: str, parts: Row, prompt_words: int, chat: bool, source: str) -> Row:
    """The row of these parts."""
    prompt, system, history = parts["prompt"], parts["system"], parts["history"] or []
    if parts["dialogue"] is not None:
        messages = parse_messages(parts["dialogue"], f"{origin}: messages")
        prompt, parts["chosen"] = messages[:-1], messages[-1:]
    elif parts["question"] is not None:
        question = decode(parts["question"])
        prompt = question if isinstance(question, list) else [{"role": "user", "content": question}]
    elif parts["instruction"] is not None:
        prompt = render_alpaca(parts["instruction"], parts["input"] or "", chat or bool(history or system))
    elif parts["text"] is not None:
        first_words = re.match(rf"\s*\S+(?:\s+\S+){{{prompt_words - 1}}}", parts["text"])
        prompt = first_words[0] if first_words else parts["text"]
        parts["demonstration"] = parts["text"].removeprefix(prompt)
    if history:
        roles = ("user", "assistant")
        turns = [{"role": role, "content": text} for turn in history for role, text in zip(roles, turn, strict=True)]
        prompt = [*turns, {"role": "user", "content": prompt}]
    completions = {name: parts[name] for name in COMPLETIONS}
    return normalize_row(origin, source, chat, prompt, completions, system, parts["tools"])


def read_parts(origin: str, raw: Row, columns: Row) -> tuple[Row, Row]:
    """The parts that the columns name, and the `problem` or `reason` of the row, if any."""
    parts, fault = dict.fromkeys(PARTS), {}
    if "choice" in columns:
        label = str(get_path(raw, columns["choice"], f"{origin}: columns.choice={columns['choice']}"))
        labels = [str(value) for value in columns["choices"]]
        if label not in labels:
            fault = filtered(f"a tie ({columns['choice']} is neither {labels[0]} nor {labels[1]})")
        chosen, rejected = columns["answers"] if label == labels[0] else reversed(columns["answers"])
        columns = {**columns, "chosen": str(chosen), "rejected": str(rejected)}
    for name, path in columns.items():
        if name in LABELLED:
            continue
        value = (get_list if name in LISTS else get_path)(raw, path, f"{origin}: columns.{name}={path}")
        if value is None and FIELD.search(path):
            # A template fits rows of one kind: that of TL;DR has no place for a news article.
            fault, value = filtered(f"no {name}"), ""
        elif value is None and name in (*PROMPTS, "chosen", "rejected"):
            raise PipelineError(f"{origin}: {name} is null, not text or messages: correct it or take it out")
        elif name in PROMPTS and isinstance(value, str) and not value.strip():
            fault = {"problem": "empty prompt"}  # seen here, because a frame is put around it
        elif name in ("system", "instruction", "input", "text") and value is not None:
            check_text(value, f"{origin}: {name}")
        elif name == "weight":
            weight, problem = to_number(value), {"problem": "weight that is no positive number"}
            fault |= {"weight": weight} if 0 < weight < math.inf else problem
        parts[name] = value
    return parts, fault


def exclude_low_values(row: Row, raw: Row, minimums: dict[str, float]) -> None:
    """Leave the row out if one of these columns is below its minimum."""
    for path, minimum in minimums.items():
        value = get_path(raw, path, f"{row['origin']}: at_least.{path}")
        if math.isnan(number := to_number(value)):
            raise PipelineError(f"{row['origin']}: {path} is {show_value(value)}, not a number")
        if number < minimum:
            row |= filtered(f"{path} below {minimum:g}")


def limit_pairs(rows: list[Row], per_prompt: int) -> None:
    """Leave out the rows beyond the first `per_prompt` of a prompt."""
    counts: Counter[str] = Counter()
    for row in rows:
        if "problem" not in row and not row["reason"]:
            counts[row["key"]] += 1
            if counts[row["key"]] > per_prompt:
                row |= filtered(f"beyond {per_prompt} pairs of its prompt")


def share_demonstrations(rows: list[Row]) -> None:
    """Give a prompt's demonstration to those of its pairs that lack it."""
    demonstrations = {row["key"]: row["demonstration"] for row in rows if "demonstration" in row}
    for row in rows if demonstrations else ():
        if "demonstration" not in row and row["key"] in demonstrations:
            row["demonstration"] = demonstrations[row["key"]]


def render_alpaca(instruction: str, input_text: str, chat: bool) -> str:
    """The prompt of an instruction, with its input if any: in the Alpaca form, but for a chat model as it is.

    Source: github.com/tatsu-lab/stanford_alpaca.
    """
    if chat:
        return f"{instruction}\n\n{input_text}" if input_text else instruction
    context, block = "", ""
    if input_text:
        context, block = ", paired with an input that provides further context", f"\n\n### Input:\n{input_text}"
    return (
        f"Below is an instruction that describes a task{context}. Write a response that appropriately completes the "
        f"request.\n\n### Instruction:\n{instruction}{block}\n\n### Response:\n"
    )
