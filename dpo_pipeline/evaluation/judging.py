"""Asks the judges about sampled completions: scores, win rates, comparisons of any two policies, Best-of-N."""

import itertools
from typing import Any

from dpo_pipeline.evaluation.best_of import best_of_n_policy
from dpo_pipeline.evaluation.judge_results import JudgeResults, Verdicts
from dpo_pipeline.evaluation.measure import Measurements, Policy
from dpo_pipeline.evaluation.plan import JudgingPlan, request_name
from dpo_pipeline.judges.judge import Completion, Judge
from dpo_pipeline.judges.verdicts import choices, scores

Side = tuple[str, float]  # a policy and its temperature
Sides = dict[Side, list[Completion]]  # with a completion for each prompt
DATA: Side = ("the data", 1.0)  # the data's own completions


def run_judges(measurements: Measurements, judges: dict[str, Judge], plan: JudgingPlan) -> JudgeResults:
    """All that the judges say; a judge that fails is named in `failures`, and the results of the others stay."""
    policies = measurements.shown_policies
    results = JudgeResults({policy.name: {} for policy in policies})
    sides: Sides = {}
    for policy in policies:
        for temperature in plan.sampled_temperatures:
            completions = measurements.completions[policy.name, request_name(temperature)]
            sides[policy.name, temperature] = completions
    if data_completions := measurements.eval_set.prompt_set.data_completions:
        sides[DATA] = data_completions
    # The judge that picks comes first: the others judge its picks too.
    for name in sorted(judges, key=lambda name: name != plan.picking_judge):
        if name == plan.picking_judge:
            with results.catch_failure(f"best of {plan.best_of} by {name}"):
                policy, completions, results.best_of = best_of_n_policy(measurements, judges, plan)
                policies, sides[policy.name, 1.0] = [*policies, policy], completions
                results.own[policy.name] = {}
        with results.catch_failure(f"judge {name}"):
            run_judge(name, judges[name], policies, sides, plan, results)
    if results.best_of:
        results.best_of["own"] = results.own[results.best_of["name"]]
    return results


def run_judge(
    name: str, judge: Judge, policies: list[Policy], sides: Sides, plan: JudgingPlan, results: JudgeResults
) -> None:
    """Add what one judge says to `results`; raises PipelineError if none of it could be read."""
    matches = matches_of(policies, sides, plan)
    pairs = []
    if judge.choose is None or plan.all_pairs:
        pairs = [((one.name, 1.0), (other.name, 1.0)) for one, other in itertools.combinations(policies, 2)]
    questions = dict.fromkeys([*((side, opponent) for side, opponent, _ in matches), *pairs])
    scores_by_side: dict[Side, Verdicts] = {}
    verdicts: dict[tuple[Side, Side], Verdicts] = {}
    if judge.score:
        completions = list(itertools.chain(*sides.values()))
        scores_by_side = split_like(sides, scores(judge, completions, plan.cache, f"scores by {name}"))
        verdicts = {
            (one, other): prefer_larger(scores_by_side[one], scores_by_side[other]) for one, other in questions
        }
    replies = list(itertools.chain(*scores_by_side.values()))
    if judge.choose:
        texts = {(one, other): list(zip(sides[one], sides[other], strict=True)) for one, other in questions}
        flat = list(itertools.chain(*texts.values()))
        verdicts = split_like(texts, choices(judge, flat, plan.cache, f"choices by {name}"))
        replies += itertools.chain(*verdicts.values())
    results.count_replies(name, judge.version, replies)
    sample_scores = {policy.name: scores_by_side[policy.name, 1.0] for policy in policies if scores_by_side}
    for policy_name, values in sample_scores.items():
        results.add_scores(policy_name, name, values)
    for side, opponent, label in matches:
        lengths = [len(a.ids) - len(b.ids) for a, b in zip(sides[side], sides[opponent], strict=True)]
        results.add_win_rate(side[0], f"{name}.{label}", verdicts[side, opponent], lengths)
    games = {(one[0], other[0]): verdicts[one, other] for one, other in pairs}
    if any(verdict is not None for verdict in itertools.chain(*games.values())):
        anchor = next((policy.sft for policy in policies if policy.sft in results.own), policies[0].name)
        results.add_comparisons(name, games, sample_scores, str(anchor))


def matches_of(policies: list[Policy], sides: Sides, plan: JudgingPlan) -> list[tuple[Side, Side, str]]:
    """Each policy at each temperature with its opponents, and the ending of the key of the win rate."""
    matches = []
    for policy, temperature in itertools.product(policies, plan.temperatures):
        side, ending = (policy.name, temperature), "" if temperature == 1 else f".t{temperature:g}"
        baseline = "sft" if str(policy.sft).startswith("sft/") else "reference"
        for label, opponent in ((baseline, (str(policy.sft), temperature)), (plan.opponent, DATA)):
            if side in sides and opponent in sides and opponent != side:
                matches.append((side, opponent, f"{label}{ending}"))
    return matches


def prefer_larger(first: Verdicts, second: Verdicts) -> Verdicts:
    """Verdicts by scores: 1 if the first is larger, 0.5 for a tie, 0 if it is smaller; None without both."""
    pairs = zip(first, second, strict=True)
    return [None if None in pair else 0.5 if pair[0] == pair[1] else float(pair[0] > pair[1]) for pair in pairs]


def split_like(lists: dict[Any, list[Any]], values: Verdicts) -> dict[Any, Verdicts]:
    """The values as lists with the keys and the lengths of `lists`."""
    rest = iter(values)
    return {key: list(itertools.islice(rest, len(items))) for key, items in lists.items()}
