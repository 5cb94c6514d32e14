"""Prompts from a file: any, those labelled safe or unsafe, or those that differ in the group they name."""

from itertools import product
from pathlib import Path
from typing import Any

from dpo_pipeline.data.columns import get_path
from dpo_pipeline.data.files import Row, check_text, read_file, remedy_of
from dpo_pipeline.data.messages import Prompt, parse_messages
from dpo_pipeline.data.normalize import ASK, REPLY, normalize_row
from dpo_pipeline.data.tokens import encode_rows
from dpo_pipeline.errors import PipelineError

LABELS = ("safe", "unsafe")


def read_prompts(path: str, columns: tuple[str, ...] = ()) -> list[Row]:
    """The rows of a prompts file: `prompt` (text, or messages with role and content), the text `columns`, `origin`.

    XSTest's CSV (arXiv:2308.01263) reads as it is. A `label` is safe or unsafe; with `template` and `group` every
    template has every group, of at least two. Raises PipelineError that names the file and the row.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise PipelineError(f"there is no prompts file {path} (from {Path.cwd()}): {remedy_of(path)}")
    rows = []
    for origin, raw in read_file(file, path):
        row = {name: check_text(get_path(raw, name, origin), f"{origin}: {name}") for name in columns}
        prompt = parse_messages(get_path(raw, "prompt", origin), f"{origin}: prompt")
        texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        if not "".join(texts).strip():
            raise PipelineError(f"{origin}: its prompt is empty: write one, or take the row out")
        if row.get("label", "safe") not in LABELS:
            raise PipelineError(f"{origin}: its label is {row['label']!r}, neither safe nor unsafe: correct it")
        rows.append({**row, "prompt": prompt, "origin": origin})
    groups, present = {row.get("group") for row in rows}, {(row.get("template"), row.get("group")) for row in rows}
    if "group" in columns and len(groups) == 1:
        raise PipelineError(f"{path}: all rows are of the group {min(groups)!r}: give each template for two or more")
    for row, group in product(rows, sorted(groups)) if "group" in columns else ():
        if (row["template"], group) not in present:
            missing = f"its template {row['template']!r} has no row for the group {group!r}"
            raise PipelineError(f"{row['origin']}: {missing}: add that row, or take the template out")
    return rows


def prompts_to_rows(prompts: list[Prompt], chat: bool, source: str, dialogues: bool = False) -> list[Row]:
    """Rows of prompts as pairs have them: messages if `chat`, else text, which stays as it is.

    `dialogues`: the policy learned from HH-RLHF's form, so a text in another form becomes what its human says.
    """
    rows = []
    for number, prompt in enumerate(prompts, 1):
        if dialogues and isinstance(prompt, str) and not prompt.endswith(REPLY):
            prompt = f"{ASK} {prompt.strip()}{REPLY}"
        rows.append(normalize_row(f"{source}, prompt {number}", source, chat, prompt, {}))
    return rows


def prompt_ids(prompts: list[Prompt], chat: bool, tokenizer: Any) -> list[list[int]]:
    """The ids of each whole prompt as sampling sees it, and as `tokenize` gives them to a pair.

    Raises PipelineError if a prompt has no token, or BOS twice.
    """
    rows = prompts_to_rows(prompts, chat, "the prompts file")
    encoded = list(encode_rows(rows, (), tokenizer, [tokenizer.eos_token_id]))
    for row, (*_, problem) in zip(rows, encoded, strict=True):
        if problem:
            remedy = "take special tokens out of its text, or take it out"
            raise PipelineError(f"{row['origin']}, cannot be answered ({problem}): {remedy}")
    return [ids for ids, *_ in encoded]
