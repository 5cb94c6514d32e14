"""In words: is the policy better than what it is to beat, by how much, at what KL, and what to watch out for."""

from typing import Any

from dpo_pipeline.report.page import Section, format_cell
from dpo_pipeline.report.runs import Runs


def verdict(runs: Runs) -> list[Section]:
    """The policy against its SFT by each judge, its accuracy and KL, and warnings; a sentence each."""
    if not runs.policies:
        return []
    result, comparisons = runs.policies[runs.subject], runs.results.get("comparisons", {})
    against, sides = result["against"]["reference" if result["reference"] else "base"], {runs.subject, result["sft"]}
    sentences = [
        judge_sentence(judge, row, runs.subject, result)
        for judge, rows in comparisons.items()
        for row in rows
        if judge != "length" and {row["one"], row["other"]} == sides  # a judge of length is a control
    ]
    accuracy, kl = against["preference_accuracy"], against["kl"]
    sentences.append(
        f"{'It' if sentences else runs.subject} prefers the chosen completion in {format_cell(accuracy)} of "
        f"{accuracy['n']} test pairs, at a KL of {format_cell(kl)} nats from {result['reference'] or 'the base'}."
    )
    if warnings := list_warnings(runs, result, kl["value"]):
        sentences.append(f"Watch out: {'; '.join(warnings)}.")
    return [Section("Verdict", "\n\n".join(sentences), short="\n".join(sentences))]


def judge_sentence(judge: str, row: dict[str, Any], subject: str, result: dict[str, Any]) -> str:
    """What a judge says of the subject against the policy to beat, which the row may name first."""
    difference, opponent = row["difference"], result["sft"]
    if row["one"] != subject:
        low, high = (None if (bound := difference[key]) is None else -bound for key in ("high", "low"))
        difference = {**difference, "value": -difference["value"], "low": low, "high": high}
    word = f"{'better' if difference['value'] > 0 else 'worse'} than {opponent}"
    if row["p"] >= 0.05:
        word = f"no different from {opponent} beyond noise"
    keys = [key for key in (f"win_rate.{judge}.sft", f"win_rate.{judge}.reference") if key in result["own"]]
    won = f", it wins {format_cell(result['own'][keys[0]])}" if keys else ""
    return f"{subject} is {word} by {judge}: difference {format_cell(difference)}, p {row['p']:.2g}{won}."


def list_warnings(runs: Runs, result: dict[str, Any], kl: float) -> list[str]:
    """What to watch out for."""
    judges = [(name, each) for name, each in runs.results.get("judges", {}).items() if each["unreadable"]]
    warnings = [f"{each['unreadable']} of {each['results']} results of {name} are unreadable" for name, each in judges]
    if kl > runs.kl_budget:
        warnings.append(f"KL is above evaluation.kl_budget={runs.kl_budget:g}")
    if result["sft"] in runs.policies:
        own, before = result["own"], runs.policies[result["sft"]]["own"]
        if own["stop_rate"]["high"] < before["stop_rate"]["low"]:
            warnings.append("fewer completions come to an end")
        if (own["completion_tokens"]["low"] or 0) > (before["completion_tokens"]["high"] or 1e9):
            warnings.append("its completions are longer, which many judges like")
    return warnings
