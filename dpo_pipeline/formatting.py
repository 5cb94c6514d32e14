"""Numbers and tables as text that reads in a terminal and as Markdown; HTML pages from templates."""

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
    """A Markdown table with aligned columns; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * width for width in widths]
    lines = []
    for row in [rows[0], rule, *rows[1:]]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def one_line(text: str, limit: int = 300) -> str:
    """A text on one line, cut at its end to `limit` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else f"{flat[:limit]} ..."


def render_template(file: Path, **values: Any) -> str:
    """An HTML page from a Jinja template: values are escaped, and a missing one raises UndefinedError."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(loader=FileSystemLoader(file.parent), autoescape=True, undefined=StrictUndefined)
    return templates.get_template(file.name).render(**values)
