"""The curves of a training, each with how to read it and what is unusual in this one."""

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from dpo_pipeline.checkpoints import TRACKER_FILE
from dpo_pipeline.record import read_json, read_metrics
from dpo_pipeline.report.figures import BLUE, GREY, ORANGE, TEAL, draw_png
from dpo_pipeline.report.page import Panel, Section
from dpo_pipeline.report.runs import Runs

MAX_GAP = 0.05  # of accuracy between train and validation
MAX_ACCURACY = 0.95  # as the tracker warns
TRACKED_COLUMNS = "step kl kl_low kl_high reward reward_low reward_high".split()
HOW = {
    "loss": "Falls; a sigmoid loss starts at ln 2 = 0.693. Validation that rises again is over-fitting.",
    "margin (with beta)": "Reward of chosen minus rejected, as TRL logs it. It grows as long as DPO learns.",
    "preference accuracy": "Share of pairs with a positive margin. Label noise bounds it below 1.",
    "log-prob change, nats": "Against the reference. Both may fall, but the rejected has to fall faster.",
    "KL from samples, nats": "From the reference, on sampled completions: what the gain costs.",
    "reward by the judge": "Of sampled completions. If it falls while the loss falls, the policy over-optimizes.",
    "gradient norm": "Before clipping. It should stay in one order of magnitude.",
    "learning rate": "Warm-up, then decay.",
    "SFT loss": "Negative log-prob of a completion token. It should level off.",
    "perplexity of validation": "Over all completion tokens. The lowest one is kept, with sft_best=perplexity.",
}


def training_curves(runs: Runs) -> list[Section]:
    """The curves of the DPO that the report is about."""
    folder = runs.home / runs.subject
    if not runs.subject.startswith("dpo/") or (metrics := load_metrics(folder)) is None:
        return []
    config = OmegaConf.load(folder / "config.yaml")
    for column in [column for column in metrics if re.fullmatch("(eval_)?rewards/(chosen|rejected)", column)]:
        metrics[f"{column.replace('rewards/', '')} change"] = metrics[column] / config.beta
    points = pd.DataFrame(read_json(folder / TRACKER_FILE) or [], columns=TRACKED_COLUMNS)
    draws: dict[str, Callable[[Any], None]] = {
        "loss": partial(draw_pair, metrics, ["loss"], line=math.log(2) if config.dpo.loss_type == "sigmoid" else None),
        "margin (with beta)": partial(draw_pair, metrics, ["rewards/margins"], line=0.0),
        "preference accuracy": partial(draw_pair, metrics, ["rewards/accuracies"], top=1.0),
        "log-prob change, nats": partial(draw_pair, metrics, ["chosen change", "rejected change"], line=0.0),
        "KL from samples, nats": partial(draw_tracked, points, "kl"),
        "reward by the judge": partial(draw_tracked, points, "reward"),
        "gradient norm": partial(draw_pair, metrics, ["grad_norm"]),
        "learning rate": partial(draw_pair, metrics, ["learning_rate"]),
    }
    for title, key in (("KL from samples, nats", "kl"), ("reward by the judge", "reward")):
        if points[key].isna().all():
            del draws[title]
    remarks = find_remarks(metrics, points, config, runs.kl_budget)
    return [curve_section("Training curves: DPO", f"Of {runs.subject}.", "training_curves.png", draws, remarks)]


def sft_curves(runs: Runs) -> list[Section]:
    """The curves of the SFT that the policy started from, or is to beat; without a policy, of the first."""
    names = [f"sft/{file.parent.name}" for file in sorted(runs.home.glob("sft/*/metrics.jsonl"))]
    opponent = runs.policies[runs.subject]["sft"] if runs.subject else None
    name = next((name for name in (runs.subject, opponent, *names) if name in names), None)
    if name is None or (metrics := load_metrics(runs.home / name)) is None:
        return []
    draws = {"SFT loss": partial(draw_pair, metrics, ["loss"])}
    if "eval_perplexity" in metrics:
        draws["perplexity of validation"] = partial(draw_pair, metrics, ["perplexity"])
    return [curve_section("Training curves: SFT", f"Of {name}.", "sft_curves.png", draws, {})]


def load_metrics(folder: Path) -> pd.DataFrame | None:
    """metrics.jsonl with a line for each step, or None where no step is logged."""
    metrics = pd.DataFrame(read_metrics(folder))
    return metrics.groupby("step").first() if "loss" in metrics else None


def curve_section(
    title: str, text: str, figure: str, draws: dict[str, Callable[[Any], None]], remarks: dict[str, str]
) -> Section:
    """A section with a panel for each curve."""
    captions = {name: f"{HOW[name]} {remarks.get(name, '')}".strip() for name in draws}
    panels = tuple(Panel(name, draw_png(draw, name), captions[name]) for name, draw in draws.items())
    return Section(title, text, panels=panels, figure=figure)


def draw_pair(
    metrics: pd.DataFrame, keys: list[str], axis: Any, line: float | None = None, top: float | None = None
) -> None:
    """Train as a line, validation as points; `line` is where an untrained policy is, `top` where the axis ends."""
    if line is not None:
        axis.axhline(line, color=GREY, linewidth=0.8, linestyle=":")
    for key, colour in zip(keys, (TEAL, ORANGE), strict=False):
        name = f"{key.split()[0]}, " if len(keys) > 1 else ""
        if key in metrics:
            label = f"{name}train" if f"eval_{key}" in metrics else None
            axis.plot(metrics[key].dropna(), color=colour, label=label)
        if f"eval_{key}" in metrics:
            dots = {"color": colour if name else BLUE, "markersize": 4, "linewidth": 1}
            axis.plot(metrics[f"eval_{key}"].dropna(), "o--", label=f"{name}validation", **dots)
    axis.set_xlabel("step")
    if top is not None:  # of a share: at step 1 ties count as wrong, which says nothing
        low = min([0.5, *(metrics[column][2:].min() - 0.05 for column in metrics if column.endswith(keys[0]))])
        axis.set_ylim(low, top)


def draw_tracked(points: pd.DataFrame, key: str, axis: Any) -> None:
    """A number of the tracker with its interval."""
    measured = points.dropna(subset=key)
    axis.plot(measured["step"], measured[key], "o-", color=TEAL)
    low, high = (measured[f"{key}_{bound}"].astype(float).fillna(measured[key]) for bound in ("low", "high"))
    axis.fill_between(measured["step"], low, high, color=TEAL, alpha=0.2, linewidth=0)
    axis.set_xlabel("step")
    if key == "kl":
        axis.set_ylim(bottom=0)


def find_remarks(metrics: pd.DataFrame, points: pd.DataFrame, config: Any, kl_budget: float) -> dict[str, str]:
    """What is unusual in each curve."""
    remarks: dict[str, str] = {}

    def remark(curve: str, is_unusual: bool, sentence: str) -> None:
        remarks.update({curve: f"Unusual: {sentence}."} if is_unusual else {})

    validation = metrics.dropna(subset="eval_loss") if "eval_loss" in metrics else metrics[:0]
    if len(validation):
        loss, last = validation["eval_loss"], validation.iloc[-1]
        rise = f"validation rises from {loss.min():.3f} at step {loss.idxmin()} to {loss.iloc[-1]:.3f}: stop earlier"
        remark("loss", loss.iloc[-1] > 1.02 * loss.min(), rise)
        train = metrics["rewards/accuracies"].dropna().tail(5).mean()
        accuracy = last["eval_rewards/accuracies"]
        gap = f"{train:.2f} on train, {accuracy:.2f} on validation"
        remark("preference accuracy", train - accuracy > MAX_GAP, f"{gap}: over-fitting")
        remark("preference accuracy", train > MAX_ACCURACY, f"{gap}: it learns label noise")
        chosen, rejected = last["eval_chosen change"], last["eval_rejected change"]
        fall = f"the chosen falls as much: chosen {chosen:+.1f}, rejected {rejected:+.1f} at the end"
        remark("log-prob change, nats", chosen < rejected, fall)
    measured = points.astype(float)
    if len(points):
        kl = measured["kl"].iloc[-1]
        remark("KL from samples, nats", kl > kl_budget, f"{kl:.1f}, above evaluation.kl_budget={kl_budget:g}")
    if measured["reward"].notna().any():
        best, reward = measured.loc[measured["reward"].idxmax()], measured["reward"].iloc[-1]
        fall = f"it falls from {best['reward']:.2f} at step {best['step']:.0f} to {reward:.2f}"
        remark("reward by the judge", reward < best["reward_low"], fall)
    if "grad_norm" in metrics:
        norms, limit = metrics["grad_norm"].dropna(), config.dpo.max_grad_norm
        share = f"clipped, in {(norms > limit).mean():.0%} of the logged steps"
        remark("gradient norm", norms.max() > 10 * norms.median(), f"it jumps; above {limit:g}, so {share}")
    return remarks
