"""Compares a DPO policy with its SFT and base model after training."""

from pathlib import Path
from typing import Any

from dpo_pipeline.distributed import on_main_process
from dpo_pipeline.evaluation.eval_set import EvalSet
from dpo_pipeline.evaluation.judge_results import JudgeResults
from dpo_pipeline.evaluation.measure import SAMPLES, Measurements, Policy, SamplingRequest, measure_policies
from dpo_pipeline.evaluation.policies_to_compare import base_policy, dpo_with_references, unique_by_name
from dpo_pipeline.evaluation.results import write_name_results, write_results
from dpo_pipeline.evaluation.terminal import print_comparison
from dpo_pipeline.judges.judge import Judge
from dpo_pipeline.judges.verdicts import scores
from dpo_pipeline.schema import Run


def compare_policies(run: Run, eval_sets: dict[str, EvalSet], judges: dict[str, Judge]) -> dict[str, Any]:
    """Measure what is not measured yet of base, SFT and this DPO, and print the tables; the results of the name."""
    dpo_policies = dpo_with_references(run.dpo_folder, run)
    policies = unique_by_name([*dpo_policies, base_policy(run, None)])
    scoring = {name: judge for name, judge in judges.items() if judge.score and not judge.post_training_only}
    measurements = {
        "eval.json": plan_measurements(eval_sets["eval.json"], policies, "base"),
        "validation.json": plan_measurements(eval_sets["validation.json"], dpo_policies, None),
    }
    measure_policies(*measurements.values())

    def write_and_print() -> dict[str, Any]:
        for file, measured in measurements.items():
            judge_and_write(file, measured, scoring, run.verdicts)
        results = write_name_results(run.home)
        print_comparison(run.home, results["policies"], policies)
        return results

    return on_main_process(write_and_print)


def plan_measurements(eval_set: EvalSet, policies: list[Policy], base: str | None) -> Measurements:
    """What is to be measured of these policies: their pairs, and one completion of each prompt."""
    shown = tuple(policy.name for policy in policies if policy.is_shown)
    return Measurements(eval_set, policies, base, [SamplingRequest(SAMPLES, eval_set.prompt_set, shown)])


def judge_and_write(file: str, measurements: Measurements, judges: dict[str, Judge], cache: Path) -> None:
    """Score the samples by each judge, with scores cached under `cache`, and write the `file` of each policy."""
    results = JudgeResults()
    for policy in measurements.shown_policies:
        for name, judge in judges.items():
            completions = measurements.completions[policy.name, SAMPLES]
            results.add_scores(policy.name, name, scores(judge, completions, cache, f"scores by {name}"))
    write_results(measurements, results, file, complete=False)
