"""All DPO variants of a name against beta, the beta that validation recommends, and win rates against temperature."""

import math
import re
from typing import Any

import pandas as pd

from dpo_pipeline.record import read_json
from dpo_pipeline.report.comparison import SHORT_KEYS, caption, policy_table
from dpo_pipeline.report.figures import GREY, SIZE, WIDE, draw_png, plot_estimates, shorten
from dpo_pipeline.report.page import Panel, Section, label_of
from dpo_pipeline.report.runs import Runs, grouped, over_seeds, recommend

PLOTTED = ("preference_accuracy", "margin_nats", "kl")  # and the target
MAX_JUDGES = 4  # panels of win rates
MAX_GAPS = 4  # variants without numbers that a terminal names


def all_variants(runs: Runs) -> list[Section]:
    """The variants on test, those on validation by which a beta is chosen, and each quantity against beta."""
    if len(runs.variants) < 2:
        return []
    measured, target = runs.measured, runs.target
    gaps = runs.variants.loc[runs.variants["problem"] != "", ["name", "problem"]]
    gaps = gaps.sort_values("problem", key=lambda each: ~each.str.startswith("failed: "), kind="stable")
    test, validation = (dict(zip(measured["name"], measured[split], strict=True)) for split in ("test", "validation"))
    wins = [key for cells in test.values() for key in cells if re.match(r"win_rate\.[^.]+\.(sft|reference)$", key)]
    tables = [policy_table(test, [*dict.fromkeys([*SHORT_KEYS, target, *wins])], max_columns=0)] if test else []
    table = pd.concat([*tables, gaps.set_axis(["", "without numbers"], axis="columns")], ignore_index=True)
    text, _ = recommend(measured, target, runs.kl_budget)
    short = "\n".join([text, *(f"Without numbers: {': '.join(gap)}" for gap in gaps.head(MAX_GAPS).to_numpy())])
    if differences := list_differences(runs):
        text += "\n\nThey differ, beside beta and seed, in:\n" + "\n".join(differences)
    for first in measured[:1].itertuples():
        text = f"{caption(runs.policies[f'dpo/{first.name}'], first.reference)}\n\n{text}"
    panels = beta_panels(measured, target) if test else ()
    parts = [Section("All variants", text, table.dropna(axis=1, how="all"), panels, "betas.png", short=short)]
    if chosen_from := {name: cells for name, cells in validation.items() if cells}:
        table = policy_table(chosen_from, [*dict.fromkeys(["kl", "margin_nats", target])], max_columns=0)
        parts.append(Section("Validation, by which beta is chosen", table=table))
    return parts


def list_differences(runs: Runs) -> list[str]:
    """A line for each variant with the keys in which the variants differ, beta and seed apart: names may be hashes."""
    manifests = {name: read_json(runs.home / "dpo" / name / "manifest.json") for name in runs.variants["name"]}
    identities = pd.DataFrame({name: manifest["identity"] for name, manifest in manifests.items() if manifest})
    identities = identities.drop(["beta", "seed"], errors="ignore").map(lambda value: str(value)[:40])
    identities = identities[identities.nunique(axis=1) > 1]
    lines = {name: ", ".join(f"{key}={value}" for key, value in column.items()) for name, column in identities.items()}
    return [f"- {name}: {line}" for name, line in lines.items() if line]


def beta_panels(variants: pd.DataFrame, target: str) -> tuple[Panel, ...]:
    """Each quantity against beta on test, a line for each setting; 95% intervals, over seeds if several."""
    titles = {key: label_of(key) for key in dict.fromkeys([*PLOTTED, target])}
    return tuple(
        Panel(title, draw_png(lambda axis, key=key: draw_betas(axis, variants, key), title))
        for key, title in titles.items()
    )


def draw_betas(axis: Any, variants: pd.DataFrame, key: str) -> None:
    """One quantity on a logarithmic axis that names each beta; the seeds as dots."""
    settings, betas = (sorted(variants[column].unique()) for column in ("setting", "beta"))
    for index, setting in enumerate(settings):
        groups = {beta: list(group["test"]) for (name, beta), group in grouped(variants, "test") if name == setting}
        seeds = max(map(len, groups.values()))
        label = shorten(setting) + (f", {seeds} seeds" if seeds > 1 else "")
        label = label if len(settings) > 1 or seeds > 1 else None
        plot_estimates(axis, list(groups), [over_seeds(cells, key) for cells in groups.values()], index, label)
        if seeds > 1:
            dots = [(beta, each[key]["value"]) for beta, cells in groups.items() for each in cells]
            axis.plot(*zip(*dots, strict=True), ".", color=GREY, zorder=0)
    axis.set(xscale="log", xlabel="beta")
    axis.minorticks_off()
    edge = 10 ** (0.1 * (math.log10(betas[-1] / betas[0]) or 1))
    axis.set_xlim(betas[0] / edge, betas[-1] * edge)
    axis.set_xticks(betas, [f"{beta:g}" for beta in betas])
    if key == "kl":
        axis.set_ylim(bottom=0)
    if key == "preference_accuracy":
        axis.set_ylim(top=min(1.0, axis.get_ylim()[1]))


def temperatures(runs: Runs) -> list[Section]:
    """Win rates over the data's completions against temperature (DPO paper, Figures 2 right and 3), for each judge."""
    lines = []
    for name, cells in runs.cells.items():
        for key, value in cells.items():
            if match := re.fullmatch(r"win_rate\.([^.]+)\.(chosen|demonstration)(?:\.t(.+))?", key):
                judge, opponent, temperature = match.groups()
                lines.append([judge, opponent, name, float(temperature or 1), value])
    table = pd.DataFrame(lines, columns="judge opponent policy temperature value".split())
    panels, groups = [], [*table.groupby(["judge", "opponent"], sort=False)][:MAX_JUDGES]
    for (judge, opponent), group in groups:
        title, size = f"Wins over the {opponent} completion, by {judge}", WIDE if len(groups) == 1 else SIZE
        panels.append(Panel(title, draw_png(lambda axis, group=group: draw_wins(axis, group), title, size)))
    text = (
        "How often a policy's completion is better than the data's own one; a tie counts one half. What wins at one "
        "temperature alone has learnt a mode, not a distribution."
    )
    return [Section("Win rate against temperature", text, None, tuple(panels), "temperatures.png")] if panels else []


def draw_wins(axis: Any, lines: pd.DataFrame) -> None:
    """Win rates by temperature, a line for each policy."""
    axis.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
    for index, (policy, group) in enumerate(lines.groupby("policy", sort=False)):
        group = group.sort_values("temperature")
        name = shorten(policy.removeprefix("dpo/"), 23)
        plot_estimates(axis, list(group["temperature"]), list(group["value"]), index, name)
    axis.set(xlabel="temperature", ylim=(0, 1), xticks=sorted(lines["temperature"].unique()))
