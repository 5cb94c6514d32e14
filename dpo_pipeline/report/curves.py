"""The curves of a training, each with how to read it and what is unusual in this one."""

import math
import re
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
FIGURES = {"dpo": "training_curves.png", "sft": "sft_curves.png"}
CURVES = {  # by stage and title: the columns of the metrics, and how to read them
    "dpo": {
        "loss": ("loss", "Falls; a sigmoid loss starts at ln 2 = 0.693. Validation that rises again is over-fitting."),
        "margin (with beta)": ("rewards/margins", "Reward of chosen minus rejected. It grows as long as DPO learns."),
        "preference accuracy": ("rewards/accuracies", "Share of pairs with a margin above 0; label noise bounds it."),
        "log-prob change, nats": ("chosen rejected", "Against the reference. Both may fall, the rejected faster."),
        "KL from samples, nats": ("kl", "From the reference, on sampled completions: what the gain costs."),
        "reward by the judge": ("reward", "Of sampled completions. It falls where the policy over-optimizes."),
        "gradient norm": ("grad_norm", "Before clipping. It should stay in one order of magnitude."),
        "learning rate": ("learning_rate", "Warm-up, then decay."),
    },
    "sft": {
        "SFT loss": ("loss", "Negative log-prob of a completion token. It should level off."),
        "perplexity of validation": ("perplexity", "Of all completion tokens; sft_best=perplexity keeps the lowest."),
    },
}


def training_curves(runs: Runs) -> list[Section]:
    """The curves of the policy that the report is about, and of the SFT it started from, is to beat, or the first."""
    sfts = [f"sft/{file.parent.name}" for file in sorted(runs.home.glob("sft/*/metrics.jsonl"))]
    opponent = runs.policies[runs.subject]["sft"] if runs.subject else None
    sft = next((name for name in (runs.subject, opponent, *sfts) if name in sfts), "")
    parts = [curve_section(runs, name) for name in dict.fromkeys((runs.subject, sft)) if name[:3] in CURVES]
    return [part for part in parts if part]


def curve_section(runs: Runs, name: str) -> Section | None:
    """A panel for each curve of a run; None where no step is logged."""
    folder, stage = runs.home / name, name[:3]
    config, metrics = OmegaConf.load(folder / "config.yaml"), load_metrics(folder)
    if "loss" not in metrics:
        return None
    starts: dict[str, float | None] = {"rewards/margins": 0.0, "chosen": 0.0}
    if stage == "dpo":
        starts["loss"] = math.log(2) if config.dpo.loss_type == "sigmoid" else None
        for column in [column for column in metrics if re.fullmatch("(eval_)?rewards/(chosen|rejected)", column)]:
            metrics[column.replace("rewards/", "")] = metrics[column] / config.beta
    remarks = find_remarks(metrics, config, runs.kl_budget) if stage == "dpo" else {}
    panels = []
    for title, (columns, how) in CURVES[stage].items():
        keys = columns.split()
        used = metrics.columns.intersection([*keys, *(f"eval_{key}" for key in keys)])
        if metrics[used].notna().any(axis=None):
            png = draw_png(lambda axis, keys=keys: draw_curve(axis, metrics, keys, starts.get(keys[0])), title)
            panels.append(Panel(title, png, f"{how} {remarks.get(title, '')}".strip()))
    return Section(f"Training curves: {stage.upper()}", f"Of {name}.", panels=tuple(panels), figure=FIGURES[stage])


def load_metrics(folder: Path) -> pd.DataFrame:
    """metrics.jsonl with the tracker's points, which have intervals, a line for each step."""
    metrics = pd.DataFrame(read_metrics(folder))
    if metrics.empty:
        return metrics
    points = pd.DataFrame(read_json(folder / TRACKER_FILE) or [], columns=TRACKED_COLUMNS)
    metrics = metrics.groupby("step").first().drop(columns=["eval_kl", "eval_reward"], errors="ignore")
    return metrics.join(points.set_index("step").astype(float), how="outer")


def draw_curve(axis: Any, metrics: pd.DataFrame, keys: list[str], start: float | None) -> None:
    """Train as a line, with its interval if any, validation as points; `start` is where an untrained policy is."""
    if start is not None:
        axis.axhline(start, color=GREY, linewidth=0.8, linestyle=":")
    for key, colour in zip(keys, (TEAL, ORANGE), strict=False):
        name = f"{key}, " if len(keys) > 1 else ""
        if key in metrics:
            label = f"{name}train" if f"eval_{key}" in metrics else None
            line = metrics[key].dropna()
            axis.plot(line, color=colour, label=label, marker="o" if f"{key}_low" in metrics else None)
        if f"{key}_low" in metrics:
            low, high = (metrics.loc[line.index, f"{key}_{bound}"].fillna(line) for bound in ("low", "high"))
            axis.fill_between(line.index, low, high, color=colour, alpha=0.2, linewidth=0)
        if f"eval_{key}" in metrics:
            dots = {"color": colour if name else BLUE, "markersize": 4, "linewidth": 1}
            axis.plot(metrics[f"eval_{key}"].dropna(), "o--", label=f"{name}validation", **dots)
    axis.set_xlabel("step")
    if keys == ["kl"]:
        axis.set_ylim(bottom=0)
    if keys == ["rewards/accuracies"]:  # at step 1 ties count as wrong, which says nothing
        axis.set_ylim(min(0.5, metrics[keys[0]][2:].min() - 0.05), 1.0)


def find_remarks(metrics: pd.DataFrame, config: Any, kl_budget: float) -> dict[str, str]:
    """What is unusual in each curve of a DPO."""
    remarks: dict[str, str] = {}

    def remark(curve: str, is_unusual: bool, sentence: str) -> None:
        remarks.update({curve: f"Unusual: {sentence}."} if is_unusual else {})

    validation = metrics.dropna(subset="eval_loss") if "eval_loss" in metrics else metrics[:0]
    if len(validation):
        loss, last = validation["eval_loss"], validation.iloc[-1]
        rise = f"validation rises from {loss.min():.3f} at step {loss.idxmin()} to {loss.iloc[-1]:.3f}: stop earlier"
        remark("loss", loss.iloc[-1] > 1.02 * loss.min(), rise)
        train, accuracy = metrics["rewards/accuracies"].dropna().tail(5).mean(), last["eval_rewards/accuracies"]
        gap = f"{train:.2f} on train, {accuracy:.2f} on validation"
        remark("preference accuracy", train - accuracy > MAX_GAP, f"{gap}: over-fitting")
        remark("preference accuracy", train > MAX_ACCURACY, f"{gap}: it learns label noise")
        fall = (
            f"the chosen falls as much: {last['eval_chosen']:+.1f}, rejected {last['eval_rejected']:+.1f} at the end"
        )
        remark("log-prob change, nats", last["eval_chosen"] < last["eval_rejected"], fall)
    kls, rewards = metrics["kl"].dropna(), metrics["reward"].dropna()
    if len(kls):
        kl = kls.iloc[-1]
        remark("KL from samples, nats", kl > kl_budget, f"{kl:.1f}, above evaluation.kl_budget={kl_budget:g}")
    if len(rewards):
        best, reward = rewards.idxmax(), rewards.iloc[-1]
        fall = f"it falls from {rewards[best]:.2f} at step {best} to {reward:.2f}"
        remark("reward by the judge", reward < metrics["reward_low"][best], fall)
    if "grad_norm" in metrics:
        norms, limit = metrics["grad_norm"].dropna(), config.dpo.max_grad_norm
        share = f"clipped, in {(norms > limit).mean():.0%} of the logged steps"
        remark("gradient norm", norms.max() > 10 * norms.median(), f"it jumps; above {limit:g}, so {share}")
    return remarks
