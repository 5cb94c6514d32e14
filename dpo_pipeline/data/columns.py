"""What `columns` of a data set may say: a column, a path into nested fields, or a template of such paths.

`summaries.0.text` is the text of the first of a row's summaries, `summaries[policy=ref].text` that of the first whose
policy is ref, and `r/{info.subreddit}` a text with a field in it.
"""

import re
from typing import Any

from dpo_pipeline.data.normalize import COMPLETIONS
from dpo_pipeline.data.sources import json_type
from dpo_pipeline.errors import PipelineError, nearest

PARTS = ("prompt", "question", "system", "instruction", "input", "text", *COMPLETIONS)
CHOICE = (
    "answers",
    "choice",
    "choices",
)  # instead of chosen and rejected: two completions and a label that orders them
STEP = re.compile(r"([^.\[\]]+)(?:\[([^=\]]+)=([^\]]*)\])?")
FIELD = re.compile(r"\{([^{}]+)\}")


def check_columns(columns: dict[str, Any] | None) -> dict[str, Any]:
    """The columns that are not null; raises PipelineError where they name no parts of a row."""
    if columns is None:
        return {}
    if not isinstance(columns, dict):
        raise PipelineError(f"dataset.columns={columns} is no mapping: type 'dataset.columns={{prompt: NAME, ...}}'")
    named = {part: where if part in CHOICE else str(where) for part, where in columns.items() if where is not None}
    if isinstance(named.get("answers"), list):
        named["answers"] = [str(where) for where in named["answers"]]
    for part in named:
        if part not in (*PARTS, *CHOICE):
            listed = ", ".join((*PARTS, *CHOICE))
            raise PipelineError(
                f"dataset.columns.{part} is no part of a row: there are {listed}{nearest(part, PARTS)}"
            )
    sizes = [len(named[part]) if isinstance(named[part], list) else 1 for part in CHOICE if part in named]
    if sizes and sizes != [2, 1, 2]:
        raise PipelineError(
            "dataset.columns needs three for a pair that a label orders: completions: [A, B], choice: the label's "
            "column, choices: [its value where A is better, its value where B is]"
        )
    return named


def is_template(path: str) -> bool:
    """Whether it is a text with fields in it."""
    return bool(FIELD.search(path))


def get_path(raw: Any, path: str, label: str) -> Any:
    """What lies there in a row; None where that, or something above it, is null; PipelineError if there is nothing."""
    if is_template(path):
        fields = {name: get_path(raw, name, label) for name in FIELD.findall(path)}
        for name, held in fields.items():
            if not isinstance(held, str | int | float | None):
                raise PipelineError(f"{label}: {name} is {json_type(held)}, not text: name a field in it")
        return None if None in fields.values() else FIELD.sub(lambda field: str(fields[field[1]]), path)
    if isinstance(raw, dict) and path in raw:
        return raw[path]  # a column, perhaps with dots in its name
    held, walked = raw, ""
    for name, field, wanted in STEP.findall(path):
        if held is None:
            return None
        try:
            held = held[int(name) if isinstance(held, list) else name]
        except (KeyError, IndexError, ValueError, TypeError):
            columns = held if isinstance(held, dict) else {}
            there = ", ".join(columns) or json_type(held) + (f" of {len(held)}" if isinstance(held, list) else "")
            at = f" in {walked}" if walked else ""
            raise PipelineError(f"{label}: there is no {name}{at}, found {there}{nearest(name, columns)}") from None
        walked = f"{walked}.{name}".strip(".")
        if field:
            listed = held if isinstance(held, list) else [held]
            held = next((each for each in listed if str(get_path(each, field, f"{label}, {walked}")) == wanted), None)
    return held


def parse_number(value: Any, label: str) -> float:
    """A number, perhaps written as text; raises PipelineError for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise PipelineError(f"{label} is {json_type(value)}, not a number") from None
