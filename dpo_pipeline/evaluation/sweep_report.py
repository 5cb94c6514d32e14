"""All DPO variants of a name: a table, two plots, and the beta that validation recommends."""

import math
import re
from pathlib import Path
from typing import Any

import pandas as pd

from dpo_pipeline.estimates import Estimate
from dpo_pipeline.evaluation import tables
from dpo_pipeline.evaluation.sweep_variants import (
    Variant,
    group_seeds,
    list_differences,
    load_variants,
    over_seeds,
    reference_of,
)
from dpo_pipeline.formatting import format_estimate
from dpo_pipeline.record import read_json

PLOTTED = ("preference_accuracy", "margin_nats", "kl")  # and the reward


def sweep_report(home: Path, kl_budget: float, failed: dict[str, str]) -> tuple[str, str | None]:
    """Write sweep.md, sweep.csv, sweep.png and reward_kl_frontier.png into `home/report`.

    Returns the Markdown and the recommended variant, None without one. All are measured against the policy they
    started from if that is one, else against the base. `failed` are variants whose last run failed, with the reason:
    gaps in the table, as are variants that are not measured, or on other data than the others.
    """
    names = sorted({file.parent.name for file in (home / "dpo").glob("*/status.json")} | {*failed})
    results = {name: read_json(home / "dpo" / name / "eval.json") for name in names if name not in failed}
    results = {name: result for name, result in results.items() if result}
    references = {reference_of(result) for result in results.values()}
    against = "reference" if len(references) == 1 else "base"
    variants = load_variants(home, names, results, failed, against)
    measured = [v for v in variants if v.test]
    estimates = [each for v in measured for each in (v.test, v.validation) if each]
    scores = [key for each in estimates for key in each if key.startswith("score.")]
    target = next((key for key in scores if all(key in each for each in estimates)), "margin_nats")
    keys = list(dict.fromkeys([*PLOTTED, target, "completion_tokens"]))
    folder = home / "report"
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "sweep.csv", variants, keys)
    blocks = [f"# {home.name}: {len(variants)} variants of DPO"]
    if measured:
        reference = min(references)[0] if against == "reference" else "base"
        blocks.append(tables.caption(results[measured[0].name], reference, beta=False))
        plot_sweep(folder / "sweep.png", measured, keys)
        plot_frontier(folder / "reward_kl_frontier.png", measured, target, home.name)
    gaps = {v.name: v.problem for v in variants if not v.test}
    wins = dict.fromkeys(key for v in measured for key in v.test if re.match(r"win_rate\.[^.]+\.\w+$", key))
    blocks.append(tables.comparison({v.name: v.test for v in measured}, [*tables.SHORT_KEYS, target, *wins], gaps))
    if differences := list_differences(home, names):
        blocks.append(differences)
    if chosen_from := {v.name: v.validation for v in measured if v.validation}:
        blocks.append("On validation, by which beta is chosen:")
        blocks.append(tables.comparison(chosen_from, list(dict.fromkeys(["kl", "margin_nats", target])), {}))
    text, best = recommendation(measured, target, kl_budget)
    blocks.append(text)
    text = "\n\n".join(blocks)
    (folder / "sweep.md").write_text(text + "\n", encoding="utf-8")
    return text, best


def recommendation(variants: list[Variant], target: str, kl_budget: float) -> tuple[str, str | None]:
    """The beta of the largest reward on validation within the KL budget and those within noise; its first variant.

    Without a reward the largest margin_nats; never the margin with beta, which grows with beta alone.
    """
    groups = group_seeds([v for v in variants if v.validation])
    measured = {key: [v.validation for v in group] for key, group in groups.items()}
    allowed = {key: over_seeds(m, target) for key, m in measured.items() if over_seeds(m, "kl")["value"] <= kl_budget}
    if not measured:
        return "Recommended: none; nothing is measured.", None
    if not allowed:
        sentence = f"no beta has a KL of at most {kl_budget:g} nats on validation. Take larger betas."
        return f"Recommended: none; {sentence}", None
    best = max(allowed, key=lambda key: allowed[key]["value"])
    # Without an interval (one row) no beta is worse beyond noise.
    low = -math.inf if allowed[best]["low"] is None else allowed[best]["low"]
    near = [key for key, e in allowed.items() if key != best and (e["high"] is None or e["high"] >= low)]
    has_settings = len({setting for setting, _ in allowed}) > 1
    names = {key: f"beta {key[1]:g}" + (f" ({key[0]})" if has_settings else "") for key in allowed}
    name = "margin_nats" if target == "margin_nats" else "reward"
    rule = f"largest {name} on validation with a KL of at most {kl_budget:g} nats"
    text = f"Recommended: {names[best]}, {name} {format_estimate(allowed[best])} ({rule})."
    if near:
        listed = ", ".join(names[key] for key in near)
        text += f" Within noise of it: {listed}; more seeds or evaluation.prompts may separate them."
    return text, groups[best][0].name


def write_csv(file: Path, variants: list[Variant], keys: list[str]) -> None:
    """One line for each variant: the estimates of `keys` on test and on validation, in columns as test.kl.value."""
    rows: list[dict[str, Any]] = []
    for v in variants:
        rows.append({"variant": v.name, "setting": v.setting, "beta": v.beta, "seed": v.seed, "why": v.problem})
        for split, estimates in (("test", v.test), ("validation", v.validation)):
            rows[-1][split] = {key: estimates[key] for key in keys if estimates}
    pd.json_normalize(rows).convert_dtypes().to_csv(file, index=False)


def error_bars(estimates: list[Estimate]) -> list[list[float]]:
    """Lengths of the error bars below and above, 0 where an interval is unknown."""
    known = [e if e["low"] is not None else {**e, "low": e["value"], "high": e["value"]} for e in estimates]
    return [[e["value"] - e["low"] for e in known], [e["high"] - e["value"] for e in known]]


def plot_sweep(file: Path, variants: list[Variant], keys: list[str]) -> None:
    """Each quantity but length against beta on test, a line for each setting; 95% intervals, over seeds if several."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes, groups, betas = figure.subplots(2, 2), group_seeds(variants), sorted({v.beta for v in variants})
    for axis in axes.flat:
        axis.axis("off")
    for axis, key in zip(axes.flat, [key for key in keys if key != "completion_tokens"], strict=False):
        axis.axis("on")
        for setting in sorted({v.setting for v in variants}):
            line = {beta: groups[setting, beta] for beta in betas if (setting, beta) in groups}
            points = [over_seeds([v.test for v in seeds], key) for seeds in line.values()]
            seeds, values = max(map(len, line.values())), [point["value"] for point in points]
            label = setting[:40] + (f", {seeds} seeds" if seeds > 1 else "")
            axis.errorbar(list(line), values, yerr=error_bars(points), marker="o", capsize=3, label=label)
            if seeds > 1:
                dots = [(v.beta, v.test[key]["value"]) for group in line.values() for v in group]
                axis.plot(*zip(*dots, strict=True), ".", color="0.6", zorder=0)
        axis.set(xscale="log", xlabel="beta", title=tables.label_of(key))
        if key == "preference_accuracy":
            axis.set_ylim(top=min(1.0, axis.get_ylim()[1]))
        axis.set_xticks(betas, [f"{beta:g}" for beta in betas])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize="small")
    figure.savefig(file, dpi=120)


def plot_frontier(file: Path, variants: list[Variant], target: str, name: str) -> None:
    """The target against KL on test, a point for each variant with its beta; 95% intervals both ways."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axis = figure.subplots()
    for setting in sorted({v.setting for v in variants}):
        line = [v for v in variants if v.setting == setting]
        kl, gain = ([v.test[key] for v in line] for key in ("kl", target))
        x, y = ([estimate["value"] for estimate in estimates] for estimates in (kl, gain))
        style = {"fmt": "o", "capsize": 2, "elinewidth": 0.8, "alpha": 0.8, "label": setting[:40]}
        axis.errorbar(x, y, xerr=error_bars(kl), yerr=error_bars(gain), **style)
        for v, *point in zip(line, x, y, strict=True):
            axis.annotate(f"{v.beta:g}", point, textcoords="offset points", xytext=(5, 5), fontsize="small")
    axis.set(xlabel="KL from the reference, nats", ylabel=tables.label_of(target), xlim=(0, None))
    quantity = "margin, since no judge scored all," if target == "margin_nats" else "reward"
    axis.set_title(f"{name[:40]}: {quantity} over KL; each point a policy with its beta", fontsize="medium")
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
