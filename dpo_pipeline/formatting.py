"""Numbers and tables as text that reads in a terminal and as Markdown; HTML pages from templates."""

import logging
import re
from pathlib import Path
from typing import Any


def format_estimate(estimate: dict[str, Any]) -> str:
    """`0.913 [0.894, 0.929]`: the value and its interval."""
    value, low, high = (format_number(estimate[key]) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def format_number(value: float | None) -> str:
    """A number with three decimals, with one from 100 on; `?` for None."""
    if value is None:
        return "?"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def markdown_table(rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns, of cells on one line and without pipes; the first row is the header."""
    rows = [[one_line(cell, limit=1000).replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * width for width in widths]
    lines = []
    for row in [rows[0], rule, *rows[1:]]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def escape_controls(text: str) -> str:
    """A text whose control characters, but tabs and line breaks, stand as `\\x1b`: a terminal would obey them.

    So do those that turn the direction of text.
    """
    controls = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]"
    return re.sub(controls, lambda character: repr(character[0])[1:-1], text)


def mask_secrets(text: str) -> str:
    """A text whose parts that look like an API key, a token or a password stand as `***`."""
    return re.sub(r"\b(sk-|hf_)[\w-]{8,}|(?<=://)[^/@\s]+:[^/@\s]+(?=@)|(?<=[?&]key=)[^&\s'\"]+", "***", text)


class EscapingFormatter(logging.Formatter):
    """Marks warnings, masks secrets, and shows control characters of data, folders and templates as text."""

    def format(self, record: logging.LogRecord) -> str:
        mark = "warning: " if record.levelno == logging.WARNING else ""
        return mark + escape_controls(mask_secrets(super().format(record)))


def one_line(text: str, limit: int = 300) -> str:
    """A text on one line, without control characters, cut at its end to `limit` characters."""
    flat = escape_controls(" ".join(text.split()))
    return flat if len(flat) <= limit else f"{flat[:limit]} ..."


def render_template(file: Path, **values: Any) -> str:
    """An HTML page from a Jinja template: values are escaped, and a missing one raises UndefinedError."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(loader=FileSystemLoader(file.parent), autoescape=True, undefined=StrictUndefined)
    return templates.get_template(file.name).render(**values)
