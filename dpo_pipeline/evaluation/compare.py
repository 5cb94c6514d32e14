"""Measures, judges and writes: what `dpo` does at its end, and `evaluate` for a whole name."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_pipeline.distributed import on_main_process
from dpo_pipeline.evaluation.eval_set import EvalSet
from dpo_pipeline.evaluation.judging import JudgeOutcome, run_judges
from dpo_pipeline.evaluation.measure import Comparison, measure_policies
from dpo_pipeline.evaluation.plan import JudgingPlan, requests_of
from dpo_pipeline.evaluation.policies import base_policy, dpo_with_references, unique_by_name
from dpo_pipeline.evaluation.results import summarize_comparison, write_name_results, write_results
from dpo_pipeline.judges.judge import Judge
from dpo_pipeline.record import read_json
from dpo_pipeline.schema import Run

log = logging.getLogger(__name__)


def compare_policies(run: Run, eval_sets: dict[str, EvalSet], judges: dict[str, Judge]) -> dict[str, Any]:
    """Measure what is not measured yet of base, SFT and this DPO, and judge it; the results of the name."""
    dpo_policies = dpo_with_references(run.dpo_folder, run)
    policies = unique_by_name([*dpo_policies, base_policy(run, None)])
    scoring = {name: judge for name, judge in judges.items() if judge.score and not judge.post_training_only}
    plan = JudgingPlan([], run.evaluation.opponent, run.verdicts)
    comparisons = {}
    for file, compared, base in (("eval.json", policies, "base"), ("validation.json", dpo_policies, None)):
        eval_set = eval_sets[file]
        comparisons[file] = Comparison(eval_set, compared, base, requests_of(compared, plan, eval_set, []))
    measure_policies(*comparisons.values())
    results, outcome = on_main_process(lambda: judge_and_write(run, run.home, comparisons, scoring, plan))
    for name, reason in outcome.failures.items():
        log.warning("%s: %s", name, reason)
    return results


def judge_and_write(
    run: Run, home: Path, comparisons: dict[str, Comparison], judges: dict[str, Judge], plan: JudgingPlan
) -> tuple[dict[str, Any], JudgeOutcome]:
    """Judge what was measured, and write the results of each file; those of a judge that failed stay as they were."""
    is_replaced = replaced_judges(judges, read_json(home / "results.json"))
    outcomes = {}
    for file, comparison in comparisons.items():
        outcomes[file] = run_judges(comparison, judges, plan)
        results, more = summarize_comparison(comparison, outcomes[file], plan)
        write_results(comparison, results, file, is_replaced)
        if file == "eval.json":
            extra = more
    comparison, outcome = comparisons["eval.json"], outcomes["eval.json"]
    folders = None if comparison.base else [policy.folder for policy in comparison.shown_policies]
    return write_name_results(home, folders, extra, is_replaced), outcome


def replaced_judges(judges: dict[str, Judge], earlier: dict[str, Any] | None) -> Callable[[str], bool]:
    """Whether the earlier numbers of a judge are those of another one: asked again in another version, or in none.

    A judge without a version gives the same numbers each time, unless people or a trained policy stand behind it.
    """
    versions = {name: counts["version"] for name, counts in (earlier or {}).get("judges", {}).items()}

    def is_replaced(name: str) -> bool:
        judge = judges.get(name)
        return judge is not None and (
            versions.get(name) != judge.version or (judge.version is None and judge.post_training_only)
        )

    return is_replaced
