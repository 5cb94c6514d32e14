"""Any file, folder or set of the hub: by `columns`, which say where the parts of a row are, or by a common form."""

import re
from collections import Counter
from itertools import islice
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt, validate_call

from dpo_pipeline.data.columns import LABELLED, PARTS, check_columns, get_path, is_template
from dpo_pipeline.data.normalize import COMPLETIONS, REPLY, normalize_row, prompt_key
from dpo_pipeline.data.sources import Row, check_text, read_source, show_value
from dpo_pipeline.errors import PipelineError

PAIR = {"chosen": "chosen", "rejected": "rejected"}
FORMS: tuple[dict[str, str], ...] = (  # a row has the first form all of whose columns it has
    {"prompt": "input.messages", "chosen": "preferred_output", "rejected": "non_preferred_output"},  # OpenAI's
    {"instruction": "instruction", "demonstration": "output"},  # Alpaca's
    {"instruction": "instruction", **PAIR},
    {"question": "question", **PAIR},
    {"question": "conversations", **PAIR},  # ShareGPT's
    {"system": "system", "question": "prompt", **PAIR},
    {"prompt": "prompt", **PAIR},
    PAIR,  # two whole dialogues
    {"demonstration": "messages"},
    {"demonstration": "conversations"},
    {"prompt": "prompt", "demonstration": "completion"},
    {"text": "text"},
)
OPTIONAL = {"instruction": "input", "question": "system"}  # a column that some rows of a form have besides
PROMPTS = ("prompt", "question", "instruction", "text")


@validate_call
def load(
    path: str,
    test_path: str | None,
    data_dir: str | None,
    revision: str | None,
    splits: dict[Literal["train", "test"], str] | None,
    rows: NonNegativeInt,
    columns: Row | None,
    at_least: dict[str, float] | None,
    per_prompt: NonNegativeInt,
    prompt_words: PositiveInt,
    chat: bool,
    source: str,
) -> dict[str, list[Row]]:
    """Rows of each split; conf/dataset/json.yaml says what the options mean.

    A row that an option excludes has the reason as `left_out`, one from which nothing can be learned as `problem`.
    Raises PipelineError if a row lacks a column, or holds a value of another type.
    """
    columns = check_columns(columns or {})
    sources = read_source(path, data_dir, revision, splits)
    if test_path:
        test_sources = read_source(test_path)
        sources["test"] = test_sources["test" if "test" in test_sources else "train"]
    loaded: dict[str, list[Row]] = {}
    for split, raw_rows in sources.items():
        loaded[split], form = [], {}
        for origin, raw in islice(raw_rows, rows or None):
            if not columns:
                form = form or detect_form(origin, raw)
            row = build_row(origin, raw, columns or add_optional(form, raw), prompt_words, chat, source)
            exclude_low_values(row, raw, at_least or {})
            loaded[split].append(row)
        if per_prompt:
            limit_pairs(loaded[split], per_prompt)
        share_demonstrations(loaded[split])
    return loaded


def detect_form(origin: str, raw: Row) -> dict[str, str]:
    """The columns of a row in one of the common forms."""
    for form in FORMS:
        is_complete = all(path.split(".")[0] in raw for path in form.values())
        # Chosen and rejected alone may also be completions whose prompt has another name.
        if is_complete and (form is not PAIR or not isinstance(raw["chosen"], str) or REPLY in raw["chosen"]):
            return form
    raise PipelineError(
        f"{origin} has the columns {', '.join(raw)}, which are no form known here: say what they hold, such as "
        "'dataset.columns={prompt: COLUMN, chosen: COLUMN, rejected: COLUMN}'"
    )


def add_optional(form: dict[str, str], raw: Row) -> dict[str, str]:
    """The columns of a form, and those that this row has besides."""
    names = (*COMPLETIONS, *(OPTIONAL[part] for part in form if part in OPTIONAL))
    return {**{name: name for name in names if name in raw}, **form}


def exclude_low_values(row: Row, raw: Row, minimums: dict[str, float]) -> None:
    """Mark a row as left out if one of these columns is below its minimum."""
    for path, minimum in minimums.items():
        value = get_path(raw, path, f"{row['origin']}: at_least.{path}")
        try:
            is_low = float(value) < minimum
        except (TypeError, ValueError):
            raise PipelineError(f"{row['origin']}: {path} is {show_value(value)}, not a number") from None
        if is_low:
            row["left_out"] = f"{path} below {minimum:g}"


def limit_pairs(rows: list[Row], per_prompt: int) -> None:
    """Mark the rows beyond the first `per_prompt` of a prompt as left out."""
    counts: Counter[str] = Counter()
    for row in rows:
        if "problem" not in row and "left_out" not in row:
            counts[prompt_key(row)] += 1
            if counts[prompt_key(row)] > per_prompt:
                row["left_out"] = f"beyond {per_prompt} pairs of its prompt"


def share_demonstrations(rows: list[Row]) -> None:
    """Give a prompt's demonstration to those of its pairs that lack it."""
    lacking = [row for row in rows if "demonstration" not in row]
    if 0 < len(lacking) < len(rows):
        demonstrations = {prompt_key(row): row["demonstration"] for row in rows if "demonstration" in row}
        for row in lacking:
            if prompt_key(row) in demonstrations:
                row["demonstration"] = demonstrations[prompt_key(row)]


def build_row(origin: str, raw: Row, columns: Row, prompt_words: int, chat: bool, source: str) -> Row:
    """The row that the columns make of a raw one."""
    parts, reason = read_parts(origin, raw, columns)
    prompt = parts["prompt"]
    if parts["question"] is not None:
        prompt = [{"role": "system", "content": parts["system"]}] if parts["system"] else []
        question = parts["question"]
        prompt += question if isinstance(question, list) else [{"role": "user", "content": question}]
    elif parts["instruction"] is not None:
        prompt = render_alpaca(parts["instruction"], parts["input"] or "", chat)
    elif parts["text"] is not None:
        first_words = re.match(rf"\s*\S+(?:\s+\S+){{{prompt_words - 1}}}", parts["text"])
        prompt = first_words[0] if first_words else parts["text"]
        parts["demonstration"] = parts["text"].removeprefix(prompt)
    completions = {name: parts[name] for name in COMPLETIONS}
    return {**normalize_row(origin, source, chat, prompt, completions), **reason}


def read_parts(origin: str, raw: Row, columns: Row) -> tuple[Row, dict[str, str]]:
    """The parts that the columns name, and the `problem` or `left_out` of the row, if any."""
    parts, reason = dict.fromkeys(PARTS), {}
    if "choice" in columns:
        label = str(get_path(raw, columns["choice"], f"{origin}: columns.choice={columns['choice']}"))
        labels = [str(value) for value in columns["choices"]]
        if label not in labels:
            reason = {"problem": f"{columns['choice']} is neither {labels[0]} nor {labels[1]}"}
        chosen, rejected = columns["answers"] if label == labels[0] else reversed(columns["answers"])
        columns = {**columns, "chosen": str(chosen), "rejected": str(rejected)}
    for name, path in columns.items():
        if name in LABELLED:
            continue
        value = get_path(raw, path, f"{origin}: columns.{name}={path}")
        if value is None and is_template(path):
            # A template fits rows of one kind: that of TL;DR has no place for a news article.
            reason, value = {"left_out": f"no {name}"}, ""
        elif value is None and name in (*PROMPTS, "chosen", "rejected"):
            raise PipelineError(f"{origin}: {name} is null, not text or messages: correct it or take it out")
        elif name in PROMPTS and isinstance(value, str) and not value.strip():
            reason = {"problem": "empty prompt"}  # found here, because a frame is put around it
        elif name in ("system", "instruction", "input", "text") and value is not None:
            check_text(value, f"{origin}: {name}")
        parts[name] = value
    return parts, reason


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
