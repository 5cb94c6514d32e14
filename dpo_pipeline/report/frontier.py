"""The reward-KL frontier (DPO paper, Figure 2 left): each run as its path over training, and the final policies."""

from pathlib import Path
from typing import Any

import pandas as pd

from dpo_pipeline.checkpoints import TRACKER_FILE
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.record import read_json, read_metrics
from dpo_pipeline.report.figures import GREY, LINES, WIDE, draw_png, error_bars, shorten
from dpo_pipeline.report.page import Panel, Section, label_of
from dpo_pipeline.report.runs import Runs, tracked_score

MARKERS = "osD^v"  # by setting


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
    """Reward over KL from the reference, for all DPO of the reference of the report's subject.

    Without a reward it is the margin, in a figure and under a title of its own.
    """
    name, title = "reward", "Reward over KL"
    if runs.target == "margin_nats":
        name, title = "margin", "Margin over KL: no judge scored all completions"
    if not (tracks := list_tracks(runs)):
        return []
    panel = Panel(title, draw_png(lambda axis: draw_frontier(axis, runs, tracks), title, WIDE))
    text = (
        "A thin line is the path of a run over training, on validation prompts from step 0; a large point the final "
        "policy on test prompts, with 95% intervals. Up and left is better; a hollow point is one that another has "
        "beaten with less KL."
    )
    text += " The KL of Best-of-N is its upper bound." if "best_of" in runs.results else ""
    if left_out := len(runs.measured) - sum(track["style"] == "-" for track in tracks):
        text += f" Left out: {left_out} with another reference."
    return [Section(f"{name.title()}-KL frontier", text, panels=(panel,), figure=f"{name}_kl_frontier.png")]


def list_tracks(runs: Runs) -> list[dict[str, Any]]:
    """What is drawn of each run and of each overlay: its path, its final point with error bars, and its looks."""
    tracks, target = [], runs.target
    settings, betas = (sorted(runs.measured[key].unique()) for key in ("setting", "beta"))
    for line in runs.measured.itertuples(index=False):
        if runs.policies[f"dpo/{line.name}"]["reference"] != runs.policies[runs.subject]["reference"]:
            continue
        kl, value = line.test["kl"], line.test[target]
        label = f"beta {line.beta:g}" + (f", {shorten(line.setting, 20)}" if len(settings) > 1 else "")
        track = {"path": training_path(runs.home / "dpo" / line.name, line, target), "style": "-", "label": label}
        track |= {"final": (kl["value"], value["value"]), "xerr": error_bars([kl]), "yerr": error_bars([value])}
        track["colour"] = LINES[betas.index(line.beta) % len(LINES)]
        tracks.append({**track, "marker": MARKERS[settings.index(line.setting) % len(MARKERS)]})
    for index, (name, points) in enumerate(runs.overlays.items() if target != "margin_nats" else ()):
        path = pd.DataFrame(points).rename(columns={"reward": "value"})
        track = {"path": path, "style": "--", "final": (points[-1]["kl"], points[-1]["reward"]), "marker": "P"}
        track |= {"xerr": None, "yerr": None, "label": shorten(name, 20)}
        tracks.append({**track, "colour": LINES[-1 - index % len(LINES)]})
    return tracks


def training_path(folder: Path, line: Any, target: str) -> pd.DataFrame:
    """KL and target at each evaluation of a run: the tracker's reward, where it is the target, or the margin."""
    points = pd.DataFrame(read_json(folder / TRACKER_FILE) or [], columns=["step", "kl", "reward"])
    points["value"] = points["reward"] if tracked_score(folder, line.test) == target else None
    if target == "margin_nats":
        metrics = pd.DataFrame(read_metrics(folder), columns=["step", "eval_rewards/margins"]).dropna()
        points = points.merge(metrics, on="step").assign(value=lambda each: each["eval_rewards/margins"] / line.beta)
    return points.dropna(subset=["kl", "value"])


def draw_frontier(axis: Any, runs: Runs, tracks: list[dict[str, Any]]) -> None:
    """Paths and final points, the reference at a KL of 0, and Best-of-N; one that another dominates is hollow."""
    reference, target = runs.policies[runs.subject]["reference"] or "base", runs.target
    if start := runs.policies.get(reference, {"own": {}})["own"].get(target):
        style = {"fmt": "D", "color": GREY, "capsize": 2, "label": shorten(reference, 20)}
        axis.errorbar([0], [start["value"]], yerr=error_bars([start]), **style)
    labels: set[str] = set()
    for track in tracks:
        thin = {"color": track["colour"], "linewidth": 1, "marker": ".", "markersize": 4, "alpha": 0.6}
        axis.plot(track["path"]["kl"], track["path"]["value"], track["style"], **thin)
        kl, value = final = track["final"]
        others = [each["final"] for each in tracks if each["final"] != final]
        is_dominated = any(other[0] <= kl and other[1] >= value for other in others)
        style = {"fmt": track["marker"], "color": track["colour"], "markersize": 8, "capsize": 2, "elinewidth": 0.8}
        style |= {"markerfacecolor": "white"} if is_dominated else {}
        label = None if track["label"] in labels else track["label"]  # one for all seeds
        labels.add(track["label"])
        axis.errorbar(*final, xerr=track["xerr"], yerr=track["yerr"], **style, label=label, zorder=4)
    best = runs.results.get("best_of")
    if best and best["policy"] == reference and target in best["points"][0]:
        bounds, values = zip(*((point["kl_bound"], point[target]["value"]) for point in best["points"]), strict=True)
        axis.plot(bounds, values, "k-.", linewidth=1.2, label=f"Best-of-N to {best['n']}")
    axis.set(xlabel=f"KL from {shorten(reference)}, nats", ylabel=shorten(label_of(target)))
    axis.set_xlim(left=0)
