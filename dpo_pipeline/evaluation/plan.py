"""What the policies complete and what the judges are asked: who meets whom, at which temperatures."""

import itertools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_pipeline.errors import PipelineError, nearest
from dpo_pipeline.evaluation.eval_set import EvalSet, PromptSet
from dpo_pipeline.evaluation.measure import Comparison, Request
from dpo_pipeline.evaluation.policies import Policy
from dpo_pipeline.judges.judge import Judge
from dpo_pipeline.schema import Run

log = logging.getLogger(__name__)

DATA = "the data"  # in place of a policy: the data's own completions
SECOND_DRAW = -1  # of a policy's completions, for the noise floor; those of Best-of-N start at 1
NOISE_FLOOR = "noise_floor"  # the label of verdicts on a policy against itself
Side = tuple[str, float | None]  # a policy and its temperature, None for its second draw


@dataclass
class JudgingPlan:
    """What the judges are asked: win rates at `temperatures`, also over the data's completions that `opponent` names.

    `cache` is the folder of verdicts; `all_pairs`: a judge that chooses compares any two policies too. Best-of-N: the
    judge `picking_judge` takes one of `best_of` completions of the policy `best_of_source`. `noise_floor` says
    which judges are asked about a policy against itself.
    """

    temperatures: list[float]
    opponent: str
    cache: Path
    all_pairs: bool = False
    best_of: int = 0
    best_of_source: str = ""
    picking_judge: str = ""
    noise_floor: str = "off"

    @property
    def best_of_name(self) -> str:
        return f"best of {self.best_of} of {self.best_of_source}"


def judging_plan(run: Run, policies: list[Policy], judges: dict[str, Judge]) -> JudgingPlan:
    """What the judges are asked; raises PipelineError if Best-of-N is asked for and cannot be measured."""
    settings = run.evaluation
    opponent = "chosen" if settings.prompts_file else settings.opponent
    plan = JudgingPlan(settings.temperatures, opponent, run.verdicts, settings.all_pairs)
    if any(has_noise_floor(judge, settings.noise_floor) for judge in judges.values()):
        plan.noise_floor = settings.noise_floor
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
    if (source := next((policy.sft for policy in policies if policy.sft), None)) is None:
        raise PipelineError("best_of.n draws from the SFT policy, and there is none: run `make sft` first")
    if len(scoring) == 1:
        log.warning(
            "best of %d is picked and scored by one judge, %s, so its score says how far that can be pushed, not how "
            "good the completions are: add another to judge=[...]",
            *(run.best_of.n, picking_judge),
        )
    plan.best_of, plan.best_of_source, plan.picking_judge = run.best_of.n, source, picking_judge
    return plan


def has_noise_floor(judge: Judge, noise_floor: str) -> bool:
    """Whether a judge is asked about a policy against itself."""
    return noise_floor == "all" or (noise_floor == "local" and not judge.post_training_only)


def requests_of(
    policies: list[Policy], plan: JudgingPlan, eval_set: EvalSet, prompt_sets: list[PromptSet]
) -> list[Request]:
    """What the policies complete; other prompts, of safety and bias, at temperature 0 as XSTest (arXiv:2308.01263)."""
    shown = tuple(policy.name for policy in policies if policy.is_shown)
    temperatures = dict.fromkeys((1.0, *plan.temperatures))  # KL and scores are taken at 1
    requests = [Request(eval_set.prompt_set, shown, temperature) for temperature in temperatures]
    if plan.best_of:
        requests.append(Request(eval_set.prompt_set, (plan.best_of_source,), draws=plan.best_of, first_draw=1))
    if plan.noise_floor != "off":
        requests.append(Request(eval_set.prompt_set, shown, first_draw=SECOND_DRAW))
    return requests + [Request(prompt_set, shown, temperature=0.0) for prompt_set in prompt_sets]


def baseline_label(sft: str | None) -> str:
    """What win rates over the policy to beat are called: it is an SFT policy, or the reference of another run."""
    return "sft" if str(sft).startswith("sft/") else "reference"


def matches_of(names: list[str], comparison: Comparison, plan: JudgingPlan, judge: Judge) -> list[dict[str, Any]]:
    """Who meets whom: each policy its opponents at each temperature, itself, and any other; with the lines of both."""
    table = comparison.completions[comparison.completions["prompt_set"] == comparison.eval_set.prompt_set.name]
    sides: dict[Side, Any] = {}
    for (name, temperature, draw), lines in table.groupby(["policy", "temperature", "draw"]):
        if draw in (0, SECOND_DRAW):
            sides[name, temperature if draw == 0 else None] = lines.index
    sft_names = {policy.name: policy.sft for policy in comparison.shown_policies}
    if plan.best_of and (plan.best_of_name, 1.0) in sides:
        names, sft_names[plan.best_of_name] = [*names, plan.best_of_name], plan.best_of_source
    meetings: list[tuple[Side, Side, str]] = []
    for name, temperature in itertools.product(names, plan.temperatures):
        sft = str(sft_names[name])
        meetings += [((name, temperature), (sft, temperature), baseline_label(sft))]
        meetings += [((name, temperature), (DATA, 1.0), plan.opponent)]
    if has_noise_floor(judge, plan.noise_floor):
        meetings += [((name, 1.0), (name, None), NOISE_FLOOR) for name in names]
    if judge.choose is None or plan.all_pairs:
        meetings += [((one, 1.0), (other, 1.0), "pair") for one, other in itertools.combinations(names, 2)]
    matches = []
    for ours, theirs, label in meetings:
        if ours in sides and theirs in sides and ours != theirs:
            roles = {"policy": ours[0], "temperature": ours[1], "opponent": theirs[0], "label": label}
            matches.append({**roles, "ours": sides[ours], "theirs": sides[theirs]})
    return matches
