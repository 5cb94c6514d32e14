"""The reward-KL frontier (DPO paper, Figure 2 left): each run as its path over training, and the final policies."""

from pathlib import Path
from typing import Any

import pandas as pd

from dpo_pipeline.checkpoints import TRACKER_FILE
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.record import read_json, read_metrics
from dpo_pipeline.report.figures import GREY, LINES, WIDE, draw_png, error_bars
from dpo_pipeline.report.runs import Runs, tracked_score
from dpo_pipeline.report.section import Panel, Section, label_of, shorten

MAX_LABELS = 8  # runs that a legend names


def read_overlays(overlay: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Points of runs made elsewhere, by name, from `NAME:FILE` in the form of reward_kl_tracker.json."""
    overlays = {}
    for item in overlay:
        name, _, file = item.partition(":")
        points = read_json(Path(file).expanduser())
        if not isinstance(points, list) or not points or not all({"kl", "reward"} <= {*point} for point in points):
            raise PipelineError(
                f"overlay=[{item}]: {file or 'it'} is no file that holds a list of points with `kl` and `reward`: "
                "give overlay=[NAME:FILE], FILE in the form of reward_kl_tracker.json"
            )
        overlays[name] = points
    return overlays


def frontier(runs: Runs) -> list[Section]:
    """Reward over KL from the reference, for all DPO of the reference of the report's subject."""
    policy = runs.policies.get(runs.subject, {"reference": None, "settings": None})
    reference, target = policy["reference"], runs.target
    lines = [
        line
        for line in runs.measured.itertuples(index=False)
        if target in line.test and runs.policies[f"dpo/{line.name}"]["reference"] == reference
    ]
    if not lines:
        return []
    paths = {line.name: training_path(runs.home / "dpo" / line.name, line, target) for line in lines}
    is_reward = target != "margin_nats"
    overlays = runs.overlays if is_reward else {}
    finals = {line.name: (line.test["kl"]["value"], line.test[target]["value"]) for line in lines}
    finals |= {name: (points[-1]["kl"], points[-1]["reward"]) for name, points in overlays.items()}
    dominated = [name for name in finals if is_dominated(finals[name], finals.values())]
    best = runs.results.get("best_of", {"policy": None, "points": []})
    best_points = [point for point in best["points"] if best["policy"] == reference and target in point]
    start = None
    if reference in runs.policies and target in runs.policies[reference]["own"]:
        start = runs.policies[reference]["own"][target]

    def draw(axis: Any) -> None:
        if start:
            bars = error_bars([start])
            label = shorten(reference, 14)
            axis.errorbar([0], [start["value"]], yerr=bars, fmt="D", color=GREY, capsize=2, label=label, zorder=3)
        for index, line in enumerate(lines):
            colour = LINES[index % len(LINES)]
            path = paths[line.name]
            axis.plot(path["kl"], path["value"], "-", color=colour, linewidth=1, marker=".", markersize=4, alpha=0.6)
            kl, value = ([line.test[key]] for key in ("kl", target))
            is_hollow = line.name in dominated
            style = {"fmt": "o", "color": colour, "markersize": 8, "capsize": 2, "elinewidth": 0.8, "zorder": 4}
            style |= {"markerfacecolor": "white" if is_hollow else colour}
            style["label"] = label_of_run(line, lines) if index < MAX_LABELS else None
            axis.errorbar(*finals[line.name], xerr=error_bars(kl), yerr=error_bars(value), **style)
        for index, (name, points) in enumerate(overlays.items()):
            colour = LINES[-2 - index % len(LINES)]
            axis.plot([p["kl"] for p in points], [p["reward"] for p in points], "--", color=colour, linewidth=1.2)
            face = "white" if name in dominated else colour
            style = {"color": colour, "markersize": 8, "markerfacecolor": face, "label": shorten(name, 14)}
            axis.plot(*finals[name], "s", **style)
        if best_points:
            bound, values = [p["kl_bound"] for p in best_points], [p[target]["value"] for p in best_points]
            axis.plot(bound, values, "k-.", linewidth=1.2, label=f"Best-of-N to {best_points[-1]['n']}")
        axis.set(xlabel=f"KL from {shorten(reference or 'the base')}, nats", ylabel=label_of(target))
        axis.set_xlim(left=0)

    title = "Reward over KL" if is_reward else "Margin over KL: no judge scored all completions"
    panel = Panel(title, draw_png(draw, title, WIDE))
    name = "Reward-KL frontier" if is_reward else "Margin-KL frontier"
    figure = "reward_kl_frontier.png" if is_reward else "margin_kl_frontier.png"
    return [Section(name, describe(runs, len(lines), dominated, bool(best_points)), panels=(panel,), figure=figure)]


def training_path(folder: Path, line: Any, target: str) -> pd.DataFrame:
    """KL and target at each evaluation of a run: the tracker's reward, where it is the target, or the margin."""
    points = pd.DataFrame(read_json(folder / TRACKER_FILE) or [], columns=["step", "kl", "reward"])
    if target == "margin_nats":
        metrics = pd.DataFrame(read_metrics(folder), columns=["step", "eval_rewards/margins"]).dropna()
        points = points.merge(metrics, on="step").assign(value=lambda each: each["eval_rewards/margins"] / line.beta)
    elif tracked_score(folder, line.test) == target:
        points = points.assign(value=points["reward"])
    else:
        return pd.DataFrame(columns=["kl", "value"])
    return points.dropna(subset=["kl", "value"])


def is_dominated(point: tuple[float, float], points: Any) -> bool:
    """Whether another point has as much reward for less KL, or more for as much."""
    kl, value = point
    return any(other != point and other[0] <= kl and other[1] >= value for other in points)


def label_of_run(line: Any, lines: list[Any]) -> str:
    """The beta of a run, with its setting and seed where runs differ in these."""
    setting = f"{shorten(line.setting, 20)}, " if len({each.setting for each in lines}) > 1 else ""
    seed = f", seed {line.seed}" if len({each.seed for each in lines}) > 1 else ""
    return f"{setting}beta {line.beta:g}{seed}"


def describe(runs: Runs, count: int, dominated: list[str], has_best_of: bool) -> str:
    """How to read the figure."""
    text = (
        "A thin line is the path of a run over training, on validation prompts from step 0; a large point the final "
        "policy on test prompts, with 95% intervals. Up and left is better."
    )
    if dominated:
        text += " Hollow: another one has more for less KL."
    if has_best_of:
        text += " The KL of Best-of-N is its upper bound."
    if runs.overlays:
        text += f" {', '.join(runs.overlays)}: as given by overlay=, last point large."
    if count > MAX_LABELS:
        text += f" The legend names the first {MAX_LABELS} of {count} runs."
    if (left_out := len(runs.measured) - count) > 0:
        text += f" Left out: {left_out} with another reference."
    return text
