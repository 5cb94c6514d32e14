"""Prints the tables of a comparison and of an evaluation."""

import logging
from pathlib import Path
from typing import Any

from dpo_pipeline.evaluation import policies_to_compare, safety, sweep_report, tables
from dpo_pipeline.evaluation.examples import changes_as_markdown
from dpo_pipeline.evaluation.judge_results import JudgeResults
from dpo_pipeline.evaluation.measure import Measurements, Policy
from dpo_pipeline.record import read_json
from dpo_pipeline.schema import Run

log = logging.getLogger(__name__)

EXAMPLES_SHOWN = 2


def print_blocks(blocks: list[str]) -> None:
    """Print each block with an empty line before it."""
    for block in blocks:
        log.info("\n%s", block)


def print_comparison(home: Path, results: dict[str, Any], policies: list[Policy]) -> None:
    """Print how a DPO policy, the first, compares with SFT and base, from the results by policy."""
    names = [policy.name for policy in reversed(policies) if policy.is_shown]
    dpo = policies[0]
    print_blocks(
        [
            tables.caption(results[dpo.name], "the base model"),
            tables.comparison(results, names, "base"),
            tables.caption(results[dpo.name], f"DPO's own reference, {dpo.reference}"),
            tables.comparison(results, [dpo.name], "reference", with_own=False),
            tables.side_by_side(read_json(home / "generation_samples.json"), names),
            f"Results: {home}/results.json, generation_samples.json\nPolicy:  {dpo.path}",
        ]
    )


def print_evaluation(
    run: Run, home: Path, results: dict[str, Any], measurements: Measurements, judge_results: JudgeResults
) -> None:
    """Print the tables of an evaluation, whose results lie in `home`."""
    policies, base, by_policy = measurements.shown_policies, measurements.base, results["policies"]
    names, first = [policy.name for policy in reversed(policies)], policies[0]
    if best := judge_results.best_of:
        by_policy = {**by_policy, best["name"]: {"own": best["own"], "against": {"base": {}, "reference": {}}}}
        names.append(best["name"])
    blocks = [
        tables.caption(by_policy[names[0]], "the base model" if base else names[0], beta=base is None),
        tables.comparison(by_policy, names, base or "reference", {**tables.ROWS, **tables.EXTRA_ROWS}),
    ]
    if base:
        blocks += reference_tables(run, by_policy, policies)
    against = by_policy[first.name]["against"]["reference" if first.reference else "base"]
    blocks += [f"Accuracy of {first.name} by kind of pair:", tables.accuracy_by_subset(against)]
    if preferred_ft := policies_to_compare.preferred_ft_names(policies):
        blocks.append(f"Preferred-FT, SFT on the chosen completions: {', '.join(preferred_ft)}")
    blocks += judge_tables(results, judge_results)
    changes = results["notable"].get(first.name, {})
    for kind, change in changes.items():
        if kind != "before":
            blocks.append(changes_as_markdown(change, changes["before"], first.name, EXAMPLES_SHOWN))
    print_blocks([*blocks, f"Results: {home}/results.json, generation_samples.json"])


def reference_tables(run: Run, by_policy: dict[str, Any], policies: list[Policy]) -> list[str]:
    """The tables of policies against their own references; for several DPO variants the sweep report."""
    blocks = []
    tuned = [policy for policy in policies if policy.reference]
    references = dict.fromkeys(policy.reference for policy in tuned)
    if len(tuned) == 1 or len(references) > 1:
        for reference in references:
            names = [policy.name for policy in tuned if policy.reference == reference]
            blocks.append(f"Against their own reference, {reference}:")
            blocks.append(tables.comparison(by_policy, names, "reference", with_own=False))
    if len(tuned) > 1:
        blocks.append(sweep_report.sweep_report(run.home, run.evaluation.kl_budget, {}))
    return blocks


def judge_tables(results: dict[str, Any], judge_results: JudgeResults) -> list[str]:
    """What the judges say beyond the comparison table."""
    blocks = []
    for name, counts in judge_results.judges.items():
        if counts["unreadable"]:
            blocks.append(f"{name}: {counts['unreadable']} of {counts['results']} results are unreadable, left out")
    for name, rows in judge_results.comparisons.items():
        blocks.append(f"Any two policies by {name}: wins, and the mean difference with its p:")
        blocks.append(tables.pairwise_table(rows))
    if best := judge_results.best_of:
        blocks.append(f"Best of N completions of {best['policy']}, picked by {best['judge']}:")
        blocks.append(tables.best_of_n_table(best))
    if "safety" in results:
        blocks += ["Prompts labelled safe and unsafe:", safety.safety_table(results["safety"])]
    if "bias" in results:
        blocks += ["Prompts in groups:", safety.bias_table(results["bias"])]
    return blocks
