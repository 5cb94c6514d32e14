"""Any file, folder or set of the hub: by `columns`, which say where the parts of a row are, or by a common form."""

import math
import re
from collections import Counter, defaultdict
from itertools import combinations, islice
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, validate_call

from dpo_pipeline.data.columns import check_columns, detect_form, get_path, read_parts, unused_columns
from dpo_pipeline.data.files import Row, show_value, to_number
from dpo_pipeline.data.messages import decode, parse_messages
from dpo_pipeline.data.normalize import COMPLETIONS, normalize_row
from dpo_pipeline.data.report import mark
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
    """Rows of each split; conf/dataset/json.yaml says what the options mean. PipelineError: a row has no form.

    A row that an option excludes has a `reason`, one that teaches nothing a `problem`.
    """
    columns, local = check_columns(columns or {}), Path(path).expanduser()
    if subsets and local.exists() and not any((local / subset).is_dir() for subset in subsets):
        subsets = None  # a copy without the folders of the published set
    sources = [(name, read_source(path, name or data_dir, revision, splits, config)) for name in subsets or [None]]
    if test_path:
        test = read_source(test_path)
        sources = [(subset, {"train": parts["train"]}) for subset, parts in sources]
        sources.append((None, {"test": test["test" if "test" in test else "train"]}))
    loaded: dict[str, list[Row]] = defaultdict(list)
    options = {"at_least": at_least or {}, "pairing": (pairs, min_score_gap), "prompt_words": prompt_words}
    for subset, parts in sources:
        name = f"{source}/{subset}" if subset else source
        for split, raw_rows in parts.items():
            for origin, raw in islice(raw_rows, rows or None):
                loaded[split] += build_rows(origin, raw, columns, chat, name, **options)
    for split_rows in loaded.values():
        compare_prompts(split_rows, per_prompt)
    return dict(loaded)


def build_rows(
    origin: str, raw: Row, columns: Row, chat: bool, source: str, at_least: Row, pairing: Any, prompt_words: int
) -> list[Row]:
    """The row that the columns make of a raw one, or one for each pair of its scored completions."""
    names = tuple(name for name, value in raw.items() if value is not None)
    if media := [name for name in MEDIA if raw.get(name)]:
        raise PipelineError(f"{origin} has {', '.join(media)}: no text model learns from a vision set, take another")
    columns = columns or detect_form(origin, raw, names)
    parts, fault = read_parts(origin, raw, columns)
    for path, minimum in at_least.items():
        value = get_path(raw, path, f"{origin}: at_least.{path}")
        if math.isnan(number := to_number(value)):
            raise PipelineError(f"{origin}: {path} is {show_value(value)}, not a number")
        if number < minimum:
            fault |= mark(f"{path} below {minimum:g}")
    fault["unused"] = unused_columns(names, {**columns, "at_least": [*at_least]})
    if parts["completions"] is None:
        return [build_row(origin, parts, prompt_words, chat, source) | fault]
    rows = []
    for place, completions, marks in pair_completions(origin, parts, *pairing):
        rows.append(build_row(origin + place, {**parts, **completions}, prompt_words, chat, source) | fault | marks)
        rows[-1] |= {"is_further_pair": True} if len(rows) > 1 else {}  # the raw row is counted once
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


def pair_completions(origin: str, parts: Row, choice: str, min_gap: float) -> list[tuple[str, Row, Row]]:
    """The pairs of a row's `completions` by `scores`, or by `ranks`, of which 1 is the best.

    Of each pair its place in the row, its two completions, and the marks of one that is left out. The first pair is
    best and worst; the best one is chosen in the last pair too, whose completion SFT learns.
    """
    completions, lists = parts["completions"], (parts["completions"], parts["scores"] or [], parts["ranks"] or [])
    if wrong := [values for values in lists if not isinstance(values, list)]:
        raise PipelineError(f"{origin}: {show_value(wrong[0])} is not a list: correct it or take it out")
    scores = [to_number(value) for value in lists[1]] or [-to_number(rank) for rank in lists[2]]
    if len(scores) != len(completions) or not all(map(math.isfinite, scores)):
        return [("", {"chosen": "", "rejected": ""}, {"problem": "not one number for each completion"})]
    if len(completions) < 2:
        return [("", {"chosen": "", "rejected": ""}, mark("fewer than two completions"))]
    order = sorted(range(len(completions)), key=lambda i: -scores[i])
    worst, pairs = len(order) - 1, []
    places = [(0, worst), *combinations(range(1, worst + 1), 2), *((0, i) for i in range(1, worst))]
    for chosen, rejected in ([order[i] for i in place] for place in places[: 1 if choice == "best_worst" else None]):
        gap = round(scores[chosen] - scores[rejected], 9)  # of decimal scores: 0.3 - 0.1 is 0.2
        marks = mark(f"scores closer than {min_gap:g}") if gap < min_gap else {}
        marks = marks if gap else mark("a tie (equal scores)")
        texts = {"chosen": completions[chosen], "rejected": completions[rejected]}
        pairs.append((f", completions {chosen + 1} and {rejected + 1}", texts, marks))
    return pairs


def compare_prompts(rows: list[Row], per_prompt: int) -> None:
    """Leave out the rows beyond the first `per_prompt` of a prompt (0: none); those left share its demonstration."""
    counts: Counter[str] = Counter()
    demonstrations = {row["key"]: row["demonstration"] for row in rows if "demonstration" in row}
    for row in rows:
        if row["key"] in demonstrations:
            row.setdefault("demonstration", demonstrations[row["key"]])
        if per_prompt and "problem" not in row and not row["reason"]:
            counts[row["key"]] += 1
            if counts[row["key"]] > per_prompt:
                row |= mark(f"beyond {per_prompt} pairs of its prompt")


def render_alpaca(instruction: str, input_text: str, chat: bool) -> str:
    """The prompt of an instruction and its input, if any: plain for a chat model, else as stanford_alpaca asks."""
    if chat:
        return f"{instruction}\n\n{input_text}" if input_text else instruction
    context, block = "", ""
    if input_text:
        context, block = ", paired with an input that provides further context", f"\n\n### Input:\n{input_text}"
    return (
        f"Below is an instruction that describes a task{context}. Write a response that appropriately completes the "
        f"request.\n\n### Instruction:\n{instruction}{block}\n\n### Response:\n"
    )
