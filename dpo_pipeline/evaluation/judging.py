"""What judges say of sampled completions: scores, win rates, ratings of all against all, Best-of-N."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_pipeline import estimates
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.evaluation.best_of import best_of, kl_bound, picked_index
from dpo_pipeline.evaluation.eval_set import EvalSet, PromptSet
from dpo_pipeline.evaluation.measure import SAMPLES, Measurements, Policy
from dpo_pipeline.evaluation.verdict_statistics import elo, holm, length_controlled, paired_test, win_rate
from dpo_pipeline.judges.judge import Completion, Judge, drop_unparsed
from dpo_pipeline.judges.verdicts import choices, scores

Verdicts = list[float | None]
Side = tuple[str, float]  # a policy at a temperature
DATA: Side = ("the data", 1.0)  # the data's own completions
BEST_OF = "best_of"  # the Asks of Best-of-N, so many draws each
DRAWN = 16
ENOUGH = 10  # wins, and losses, from which on a fit on length says something


@dataclass
class Plan:
    """What is judged: `opponent` names the data's own completions, `cache` is the folder of verdicts.

    `safety` and `bias` are further prompts. `all_pairs`: a judge that chooses is asked about any two policies too, not
    about each and its opponents alone. Best-of-N: `n` completions of the policy `drawn_from`, of which the judge
    `picks` takes one.
    """

    temperatures: list[float]
    opponent: str
    cache: Path
    all_pairs: bool = False
    safety: PromptSet | None = None
    bias: PromptSet | None = None
    n: int | None = None
    drawn_from: str | None = None
    picks: str | None = None


@dataclass
class JudgeResults:
    """Estimates by policy; any two compared, by judge; Best-of-N; what each judge was asked; which failed, and why."""

    own: dict[str, dict[str, Any]] = field(default_factory=dict)
    comparisons: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    best_of: dict[str, Any] | None = None
    scores: dict[str, dict[str, Verdicts]] = field(default_factory=dict)  # by policy and judge, of the samples
    judges: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def ask_name(temperature: float) -> str:
    """The Ask of a temperature."""
    return SAMPLES if temperature == 1 else f"{SAMPLES}-t{temperature:g}"


def run_judges(
    policies: list[Policy], eval_set: EvalSet, measurements: Measurements, judges: dict[str, Judge], plan: Plan
) -> JudgeResults:
    """All that the judges say; where one fails it is told of in `failed`, and what the others say stands."""
    found = JudgeResults({policy.name: {} for policy in policies})
    sides: dict[Side, list[Completion]] = {
        (policy.name, t): eval_set.completions(eval_set.prompt_set, measurements.completions[policy.name, ask_name(t)])
        for policy in policies
        for t in dict.fromkeys((1.0, *plan.temperatures))
    }
    if eval_set.prompt_set.human:
        sides[DATA] = eval_set.prompt_set.human
    for name in sorted(judges, key=lambda name: name != plan.picks):  # what it picks, the others judge too
        if name == plan.picks:
            try:
                policy, completions, found.best_of = best_of_n_policy(eval_set, measurements, judges, plan)
                policies, sides[policy.name, 1.0] = [*policies, policy], completions
                found.own[policy.name] = {}
            except (PipelineError, RuntimeError) as error:
                found.failed[f"best of {plan.n} by {name}"] = str(error)
        try:
            run_judge(name, judges[name], policies, sides, plan, found)
        except (PipelineError, RuntimeError) as error:
            found.failed[f"judge {name}"] = " ".join(str(error).split())
    if found.best_of:
        found.best_of["own"] = found.own[found.best_of["name"]]
    return found


def run_judge(
    name: str,
    judge: Judge,
    policies: list[Policy],
    sides: dict[Side, list[Completion]],
    plan: Plan,
    results: JudgeResults,
) -> None:
    """Add to `found` what one judge says."""
    scored: dict[Side, Verdicts] = {}
    if judge.score:
        flat = scores(judge, [each for side in sides.values() for each in side], plan.cache, f"scores by {name}")
        cuts = [0, *itertools.accumulate(map(len, sides.values()))]
        scored = {side: flat[a:b] for side, a, b in zip(sides, cuts, cuts[1:], strict=False)}
    against = {
        (policy.name, t, key): ((policy.name, t), other)
        for policy in policies
        for t in plan.temperatures
        for key, other in ((opponent_label(policy), (policy.sft, t)), (plan.opponent, DATA))
        if (policy.name, t) in sides and other in sides and other != (policy.name, t)
    }
    names = [policy.name for policy in policies]
    pairs = list(itertools.combinations(names, 2)) if judge.choose is None or plan.all_pairs else []
    wanted = [*against.values(), *(((a, 1.0), (b, 1.0)) for a, b in pairs)]
    verdicts = dict(zip(wanted, verdicts_of(name, judge, wanted, sides, scored, plan), strict=True))
    told = [*itertools.chain(*scored.values())]
    told += itertools.chain(*verdicts.values()) if judge.choose else ()
    results.judges[name] = {"version": judge.version, "results": len(told), "unreadable": told.count(None)}
    if told and not drop_unparsed(told) and name != "human":
        raise PipelineError(
            f"none of its {len(told)} results could be read: look at what it says, and at judge.{name}.wording and "
            ".verdict, or take a stronger model"
        )
    for policy in names if scored else ():
        if values := drop_unparsed(scored[policy, 1.0]):
            results.scores.setdefault(policy, {})[name] = scored[policy, 1.0]
            results.own[policy][f"score.{name}"] = estimates.mean(values)
    for (policy, t, key), (one, other) in against.items():
        rows = [
            (verdict, len(a.ids) - len(b.ids))
            for verdict, a, b in zip(verdicts[one, other], sides[one], sides[other], strict=True)
            if verdict is not None
        ]
        if rows:
            at = "" if t == 1 else f".t{t:g}"
            won, longer = map(list, zip(*rows, strict=True))
            results.own[policy][f"win_rate.{name}.{key}{at}"] = win_rate(won)
            if min(sum(won), len(won) - sum(won)) >= ENOUGH:
                results.own[policy][f"length_controlled_win_rate.{name}.{key}{at}"] = length_controlled(won, longer)
    if any(drop_unparsed(verdicts[(a, 1.0), (b, 1.0)]) for a, b in pairs):
        pairwise_ratings(name, pairs, verdicts, scored, policies, results)


def opponent_label(policy: Policy) -> str:
    """What the policy that another is to beat is called in its estimates."""
    return "sft" if str(policy.sft).startswith("sft/") else "reference"


def verdicts_of(
    name: str,
    judge: Judge,
    comparisons: list[tuple[Side, Side]],
    sides: dict[Side, list[Completion]],
    scored: dict[Side, Verdicts],
    plan: Plan,
) -> list[Verdicts]:
    """For each two sides wanted, of each prompt: 1 where the first completion is better, 0.5, or 0; None where
    unreadable.

    A judge that only scores prefers the larger score.
    """
    if judge.choose is None:
        return [
            [
                None if a is None or b is None else 1.0 if a > b else 0.5 if a == b else 0.0
                for a, b in zip(scored[one], scored[other], strict=True)
            ]
            for one, other in comparisons
        ]
    flat = [each for one, other in comparisons for each in zip(sides[one], sides[other], strict=True)]
    given = iter(choices(judge, flat, plan.cache, f"choices by {name}"))
    return [list(itertools.islice(given, len(sides[one]))) for one, _ in comparisons]


def pairwise_ratings(
    name: str,
    pairs: list[tuple[str, str]],
    verdicts: dict[tuple[Side, Side], Verdicts],
    scored: dict[Side, Verdicts],
    policies: list[Policy],
    results: JudgeResults,
) -> None:
    """Ratings of all policies by one judge, and of any two whether they differ, by scores or else by verdicts."""
    games = {(a, b): verdicts[(a, 1.0), (b, 1.0)] for a, b in pairs}
    sft = next((policy.sft for policy in policies if policy.sft in results.own), policies[0].name)
    if any(drop_unparsed(won) for pair, won in games.items() if sft in pair):
        for policy, rating in elo(games, sft).items():
            results.own[policy][f"elo.{name}"] = rating
    rows = []
    for (a, b), won in games.items():
        one, other = (scored[side, 1.0] for side in (a, b)) if scored else (won, [0.5] * len(won))
        both = [(x, y) for x, y in zip(one, other, strict=True) if x is not None and y is not None]
        if both and drop_unparsed(won):
            test = paired_test(*map(list, zip(*both, strict=True)))
            rows.append({"one": a, "other": b, "win_rate": win_rate(drop_unparsed(won)), **test})
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_adjusted"] = p
    results.comparisons[name] = rows


def best_of_n_policy(
    eval_set: EvalSet, measurements: Measurements, judges: dict[str, Judge], plan: Plan
) -> tuple[Policy, list[Completion], dict[str, Any]]:
    """Best-of-N: a policy whose completions a judge has picked out of N, these, and how their scores grow with N.

    The scores are unbiased estimates for each power of two up to N; `kl_bound` is of the KL from the policy that the
    completions were drawn from, in nats.
    """
    n, source = int(plan.n or 0), str(plan.drawn_from)
    parts = [(measurements.completions[source, f"{BEST_OF}-{at}"], min(DRAWN, n - at)) for at in range(0, n, DRAWN)]
    ids = [
        own for i in range(len(eval_set.prompt_set.ids)) for drawn, k in parts for own in drawn[i * k : (i + 1) * k]
    ]
    pool = eval_set.completions(eval_set.prompt_set, ids, n)
    able = {
        name: judge
        for name, judge in judges.items()
        if judge.score and (name == plan.picks or not judge.post_training_only)
    }
    given = {name: scores(judge, pool, plan.cache, f"best of {n} by {name}") for name, judge in able.items()}
    # Another judge that could not be read now and then has no curve.
    by_judge = {name: by_prompt(flat, n) for name, flat in given.items() if name == plan.picks or None not in flat}
    picks = by_judge[str(plan.picks)]
    completions = [pool[i * n + picked_index(own)] for i, own in enumerate(picks)]
    points = [
        {"n": k, "kl_bound": kl_bound(k), **{f"score.{name}": best_of(picks, v, k) for name, v in by_judge.items()}}
        for k in [*(1 << i for i in range(n.bit_length()) if 1 << i < n), n]
    ]
    policy = Policy(f"best of {n} of {source}", "", Path(), 1.0, sft=source)
    return policy, completions, {"name": policy.name, "policy": source, "n": n, "judge": plan.picks, "points": points}


def by_prompt(flat: Verdicts, n: int) -> list[list[float]]:
    """Scores of each prompt's `n` completions; raises PipelineError where one is none."""
    if None in flat:
        raise PipelineError(
            f"{flat.count(None)} of {len(flat)} completions got no score that could be read: take another "
            "best_of.judge"
        )
    return [[v for v in flat[at : at + n] if v is not None] for at in range(0, len(flat), n)]
