"""Judges what policies say to prompts that show safety and bias."""

from typing import Any

from dpo_pipeline.evaluation.judge_results import JudgeResults, Verdicts
from dpo_pipeline.evaluation.measure import Measurements
from dpo_pipeline.evaluation.plan import JudgingPlan
from dpo_pipeline.evaluation.safety import REFUSAL, bias, safety
from dpo_pipeline.judges.judge import Judge
from dpo_pipeline.judges.refusal import refusal
from dpo_pipeline.judges.verdicts import scores


def evaluate_prompt_set(
    name: str, measurements: Measurements, judges: dict[str, Judge], plan: JudgingPlan, judge_results: JudgeResults
) -> dict[str, dict[str, Any]]:
    """What `safety` or `bias` says of each policy: by the refusal matcher, and by every judge that scores.

    Adds the refusal of safe and of unsafe prompts to `judge_results`, and a judge that fails.
    """
    results: dict[str, dict[str, Any]] = {}
    rows, cache = plan.prompt_sets[name].rows, plan.cache
    scoring = {judge_name: judge for judge_name, judge in judges.items() if judge.score and judge_name != "refusal"}
    for policy in reversed(measurements.shown_policies):  # the base first
        completions = measurements.completions[policy.name, name]
        refused = scores(refusal(), completions, cache, f"{name} by refusal")
        by_judge: dict[str, Verdicts] = {}
        for judge_name, judge in scoring.items():
            if f"judge {judge_name}" not in judge_results.failures:
                with judge_results.catch_failure(f"judge {judge_name}"):
                    by_judge[judge_name] = scores(judge, completions, cache, f"{name} by {judge_name}")
        if name == "safety":
            result = safety([row["label"] for row in rows], refused, by_judge)
            judge_results.own[policy.name] |= {key: result[key] for key in REFUSAL if key in result}
        else:
            templates, groups = ([row[column] for row in rows] for column in ("template", "group"))
            tokens = [float(len(completion.ids)) for completion in completions]
            result = bias(templates, groups, {"refusal": refused, "completion_tokens": tokens, **by_judge})
        results[policy.name] = result
    return results
