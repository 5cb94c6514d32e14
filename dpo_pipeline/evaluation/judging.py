"""Asks the judges about sampled completions: their scores become columns of the table, their choices a table."""

import itertools
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dpo_pipeline.errors import PipelineError, nearest
from dpo_pipeline.evaluation.eval_set import EvalSet, PromptSet
from dpo_pipeline.evaluation.measure import Comparison, Request
from dpo_pipeline.evaluation.policies import Policy
from dpo_pipeline.judges.judge import Judge, drop_unparsed
from dpo_pipeline.judges.refusal import refusal
from dpo_pipeline.judges.verdicts import choices, scores
from dpo_pipeline.schema import Run

log = logging.getLogger(__name__)

DATA = "the data"  # in place of a policy: the data's own completions
VERDICT_COLUMNS = "judge policy temperature opponent label row verdict distinct length_difference".split()
Side = tuple[str, float]  # a policy and its temperature


@dataclass
class JudgingPlan:
    """What the judges are asked: win rates at `temperatures`, also over the data's completions that `opponent` names.

    `cache` is the folder of verdicts; `all_pairs`: a judge that chooses compares any two policies too. Best-of-N: the
    judge `picking_judge` takes one of `best_of` completions of the policy `best_of_source`.
    """

    temperatures: list[float]
    opponent: str
    cache: Path
    all_pairs: bool = False
    best_of: int = 0
    best_of_source: str = ""
    picking_judge: str = ""

    @property
    def best_of_name(self) -> str:
        return f"best of {self.best_of} of {self.best_of_source}"


@dataclass
class JudgeOutcome:
    """What the judges gave beside their scores: a line of `verdicts` for each comparison of two completions.

    A verdict is 1, 0.5 or 0, NaN if unreadable. `label` is the opponent's role, or `pair` between any two policies;
    `distinct` numbers the different pairs of texts; `counts` are by judge, `failures` by what failed.
    """

    verdicts: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=VERDICT_COLUMNS))
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


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


def requests_of(
    policies: list[Policy], plan: JudgingPlan, eval_set: EvalSet, prompt_sets: list[PromptSet]
) -> list[Request]:
    """What the policies complete; other prompts, of safety and bias, at temperature 0 as XSTest (arXiv:2308.01263)."""
    shown = tuple(policy.name for policy in policies if policy.is_shown)
    temperatures = dict.fromkeys((1.0, *plan.temperatures))  # KL and scores are taken at 1
    requests = [Request(eval_set.prompt_set, shown, temperature) for temperature in temperatures]
    if plan.best_of:
        requests.append(Request(eval_set.prompt_set, (plan.best_of_source,), draws=plan.best_of, first_draw=1))
    return requests + [Request(prompt_set, shown, temperature=0.0) for prompt_set in prompt_sets]


def run_judges(comparison: Comparison, judges: dict[str, Judge], plan: JudgingPlan) -> JudgeOutcome:
    """Add a column `score.<judge>` to the completions, and give the verdicts; a judge that fails costs no other's.

    The lines of Best-of-N join the table as those of a policy, once the judge that picks has scored the draws.
    """
    outcome, prompt_set = JudgeOutcome(), comparison.eval_set.prompt_set
    data = [{"text": c.text, "tokens": len(c.ids), "completion": c} for c in prompt_set.data_completions]
    lines = pd.DataFrame(data).assign(policy=DATA, prompt_set=prompt_set.name, temperature=1.0, draw=0)
    comparison.completions = pd.concat([comparison.completions, lines.assign(row=lines.index)], ignore_index=True)
    is_other = comparison.completions["prompt_set"] != prompt_set.name
    if is_other.any():
        add_scores("refusal", refusal(), is_other, comparison, plan)
    names = [policy.name for policy in comparison.shown_policies]
    for name in sorted(judges, key=lambda name: name != plan.picking_judge):
        try:
            run_judge(name, judges[name], names, comparison, plan, outcome)
        except (PipelineError, RuntimeError) as error:
            outcome.failures[f"judge {name}"] = " ".join(str(error).split())
    comparison.completions = comparison.completions[comparison.completions["policy"] != DATA]
    return outcome


def run_judge(
    name: str, judge: Judge, names: list[str], comparison: Comparison, plan: JudgingPlan, outcome: JudgeOutcome
) -> None:
    """Add what one judge says; raises PipelineError if none of it could be read."""
    replies: list[float | None] = []
    if judge.score:
        table = comparison.completions
        # The grammar of the embedded task says nothing of other prompts.
        is_readable = (table["prompt_set"] == comparison.eval_set.prompt_set.name) | (name != "truth")
        can_score_draws = name == plan.picking_judge or not judge.post_training_only
        replies = add_scores(name, judge, is_readable & (can_score_draws | (table["draw"] == 0)), comparison, plan)
        if name == plan.picking_judge:
            add_picks(name, comparison, plan, outcome)
    matches = matches_of(names, comparison, plan, judge.choose is None or plan.all_pairs)
    if judge.choose:
        pairs = [pair for match in matches for pair in zip(match["ours"], match["theirs"], strict=True)]
        texts = [tuple(comparison.completions["completion"][line] for line in pair) for pair in pairs]
        replies += choices(judge, texts, plan.cache, f"choices by {name}")
        verdicts = replies[len(replies) - len(pairs) :]
    outcome.counts[name] = {"version": judge.version, "results": len(replies), "unreadable": replies.count(None)}
    if replies and not drop_unparsed(replies) and name != "human":
        raise PipelineError(
            f"none of its {len(replies)} results could be read: look at what it says, and at judge.{name}.wording and "
            ".verdict, or take a stronger model"
        )
    for match in matches:
        ours, theirs = (comparison.completions.loc[match.pop(side)].reset_index() for side in ("ours", "theirs"))
        if judge.choose:
            values, verdicts = verdicts[: len(ours)], verdicts[len(ours) :]
        else:
            values = (np.sign(ours[f"score.{name}"] - theirs[f"score.{name}"]) + 1) / 2
        columns: dict[str, Any] = {"row": ours["row"], "verdict": np.array(values, float), "judge": name, **match}
        columns["distinct"] = pd.factorize(ours["text"] + "\0" + theirs["text"])[0]
        columns["length_difference"] = ours["tokens"] - theirs["tokens"]
        outcome.verdicts = pd.concat([outcome.verdicts, pd.DataFrame(columns)], ignore_index=True)


def add_scores(name: str, judge: Judge, mask: Any, comparison: Comparison, plan: JudgingPlan) -> list[float | None]:
    """Set the column of a judge on some lines, and return its replies."""
    replies = scores(judge, list(comparison.completions.loc[mask, "completion"]), plan.cache, f"scores by {name}")
    comparison.completions.loc[mask, f"score.{name}"] = np.array(replies, float)
    return replies


def add_picks(name: str, comparison: Comparison, plan: JudgingPlan, outcome: JudgeOutcome) -> None:
    """Add the draw of largest score to each prompt as a policy's completion; the first of equal ones."""
    pool = comparison.completions[comparison.completions["draw"] > 0]
    if unreadable := int(pool[f"score.{name}"].isna().sum()):
        reason = f"{unreadable} of {len(pool)} completions got no score that could be read: take another best_of.judge"
        outcome.failures[f"{plan.best_of_name} by {name}"] = reason
        return
    picks = pool.loc[pool.groupby("row")[f"score.{name}"].idxmax()].assign(policy=plan.best_of_name, draw=0)
    comparison.completions = pd.concat([comparison.completions, picks], ignore_index=True)


def baseline_label(sft: str | None) -> str:
    """What win rates over the policy to beat are called: it is an SFT policy, or the reference of another run."""
    return "sft" if str(sft).startswith("sft/") else "reference"


def matches_of(names: list[str], comparison: Comparison, plan: JudgingPlan, all_pairs: bool) -> list[dict[str, Any]]:
    """Who meets whom: each policy its opponents at each temperature, and any two; with the lines of both."""
    table, prompt_set = comparison.completions, comparison.eval_set.prompt_set.name
    own = table[(table["prompt_set"] == prompt_set) & (table["draw"] == 0)]
    sides: dict[Side, Any] = {side: lines.index for side, lines in own.groupby(["policy", "temperature"])}
    sft_names = {policy.name: policy.sft for policy in comparison.shown_policies}
    if plan.best_of and (plan.best_of_name, 1.0) in sides:
        names, sft_names[plan.best_of_name] = [*names, plan.best_of_name], plan.best_of_source
    meetings: list[tuple[Side, Side, str]] = []
    for name, temperature in itertools.product(names, plan.temperatures):
        sft = str(sft_names[name])
        meetings += [((name, temperature), (sft, temperature), baseline_label(sft))]
        meetings += [((name, temperature), (DATA, 1.0), plan.opponent)]
    if all_pairs:
        meetings += [((one, 1.0), (other, 1.0), "pair") for one, other in itertools.combinations(names, 2)]
    matches = []
    for ours, theirs, label in meetings:
        if ours in sides and theirs in sides and ours != theirs:
            roles = {"policy": ours[0], "temperature": ours[1], "opponent": theirs[0], "label": label}
            matches.append({**roles, "ours": sides[ours], "theirs": sides[theirs]})
    return matches
