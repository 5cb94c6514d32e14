"""A page: its sections, the words and numbers in their tables, and the same as HTML, Markdown and terminal text."""

import base64
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dpo_pipeline.formatting import escape_controls, format_estimate, format_number, markdown_table, render_template
from dpo_pipeline.record import write_file
from dpo_pipeline.report.figures import join_pngs
from dpo_pipeline.report.token_view import format_tokens

LABELS = {  # of keys that their own words, with spaces, do not explain
    "margin": "margin (with beta)",
    "margin_nats": "margin_nats",
    "kl": "KL from samples, nats",
    "kl_per_token": "KL per token, nats",
    "perplexity_chosen": "perplexity of chosen",
    "completion_tokens": "completion length, tokens",
    "refusal_unsafe": "refusal, unsafe prompts",
    "over_refusal_safe": "over-refusal, safe prompts",
}
JUDGED = {"score": "score", "elo": "Elo", "noise_floor": "wins over itself (noise floor)"}
JUDGE_KEYS = re.compile(r"(score|noise_floor|win_rate|length_controlled_win_rate|elo)\.")


@dataclass(frozen=True)
class Panel:
    """One picture of a figure, with what it shows and how to read it."""

    title: str
    png: bytes
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page; a cell of its table is a text, a number or an estimate.

    `panels` stand beside each other, and are one PNG, `figure`, outside of HTML. `tokens` are rows that `show_tokens`
    makes. `short` is what a terminal shows of it, if anything.
    """

    title: str
    text: str = ""
    table: pd.DataFrame | None = None
    panels: tuple[Panel, ...] = ()
    figure: str = ""
    tokens: tuple[dict[str, Any], ...] = ()
    short: str = ""


def label_of(key: str) -> str:
    """A key in words: `win_rate.truth.sft.t0.5` is `wins over sft by truth, temperature 0.5`."""
    if not JUDGE_KEYS.match(key):
        return LABELS.get(key, key.replace("_", " "))
    kind, judge, *rest = key.split(".", 3)
    if kind in JUDGED:
        return f"{JUDGED[kind]} by {judge}"
    temperature = f", temperature {rest[1].removeprefix('t')}" if len(rest) > 1 else ""
    control = " at equal length (logistic fit)" if kind.startswith("length") else ""
    return f"wins over {rest[0]} by {judge}{control}{temperature}"


def split_cell(value: Any) -> tuple[str, str]:
    """A cell as its value and what stands in small beside it: an estimate's interval, or how few it is of."""
    if isinstance(value, dict):
        if value["low"] is None:
            return format_number(value["value"]), f"(of {value['n']})"
        number, _, interval = format_estimate(value).partition(" ")
        return number, interval
    if isinstance(value, float):
        return ("" if value != value else f"{value:.3g}"), ""  # NaN: a cell that is not there
    return f"{value:,}" if isinstance(value, int) else str(value), ""


def format_cell(value: Any) -> str:
    """A cell as one text."""
    return " ".join(filter(None, split_cell(value)))


def table_rows(table: pd.DataFrame) -> list[list[Any]]:
    """The lines of a table below its header, with Python's own numbers."""
    return table.astype(object).to_numpy().tolist()


def as_markdown(table: pd.DataFrame, escape: Callable[[str], str] = str) -> str:
    """A table as Markdown that reads in a terminal too."""
    rows = [[*table.columns], *([format_cell(cell) for cell in row] for row in table_rows(table))]
    return markdown_table([[escape(cell) for cell in row] for row in rows])


def to_html(title: str, lead: str, sections: list[Section]) -> str:
    """One page that fetches nothing and runs nothing; every text is escaped."""
    functions = {"show": escape_controls, "split_cell": split_cell, "table_rows": table_rows}
    functions["data_uri"] = lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}"
    values = {"title": title, "lead": lead, "sections": sections, **functions}
    return render_template(Path(__file__).parent / "page.html.jinja", **values) + "\n"


def to_markdown(title: str, lead: str, sections: list[Section]) -> str:
    """All sections as Markdown in which texts have no tags and no links; a figure is the file beside it."""

    def escape(text: str) -> str:
        return escape_controls(text).replace("<", "&lt;").replace("](", "]\\(")

    return to_text(title, lead, sections, escape, figures=True)


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
            blocks.append(as_markdown(section.table, escape))
        for row in section.tokens:  # indented, so that Markdown leaves them as they are
            cut = f", {row['cut']} tokens cut" * (row["cut"] > 0)
            blocks.append(f"{row['title']}: {escape(row['origin'])}{cut}")
            for part in row["parts"]:
                head = f"{part['name']}, {len(part['tokens'])} tokens, {part['use']}"
                blocks.append(f"    {head}\n    {format_tokens(part, colour)}")
    return "\n\n".join(block for block in blocks if block) + "\n"


def write_page(folder: Path, page: str, markdown: str, title: str, lead: str, sections: list[Section]) -> None:
    """Write sections as HTML and as Markdown, and their figures, each file atomically and none before all are made."""
    files = {page: to_html(title, lead, sections).encode(), markdown: to_markdown(title, lead, sections).encode()}
    files |= {part.figure: join_pngs([panel.png for panel in part.panels]) for part in sections if part.panels}
    for name, content in files.items():
        write_file(folder / name, content)
