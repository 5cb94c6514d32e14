"""All DPO variants of a name side by side: a table, two plots, and the beta that validation recommends."""

import csv
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_pipeline import estimates
from dpo_pipeline.evaluation import tables
from dpo_pipeline.formatting import format_estimate
from dpo_pipeline.run_folder import read_json, run_state

COLUMNS = {
    "preference_accuracy": "preference accuracy",
    "margin_nats": "margin_nats",
    "kl": "KL from samples, nats",
    "score": "reward",
    "completion_tokens": "completion length, tokens",
}


@dataclass
class Variant:
    """One DPO of a name: `setting` is its identity but for beta and seed; `why` it has no numbers, if so."""

    name: str
    setting: str
    beta: float | None
    seed: int | None
    why: str
    test: dict[str, Any]
    validation: dict[str, Any]


def sweep_report(home: Path, kl_budget: float, failed: dict[str, str]) -> str:
    """Write sweep.md, sweep.csv, sweep.png and reward_kl_frontier.png into `home/report`; the Markdown.

    All are measured against the policy they started from where that is one, else against the base. `failed` are
    variants whose last try failed, with the reason: gaps in the table, as are those not measured.
    """
    folders = {file.parent for file in (home / "dpo").glob("*/status.json")} | {home / "dpo" / name for name in failed}
    found = {folder: read_json(folder / "eval.json") for folder in folders if folder.name not in failed}
    references = {json.dumps(reference_of(result)) for result in found.values() if result}
    against = "reference" if len(references) == 1 else "base"
    variants = [variant(folder, failed.get(folder.name), against) for folder in folders]
    labels = {v.setting: BETA_SEED.sub("", v.name) for v in sorted(variants, key=lambda v: v.name, reverse=True)}
    for v in variants:
        v.setting = labels[v.setting]
    variants.sort(key=lambda v: (v.setting, v.beta or math.inf, v.seed or 0, v.name))
    there = [v for v in variants if v.test]
    numbers = [m for v in there for m in (v.test, v.validation) if m]
    scored = (key for m in numbers for key in m if key.startswith("score."))
    judge = next((key for key in scored if all(key in m for m in numbers)), None)
    columns = {(judge if key == "score" else key): label for key, label in COLUMNS.items() if key != "score" or judge}
    folder = home / "report"
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"# {home.name}: {len(variants)} variants of DPO"]
    if there:
        of = json.loads(min(references))[0] if against == "reference" else "base"
        parts.append(tables.caption(found[home / "dpo" / there[0].name], of, beta=False))
    measured = {v.name: found[home / "dpo" / v.name] for v in there}
    gaps = {v.name: v.why for v in variants if not v.test}
    parts += [tables.comparison(measured, list(measured), against, gaps=gaps), recommendation(there, judge, kl_budget)]
    write_csv(folder / "sweep.csv", variants, list(columns))
    if there:
        plot_sweep(folder / "sweep.png", there, columns)
        plot_frontier(folder / "reward_kl_frontier.png", there, judge or "margin_nats", home)
    text = "\n\n".join(parts)
    (folder / "sweep.md").write_text(text + "\n", encoding="utf-8")
    return text


def reference_of(result: dict[str, Any]) -> list[str]:
    """Name and weights of a DPO's own reference, from its eval.json."""
    weights = {name: value for name, value in result["settings"]["weights"].items() if name != result["policy"]}
    return next(([name, value] for name, value in weights.items() if name != "base"), ["base", weights["base"]])


def variant(folder: Path, problem: str | None, against: str) -> Variant:
    """A DPO's folder as a row: its numbers where it is done and measured, else the reason why there are none."""
    identity = (read_json(folder / "manifest.json") or {"identity": {"beta": None, "seed": None}})["identity"]
    status, test = read_json(folder / "status.json"), read_json(folder / "eval.json")
    validation = read_json(folder / "validation.json")
    if problem is None and run_state(folder) != "done":
        problem = f"{run_state(folder)} at step {status['step']}" + (f": {status['error']}" if status["error"] else "")
    if problem is None and not test:
        problem = "not measured: type its command again"
    blocks = ((test, against), (validation, "reference"))
    numbers = [{**f["against"][b], **f["own"]} if f and not problem else {} for f, b in blocks]
    setting = json.dumps({key: value for key, value in identity.items() if key not in ("beta", "seed")})
    return Variant(folder.name, setting, identity["beta"], identity["seed"], problem or "", *numbers)


BETA_SEED = re.compile(r"-(beta[0-9.]+(e-?\d+)?|seed\d+)(?=-|$)")


def groups(variants: list[Variant]) -> dict[tuple[str, float], list[Variant]]:
    """The seeds of each setting and beta."""
    found: dict[tuple[str, float], list[Variant]] = {}
    for v in variants:
        found.setdefault((v.setting, v.beta), []).append(v)
    return found


def over_seeds(measured: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """The estimate of one seed, or the mean over several.

    Its interval is that of the seeds (Student's t) and the mean one of the rows together, in quadrature: all seeds are
    measured on the same rows, whose noise more seeds do not lessen.
    """
    found = [m[key] for m in measured]
    if len(found) == 1:
        return found[0]
    mean = estimates.mean([f["value"] for f in found])
    rows = sum(f["high"] - f["low"] for f in found if f["low"] is not None) / (2 * len(found))
    half = math.hypot(mean["high"] - mean["value"], rows)
    return {**mean, "low": mean["value"] - half, "high": mean["value"] + half}


def recommendation(variants: list[Variant], judge: str | None, kl_budget: float) -> str:
    """The beta of the largest reward on validation whose KL is within the budget, and whether that is beyond noise.

    Without a reward the largest margin_nats; never the margin with beta, which grows with beta alone.
    """
    aim, name = (judge, "reward") if judge else ("margin_nats", "margin_nats")
    rule = f"largest {name} on validation with a KL of at most {kl_budget:g} nats"
    chosen_from = [v for v in variants if v.validation]
    measured = {key: [v.validation for v in group] for key, group in groups(chosen_from).items()}
    within = {key: over_seeds(m, aim) for key, m in measured.items() if over_seeds(m, "kl")["value"] <= kl_budget}
    if not measured:
        return "Recommended: none; nothing is measured."
    if not within:
        return f"Recommended: none; no beta has a KL of at most {kl_budget:g} nats on validation. Take larger betas."
    best = max(within, key=lambda key: within[key]["value"])
    # Of one row the interval is unknown: all others may be as good.
    low = -math.inf if within[best]["low"] is None else within[best]["low"]
    near = [key for key, e in within.items() if key != best and (math.inf if e["high"] is None else e["high"]) >= low]
    several = len({setting for setting, _ in within}) > 1
    names = {key: f"beta {key[1]:g}" + (f" ({key[0]})" if several else "") for key in within}
    text = f"Recommended: {names[best]}, {name} {format_estimate(within[best])} ({rule})."
    if near:
        listed = ", ".join(names[key] for key in near)
        text += f" Within noise of it: {listed}; more seeds or evaluation.prompts would tell them apart."
    return text


def write_csv(file: Path, variants: list[Variant], columns: list[str]) -> None:
    """One line for each variant: the estimates on test and on validation."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        parts = [f"{split}.{key}.{end}" for split in ("test", "validation") for key in columns for end in ENDS]
        writer.writerow(["variant", "setting", "beta", "seed", "why", *parts])
        for v in variants:
            cells = [m[key][end] if m else None for m in (v.test, v.validation) for key in columns for end in ENDS]
            writer.writerow([v.name, v.setting, v.beta, v.seed, v.why, *cells])


ENDS = ("value", "low", "high")


def bars(estimates: list[dict[str, Any]]) -> list[list[float]]:
    """Lengths of error bars below and above, none where an interval is unknown."""
    known = [f if f["low"] is not None else {**f, "low": f["value"], "high": f["value"]} for f in estimates]
    return [[f["value"] - f["low"] for f in known], [f["high"] - f["value"] for f in known]]


def plot_sweep(file: Path, variants: list[Variant], columns: dict[str, str]) -> None:
    """Each quantity against beta on test, a line for each setting; 95% intervals, over seeds where several."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), layout="constrained")
    shown_keys = [key for key in columns if key != "completion_tokens"]
    for axis, key in zip(axes.flat, shown_keys, strict=False):
        for setting in sorted({v.setting for v in variants}):
            line = {beta: group for (s, beta), group in groups(variants).items() if s == setting}
            found = [over_seeds([v.test for v in line[beta]], key) for beta in sorted(line)]
            seeds = max(map(len, line.values()))
            label = setting + (f", {seeds} seeds" if seeds > 1 else "")
            values = [f["value"] for f in found]
            axis.errorbar(sorted(line), values, yerr=bars(found), marker="o", capsize=3, label=label)
            if seeds > 1:
                dots = [(beta, v.test[key]["value"]) for beta, group in line.items() for v in group]
                axis.plot(*zip(*dots, strict=True), ".", color="0.6", zorder=0)
        ticks = sorted({v.beta for v in variants})
        axis.set(xscale="log", xlabel="beta", title=columns[key])
        axis.set_xticks(ticks, [f"{beta:g}" for beta in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(shown_keys) :]:
        axis.axis("off")
    axes.flat[0].legend(fontsize="small")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def plot_frontier(file: Path, variants: list[Variant], aim: str, home: Path) -> None:
    """What is gained against KL, a point for each variant with its beta, on test; 95% intervals both ways."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 5), layout="constrained")
    for setting in sorted({v.setting for v in variants}):
        line = sorted((v for v in variants if v.setting == setting), key=lambda v: v.test["kl"]["value"])
        kl, gain = ([v.test[key] for v in line] for key in ("kl", aim))
        at = [[f["value"] for f in found] for found in (kl, gain)]
        axis.errorbar(
            *at, xerr=bars(kl), yerr=bars(gain), fmt="o", capsize=2, elinewidth=0.8, alpha=0.8, label=setting
        )
        for v, x, y in zip(line, *at, strict=True):
            axis.annotate(f"{v.beta:g}", (x, y), textcoords="offset points", xytext=(5, 5), fontsize="small")
    axis.set(xlabel="KL from the reference, nats", ylabel=COLUMNS.get(aim, aim.replace("score.", "reward by ")))
    axis.set_title(f"{home.name}: each point a policy, labelled with its beta", fontsize="medium")
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
