"""Asks the judges about sampled completions: their scores become columns of the table, their choices a table."""

import logging
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from dpo_pipeline.errors import PipelineError
from dpo_pipeline.evaluation.measure import Comparison
from dpo_pipeline.evaluation.plan import DATA, SECOND_DRAW, JudgingPlan, has_noise_floor, matches_of
from dpo_pipeline.judges.judge import Judge
from dpo_pipeline.judges.refusal import refusal
from dpo_pipeline.judges.verdicts import choices, scores

log = logging.getLogger(__name__)

VERDICT_COLUMNS = "judge policy temperature opponent label row verdict distinct length_difference".split()


@dataclass
class JudgeOutcome:
    """What the judges gave beside their scores: a line of `verdicts` for each comparison of two completions.

    A verdict is 1, 0.5 or 0, NaN if unreadable. `label` is the opponent's role, or `pair` between any two policies;
    `distinct` numbers the different pairs of texts; `counts` are by judge, `failures` by what failed.
    """

    verdicts: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=VERDICT_COLUMNS))
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


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
        if not is_readable.all():
            log.info("truth knows film reviews alone: it scores no prompt of evaluation.safety_file and bias_file")
        can_score_draws = name == plan.picking_judge or not judge.post_training_only
        is_scored = (table["draw"] == 0) | ((table["draw"] > 0) & can_score_draws)
        is_scored |= (table["draw"] == SECOND_DRAW) & has_noise_floor(judge, plan.noise_floor)
        replies = add_scores(name, judge, is_readable & is_scored, comparison, plan)
        if name == plan.picking_judge:
            add_picks(name, comparison, plan, outcome)
    matches = matches_of(names, comparison, plan, judge)
    if judge.choose:
        pairs = [pair for match in matches for pair in zip(match["ours"], match["theirs"], strict=True)]
        texts = [tuple(comparison.completions["completion"][line] for line in pair) for pair in pairs]
        replies += choices(judge, texts, plan.cache, f"choices by {name}")
        verdicts = replies[len(replies) - len(pairs) :]
    outcome.counts[name] = {"version": judge.version, "results": len(replies), "unreadable": replies.count(None)}
    if replies and all(reply is None for reply in replies) and name != "human":
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
