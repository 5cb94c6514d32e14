"""The comparison at the end of `dpo`: what is not measured yet of base, SFT and this DPO."""

import logging
from typing import Any

from dpo_pipeline.distributed import on_main_process
from dpo_pipeline.evaluation.eval_set import EvalSet
from dpo_pipeline.evaluation.judging import JudgingPlan, requests_of
from dpo_pipeline.evaluation.measure import Comparison, measure_policies
from dpo_pipeline.evaluation.policies import base_policy, dpo_with_references, unique_by_name
from dpo_pipeline.evaluation.results import judge_and_write
from dpo_pipeline.judges.judge import Judge
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
    results = on_main_process(lambda: judge_and_write(run.home, comparisons, scoring, plan))
    for name, reason in comparisons["eval.json"].failures.items():
        log.warning("%s: %s", name, reason)
    return results
