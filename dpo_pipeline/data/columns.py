"""What `columns` of a data set may say: a column, a path into nested fields, or a template of such paths.

`summaries.0.text` is the text of the first of a row's summaries, `summaries[policy=ref].text` that of the first whose
policy is ref, and `r/{info.subreddit}` a text with a field in it.
"""

import re
from typing import Any

from dpo_pipeline.data.files import Row, list_names, show_value
from dpo_pipeline.errors import PipelineError, nearest

PROMPTS = ("prompt", "question", "instruction", "text", "dialogue")
PARTS = (*PROMPTS, "system", "input", "history", "tools", "chosen", "rejected", "demonstration")
# Instead of chosen and rejected: two completions, a label, and its values where the first and the second is better.
LABELLED = ("answers", "choice", "choices")
STEP = re.compile(r"([^.\[\]]+)(?:\[([^=\]]+)=([^\]]*)\])?")  # name, or name[field=value]
FIELD = re.compile(r"\{([^{}]+)\}")


def check_columns(columns: Row) -> Row:
    """The columns that are not null; raises PipelineError if they name no parts of a row."""
    columns = {part: path for part, path in columns.items() if path is not None}
    for part in columns:
        if part not in (*PARTS, *LABELLED):
            hint = nearest(part, PARTS) or f": there are {', '.join((*PARTS, *LABELLED))}"
            raise PipelineError(f"dataset.columns.{part} is no part of a row{hint}")
    sizes = [len(columns[part]) if isinstance(columns[part], list) else 1 for part in LABELLED if part in columns]
    if sizes and sizes != [2, 1, 2]:
        needed = "answers: [A, B], choice: LABEL_COLUMN, choices: [LABEL_IF_A_IS_BETTER, LABEL_IF_B_IS]"
        raise PipelineError(f"dataset.columns needs all three for a pair that a label orders: {needed}")
    return {part: path if part in LABELLED else str(path) for part, path in columns.items()}


def get_path(raw: Any, path: str, label: str) -> Any:
    """The value at a path of a row; None if it, or something above it, is null; PipelineError if there is nothing."""
    if FIELD.search(path):
        fields = {name: get_path(raw, name, label) for name in FIELD.findall(path)}
        for name, value in fields.items():
            if not isinstance(value, str | int | float | None):
                raise PipelineError(f"{label}: {name} is {show_value(value)}, not text: name a field in it")
        return None if None in fields.values() else FIELD.sub(lambda field: str(fields[field[1]]), path)
    if isinstance(raw, dict) and path in raw:
        return raw[path]  # a column, perhaps with dots in its name
    value = raw
    for name, field, field_value in STEP.findall(path):
        if value is None:
            return None
        try:
            value = value[int(name) if isinstance(value, list) else name]
        except (KeyError, IndexError, ValueError, TypeError):
            columns = value if isinstance(value, dict) else {}
            names = list_names(columns) or show_value(value)
            raise PipelineError(f"{label}: there is no {name}, found {names}{nearest(name, columns)}") from None
        if field:
            items = value if isinstance(value, list) else [value]
            value = next((item for item in items if str(get_path(item, field, label)) == field_value), None)
    return value


def unused_columns(names: tuple[str, ...], columns: Row) -> tuple[str, ...]:
    """The columns of a raw row that no part of its form names."""
    paths = [path for value in columns.values() for path in (value if isinstance(value, list) else [value])]
    fields = [field for path in map(str, paths) for field in FIELD.findall(path) or [path]]
    used = {*fields, *(STEP.match(field)[1] for field in fields if STEP.match(field))}
    return tuple(name for name in names if name not in used)
