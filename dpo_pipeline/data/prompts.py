"""Prompts from a file: any, those labelled safe or unsafe, or those that differ in the group they name."""

from pathlib import Path
from typing import Any

from dpo_pipeline.data.normalize import ASK, REPLY, normalize_row, parse_messages
from dpo_pipeline.data.sources import read_file, require_text
from dpo_pipeline.data.tokens import encode_rows
from dpo_pipeline.errors import PipelineError

LABELS = ("safe", "unsafe")


def read_prompts(path: str, columns: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The rows of a prompts file: `prompt` (text, or messages with role and content), the text `columns`, `origin`.

    It is a .json, .jsonl, .csv or .parquet file (or .gz) and may hold other columns: XSTest's CSV (arXiv:2308.01263)
    reads as it is. A `label` is safe or unsafe; with `template` and `group` every template has every group, of at
    least two. Raises PipelineError that names the file and the row.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise PipelineError(f"there is no prompts file {path} (from {Path.cwd()}): check the path")
    rows = [parse_prompt_row(row, columns, origin) for origin, row in read_file(file, path)]
    if not rows:
        raise PipelineError(f"{path} is empty: give one row with a prompt for each completion")
    if "group" in columns:
        check_groups(rows, path)
    return rows


def parse_prompt_row(row: dict[str, Any], columns: tuple[str, ...], origin: str) -> dict[str, Any]:
    """A row's prompt, columns and origin; raises PipelineError where one is missing or cannot be."""
    found = require_text(row, columns if isinstance(row.get("prompt"), list) else ("prompt", *columns), origin)
    prompt = parse_messages(row["prompt"], "prompt", origin)
    if not "".join([prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]).strip():
        raise PipelineError(f"{origin}: its prompt is empty: write one, or take the row out")
    if found.get("label", LABELS[0]) not in LABELS:
        raise PipelineError(f"{origin}: its label is {found['label']!r}, neither safe nor unsafe: correct it")
    return {**found, "prompt": prompt, "origin": origin}


def check_groups(rows: list[dict[str, Any]], path: str) -> None:
    """Raises PipelineError unless there are two groups or more and every template has them all."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    if len(groups) == 1:
        raise PipelineError(
            f"{path}: all of its rows are of the group {groups[0]!r}, and bias is a difference between groups: give "
            "each template for two groups or more"
        )
    there = {(row["template"], row["group"]) for row in rows}
    for row in rows:
        for group in groups:
            if (row["template"], group) not in there:
                raise PipelineError(
                    f"{row['origin']}: its template {row['template']!r} has no row for the group {group!r}, so the "
                    "groups cannot be compared on it: add that row, or take the template out"
                )


def prompts_to_rows(
    prompts: list[str | list[dict[str, str]]], chat: bool, source: str, dialogues: bool = False
) -> list[dict[str, Any]]:
    """Rows of prompts as pairs have them: messages where `chat`, else text (shape.py).

    For a base model a text stays as it is: words around it would be a guess. `dialogues`: the policy has learnt from
    prompts in HH-RLHF's form, so a text that is not in it becomes what the human of a dialogue says.
    """

    def add_dialogue_frame(prompt: str | list[dict[str, str]]) -> str | list[dict[str, str]]:
        bare = dialogues and isinstance(prompt, str) and not prompt.endswith(REPLY)
        return f"{ASK} {prompt.strip()}{REPLY}" if bare else prompt

    return [
        normalize_row(f"{source}, prompt {i}", source, chat, add_dialogue_frame(prompt), {})
        for i, prompt in enumerate(prompts, 1)
    ]


def prompt_ids(prompts: list[str | list[dict[str, str]]], chat: bool, tokenizer: Any) -> list[list[int]]:
    """The ids of each prompt as sampling sees it, whole: those that `tokens.tokenize` gives the prompt of a pair.

    A chat model's are what its template writes with the generation prompt, a base model's begin with what the
    tokenizer puts before a text, once. Raises PipelineError where a prompt has no token, or BOS twice.
    """
    rows, ids = prompts_to_rows(prompts, chat, "the prompts file"), []
    found = encode_rows(rows, (), tokenizer, [tokenizer.eos_token_id])
    for row, (prompt, _, _, fault) in zip(rows, found, strict=True):
        if fault:
            raise PipelineError(
                f"{row['origin']}, cannot be answered ({fault}): take special tokens out of its text, or take it out"
            )
        ids.append(prompt)
    return ids
