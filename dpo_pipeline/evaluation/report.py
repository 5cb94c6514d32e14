"""What an evaluation or a DPO run says at its end: in short on the terminal, whole in report/report.md."""

import logging
import re
from pathlib import Path
from typing import Any

from dpo_pipeline.evaluation import sweep_report, tables
from dpo_pipeline.evaluation.policies import Policy, preferred_ft_names
from dpo_pipeline.formatting import format_estimate
from dpo_pipeline.record import read_json

log = logging.getLogger(__name__)

EXAMPLES = 2  # on the terminal, and of each kind of change in the report
MAX_LINES = 12  # policies in the table on the terminal


def report(home: Path, results: dict[str, Any], policies: list[Policy], kl_budget: float, write_sweep: bool) -> None:
    """Print the verdict, one table and two prompts, and write all tables to report/report.md in `home`.

    `policies` are those of this command, DPO first; without `write_sweep` the sweep's files stay as they are.
    """
    by_name = {policy.name: policy for policy in reversed(policies) if policy.is_shown}
    by_policy, subject, sweep = results["policies"], policies[0], ""
    if sum(name.startswith("dpo/") for name in by_name) > 1 and write_sweep:
        sweep, recommended = sweep_report.sweep_report(home, kl_budget, {})
        subject = by_name.get(f"dpo/{recommended}", subject)
    against = "base" if "base" in by_policy else "reference"
    reference = "the base model" if against == "base" else str(subject.reference)
    caption = tables.caption(by_policy[subject.name], reference, beta=against != "base")
    sentences = verdict(results, subject, kl_budget)
    cells = tables.cells_against(by_policy, list(by_name), against)
    samples = read_json(home / "generation_samples.json")
    names = [name for name in by_name if name in ("base", subject.sft, subject.name)]
    best = {best["name"]: best["own"]} if (best := results.get("best_of")) else {}
    sections = {"Verdict": sentences, "Comparison": f"{caption}\n\n{tables.comparison(cells | best)}"}
    sections |= {"All variants": sweep} if sweep else {}
    sections |= reference_sections(by_policy, by_name, subject) | judge_sections(results, subject)
    sections["Completions"] = tables.side_by_side(samples, names, 10)
    text = "\n\n".join(f"## {title}\n\n{body}" for title, body in sections.items())
    (home / "report").mkdir(parents=True, exist_ok=True)
    (home / "report" / "report.md").write_text(f"# {home.name}\n\n{text}\n", encoding="utf-8")
    listed = {name: cells[name] for name in cells if len(cells) <= MAX_LINES or name in names}
    judge_keys = [key for key in cells[subject.name] if re.match(r"(win_rate|score)\.[^.]+(\.[a-z]+)?$", key)]
    judge_keys = sorted(judge_keys, key=lambda key: not key.endswith((".sft", ".reference")))[:1]
    written = "results.json, generation_samples.json, report/report.md"
    for block in (
        *(sentences, caption, tables.comparison(listed, [*tables.SHORT_KEYS, *judge_keys])),
        *(tables.side_by_side(samples, names, EXAMPLES), f"Results: {home}/{written}\nPolicy:  {subject.path}"),
    ):
        log.info("\n%s", block)


def reference_sections(by_policy: dict[str, Any], by_name: dict[str, Policy], subject: Policy) -> dict[str, str]:
    """Each DPO against its own reference, and the accuracy of one by kind of pair."""
    sections: dict[str, str] = {}
    for reference in dict.fromkeys(policy.reference for policy in by_name.values() if policy.reference):
        names = [name for name, policy in by_name.items() if policy.reference == reference]
        table = tables.comparison(tables.cells_against(by_policy, names, "reference", with_own=False))
        sections[f"Against DPO's own reference, {reference}"] = table
    against = by_policy[subject.name]["against"]["reference" if subject.reference else "base"]
    sections[f"Accuracy of {subject.name} by kind of pair"] = tables.accuracy_by_subset(against)
    if preferred_ft := preferred_ft_names(list(by_name.values())):
        sections["Preferred-FT"] = f"SFT on the chosen completions: {', '.join(preferred_ft)}"
    return sections


def judge_sections(results: dict[str, Any], subject: Policy) -> dict[str, str]:
    """What the judges say beyond the comparison, and the examples that changed most."""
    sections = {
        f"Any two policies by {name}: wins, and the mean difference with its p": tables.pairwise_table(rows)
        for name, rows in results["comparisons"].items()
        if rows
    }
    if best := results.get("best_of"):
        title = f"Best of N completions of {best['policy']}, picked by {best['judge']}"
        sections[title] = tables.best_of_n_table(best)
    if "safety" in results:
        sections["Prompts labelled safe and unsafe"] = tables.safety_table(results["safety"])
    if "bias" in results:
        sections["Prompts in groups"] = tables.bias_table(results["bias"])
    changes = dict(results["notable"].get(subject.name, {}))
    before = changes.pop("before", None)
    for change in changes.values():
        text = tables.changes_as_markdown(change, before, subject.name, EXAMPLES)
        sections[f"Changes by {change['quantity']}"] = text
    return sections


def verdict(results: dict[str, Any], subject: Policy, kl_budget: float) -> str:
    """In words: is the policy better than what it is to beat, at what KL, and what to watch out for."""
    own = results["policies"][subject.name]["own"]
    against = results["policies"][subject.name]["against"]["reference" if subject.reference else "base"]
    sentences = []
    for judge, rows in results["comparisons"].items():
        row = next((row for row in rows if {row["one"], row["other"]} == {subject.name, subject.sft}), None)
        if row is None or judge == "length":  # a control, on which no policy is better
            continue
        difference = row["difference"]
        if row["one"] != subject.name and difference["low"] is not None:
            bounds = {"low": -difference["high"], "high": -difference["low"]}
            difference = {**difference, "value": -difference["value"], **bounds}
        word = "better than" if difference["value"] > 0 else "worse than"
        word = f"{word} {subject.sft}" if row["p"] < 0.05 else f"no different from {subject.sft} beyond noise"
        wins = own.get(f"win_rate.{judge}.sft") or own.get(f"win_rate.{judge}.reference")
        won = f", it wins {tables.format_cell(wins)}" if wins else ""
        shown = tables.format_cell(difference)
        sentences.append(f"{subject.name} is {word} by {judge}: difference {shown}, p {row['p']:.2g}{won}.")
    accuracy, kl = against["preference_accuracy"], against["kl"]
    sentences.append(
        f"{'It' if sentences else subject.name} prefers the chosen completion in {format_estimate(accuracy)} of "
        f"{accuracy['n']} test pairs, at a KL of {tables.format_cell(kl)} nats from {subject.reference or 'the base'}."
    )
    judges = [(name, counts) for name, counts in results["judges"].items() if counts["unreadable"]]
    warnings = [f"{each['unreadable']} of {each['results']} results of {name} are unreadable" for name, each in judges]
    if kl["value"] > kl_budget:
        warnings.append(f"KL is above evaluation.kl_budget={kl_budget:g}")
    if subject.sft in results["policies"]:
        before = results["policies"][subject.sft]["own"]
        if own["stop_rate"]["high"] < before["stop_rate"]["low"]:
            warnings.append("fewer completions come to an end")
        if (own["completion_tokens"]["low"] or 0) > (before["completion_tokens"]["high"] or 1e9):
            warnings.append("its completions are longer, which many judges like")
    return "\n".join([*sentences, *([f"Watch out: {'; '.join(warnings)}."] if warnings else [])])
