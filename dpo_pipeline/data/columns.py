"""Where the parts of a row are: what `columns` may say, and the columns of the common forms.

A part is a column, a path (`summaries.0.text`, or `summaries[policy=ref].text`, of the first whose policy is ref), a
text with such in it (`r/{info.subreddit}`), or a list (`completions.*.text`, the text of each completion).
"""

import math
import re
from functools import lru_cache
from typing import Any

from dpo_pipeline.data.files import Row, check_text, list_names, show_value, to_number
from dpo_pipeline.data.messages import decode
from dpo_pipeline.data.normalize import COMPLETIONS, REPLY
from dpo_pipeline.data.report import mark
from dpo_pipeline.errors import PipelineError, nearest

PAIR = {"chosen": "chosen", "rejected": "rejected"}
FORMS: tuple[dict[str, str], ...] = (  # a row has the first form all of whose columns it has
    {"prompt": "input.messages", "chosen": "preferred_output", "rejected": "non_preferred_output"},  # OpenAI's
    {"dialogue": "messages", "rejected": "rejected_messages"},  # ms-swift's
    {"dialogue": "messages", "rejected": "rejected_response"},
    {"instruction": "instruction", "demonstration": "output"},  # Alpaca's
    {"instruction": "instruction", **PAIR},
    {"question": "question", **PAIR},
    {"question": "conversations", **PAIR},  # ShareGPT's
    {"system": "system", "question": "prompt", **PAIR},
    {"prompt": "prompt", **PAIR},
    {"prompt": "messages", **PAIR},  # axolotl's
    PAIR,  # two whole dialogues
    *(
        {prompt: prompt, "completions": completions, "scores": scores}
        for prompt in ("prompt", "instruction")
        for completions in ("completions", "responses")
        for scores in ("scores", "ratings")
    ),
    {"instruction": "instruction", "completions": "completions.*.response", "scores": "completions.*.overall_score"},
    {"prompt": "prompt", "demonstration": "messages"},
    {"demonstration": "messages"},
    {"demonstration": "conversations"},
    {"prompt": "prompt", "demonstration": "completion"},
    {"text": "text"},
)
OPTIONAL = {"input": "instruction", "history": "instruction"}  # columns that some rows have beside another
CLAIMS = ("prompt", "question", "instruction", "input")  # columns that can only be the prompt
PROMPTS = ("prompt", "question", "instruction", "text", "dialogue")
PARTS = (*PROMPTS, *COMPLETIONS, *"system input history tools weight completions scores ranks".split())
# Instead of chosen and rejected: two completions, a label, and its values where the first and the second is better.
LABELLED = ("answers", "choice", "choices")
STEP = re.compile(r"([^.\[\]]+)(?:\[([^=\]]+)=([^\]]*)\])?")  # name, or name[field=value]
FIELD = re.compile(r"\{([^{}]+)\}")


def check_columns(columns: Row) -> Row:
    """The columns that are not null; raises PipelineError if they name no parts of a row."""
    columns = {part: path for part, path in columns.items() if path is not None}
    if unknown := [part for part in columns if part not in (*PARTS, *LABELLED)]:
        hint = nearest(unknown[0], PARTS) or f": there are {', '.join((*PARTS, *LABELLED))}"
        raise PipelineError(f"dataset.columns.{unknown[0]} is no part of a row{hint}")
    sizes = [len(columns[part]) if isinstance(columns[part], list) else 1 for part in LABELLED if part in columns]
    if sizes and sizes != [2, 1, 2]:
        needed = "answers: [A, B], choice: LABEL_COLUMN, choices: [LABEL_IF_A_IS_BETTER, LABEL_IF_B_IS]"
        raise PipelineError(f"dataset.columns needs all three for a pair that a label orders: {needed}")
    if len({"scores", "ranks"} & set(columns)) != int("completions" in columns):
        raise PipelineError("dataset.columns needs completions and their scores (or ranks: 1 is the best)")
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
    head, star, tail = path.partition(".*")
    if star:
        values = get_path(raw, head, label)
        if not isinstance(values, list):
            raise PipelineError(f"{label} is {show_value(values)}, not a list: correct it or take it out")
        return [get_path(value, tail.removeprefix("."), label) for value in values]
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


def read_parts(origin: str, raw: Row, columns: Row) -> tuple[Row, Row]:
    """The parts that the columns name, and the `problem` or `reason` of the row, if any."""
    parts, fault = dict.fromkeys(PARTS), {}
    if "choice" in columns:
        label = str(get_path(raw, columns["choice"], f"{origin}: columns.choice={columns['choice']}"))
        labels = [str(value) for value in columns["choices"]]
        if label not in labels:
            fault = mark(f"a tie ({columns['choice']} is neither {labels[0]} nor {labels[1]})")
        chosen, rejected = columns["answers"] if label == labels[0] else reversed(columns["answers"])
        columns = {**columns, "chosen": str(chosen), "rejected": str(rejected)}
    for name, path in columns.items():
        if name in LABELLED:
            continue
        value = get_path(raw, path, f"{origin}: columns.{name}={path}")
        if value is None and FIELD.search(path):
            # A template fits rows of one kind: that of TL;DR has no place for a news article.
            fault, value = mark(f"no {name}"), ""
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


def unused_columns(names: tuple[str, ...], columns: Row) -> tuple[str, ...]:
    """The columns of a raw row that no part of its form names."""
    paths = [path for value in columns.values() for path in (value if isinstance(value, list) else [value])]
    fields = [field for path in map(str, paths) for field in FIELD.findall(path) or [path]]
    used = {*fields, *(STEP.match(field)[1] for field in fields if STEP.match(field))}
    return tuple(name for name in names if name not in used)


def detect_form(origin: str, raw: Row, names: tuple[str, ...]) -> dict[str, str]:
    """The columns of a row in one of the common forms; raises PipelineError where there is none, or too many."""
    form = find_form(names)
    # Chosen and rejected alone may also be completions whose prompt has another name, or is null.
    if form is None or (form is PAIR and isinstance(decode(raw["chosen"]), str) and REPLY not in raw["chosen"]):
        form = None if form and len(names) == len(raw) else find_form(tuple(raw))
    if form is None:
        raise PipelineError(
            f"{origin} has the columns {list_names(names)}, which are no form known here: say what they hold, such as "
            "'dataset.columns={prompt: COLUMN, chosen: COLUMN, rejected: COLUMN}'"
        )
    if "rejected" not in form and str(raw.get("label")).lower() in ("true", "false"):
        raise PipelineError(f"{origin}: its label says good or bad of one completion: unpaired data, DPO needs pairs")
    form = {**{name: name for name in (*COMPLETIONS, "system", "tools") if name in names}, **form}
    form |= {"weight": "weight"} if "weight" in raw else {}
    form |= {name: name for name, part in OPTIONAL.items() if part in form and name in names}
    if form.get("prompt") == "input.messages" and "tools" in raw["input"]:
        form["tools"] = "input.tools"
    used = {path.split(".")[0] for path in form.values()}
    if claims := [name for name in CLAIMS if name in names and name not in used and str(raw[name]).strip()]:
        raise PipelineError(
            f"{origin}: {', '.join([*claims, *used])}: two columns claim to be the prompt, say which is it, such as "
            "'dataset.columns={prompt: COLUMN, chosen: COLUMN, rejected: COLUMN}'"
        )
    return form


@lru_cache
def find_form(names: tuple[str, ...]) -> dict[str, str] | None:
    """The first form all of whose columns are among the names."""
    return next((form for form in FORMS if {path.split(".")[0] for path in form.values()} <= set(names)), None)
