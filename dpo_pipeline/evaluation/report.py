"""What an evaluation or a DPO run says at its end: in short on the terminal, whole in report/report.md."""

import logging
import re
from pathlib import Path
from typing import Any

from dpo_pipeline.evaluation import policies as policy_names
from dpo_pipeline.evaluation import sweep_report, tables
from dpo_pipeline.evaluation.policies import Policy
from dpo_pipeline.formatting import format_estimate
from dpo_pipeline.record import read_json

log = logging.getLogger(__name__)

EXAMPLES = 2  # on the terminal, and of each kind of change in the report
MAX_LINES = 12  # policies in the table on the terminal
Sections = list[tuple[str, str]]  # title and Markdown


def report(home: Path, results: dict[str, Any], policies: list[Policy], kl_budget: float, write_sweep: bool) -> None:
    """Print the verdict, one table and two prompts, and write all tables to report/report.md in `home`.

    `policies` are those of this command, DPO first; without `write_sweep` the sweep's files stay as they are.
    """
    shown = {policy.name: policy for policy in reversed(policies) if policy.is_shown}
    subject, sweep = policies[0], ""
    if sum(name.startswith("dpo/") for name in shown) > 1 and write_sweep:
        sweep, recommended = sweep_report.sweep_report(home, kl_budget, {})
        subject = shown.get(f"dpo/{recommended}", subject)
    against = "base" if "base" in results["policies"] else "reference"
    sections = make_sections(results, shown, subject, against, kl_budget)
    if sweep:
        sections.insert(3, ("All variants", sweep))
    samples = read_json(home / "generation_samples.json")
    names = [name for name in shown if name in ("base", subject.sft, subject.name)]
    sections.append(("Completions", tables.side_by_side(samples, names, 10)))
    file = home / "report" / "report.md"
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(f"## {title}\n\n{body}" for title, body in sections)
    file.write_text(f"# {home.name}\n\n{text}\n", encoding="utf-8")
    listed = [name for name in shown if name in names] if len(shown) > MAX_LINES else list(shown)
    cells = tables.cells_against(results["policies"], listed, against)
    judge_keys = [
        key
        for key in cells[subject.name]
        if key.startswith(("win_rate.", "score.")) and not re.search(r"\.t[\d.]+$", key)
    ]
    judge_keys = sorted(judge_keys, key=lambda key: not key.endswith((".sft", ".reference")))[:1]
    blocks = [
        *(
            sections[0][1],
            sections[1][1].split("\n\n")[0],
            tables.comparison(cells, [*tables.SHORT_KEYS, *judge_keys]),
        ),
        tables.side_by_side(samples, names, EXAMPLES),
        f"Results: {home}/results.json, generation_samples.json, report/report.md\nPolicy:  {subject.path}",
    ]
    for block in blocks:
        log.info("\n%s", block)


def make_sections(
    results: dict[str, Any], shown: dict[str, Policy], subject: Policy, against: str, kl_budget: float
) -> Sections:
    """All tables of the results, the verdict first."""
    by_policy = results["policies"]
    result = by_policy[subject.name]
    reference = "the base model" if against == "base" else str(subject.reference)
    cells = tables.cells_against(by_policy, list(shown), against)
    if best := results.get("best_of"):
        cells[best["name"]] = best["own"]
    caption = tables.caption(result, reference, beta=against != "base")
    sections = [("Verdict", verdict(results, subject, kl_budget))]
    sections.append(("Comparison", f"{caption}\n\n{tables.comparison(cells)}"))
    if against == "base":
        by_reference: dict[str, list[str]] = {}
        for name, policy in shown.items():
            if policy.reference:
                by_reference.setdefault(policy.reference, []).append(name)
        for name, tuned in by_reference.items():
            table = tables.comparison(tables.cells_against(by_policy, tuned, "reference", with_own=False))
            sections.append((f"Against DPO's own reference, {name}", table))
    kind = "reference" if subject.reference else "base"
    sections.append(
        (f"Accuracy of {subject.name} by kind of pair", tables.accuracy_by_subset(result["against"][kind]))
    )
    if preferred_ft := policy_names.preferred_ft_names(list(shown.values())):
        sections.append(("Preferred-FT", f"SFT on the chosen completions: {', '.join(preferred_ft)}"))
    for name, rows in results["comparisons"].items():
        if rows:
            title = f"Any two policies by {name}: wins, and the mean difference with its p"
            sections.append((title, tables.pairwise_table(rows)))
    if best:
        title = f"Best of N completions of {best['policy']}, picked by {best['judge']}"
        sections.append((title, tables.best_of_n_table(best)))
    if "safety" in results:
        sections.append(("Prompts labelled safe and unsafe", tables.safety_table(results["safety"])))
    if "bias" in results:
        sections.append(("Prompts in groups", tables.bias_table(results["bias"])))
    changes = results["notable"].get(subject.name, {})
    for key, change in changes.items():
        if key != "before":
            text = tables.changes_as_markdown(change, changes["before"], subject.name, EXAMPLES)
            sections.append((f"Changes by {change['quantity']}", text))
    return sections


def verdict(results: dict[str, Any], subject: Policy, kl_budget: float) -> str:
    """In words: is the policy better than what it is to beat, at what KL, and what to watch out for."""
    name, other, sentences = subject.name, subject.sft, []
    own = results["policies"][name]["own"]
    kind = "reference" if subject.reference else "base"
    against = results["policies"][name]["against"][kind]
    for judge, rows in results["comparisons"].items():
        row = next((row for row in rows if {row["one"], row["other"]} == {name, other}), None)
        if row is None or judge == "length":  # a control, on which no policy is better
            continue
        sign = 1 if row["one"] == name else -1
        difference, is_clear = row["difference"], row["p"] < 0.05
        values = {key: difference[key] and sign * difference[key] for key in ("value", "low", "high")}
        if sign < 0:
            values["low"], values["high"] = values["high"], values["low"]
        word = "no different from" if not is_clear else "better than" if values["value"] > 0 else "worse than"
        noise = "" if is_clear else " beyond noise"
        wins = own.get(f"win_rate.{judge}.sft") or own.get(f"win_rate.{judge}.reference")
        won = f", it wins {tables.format_cell(wins)}" if wins else ""
        text = f"{name} is {word} {other}{noise} by {judge}: difference {tables.format_cell({**values, 'n': difference['n']})}"
        sentences.append(f"{text}, p {row['p']:.2g}{won}.")
    accuracy, kl = against["preference_accuracy"], against["kl"]
    sentences.append(
        f"It prefers the chosen completion in {format_estimate(accuracy)} of {accuracy['n']} test pairs, at a KL of "
        f"{tables.format_cell(kl)} nats from {subject.reference or 'the base'}."
    )
    warnings = [
        f"{counts['unreadable']} of {counts['results']} results of {judge} are unreadable"
        for judge, counts in results["judges"].items()
        if counts["unreadable"]
    ]
    if kl["value"] > kl_budget:
        warnings.append(f"KL is above evaluation.kl_budget={kl_budget:g}")
    if other in results["policies"]:
        before = results["policies"][other]["own"]
        if (own["stop_rate"]["high"] or 1) < (before["stop_rate"]["low"] or 0):
            warnings.append("fewer completions come to an end")
        if (own["completion_tokens"]["low"] or 0) > (before["completion_tokens"]["high"] or 1e9):
            warnings.append("its completions are longer, which many judges like")
    if warnings:
        sentences.append(f"Watch out: {'; '.join(warnings)}.")
    return "\n".join(sentences)
