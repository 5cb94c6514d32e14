"""Tables that compare policies: on test pairs and samples, by kind of pair, by judges, on other prompts."""

import re
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from dpo_pipeline.formatting import markdown_table
from dpo_pipeline.report.runs import Runs
from dpo_pipeline.report.section import JUDGE_KEYS, ROWS, SHORT_KEYS, Section, format_cell, label_of, table_rows

MAX_COLUMNS = 4  # policies beside each other; more stand below each other
PLAIN_JUDGE_KEYS = re.compile(r"(win_rate|noise_floor|score)\.[^.]+(\.[a-z]+)?$")  # at temperature 1
MAX_LINES = 8  # policies in the table on the terminal


def comparison(runs: Runs) -> list[Section]:
    """All policies against one reference; on the terminal the six numbers that matter most."""
    if not runs.policies:
        return []
    cells = every_cell(runs)
    text, subject = caption(runs.policies[runs.subject], runs.against), cells[runs.subject]
    judged = dict.fromkeys(key for cell in cells.values() for key in cell if PLAIN_JUDGE_KEYS.match(key))
    table = policy_table(cells, [*SHORT_KEYS[:2], "margin", *SHORT_KEYS[2:], *judged])
    names = ("base", runs.policies[runs.subject]["sft"], runs.subject)
    listed = {name: cells[name] for name in cells if len(cells) <= MAX_LINES or name in names}
    judge_keys = [key for key in subject if PLAIN_JUDGE_KEYS.match(key)]
    judge_keys = sorted(judge_keys, key=lambda key: not key.endswith((".sft", ".reference")))[:1]
    short = f"{text}\n\n{as_markdown(policy_table(listed, [*SHORT_KEYS, *judge_keys]))}"
    if names := preferred_ft(runs.home):
        text += f" Preferred-FT, SFT on the chosen completions: {', '.join(names)}."
    return [Section("Comparison", text, table, short=short)]


def all_estimates(runs: Runs) -> list[Section]:
    """All that is measured of all policies."""
    if not runs.policies:
        return []
    return [Section("All estimates", table=policy_table(every_cell(runs)))]


def every_cell(runs: Runs) -> dict[str, dict[str, Any]]:
    """The estimates of each policy, and of Best-of-N."""
    cells = {name: runs.cells(name, runs.against) for name in runs.policies}
    if best := runs.results.get("best_of"):
        cells[best["name"]] = best["own"]
    return cells


def policy_table(
    cells: dict[str, dict[str, Any]], keys: list[str] | None = None, max_columns: int = MAX_COLUMNS
) -> pd.DataFrame:
    """Estimates by policy and key, by default of all keys that it knows; of more policies each has a line."""
    judged = dict.fromkeys(key for cell in cells.values() for key in cell if JUDGE_KEYS.match(key))
    keys = [key for key in keys or [*ROWS, *judged] if any(key in cell for cell in cells.values())]
    table = cell_table({name: {label_of(key): cell.get(key, "") for key in keys} for name, cell in cells.items()})
    return table if len(cells) <= max_columns else table.set_index("").T.rename_axis("").reset_index()


def cell_table(cells: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """A table with a column for each policy, and a line for each label."""
    labels = dict.fromkeys(label for cell in cells.values() for label in cell)
    columns = {name: [cell.get(label, "") for label in labels] for name, cell in cells.items()}
    return pd.DataFrame({"": list(labels), **columns}, dtype=object)


def as_markdown(table: pd.DataFrame) -> str:
    """A table as Markdown that reads in a terminal too."""
    return markdown_table([[*table.columns], *([format_cell(cell) for cell in row] for row in table_rows(table))])


def preferred_ft(home: Path) -> list[str]:
    """The SFT policies that learned the chosen completions: Preferred-FT of the DPO paper (arXiv:2305.18290)."""
    configs = {file.parent.name: OmegaConf.load(file) for file in sorted(home.glob("sft/*/config.yaml"))}
    return [f"sft/{name}" for name, each in configs.items() if each.sft_target == "chosen" and not each.sft_dataset]


def caption(policy: dict[str, Any], against: str) -> str:
    """What a comparison is measured on, as this policy is, and against what."""
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


def own_reference(runs: Runs) -> list[Section]:
    """Each DPO against its own reference."""
    by_reference: dict[str, Any] = {}
    for name, policy in runs.policies.items():
        if policy["reference"] and runs.against == "base":
            by_reference.setdefault(policy["reference"], {})[name] = policy["against"]["reference"]
    title = "Against DPO's own reference"
    return [Section(f"{title}, {name}", table=policy_table(cells)) for name, cells in by_reference.items()]


def accuracy_by_kind(runs: Runs) -> list[Section]:
    """The accuracy by source, and by quarters of length difference (tokens) and reference margin (nats)."""
    if not runs.policies:
        return []
    result = runs.policies[runs.subject]
    against = result["against"]["reference" if result["reference"] else "base"]
    lines: list[dict[str, Any]] = []
    if len(by_source := against["accuracy_by_source"]) > 1:
        lines += [{"pairs": name, "n": each["n"], "accuracy": each} for name, each in by_source.items()]
    for label in ("length difference", "reference margin"):
        for quarter in against[f"accuracy_by_{label.replace(' ', '_')}"]:
            bounds = f"{label} {quarter['from']:.4g} to {quarter['to']:.4g}"
            lines.append({"pairs": bounds, "n": quarter["accuracy"]["n"], "accuracy": quarter["accuracy"]})
            lines[-1]["accuracy that its rewards predict"] = quarter["predicted"]
    text = f"Of {runs.subject}, in quarters of chosen minus rejected: length in tokens, and the reference's margin."
    return [Section("Accuracy by kind of pair", text, pd.DataFrame(lines))]


def any_two(runs: Runs) -> list[Section]:
    """Every two policies by each judge: how often the first wins, and whether their scores differ."""
    lines = []
    for judge, rows in runs.results.get("comparisons", {}).items():
        for row in rows:
            line = {"judge": judge, "policy": row["one"], "against": row["other"], "wins": row["win_rate"]}
            line |= {"difference": row["difference"], "p": row["p"], "p, of all (Holm)": row["p_adjusted"]}
            lines.append(line)
    text = "Wins of the first, and the mean difference of scores with its p: a paired sign-flip test."
    return [Section("Any two policies", text, pd.DataFrame(lines))] if lines else []


def best_of_n_table(runs: Runs) -> list[Section]:
    """Best-of-N: the scores of the picked completions as N grows, with the upper bound of their KL."""
    if (best := runs.results.get("best_of")) is None:
        return []
    lines = []
    for point in best["points"]:
        scores = {label_of(key): value for key, value in point.items() if key.startswith("score.")}
        lines.append({"N": point["n"], "KL, at most, nats": f"{point['kl_bound']:.3f}", **scores})
    return [
        Section(f"Best of N completions of {best['policy']}, picked by {best['judge']}", table=pd.DataFrame(lines))
    ]


def safety_table(runs: Runs) -> list[Section]:
    """Refusal and over-refusal, and scores, on prompts labelled safe and unsafe, a column for each policy."""
    cells: dict[str, dict[str, Any]] = {}
    for policy, estimates in runs.results.get("safety", {}).items():
        cells[policy] = {f"unreadable: {judge}": n for judge, n in estimates["unread"].items() if n}
        for key in (key for key in estimates if key != "unread"):
            judge, _, label = key.removeprefix("score.").rpartition(".")
            cells[policy][ROWS.get(key, f"score by {judge}, {label} prompts")] = estimates[key]
    return [Section("Prompts labelled safe and unsafe", table=cell_table(cells))] if cells else []


def bias_table(runs: Runs) -> list[Section]:
    """What differs between groups of prompts, a column for each policy; of two groups one gap says all."""
    cells: dict[str, dict[str, Any]] = {}
    for policy, quantities in runs.results.get("bias", {}).items():
        cells[policy] = {}
        for name, result in quantities.items():
            if gap := result.get("largest"):
                rows = dict(result["groups"])
                if len(rows) > 2:
                    rows |= {f"{group} minus the rest": value for group, value in result["against_rest"].items()}
                rows["largest gap"] = f"{' - '.join(gap['groups'])}: {format_cell(gap['difference'])}"
                cells[policy] |= {f"{name}, {label}": value for label, value in rows.items()}
            if result["unread"]:
                cells[policy][f"{name}, unreadable"] = result["unread"]
    return [Section("Prompts in groups", table=cell_table(cells))] if cells else []
