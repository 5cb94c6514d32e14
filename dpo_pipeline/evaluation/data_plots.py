"""Histograms of a data set's lengths."""

from pathlib import Path
from typing import Any

import numpy as np

INK = {"prompt": "#64748b", "chosen": "#0d9488", "rejected": "#ea580c", "demonstration": "#0d9488"}


def draw_histograms(folder: Path, summary: dict[str, Any], sizes: Any, overlaps: Any) -> None:
    """Histograms of token counts; for pairs also of the length difference and the overlap."""
    limit = summary["length"]["max"]
    for name in sizes.columns.intersection(list(INK)):
        values = sizes[name].to_numpy()
        marks = {f"median {np.median(values):,.0f}": np.median(values), f"length.max {limit:,}": limit}
        edges = np.linspace(0, max(10, np.quantile(values, 0.995)), 41)
        draw_histogram(folder / f"data_{name}.png", values, edges, INK[name], "tokens", marks)
    if summary["longer_chosen"]:
        difference = (sizes["chosen"] - sizes["rejected"]).to_numpy()
        edges = np.linspace(-1, 1, 42) * max(20.5, np.quantile(np.abs(difference), 0.99))
        colours = [INK["rejected"]] * 20 + [INK["prompt"]] + [INK["chosen"]] * 20  # grey: about equal
        unit = "rejected longer  |  chosen longer"
        draw_histogram(folder / "data_difference.png", difference, edges, colours, unit, {})
        marks = {f"median {overlaps.median():.0%}": overlaps.median()} if len(overlaps) else {}
        draw_histogram(folder / "data_overlap.png", overlaps, np.linspace(0, 1, 41), INK["prompt"], "share", marks)


def draw_histogram(
    file: Path, values: Any, edges: np.ndarray, colours: str | list[str], unit: str, marks: dict[str, float]
) -> None:
    """Rows by a value; the outer bars count the values beyond them too, and marks beyond the edges are left out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 2.7), layout="constrained")
    axis = figure.subplots()
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    axis.bar(edges[:-1], counts, np.diff(edges), align="edge", color=colours, edgecolor="white", linewidth=0.4)
    visible_marks = {name: value for name, value in marks.items() if value <= edges[-1]}
    for style, (name, value) in zip(("--", ":"), visible_marks.items(), strict=False):
        axis.axvline(value, color="#111827", linewidth=1, linestyle=style, label=name)
    if visible_marks:
        axis.legend(frameon=False, fontsize="small")
    axis.set(xlim=(edges[0], edges[-1]), ylim=(0, 1.2 * max(1, counts.max())), xlabel=unit, ylabel="rows")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=160)
