"""Best-of-N: the value of the completion that a judge picks out of several, and its KL from the policy."""

import math
from bisect import bisect_left, bisect_right

from dpo_pipeline import estimates
from dpo_pipeline.estimates import Estimate


def picked_index(picks: list[float]) -> int:
    """The index of the completion that is taken: the first of those with the largest score of the picking judge."""
    return picks.index(max(picks))


def expected_best(picks: list[float], values: list[float], k: int) -> float:
    """The mean value of the completion picked out of k, over all k-subsets of n completions to one prompt: unbiased.

    `picks` are the scores of the judge that picks, `values` what its pick is measured by. The subsets in which an
    completion is picked are counted (the estimator of WebGPT's Best-of-N, arXiv:2112.09332, and of pass@k,
    arXiv:2107.03374); completions of equal score share theirs. Raises ValueError for k that is not 1 to n, and for
    lists of different lengths.
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

    Stiennon et al. (arXiv:2009.01325) give it as the KL itself, which it is where no two completions score alike and
    none is likely; else the KL is below it (Beirami et al., arXiv:2401.01879).
    """
    return math.log(n) - (n - 1) / n
