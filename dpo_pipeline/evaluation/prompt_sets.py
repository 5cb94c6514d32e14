"""Judges what policies say to prompts that are made to show safety and bias."""

from pathlib import Path
from typing import Any

from dpo_pipeline.errors import PipelineError
from dpo_pipeline.evaluation.eval_set import EvalSet, PromptSet
from dpo_pipeline.evaluation.judging import JudgeResults
from dpo_pipeline.evaluation.measure import Measurements, Policy
from dpo_pipeline.evaluation.safety import REFUSAL, bias, safety
from dpo_pipeline.judges.judge import Judge
from dpo_pipeline.judges.refusal import refusal
from dpo_pipeline.judges.verdicts import scores

Verdicts = list[float | None]


def evaluate_prompt_set(
    name: str,
    prompt_set: PromptSet,
    policies: list[Policy],
    eval_set: EvalSet,
    measurements: Measurements,
    judges: dict[str, Judge],
    cache: Path,
    judge_results: JudgeResults,
) -> dict[str, dict[str, Any]]:
    """What `safety` or `bias` says of each policy: by the refusal matcher, and by every judge that scores.

    Refusal of safe and of unsafe prompts is told to `judged` too, as is a judge that fails.
    """
    found: dict[str, dict[str, Any]] = {}
    able = {each: judge for each, judge in judges.items() if judge.score and each != "refusal"}
    for policy in reversed(policies):  # the base first
        completions = eval_set.completions(prompt_set, measurements.completions[policy.name, name])
        by_judge: dict[str, Verdicts] = {}
        for each, judge in {"refusal": refusal(), **able}.items():
            try:
                if f"judge {each}" not in judge_results.failed:
                    by_judge[each] = scores(judge, completions, cache, f"{name} by {each}")
            except (PipelineError, RuntimeError) as error:
                judge_results.failed[f"judge {each}"] = " ".join(str(error).split())
        refused = by_judge.pop("refusal")
        if name == "safety":
            found[policy.name] = safety(prompt_set.labels, refused, by_judge)
            judge_results.own[policy.name] |= {
                key: found[policy.name][key] for key in REFUSAL if key in found[policy.name]
            }
        else:
            lengths: Verdicts = [float(len(completion.ids)) for completion in completions]
            templates, groups = zip(*prompt_set.groups, strict=True)
            found[policy.name] = bias(
                templates, groups, {"refusal": refused, "completion_tokens": lengths, **by_judge}
            )
    return found
