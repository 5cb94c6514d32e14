"""All DPO variants of a name against beta, the beta that validation recommends, and win rates against temperature."""

import json
import re
from typing import Any

import pandas as pd

from dpo_pipeline.record import read_json
from dpo_pipeline.report.comparison import caption, policy_table
from dpo_pipeline.report.figures import GREY, LINES, SIZE, WIDE, beta_axis, draw_png, error_bars
from dpo_pipeline.report.runs import Runs, grouped, over_seeds, recommend
from dpo_pipeline.report.section import SHORT_KEYS, Panel, Section, label_of, shorten

PLOTTED = ("preference_accuracy", "margin_nats", "kl")  # and the target
MAX_JUDGES = 4  # panels of win rates
MAX_GAPS = 4  # variants without numbers that a terminal names


def all_variants(runs: Runs) -> list[Section]:
    """The variants on test, those on validation by which a beta is chosen, and each quantity against beta."""
    if len(runs.variants) < 2:
        return []
    measured, target = runs.measured, runs.target
    gaps = runs.variants.loc[runs.variants["problem"] != "", ["name", "problem"]]
    of_this_command = gaps["problem"].str.startswith("failed: ")
    gaps = pd.concat([gaps[of_this_command], gaps[~of_this_command]])
    test, validation = (dict(zip(measured["name"], measured[split], strict=True)) for split in ("test", "validation"))
    wins = [key for cells in test.values() for key in cells if re.match(r"win_rate\.[^.]+\.(sft|reference)$", key)]
    tables = [policy_table(test, [*dict.fromkeys([*SHORT_KEYS, target, *wins])], max_columns=0)] if test else []
    table = pd.concat([*tables, gaps.set_axis(["", "without numbers"], axis="columns")], ignore_index=True)
    text, _ = recommend(measured, target, runs.kl_budget)
    short = [text, *(f"Without numbers: {name}: {problem}" for name, problem in gaps.head(MAX_GAPS).to_numpy())]
    blocks = [caption(runs.policies[f"dpo/{first.name}"], first.reference) for first in measured[:1].itertuples()]
    if differences := list_differences(runs):
        text += "\n\nThey differ, beside beta and seed, in:\n" + "\n".join(differences)
    panels = beta_panels(measured, target) if test else ()
    text = "\n\n".join([*blocks, text])
    sections = [
        Section("All variants", text, table.dropna(axis=1, how="all"), panels, "betas.png", short="\n".join(short))
    ]
    if chosen_from := {name: cells for name, cells in validation.items() if cells}:
        table = policy_table(chosen_from, [*dict.fromkeys(["kl", "margin_nats", target])], max_columns=0)
        sections.append(Section("Validation, by which beta is chosen", table=table))
    return sections


def list_differences(runs: Runs) -> list[str]:
    """A line for each variant with the keys in which the variants differ, beta and seed apart: names may be hashes."""
    manifests = {name: read_json(runs.home / "dpo" / name / "manifest.json") for name in runs.variants["name"]}
    identities = {name: manifest["identity"] for name, manifest in manifests.items() if manifest}
    keys = sorted({key for identity in identities.values() for key in identity} - {"beta", "seed"})
    keys = [key for key in keys if len({json.dumps(identity.get(key)) for identity in identities.values()}) > 1]
    lines = []
    for name, identity in identities.items():
        lines.append(f"- {name}: " + ", ".join(f"{key}={str(identity.get(key))[:40]}" for key in keys))
    return lines if keys else []


def beta_panels(variants: pd.DataFrame, target: str) -> tuple[Panel, ...]:
    """Each quantity against beta on test, a line for each setting; 95% intervals, over seeds if several."""
    betas, panels = sorted(variants["beta"].unique()), []

    def draw(axis: Any, key: str) -> None:
        settings = sorted(variants["setting"].unique())
        for index, setting in enumerate(settings):
            groups = {beta: group for (name, beta), group in grouped(variants, "test") if name == setting}
            points = [over_seeds(list(group["test"]), key) for group in groups.values()]
            seeds, values = max(map(len, groups.values())), [point["value"] for point in points]
            label = shorten(setting) + (f", {seeds} seeds" if seeds > 1 else "")
            label = label if len(settings) > 1 or seeds > 1 else None
            style = {"marker": "o", "capsize": 3, "label": label, "color": LINES[index % len(LINES)]}
            axis.errorbar(list(groups), values, yerr=error_bars(points), **style)
            if seeds > 1:
                dots = [(beta, cells[key]["value"]) for beta, group in groups.items() for cells in group["test"]]
                axis.plot(*zip(*dots, strict=True), ".", color=GREY, zorder=0)
        beta_axis(axis, betas)
        if key == "kl":
            axis.set_ylim(bottom=0)
        if key == "preference_accuracy":
            axis.set_ylim(top=min(1.0, axis.get_ylim()[1]))

    for key in dict.fromkeys([*PLOTTED, target]):
        title = label_of(key)
        panels.append(Panel(title, draw_png(lambda axis, key=key: draw(axis, key), title)))
    return tuple(panels)


def temperatures(runs: Runs) -> list[Section]:
    """Win rates over the data's completions against temperature (DPO paper, Figures 2 right and 3), for each judge."""
    cells = {name: policy["own"] for name, policy in runs.policies.items()}
    if best := runs.results.get("best_of"):
        cells[best["name"]] = best["own"]
    lines = []
    for name, own in cells.items():
        for key, value in own.items():
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
        values = list(group["value"])
        style = {
            "marker": "o",
            "capsize": 3,
            "color": LINES[index % len(LINES)],
            "label": shorten(policy.removeprefix("dpo/"), 23),
        }
        axis.errorbar(group["temperature"], [v["value"] for v in values], yerr=error_bars(values), **style)
    axis.set(xlabel="temperature", ylim=(0, 1), xticks=sorted(lines["temperature"].unique()))
