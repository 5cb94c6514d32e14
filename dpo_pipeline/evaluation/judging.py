"""Who meets whom before the judges: what policies complete for it, scores as columns, and verdicts as a table."""

import itertools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dpo_pipeline.errors import PipelineError, nearest
from dpo_pipeline.evaluation.eval_set import EvalSet, PromptSet
from dpo_pipeline.evaluation.measure import Comparison, Request
from dpo_pipeline.evaluation.policies import Policy
from dpo_pipeline.judges.judge import Judge, choices, scores
from dpo_pipeline.judges.refusal import refusal
from dpo_pipeline.schema import Run

log = logging.getLogger(__name__)

DATA = "the data"  # in place of a policy: the data's own completions
SECOND_DRAW = -1  # of a policy's completions, for the noise floor; those of Best-of-N start at 1
NOISE_FLOOR = "noise_floor"  # the label of verdicts on a policy against itself
SIDES = (["policy", "temperature", "draw"], ["opponent", "opponent_temperature", "opponent_draw"])


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
    settings, n = run.evaluation, run.best_of.n
    opponent = "chosen" if settings.prompts_file else settings.opponent
    plan = JudgingPlan(settings.temperatures, opponent, run.verdicts, settings.all_pairs)
    if any(has_noise_floor(judge, settings.noise_floor) for judge in judges.values()):
        plan.noise_floor = settings.noise_floor
    if n is None:
        return plan
    scoring = sorted((name for name in judges if judges[name].score), key=lambda x: judges[x].post_training_only)
    picking_judge = run.best_of.judge or next(iter(scoring), None)
    if picking_judge not in scoring:
        raise PipelineError(
            f"best_of.n={n}, best_of.judge={picking_judge}: it takes a judge of judge= that scores completions"
            f"{nearest(picking_judge, scoring)}: type judge=[NAME], such as length or reward_model"
        )
    if (source := next((policy.sft for policy in policies if policy.sft), None)) is None:
        raise PipelineError("best_of.n draws from the SFT policy, and there is none: run `make sft` first")
    if len(scoring) == 1:
        log.warning("best of %d is picked and scored by %s alone, which favours it: add another judge", n, scoring[0])
    plan.best_of, plan.best_of_source, plan.picking_judge = n, source, picking_judge
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


def run_judges(comparison: Comparison, judges: dict[str, Judge], plan: JudgingPlan) -> None:
    """Add a column `score.<judge>` to the completions, and the verdicts; a judge that fails costs no other's.

    The lines of Best-of-N join the table as those of a policy, once the judge that picks has scored the draws.
    """
    prompt_set = comparison.eval_set.prompt_set
    data = [{"row": row, "text": c.text, "tokens": len(c.ids), "completion": c}
            for row, c in enumerate(prompt_set.data_completions)]  # fmt: skip
    if data:
        lines = pd.DataFrame(data).assign(policy=DATA, prompt_set=prompt_set.name, temperature=1.0, draw=0)
        comparison.completions = pd.concat([comparison.completions, lines], ignore_index=True)
    is_other = comparison.completions["prompt_set"] != prompt_set.name
    if is_other.any():
        add_scores("refusal", refusal(), is_other, comparison, plan)
    for name in sorted(judges, key=lambda name: name != plan.picking_judge):
        try:
            run_judge(name, judges[name], comparison, plan)
        except (PipelineError, RuntimeError) as error:
            comparison.failures[f"judge {name}"] = " ".join(str(error).split())
    comparison.completions = comparison.completions[comparison.completions["policy"] != DATA]


def run_judge(name: str, judge: Judge, comparison: Comparison, plan: JudgingPlan) -> None:
    """Add what one judge says; raises PipelineError if none of it could be read."""
    replies: list[float | None] = []
    if judge.score:
        table = comparison.completions
        # The grammar of the embedded task says nothing of other prompts.
        is_readable = (table["prompt_set"] == comparison.eval_set.prompt_set.name) | (name != "truth")
        if not is_readable.all():
            log.info("truth knows film reviews alone: it scores no prompt of evaluation.safety_file and bias_file")
        can_score_draws = name == plan.picking_judge or not judge.post_training_only
        is_scored = (table["draw"] == 0) | ((table["draw"] > 0) & can_score_draws)
        is_scored |= (table["draw"] == SECOND_DRAW) & has_noise_floor(judge, plan.noise_floor)
        replies = add_scores(name, judge, is_readable & is_scored, comparison, plan)
        if name == plan.picking_judge:
            add_picks(name, comparison, plan)
    lines = match_completions(judge, comparison, plan)
    ours, theirs = (comparison.completions.loc[lines.pop(side)].reset_index() for side in ("ours", "theirs"))
    if judge.choose:
        pairs = list(zip(ours["completion"], theirs["completion"], strict=True))
        verdicts = choices(judge, pairs, plan.cache, f"choices by {name}")
        replies += verdicts
    else:
        verdicts = (np.sign(ours[f"score.{name}"] - theirs[f"score.{name}"]) + 1) / 2
    counts = {"version": judge.version, "results": len(replies), "unreadable": replies.count(None)}
    comparison.judge_counts[name] = counts
    if replies and counts["unreadable"] == len(replies) and name != "human":
        raise PipelineError(
            f"none of its {len(replies)} results could be read: look at what it says, and at judge.{name}.wording and "
            ".verdict, or take a stronger model"
        )
    columns = {"judge": name, "verdict": np.array(verdicts, float)}
    columns["distinct"] = pd.factorize(ours["text"] + "\0" + theirs["text"])[0]
    columns["length_difference"] = ours["tokens"] - theirs["tokens"]
    comparison.verdicts = pd.concat([comparison.verdicts, lines.assign(**columns)], ignore_index=True)


def match_completions(judge: Judge, comparison: Comparison, plan: JudgingPlan) -> pd.DataFrame:
    """A line for each two completions of a prompt that meet, whose lines in the table are `ours` and `theirs`.

    Each policy meets its opponents at each temperature, itself, and any other.
    """
    table = comparison.completions[comparison.completions["prompt_set"] == comparison.eval_set.prompt_set.name]
    sfts = {policy.name: str(policy.sft) for policy in comparison.shown_policies}
    if plan.best_of_name in {*table["policy"]}:
        sfts[plan.best_of_name] = plan.best_of_source
    meetings: list[list[Any]] = []
    for (name, sft), temperature in itertools.product(sfts.items(), plan.temperatures):
        meetings += [[name, temperature, 0, sft, temperature, 0, baseline_label(sft)]] if sft != name else []
        meetings += [[name, temperature, 0, DATA, 1.0, 0, plan.opponent]]
    if has_noise_floor(judge, plan.noise_floor):
        meetings += [[name, 1.0, 0, name, 1.0, SECOND_DRAW, NOISE_FLOOR] for name in sfts]
    if judge.choose is None or plan.all_pairs:
        meetings += [[one, 1.0, 0, other, 1.0, 0, "pair"] for one, other in itertools.combinations(sfts, 2)]
    lines = pd.DataFrame(meetings, columns=[*SIDES[0], *SIDES[1], "label"])
    lines = lines.astype({name: float for side in SIDES for name in side[1:]})
    completions = table.reset_index(names="line")[["line", "row", *SIDES[0]]]
    for name, side in zip(("ours", "theirs"), SIDES, strict=True):
        renamed = completions.rename(columns={"line": name, **dict(zip(SIDES[0], side, strict=True))})
        lines = lines.merge(renamed, on=[*side, *({"row"} & {*lines})])
    return lines


def add_scores(name: str, judge: Judge, mask: Any, comparison: Comparison, plan: JudgingPlan) -> list[float | None]:
    """Set the column of a judge on some lines, and return its replies."""
    replies = scores(judge, list(comparison.completions.loc[mask, "completion"]), plan.cache, f"scores by {name}")
    comparison.completions.loc[mask, f"score.{name}"] = np.array(replies, float)
    return replies


def add_picks(name: str, comparison: Comparison, plan: JudgingPlan) -> None:
    """Add the draw of largest score to each prompt as a policy's completion; the first of equal ones."""
    pool = comparison.completions[comparison.completions["draw"] > 0]
    if unreadable := int(pool[f"score.{name}"].isna().sum()):
        reason = f"{unreadable} of {len(pool)} completions got no score that could be read: take another best_of.judge"
        comparison.failures[f"{plan.best_of_name} by {name}"] = reason
        return
    picks = pool.loc[pool.groupby("row")[f"score.{name}"].idxmax()].assign(policy=plan.best_of_name, draw=0)
    comparison.completions = pd.concat([comparison.completions, picks], ignore_index=True)
