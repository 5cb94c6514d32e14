"""Best-of-N: the completion that a judge picks out of several, its score, and its KL from the policy."""

import math
from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import Any

from dpo_pipeline import estimates
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.estimates import Estimate
from dpo_pipeline.evaluation.measure import Measurements, Policy
from dpo_pipeline.evaluation.plan import JudgingPlan
from dpo_pipeline.judges.judge import Completion, Judge
from dpo_pipeline.judges.verdicts import scores


def best_of_n_policy(
    measurements: Measurements, judges: dict[str, Judge], plan: JudgingPlan
) -> tuple[Policy, list[Completion], dict[str, Any]]:
    """Best-of-N as a policy, the completions that the judge picked, and how their scores grow with N.

    The scores are unbiased estimates for each power of two up to N; `kl_bound` is in nats, from the policy that the
    completions were drawn from. Raises PipelineError if the picking judge gave a score that cannot be read.
    """
    n, source = plan.best_of, plan.best_of_source
    pool = best_of_n_pool(measurements, plan)
    scores_by_judge: dict[str, list[list[float]]] = {}  # a list for each prompt
    for name, judge in judges.items():
        if not judge.score or (judge.post_training_only and name != plan.picking_judge):
            continue
        values = scores(judge, pool, plan.cache, f"best of {n} by {name}")
        if None not in values:
            scores_by_judge[name] = [values[i : i + n] for i in range(0, len(values), n)]
        elif name == plan.picking_judge:
            raise PipelineError(
                f"{values.count(None)} of {len(values)} completions got no score that could be read: take another "
                "best_of.judge"
            )
    picks = scores_by_judge[plan.picking_judge]
    completions = [pool[i * n + picked_index(values)] for i, values in enumerate(picks)]
    points = []
    for k in [*(2**i for i in range(n.bit_length()) if 2**i < n), n]:
        curves = {f"score.{name}": best_of(picks, values, k) for name, values in scores_by_judge.items()}
        points.append({"n": k, "kl_bound": kl_bound(k), **curves})
    policy = Policy(f"best of {n} of {source}", "", Path(), 1.0, sft=source)
    result = {"name": policy.name, "policy": source, "n": n, "judge": plan.picking_judge, "points": points}
    return policy, completions, result


def best_of_n_pool(measurements: Measurements, plan: JudgingPlan) -> list[Completion]:
    """The drawn completions, N for each prompt, one prompt after the other."""
    prompts = len(measurements.eval_set.prompt_set.ids)
    chunks = [measurements.completions[plan.best_of_source, name] for name in plan.chunks]
    pool = []
    for i in range(prompts):
        for chunk in chunks:
            draws = len(chunk) // prompts
            pool += chunk[i * draws : (i + 1) * draws]
    return pool


def picked_index(picks: list[float]) -> int:
    """The index of the completion that is taken: the first of those with the largest score of the picking judge."""
    return picks.index(max(picks))


def expected_best(picks: list[float], values: list[float], k: int) -> float:
    """The mean value of the completion picked out of k, over all k-subsets of n completions to one prompt: unbiased.

    `picks` are the scores of the judge that picks, `values` those that its pick is measured by. It counts the subsets
    in which a completion is picked (the estimator of WebGPT's Best-of-N, arXiv:2112.09332, and of pass@k,
    arXiv:2107.03374); completions of equal score share theirs. Raises ValueError for k outside 1 to n, and for lists
    of different lengths.
    """
    n, ranked = len(picks), sorted(picks)
    if not 1 <= k <= n:
        raise ValueError(f"the best of {k} out of {n}")
    terms = []
    for pick, value in zip(picks, values, strict=True):
        below, up_to = bisect_left(ranked, pick), bisect_right(ranked, pick)
        subsets = math.comb(up_to, k) - math.comb(below, k)
        terms.append(subsets / (math.comb(n, k) * (up_to - below)) * value)
    return math.fsum(terms)


def best_of(picks_by_prompt: list[list[float]], values_by_prompt: list[list[float]], k: int) -> Estimate:
    """The mean over prompts of `expected_best`."""
    pairs = zip(picks_by_prompt, values_by_prompt, strict=True)
    return estimates.mean([expected_best(picks, values, k) for picks, values in pairs])


def kl_bound(n: int) -> float:
    """An upper bound of the KL of Best-of-n to its policy, in nats: log n - (n - 1) / n.

    Stiennon et al. (arXiv:2009.01325) give it as the KL itself, which holds if no two completions score alike and none
    is likely; else the KL is lower (Beirami et al., arXiv:2401.01879).
    """
    return math.log(n) - (n - 1) / n
