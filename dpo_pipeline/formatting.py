"""Numbers and tables as text that reads in a terminal, and as Markdown."""

from typing import Any


def format_estimate(estimate: dict[str, Any]) -> str:
    """`0.913 [0.894, 0.929]`, with three significant digits or three places."""
    return f"{format_number(estimate['value'])} [{format_number(estimate['low'])}, {format_number(estimate['high'])}]"


def format_number(value: float | None) -> str:
    """A number with three places, fewer where it is large."""
    if value is None:
        return "?"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def markdown_table(rows: list[list[str]]) -> str:
    """Markdown with its columns aligned, so that it reads in a terminal too."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [rows[0], rule, *rows[1:]]
    )


def one_line(text: str, limit: int = 300) -> str:
    """A text on one line, cut to `limit` characters at its end."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else f"{flat[:limit]} ..."
