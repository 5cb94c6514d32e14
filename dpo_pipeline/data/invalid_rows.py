"""Rows from which nothing can be learned: dropped, and counted in the report."""

from collections.abc import Callable

from dpo_pipeline.data.normalize import is_blank, prompt_key
from dpo_pipeline.data.report import DataReport
from dpo_pipeline.data.sources import Row


def drop_invalid(rows: list[Row], completions: tuple[str, ...], report: DataReport) -> list[Row]:
    """The rows that can be learned from: the first of equal rows, and no pair that is labelled both ways."""
    rows = filter_rows(rows, report, lambda row: row_problem(row, completions))
    pairs = [row for row in rows if "chosen" in row and "rejected" in row]
    labels = {(prompt_key(row), row["chosen"], row["rejected"]) for row in pairs}
    last_of_prompt = {prompt_key(row): row for row in pairs}  # SFT learns the completion of a prompt's last pair
    seen: set[tuple[str, ...]] = set()

    def repetition_problem(row: Row) -> str | None:
        prompt = prompt_key(row)
        if len(completions) > 1 and (prompt, row["rejected"], row["chosen"]) in labels:
            return "contradiction"
        if len(completions) == 1 and last_of_prompt.get(prompt, row) is not row:
            return "another completion of its prompt"
        content = (prompt, *(row[name] for name in completions))
        if content in seen:
            return "exact duplicate"
        seen.add(content)
        return None

    return filter_rows(rows, report, repetition_problem)


def row_problem(row: Row, completions: tuple[str, ...]) -> str | None:
    """Why a row by itself teaches nothing."""
    if "problem" in row:
        return row["problem"]
    if is_blank(row["prompt"]):
        return "empty prompt"
    for name in completions:
        if name not in row:
            return f"no {name}"
    if not all(row[name].strip() for name in completions):
        return "empty completion"
    return "identical completions" if len(completions) > 1 and row["chosen"] == row["rejected"] else None


def filter_rows(rows: list[Row], report: DataReport, reason_of: Callable[[Row], str | None]) -> list[Row]:
    """The rows for which `reason_of` gives no reason to drop them; the others are counted."""
    remaining = []
    for row in rows:
        if reason := reason_of(row):
            report.drop(row, reason)
        else:
            remaining.append(row)
    return remaining
