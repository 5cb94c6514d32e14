"""Tables that compare policies: on test pairs and samples, by kind of pair, by judges, on other prompts."""

import re
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from dpo_pipeline.report.page import LABELS, Section, as_markdown, format_cell, label_of
from dpo_pipeline.report.runs import Runs

MAX_COLUMNS = 4  # policies beside each other; more stand below each other
MAX_LINES = 8  # policies in the table on the terminal
SHORT_KEYS = ["preference_accuracy", "margin_nats", "kl", "completion_tokens", "stop_rate"]  # and what a judge says
PLAIN_JUDGE_KEYS = re.compile(r"(win_rate|noise_floor|score)\.[^.]+(\.[a-z]+)?$")  # at temperature 1


def comparison(runs: Runs) -> list[Section]:
    """All policies against one reference; on the terminal the six numbers that matter most."""
    if not runs.policies:
        return []
    cells, text = runs.cells, caption(runs.policies[runs.subject], runs.against)
    judged = dict.fromkeys(key for cell in cells.values() for key in cell if PLAIN_JUDGE_KEYS.match(key))
    table = policy_table(cells, [*SHORT_KEYS[:2], "margin", *SHORT_KEYS[2:], *judged])
    names = ("base", runs.policies[runs.subject]["sft"], runs.subject)
    listed = {name: cells[name] for name in cells if len(cells) <= MAX_LINES or name in names}
    judge_keys = sorted(judged.keys() & cells[runs.subject], key=[*judged].index)
    judge_keys.sort(key=lambda key: not key.endswith((".sft", ".reference")))
    short = f"{text}\n\n{as_markdown(policy_table(listed, [*SHORT_KEYS, *judge_keys[:1]]))}"
    if names := preferred_ft(runs.home):
        text += f" Preferred-FT, SFT on the chosen completions: {', '.join(names)}."
    return [Section("Comparison", text, table, short=short)]


def policy_table(
    cells: dict[str, dict[str, Any]], keys: list[str] | None = None, max_columns: int = MAX_COLUMNS
) -> pd.DataFrame:
    """Estimates by policy and key, by default of all keys; of more policies each has a line."""
    estimates = {
        name: {key: value for key, value in cell.items() if isinstance(value, dict) and {"value", "low"} <= {*value}}
        for name, cell in cells.items()
    }
    used = dict.fromkeys(key for cell in estimates.values() for key in cell)
    keys = [key for key in keys or used if key in used]
    table = cell_table({n: {label_of(key): cell.get(key, "") for key in keys} for n, cell in estimates.items()})
    return table if len(cells) <= max_columns else table.set_index("").T.rename_axis("").reset_index()


def cell_table(cells: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """A table with a column for each policy, and a line for each label."""
    return pd.DataFrame(cells, dtype=object).fillna("").reset_index(names="")


def preferred_ft(home: Path) -> list[str]:
    """The SFT policies that learned the chosen completions: Preferred-FT of the DPO paper (arXiv:2305.18290)."""
    configs = {file.parent.name: OmegaConf.load(file) for file in sorted(home.glob("sft/*/config.yaml"))}
    return [f"sft/{name}" for name, each in configs.items() if each.sft_target == "chosen" and not each.sft_dataset]


def caption(policy: dict[str, Any], against: str) -> str:
    """What a comparison is measured on, as this policy is, and against `base`, its own `reference`, or a name."""
    settings = policy["settings"]
    name = {"base": "the base model", "reference": policy["reference"]}.get(against, against)
    sampling = f"temperature 1, at most {settings['max_new_tokens']} tokens"
    if settings["quantization"]:
        sampling += f", weights in {settings['quantization']['_target_'].split('.')[-1]}"
    beta = f"beta {settings['beta']:g}, " if against == "reference" else ""
    return (
        f"All against {name}: {settings['pairs']:,} test pairs and {settings['prompts']} sampled completions of "
        f"{settings['prompts_file'] or policy['dataset']} ({sampling}), {beta}95% intervals."
    )


def all_estimates(runs: Runs) -> list[Section]:
    """All that is measured of all policies, and of each DPO against its own reference."""
    if not runs.policies:
        return []
    by_reference: dict[str, Any] = {}
    for name, policy in runs.policies.items():
        if policy["reference"] and runs.against == "base":
            by_reference.setdefault(policy["reference"], {})[name] = policy["against"]["reference"]
    title = "Against DPO's own reference"
    parts = [Section(f"{title}, {name}", table=policy_table(cells)) for name, cells in by_reference.items()]
    return [*parts, Section("All estimates", table=policy_table(runs.cells))]


def accuracy_by_kind(runs: Runs) -> list[Section]:
    """The accuracy by source, and by quarters of length difference (tokens) and reference margin (nats)."""
    if not runs.policies:
        return []
    result = runs.policies[runs.subject]
    against = result["against"]["reference" if result["reference"] else "base"]
    sources = against["accuracy_by_source"] if len(against["accuracy_by_source"]) > 1 else {}
    lines = [{"pairs": name, "n": each["n"], "accuracy": each} for name, each in sources.items()]
    for label in ("length difference", "reference margin"):
        for quarter in against[f"accuracy_by_{label.replace(' ', '_')}"]:
            bounds = f"{label} {quarter['from']:.4g} to {quarter['to']:.4g}"
            line = {"pairs": bounds, "n": quarter["accuracy"]["n"], "accuracy": quarter["accuracy"]}
            lines.append({**line, "accuracy that its rewards predict": quarter["predicted"]})
    text = f"Of {runs.subject}, in quarters of chosen minus rejected: length in tokens, and the reference's margin."
    return [Section("Accuracy by kind of pair", text, pd.DataFrame(lines))]


def by_judges(runs: Runs) -> list[Section]:
    """Every two policies by each judge, and the scores of Best-of-N as N grows, with the upper bound of their KL."""
    parts = []
    columns = {"one": "policy", "other": "against", "win_rate": "wins", "p_adjusted": "p, of all (Holm)"}
    lines = [{"judge": name, **row} for name, rows in runs.results.get("comparisons", {}).items() for row in rows]
    if lines:
        text = "Wins of the first, and the mean difference of scores with its p: a paired sign-flip test."
        parts.append(Section("Any two policies", text, pd.DataFrame(lines).rename(columns=columns)))
    if best := runs.results.get("best_of"):
        points = pd.DataFrame(best["points"]).rename(columns={"n": "N", "kl_bound": "KL, at most, nats"})
        title = f"Best of N completions of {best['policy']}, picked by {best['judge']}"
        scores = {key: label_of(key) for key in points if key.startswith("score.")}
        parts.append(Section(title, table=points.rename(columns=scores)))
    return parts


def other_prompts(runs: Runs) -> list[Section]:
    """Refusals and scores on prompts labelled safe and unsafe, and what differs between groups of prompts."""
    safety: dict[str, dict[str, Any]] = {}
    for policy, estimates in runs.results.get("safety", {}).items():
        safety[policy] = {f"unreadable: {judge}": n for judge, n in estimates["unread"].items() if n}
        for key in (key for key in estimates if key != "unread"):
            judge, _, label = key.removeprefix("score.").rpartition(".")
            safety[policy][LABELS.get(key, f"score by {judge}, {label} prompts")] = estimates[key]
    bias: dict[str, dict[str, Any]] = {}
    for policy, quantities in runs.results.get("bias", {}).items():
        bias[policy] = {}
        for name, result in quantities.items():
            if gap := result.get("largest"):
                rows = dict(result["groups"])
                if len(rows) > 2:  # of two groups one gap says all
                    rows |= {f"{group} minus the rest": value for group, value in result["against_rest"].items()}
                rows["largest gap"] = f"{' - '.join(gap['groups'])}: {format_cell(gap['difference'])}"
                bias[policy] |= {f"{name}, {label}": value for label, value in rows.items()}
            if result["unread"]:
                bias[policy][f"{name}, unreadable"] = result["unread"]
    parts = {"Prompts labelled safe and unsafe": safety, "Prompts in groups": bias}
    return [Section(title, table=cell_table(cells)) for title, cells in parts.items() if cells]
