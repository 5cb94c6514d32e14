"""Any file, folder or set of the hub: by `columns`, which say where in a row its parts lie, or by a common form."""

from collections import Counter
from itertools import islice
from re import match
from typing import Any

from dpo_pipeline.data.columns import CHOICE, PARTS, check_columns, get_path, is_template, parse_number
from dpo_pipeline.data.normalize import COMPLETIONS, REPLY, normalize_row
from dpo_pipeline.data.sources import Rows, json_type, read_source
from dpo_pipeline.data.splits import prompt_key
from dpo_pipeline.errors import PipelineError

PAIR = {"chosen": "chosen", "rejected": "rejected"}
FORMS: tuple[dict[str, Any], ...] = (  # known by their columns: the first that has all of its own
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
ASKS = ("prompt", "question", "instruction", "text")
NEEDED = (*ASKS, "chosen", "rejected")
BESIDE = {"instruction": "input", "question": "system"}  # taken along where a row has it


def load(
    path: str,
    test_path: str | None,
    data_dir: str | None,
    revision: str | None,
    splits: dict[str, str] | None,
    rows: int,
    columns: dict[str, Any] | None,
    at_least: dict[str, float] | None,
    per_prompt: int,
    prompt_words: int,
    chat: bool,
    source: str,
) -> dict[str, list[dict[str, Any]]]:
    """Rows of each split; conf/dataset/json.yaml says what the options mean.

    A row that an option takes out has the reason as `left_out`, one that cannot be learnt from as `problem`. Raises
    PipelineError where a row has no such columns, or of another type.
    """
    if not isinstance(at_least, dict | None):
        raise PipelineError(f"dataset.at_least={at_least} is no mapping: type 'dataset.at_least={{NAME: VALUE}}'")
    for option, given in (("rows", rows), ("per_prompt", per_prompt), ("prompt_words", prompt_words)):
        if not isinstance(given, int) or given < (option == "prompt_words"):
            raise PipelineError(f"dataset.{option}={given} is no whole number from 0 on: type dataset.{option}=5")
    named = check_columns(columns)
    bounds = {where: parse_number(least, f"dataset.at_least.{where}") for where, least in (at_least or {}).items()}
    found = read_source(path, data_dir, revision, splits)
    if test_path:
        other = read_source(test_path)
        found["test"] = other["test" if "test" in other else "train"]

    def read_split(raws: Rows) -> list[dict[str, Any]]:
        form, kept, pairs = {}, [], Counter()
        for origin, raw in islice(raws, rows or None):
            parts = named
            if not named:
                form = form or detect_format(origin, raw)  # by the first row; what may stand beside it, by each
                beside = (BESIDE[part] for part in form if part in BESIDE)
                parts = {**{name: name for name in (*COMPLETIONS, *beside) if name in raw}, **form}
            row = build_row(origin, raw, parts, prompt_words, chat, source)
            for where, least in bounds.items():
                if parse_number(get_path(raw, where, f"{origin}: at_least.{where}"), f"{origin}: {where}") < least:
                    row["left_out"] = f"{where} below {least:g}"
            if per_prompt and "problem" not in row and "left_out" not in row:
                pairs[prompt_key(row)] += 1
                if pairs[prompt_key(row)] > per_prompt:
                    row["left_out"] = f"beyond {per_prompt} pairs of its prompt"
            kept.append(row)
        lacking = [row for row in kept if "demonstration" not in row]
        shown = {prompt_key(row): row["demonstration"] for row in kept if "demonstration" in row} if lacking else {}
        for row in lacking if shown else ():  # it belongs to the prompt, though not every pair of that has it
            if prompt_key(row) in shown:
                row["demonstration"] = shown[prompt_key(row)]
        return kept

    return {split: read_split(raws) for split, raws in found.items()}


def detect_format(origin: str, raw: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row in one of the common forms."""
    for form in FORMS:
        if not all(where.split(".")[0] in raw for where in form.values()):
            continue
        if form is PAIR and isinstance(raw["chosen"], str) and REPLY not in raw["chosen"]:
            continue  # completions alone
        return form
    raise PipelineError(
        f"{origin} has the columns {', '.join(raw)}, which are no form known here: say what they hold, such as "
        "'dataset.columns={prompt: COLUMN, chosen: COLUMN, rejected: COLUMN}'"
    )


def build_row(
    origin: str, raw: dict[str, Any], named: dict[str, Any], words: int, chat: bool, source: str
) -> dict[str, Any]:
    """The row that the columns make of a raw one."""
    reason = {}
    if "choice" in named:
        choice = str(get_path(raw, named["choice"], f"{origin}: columns.choice={named['choice']}"))
        choices = [str(each) for each in named["choices"]]
        better, worse = named["answers"] if choice == choices[0] else reversed(named["answers"])
        named = {**named, "chosen": better, "rejected": worse}
        if choice not in choices:
            reason = {"problem": f"{named['choice']} is neither {' nor '.join(choices)}"}
    part: dict[str, Any] = dict.fromkeys(PARTS)
    for name in (name for name in named if name not in CHOICE):
        part[name] = get_path(raw, named[name], f"{origin}: columns.{name}={named[name]}")
        if part[name] is None and is_template(named[name]):
            # It is for rows of a kind, as that of TL;DR has no place for a news article.
            reason, part[name] = {"left_out": f"no {name}"}, ""
        elif name in ASKS and isinstance(part[name], str) and not part[name].strip():
            reason = {"problem": "empty prompt"}  # before a frame is put around it
        elif part[name] is None and name in NEEDED:
            raise PipelineError(f"{origin}: {name} is null, not text or messages: correct it or take it out")
    for name in ("system", "instruction", "input", "text"):
        if not isinstance(part[name], str | None):
            raise PipelineError(f"{origin}: {name} is {json_type(part[name])}, not text: correct it or take it out")
    prompt = part["prompt"]
    if (asked := part["question"]) is not None:
        system = [{"role": "system", "content": part["system"]}] if part["system"] else []
        prompt = system + (asked if isinstance(asked, list) else [{"role": "user", "content": asked}])
    elif part["instruction"] is not None:
        prompt = alpaca(part["instruction"], part["input"] or "", chat)
    elif part["text"] is not None:
        opening = match(rf"\s*\S+(?:\s+\S+){{{words - 1}}}", part["text"])
        prompt = opening[0] if opening else part["text"]
        part["demonstration"] = part["text"][len(prompt) :]
    return {**normalize_row(origin, source, chat, prompt, {name: part[name] for name in COMPLETIONS}), **reason}


def alpaca(instruction: str, input_text: str, chat: bool) -> str:
    """How an instruction is put, with its input if any: to a base model in the Alpaca form, else plainly.

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
