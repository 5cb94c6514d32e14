"""Statistics of verdicts and scores: win rates, ratings, whether two policies differ, and Best-of-N.

A verdict is 1 (the first is better), 0.5 (a tie) or 0. Intervals are over prompts, from a seeded bootstrap; those of
logistic fits from its Bayesian form (Rubin 1981), which weights prompts by exponential draws: no draw leaves the only
loss out, so that every fit is finite.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from dpo_pipeline import estimates
from dpo_pipeline.estimates import Estimate

DRAWS = 2000
MIN_DISTINCT = 10  # comparisons that an interval needs, and wins as well as losses that a fit on length needs
RIDGE = 0.1  # a slope of 3 log-odds per deviation costs half a nat in all: it is felt where length alone decides


def win_rate(verdicts: Sequence[float], distinct: Sequence[int] | None = None) -> Estimate:
    """Wins plus half the ties, over all prompts; the interval and `n` are over distinct comparisons.

    `distinct` numbers the different pairs of texts, by default each verdict its own: a policy that gives one text to
    every prompt has been compared once. Below ten of them there is no interval; if all verdicts are equal, so that a
    bootstrap has no width, it is Wilson's. Raises ValueError for no verdicts.
    """
    numbers = np.arange(len(verdicts)) if distinct is None else pd.factorize(np.asarray(distinct))[0]
    wins, counts = np.bincount(numbers, verdicts), np.bincount(numbers)
    rate = estimates.ratio(wins, counts)
    if len({*verdicts}) == 1:
        rate = estimates.proportion([verdicts[0]] * len(counts))
    if len(counts) < MIN_DISTINCT:
        return {**rate, "low": None, "high": None}
    return {**rate, "low": max(0.0, rate["low"]), "high": min(1.0, rate["high"])}


def length_controlled(
    verdicts: Sequence[float], length_differences: Sequence[float], distinct: Sequence[int] | None = None
) -> Estimate | None:
    """The win rate at equal length: a logistic fit on the length difference (ours minus theirs, tokens), read at 0.

    In the spirit of AlpacaEval 2 (arXiv:2404.04475), with its length term alone, in standard deviations, without its
    tanh; a ridge on the slope keeps it finite if the longer completion always wins. None where the fit would say
    nothing: fewer than ten distinct wins or losses, or all differences on one side of 0.
    """
    wins, lengths = np.asarray(verdicts, float), np.asarray(length_differences, float)
    numbers = np.arange(len(wins)) if distinct is None else pd.factorize(np.asarray(distinct))[0]
    decided = [len({*numbers[wins == verdict]}) for verdict in (1, 0)]
    if min(decided) < MIN_DISTINCT or not lengths.min() <= 0 <= lengths.max():
        return None
    if np.ptp(lengths) == 0:
        return win_rate(verdicts, distinct)
    weights = prompt_weights(numbers.max() + 1)[:, numbers]
    features = np.column_stack([np.ones(len(wins)), lengths / lengths.std()])
    intercepts = log_odds(weights * wins, weights * (1 - wins), features, ridge=[0.0, RIDGE])[:, 0]
    return with_quantiles(1 / (1 + np.exp(-intercepts)), int(numbers.max()) + 1)


def elo(verdicts: dict[tuple[str, str], list[float]], anchor: str) -> dict[str, Estimate]:
    """Bradley-Terry strengths of all policies from their pairwise verdicts, on the Elo scale, `anchor` at 1000.

    The verdicts of a pair are by prompt, NaN without one; `n` is the number of prompts that a policy was judged on.
    Each pair gets one more tie, half a win for either (Jeffreys' prior), so that the rating of a policy that wins
    everything is finite: between two policies it is 400 log10((wins + 1/2) / (losses + 1/2)). A policy that is linked
    to the anchor by no chain of verdicts is left out.
    """
    pairs = [pair for pair, values in verdicts.items() if not np.isnan(values).all()]
    linked = {anchor}
    for _ in pairs:  # no chain has more links
        linked |= {name for pair in pairs if linked & {*pair} for name in pair}
    if linked == {anchor}:
        return {}
    names, wins = sorted(linked), np.array([verdicts[pair] for pair in pairs])  # [pairs, prompts]
    features = np.array([[float(name == one) - (name == other) for name in names] for one, other in pairs])
    weights = prompt_weights(wins.shape[1])
    prior = np.random.default_rng(1).gamma(0.5, size=(2, len(weights), len(wins)))
    prior[:, 0] = 0.5
    won, lost = (
        weights @ np.nan_to_num(counts).T + half for counts, half in zip((wins, 1 - wins), prior, strict=True)
    )
    # All strengths may be shifted alike: a ridge on the anchor's puts it at 0 and changes no difference.
    ratings = 1000 + 400 / np.log(10) * log_odds(won, lost, features, ridge=[float(name == anchor) for name in names])
    prompts = [int((~np.isnan(wins[column != 0])).any(0).sum()) for column in features.T]
    return {name: with_quantiles(ratings[:, i], prompts[i]) for i, name in enumerate(names)}


def prompt_weights(n: int) -> Any:
    """Weights of n prompts, of mean 1: the first row is all ones, each other row a draw of the Bayesian bootstrap."""
    return np.vstack([np.ones(n), np.random.default_rng(0).exponential(size=(DRAWS, n))])


def with_quantiles(values: Any, n: int) -> Estimate:
    """The estimate of a value, the first, and its draws, the rest; one prompt has no interval."""
    low, high = np.quantile(values[1:], [0.025, 0.975]).tolist() if n > 1 else (None, None)
    return estimates.estimate(float(values[0]), low, high, n)


def log_odds(wins: Any, losses: Any, features: Any, ridge: list[float]) -> Any:
    """The coefficients [fits, k] of logistic fits with shared `features` [rows, k]; wins and losses: [fits, rows].

    They minimise minus the log-likelihood plus half of `ridge` [k] times their squares, by Newton's steps from the
    first fit. A step that moves no row by more than 1 cannot overshoot: no curvature grows beyond e times on its way.
    """
    coefficients = np.zeros((1, len(ridge)))
    if len(wins) > 1:
        coefficients = log_odds(wins[:1], losses[:1], features, ridge).repeat(len(wins), 0)
    products = (features[:, :, None] * features[:, None, :]).reshape(len(features), -1)
    for _ in range(1000):
        odds_against = np.exp(-coefficients @ features.T)
        p = 1 / (1 + odds_against)
        q = odds_against * p  # 1 - p loses its digits where p is near 1
        slope = (wins * q - losses * p) @ features - ridge * coefficients
        curvature = ((wins + losses) * p * q @ products).reshape(len(wins), *np.diag(ridge).shape) + np.diag(ridge)
        step = np.linalg.solve(curvature, slope[..., None])[..., 0]
        change = np.abs(step @ features.T).max(1, keepdims=True)
        coefficients += step / np.maximum(change, 1)
        if change.max() < 1e-5:  # convergence is quadratic
            break
    return coefficients


def paired_test(first: list[float], second: list[float]) -> dict[str, Any]:
    """The mean `difference` of two policies' scores of the same prompts, and the `p` of the sign-flip test of it.

    p is two-sided: exact up to 13 prompts, else from 9,999 seeded draws. Raises ValueError for no scores.
    """
    from scipy.stats import permutation_test

    differences = [a - b for a, b in zip(first, second, strict=True)]
    difference, p = estimates.mean(differences), 1.0  # either sign of a single difference is as far from 0
    if len(differences) > 1:
        rng = np.random.default_rng(0)
        test = permutation_test((differences,), np.mean, permutation_type="samples", batch=1000, rng=rng)
        p = float(test.pvalue)
    return {"difference": difference, "p": p}


def holm(ps: list[float]) -> list[float]:
    """The p values of several tests, each adjusted so that all of them together keep to its level (Holm, 1979)."""
    order = np.argsort(ps)
    adjusted = np.maximum.accumulate(np.asarray(ps)[order] * np.arange(len(ps), 0, -1))
    return np.minimum(adjusted, 1.0)[np.argsort(order)].tolist()


def expected_best(picks: list[float], values: list[float], k: int) -> float:
    """The mean value of the completion picked out of k, over all k-subsets of n completions to one prompt: unbiased.

    `picks` are the scores of the judge that picks, `values` those that its pick is measured by. It counts the subsets
    in which a completion is picked (the estimator of WebGPT's Best-of-N, arXiv:2112.09332, and of pass@k,
    arXiv:2107.03374); completions of equal score share theirs.
    """
    n, ranked, terms = len(picks), sorted(picks), []
    for pick, value in zip(picks, values, strict=True):
        below, up_to = bisect_left(ranked, pick), bisect_right(ranked, pick)
        subsets = math.comb(up_to, k) - math.comb(below, k)
        terms.append(subsets / (math.comb(n, k) * (up_to - below)) * value)
    return math.fsum(terms)


def kl_bound(n: int) -> float:
    """An upper bound of the KL of Best-of-n to its policy, in nats: log n - (n - 1) / n.

    Stiennon et al. (arXiv:2009.01325) give it as the KL itself, which holds if no two completions score alike and none
    is likely; else the KL is lower (Beirami et al., arXiv:2401.01879).
    """
    return math.log(n) - (n - 1) / n
