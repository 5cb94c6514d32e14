"""In words: is the policy better than what it is to beat, by how much, at what KL, and what to watch out for."""

from typing import Any

from dpo_pipeline.formatting import format_estimate
from dpo_pipeline.report.runs import Runs
from dpo_pipeline.report.section import Section, format_cell


def verdict(runs: Runs) -> list[Section]:
    """The policy against its SFT by each judge, its accuracy and KL, and warnings; a sentence each."""
    if not runs.policies:
        return []
    result = runs.policies[runs.subject]
    against = result["against"]["reference" if result["reference"] else "base"]
    sentences = judge_sentences(runs, runs.subject, result["sft"])
    accuracy, kl = against["preference_accuracy"], against["kl"]
    sentences.append(
        f"{'It' if sentences else runs.subject} prefers the chosen completion in {format_estimate(accuracy)} of "
        f"{accuracy['n']} test pairs, at a KL of {format_cell(kl)} nats from {result['reference'] or 'the base'}."
    )
    if warnings := list_warnings(runs, result, kl["value"]):
        sentences.append(f"Watch out: {'; '.join(warnings)}.")
    return [Section("Verdict", "\n\n".join(sentences), short="\n".join(sentences))]


def judge_sentences(runs: Runs, subject: str, opponent: str | None) -> list[str]:
    """What each judge says of the subject against its opponent; one of length is a control, and says nothing."""
    sentences, own = [], runs.policies[subject]["own"]
    for judge, rows in runs.results.get("comparisons", {}).items():
        row = next((row for row in rows if {row["one"], row["other"]} == {subject, opponent}), None)
        if row is None or judge == "length":
            continue
        difference = row["difference"]
        if row["one"] != subject:
            bounds = {"value": -difference["value"]}
            if difference["low"] is not None:
                bounds |= {"low": -difference["high"], "high": -difference["low"]}
            difference = difference | bounds
        word = f"better than {opponent}" if difference["value"] > 0 else f"worse than {opponent}"
        if row["p"] >= 0.05:
            word = f"no different from {opponent} beyond noise"
        wins = own.get(f"win_rate.{judge}.sft") or own.get(f"win_rate.{judge}.reference")
        won = f", it wins {format_cell(wins)}" if wins else ""
        sentences.append(
            f"{subject} is {word} by {judge}: difference {format_cell(difference)}, p {row['p']:.2g}{won}."
        )
    return sentences


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
