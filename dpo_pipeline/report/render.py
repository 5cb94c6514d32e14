"""Sections as HTML, as Markdown, and in short for a terminal."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_pipeline.formatting import escape_controls, markdown_table, render_template
from dpo_pipeline.report.section import Section, format_cell, split_cell, table_rows
from dpo_pipeline.report.token_view import format_tokens


def to_html(title: str, lead: str, sections: list[Section]) -> str:
    """One page that fetches nothing and runs nothing; every text is escaped."""
    functions = {"show": escape_controls, "split_cell": split_cell, "table_rows": table_rows}
    values = {"title": title, "lead": lead, "sections": sections, "data_uri": data_uri, **functions}
    return render_template(Path(__file__).parent / "page.html.jinja", **values) + "\n"


def data_uri(png: bytes) -> str:
    """A PNG as the address of itself."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def to_markdown(title: str, lead: str, sections: list[Section]) -> str:
    """All sections as Markdown in which texts are no markup; a figure is the file beside it."""
    return to_text(title, lead, sections, escape_markup, figures=True)


def escape_markup(text: str) -> str:
    """A text in which Markdown has no tags and no links of its own."""
    return escape_controls(text).replace("<", "&lt;").replace("](", "]\\(")


def to_text(
    title: str,
    lead: str,
    sections: list[Section],
    escape: Callable[[str], str] = escape_controls,
    figures: bool = False,
    colour: bool = False,
) -> str:
    """All sections as text, with tokens in colour if asked for."""
    blocks = [f"# {escape(' '.join(title.split()))}", escape(lead)]
    for section in sections:
        blocks += [f"## {escape(' '.join(section.title.split()))}", escape(section.text)]
        if section.panels and figures:
            blocks.append(f"![{escape(section.title)}]({section.figure})")
            blocks.append("\n".join(f"- {panel.title}: {panel.caption}" for panel in section.panels if panel.caption))
        if section.table is not None:
            cells = [[format_cell(cell) for cell in row] for row in table_rows(section.table)]
            blocks.append(
                markdown_table([[escape(cell) for cell in row] for row in [[*section.table.columns], *cells]])
            )
        blocks += [tokens_text(row, escape, colour) for row in section.tokens]
    return "\n\n".join(block for block in blocks if block) + "\n"


def tokens_text(row: dict[str, Any], escape: Callable[[str], str], colour: bool) -> str:
    """A row token by token, as an indented block that Markdown leaves as it is."""
    cut = f", {row['cut']} tokens cut" * (row["cut"] > 0)
    blocks = [f"{row['title']}: {escape(row['origin'])}{cut}"]
    for part in row["parts"]:
        head = f"{part['name']}, {len(part['tokens'])} tokens, {part['use']}"
        blocks.append(f"    {head}\n    {format_tokens(part, colour)}")
    return "\n\n".join(blocks)


def to_terminal(sections: list[Section]) -> str:
    """What a command prints at its end."""
    return "\n\n".join(escape_controls(section.short) for section in sections if section.short)
