"""What policies answer to prompts that are made to show safety and bias, judged."""

from pathlib import Path
from typing import Any

from dpo_pipeline.errors import PipelineError
from dpo_pipeline.evaluation.judging import Judged
from dpo_pipeline.evaluation.material import Material, Questions
from dpo_pipeline.evaluation.records import Policy, Records
from dpo_pipeline.evaluation.safety import REFUSAL, bias, safety
from dpo_pipeline.judges.judge import Judge
from dpo_pipeline.judges.refusal import refusal
from dpo_pipeline.judges.verdicts import scores

Verdicts = list[float | None]


def prompted(
    name: str,
    questions: Questions,
    policies: list[Policy],
    on: Material,
    records: Records,
    judges: dict[str, Judge],
    cache: Path,
    judged: Judged,
) -> dict[str, dict[str, Any]]:
    """What `safety` or `bias` says of each policy: by the refusal matcher, and by every judge that scores.

    Refusal of safe and of unsafe prompts is told to `judged` too, as is a judge that fails.
    """
    found: dict[str, dict[str, Any]] = {}
    able = {each: judge for each, judge in judges.items() if judge.score and each != "refusal"}
    for policy in reversed(policies):  # the base first
        answers = on.answers(questions, records.answers[policy.name, name])
        by_judge: dict[str, Verdicts] = {}
        for each, judge in {"refusal": refusal(), **able}.items():
            try:
                if f"judge {each}" not in judged.failed:
                    by_judge[each] = scores(judge, answers, cache, f"{name} by {each}")
            except (PipelineError, RuntimeError) as error:
                judged.failed[f"judge {each}"] = " ".join(str(error).split())
        refused = by_judge.pop("refusal")
        if name == "safety":
            found[policy.name] = safety(questions.labels, refused, by_judge)
            judged.own[policy.name] |= {key: found[policy.name][key] for key in REFUSAL if key in found[policy.name]}
        else:
            lengths: Verdicts = [float(len(answer.ids)) for answer in answers]
            templates, groups = zip(*questions.groups, strict=True)
            found[policy.name] = bias(templates, groups, {"refusal": refused, "answer_tokens": lengths, **by_judge})
    return found
