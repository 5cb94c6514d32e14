"""What an evaluation asks of policies and judges: temperatures, opponents, Best-of-N, further prompts."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from dpo_pipeline.errors import PipelineError, nearest
from dpo_pipeline.evaluation.eval_set import EvalSet, PromptSet
from dpo_pipeline.evaluation.measure import SAMPLES, Policy, SamplingRequest
from dpo_pipeline.judges.judge import Judge
from dpo_pipeline.schema import Run

log = logging.getLogger(__name__)

DRAWS_PER_CHUNK = 16  # of Best-of-N: each chunk of draws is cached by itself


@dataclass
class JudgingPlan:
    """What is judged: `opponent` names the data's own completions, `cache` is the folder of verdicts.

    `all_pairs`: a judge that chooses compares any two policies, not only each with its opponents. `prompt_sets` are
    those of safety and bias. Best-of-N: the judge `picking_judge` takes one of `best_of` completions of the policy
    `best_of_source`.
    """

    temperatures: list[float]
    opponent: str
    cache: Path
    all_pairs: bool = False
    prompt_sets: dict[str, PromptSet] = field(default_factory=dict)
    best_of: int = 0
    best_of_source: str = ""
    picking_judge: str = ""

    @property
    def sampled_temperatures(self) -> list[float]:
        """1, where KL and scores are taken, and the temperatures of the win rates."""
        return list(dict.fromkeys((1.0, *self.temperatures)))

    @property
    def chunks(self) -> dict[str, int]:
        """The sampling requests of Best-of-N, with the number of the first draw of each."""
        return {f"best_of-{start}": start for start in range(0, self.best_of, DRAWS_PER_CHUNK)}


def request_name(temperature: float) -> str:
    """The name of the sampling request of a temperature."""
    return SAMPLES if temperature == 1 else f"{SAMPLES}-t{temperature:g}"


def judging_plan(run: Run, policies: list[Policy], judges: dict[str, Judge]) -> JudgingPlan:
    """What the judges are asked; raises PipelineError if Best-of-N is asked for and cannot be measured."""
    settings = run.evaluation
    opponent = "chosen" if settings.prompts_file else settings.opponent
    plan = JudgingPlan(settings.temperatures, opponent, run.verdicts, settings.all_pairs)
    if run.best_of.n is None:
        return plan
    scoring = [name for name, judge in judges.items() if judge.score]
    local = [name for name in scoring if not judges[name].post_training_only]
    picking_judge = run.best_of.judge or next(iter([*local, *scoring]), None)
    if picking_judge not in scoring:
        setting = f"best_of.judge={picking_judge}" if picking_judge else f"best_of.n={run.best_of.n}"
        raise PipelineError(
            f"{setting}: it takes a judge of judge= that scores completions{nearest(picking_judge, scoring)}: type "
            "judge=[NAME], such as length or reward_model"
        )
    source = next((policy.sft for policy in policies if policy.sft), None)
    if source is None:
        raise PipelineError("best_of.n draws from the SFT policy, and there is none: run `make sft` first")
    if len(scoring) == 1:
        log.warning(
            "best of %d is picked and scored by one judge, %s, so its score says how far that can be pushed, not how "
            "good the completions are: add another to judge=[...]",
            *(run.best_of.n, picking_judge),
        )
    plan.best_of, plan.best_of_source, plan.picking_judge = run.best_of.n, source, picking_judge
    return plan


def sampling_requests(policies: list[Policy], plan: JudgingPlan, eval_set: EvalSet) -> list[SamplingRequest]:
    """What the policies complete; safety and bias at temperature 0, as in XSTest (arXiv:2308.01263)."""
    shown = tuple(policy.name for policy in policies if policy.is_shown)
    prompt_set, source = eval_set.prompt_set, (plan.best_of_source,)
    requests = [SamplingRequest(request_name(t), prompt_set, shown, t) for t in plan.sampled_temperatures]
    for name, start in plan.chunks.items():
        draws = min(DRAWS_PER_CHUNK, plan.best_of - start)
        # Seeds differ from 0, so that these are other completions than the policy's own.
        requests.append(SamplingRequest(name, prompt_set, source, draws=draws, seed=1 + start))
    for name, prompts in plan.prompt_sets.items():
        requests.append(SamplingRequest(name, prompts, shown, temperature=0.0))
    return requests
