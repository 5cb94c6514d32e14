"""The style of all figures: small panels that read at the width of a phone."""

import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from dpo_pipeline.formatting import escape_controls

SIZE, DPI = (3.9, 2.75), 160  # inches: 9 points are some 11 pixels on a phone of 390
WIDE = (4.8, 3.5)
GREY, TEAL, ORANGE, BLUE, VIOLET = "#64748b", "#0d9488", "#ea580c", "#2563eb", "#9333ea"
INK = {"prompt": GREY, "chosen": TEAL, "rejected": ORANGE, "demonstration": TEAL}
LINES = (TEAL, ORANGE, BLUE, VIOLET, "#ca8a04", "#db2777", "#4d7c0f", GREY)
STYLE = {
    "font.size": 9,
    "text.parse_math": False,  # a name may hold a dollar sign
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#94a3b8",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": "#e2e8f0",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
}


def draw_png(draw: Callable[[Any], None], title: str, size: tuple[float, float] = SIZE) -> bytes:
    """The PNG of one set of axes, which `draw` fills; a legend goes below them, where it covers nothing."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a name in letters that the font lacks
        figure, buffer = Figure(figsize=size), io.BytesIO()  # without a layout engine, which draws all twice
        axis = figure.subplots()
        draw(axis)
        axis.set(xlabel=escape_controls(axis.get_xlabel()), ylabel=escape_controls(axis.get_ylabel()))
        axis.set_title(escape_controls(title))
        axis.yaxis.set_major_formatter("{x:g}")
        handles, labels = axis.get_legend_handles_labels()
        columns = max(1, int(size[0] / (0.35 + 0.065 * max(map(len, labels), default=0))))
        rows = math.ceil(len(labels) / columns)
        figure.legend(handles, map(escape_controls, labels), loc="lower center", ncols=columns)
        ticks = axis.yaxis.get_major_formatter().format_ticks(axis.get_yticks())
        left = 0.16 + 0.07 * max(map(len, ticks)) + (0.2 if axis.get_ylabel() else 0)  # inches
        height = size[1] + 0.19 * max(0, rows - 2)
        figure.set_figheight(height)
        edges = {"left": left / size[0], "bottom": (0.5 + 0.19 * rows) / height}
        figure.subplots_adjust(**edges, right=1 - 0.15 / size[0], top=1 - 0.27 / height)
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def join_pngs(pngs: list[bytes]) -> bytes:
    """One PNG of several of equal width, two beside each other; the shorter ones end in white."""
    from PIL import Image

    if len(pngs) == 1:
        return pngs[0]
    tiles, buffer = [Image.open(io.BytesIO(png)) for png in pngs], io.BytesIO()
    width, height = tiles[0].width, max(tile.height for tile in tiles)
    grid = Image.new("RGB", (2 * width, height * math.ceil(len(tiles) / 2)), "white")
    for i, tile in enumerate(tiles):
        grid.paste(tile, (i % 2 * width, i // 2 * height))
    grid.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def error_bars(estimates: list[dict[str, Any]]) -> list[list[float]]:
    """Lengths of the error bars below and above, 0 where an interval is unknown."""
    known = [e if e["low"] is not None else {**e, "low": e["value"], "high": e["value"]} for e in estimates]
    return [[e["value"] - e["low"] for e in known], [e["high"] - e["value"] for e in known]]


def plot_estimates(axis: Any, x: list[float], estimates: list[dict[str, Any]], index: int, label: str | None) -> None:
    """Estimates over x as points on a line of the colour of this index."""
    style = {"marker": "o", "capsize": 3, "color": LINES[index % len(LINES)], "label": label}
    axis.errorbar(x, [each["value"] for each in estimates], yerr=error_bars(estimates), **style)


def draw_histogram(
    axis: Any, values: Any, edges: np.ndarray, colours: str | list[str], unit: str, marks: dict[str, float]
) -> None:
    """Rows by a value; the outer bars count the values beyond them too, and marks beyond the edges are left out."""
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    axis.bar(edges[:-1], counts, np.diff(edges), align="edge", color=colours, edgecolor="white", linewidth=0.4)
    visible_marks = {name: value for name, value in marks.items() if value <= edges[-1]}
    for style, (name, value) in zip(("--", ":"), visible_marks.items(), strict=False):
        axis.axvline(value, color="#0f172a", linewidth=1, linestyle=style, label=name)
    axis.set(xlim=(edges[0], edges[-1]), ylim=(0, 1.1 * max(1, counts.max())), xlabel=unit, ylabel="rows")


def shorten(name: str, limit: int = 36) -> str:
    """A name without its middle where it is too long for a figure."""
    return name if len(name) <= limit else f"{name[: limit - 13]}…{name[-12:]}"
