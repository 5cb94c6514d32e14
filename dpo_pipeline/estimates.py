"""Means with their 95% intervals: `{"value", "low", "high", "n"}`, never a bare mean."""

import math
from collections import Counter
from collections.abc import Sequence

Estimate = dict[str, float | int | None]


def estimate(value: float, low: float | None, high: float | None, n: int) -> Estimate:
    """An estimate whose interval holds its value: a rounding never puts `value` outside `low` and `high`."""
    if low is not None and high is not None and not math.isnan(value):
        low, high = min(low, value), max(high, value)
    return {"value": value, "low": low, "high": high, "n": n}


def mean(values: Sequence[float]) -> Estimate:
    """The mean with Student's t interval; of one value, or of equal values, the interval is what it can be.

    Raises ValueError for no values.
    """
    from scipy.stats import t

    n = len(values)
    if not n:
        raise ValueError("the mean of no values")
    value = math.fsum(values) / n
    if n == 1:
        return estimate(value, None, None, 1)
    error = math.sqrt(math.fsum((v - value) ** 2 for v in values) / (n - 1) / n)
    half = float(t.ppf(0.975, n - 1)) * error
    return estimate(value, value - half, value + half, n)


def proportion(values: Sequence[float]) -> Estimate:
    """The mean of values 0, 0.5 (a tie) or 1, with Wilson's interval.

    A tie counts half a success: its variance is below that of a trial, so the interval is, if anything, too wide.
    """
    n = len(values)
    if not n:
        raise ValueError("the share of no values")
    value, z = math.fsum(values) / n, 1.959963984540054
    centre = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    return estimate(value, max(0.0, centre - half), min(1.0, centre + half), n)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Sum of numerators over sum of denominators, with a bootstrap interval over rows (2,000 draws, seeded).

    One row has no interval. Raises ValueError for no rows, or for lists of different lengths.
    """
    import numpy as np

    n = len(numerators)
    if not n or n != len(denominators):
        raise ValueError(f"the ratio of {n or 'no'} values to {len(denominators)}")
    if n == 1:
        return estimate(numerators[0] / denominators[0], None, None, 1)
    top, bottom = np.asarray(numerators, float), np.asarray(denominators, float)
    rows = np.random.default_rng(0).integers(0, n, (2000, n))
    low, high = np.quantile(top[rows].sum(1) / bottom[rows].sum(1), [0.025, 0.975])
    return estimate(float(top.sum() / bottom.sum()), float(low), float(high), n)


def perplexity(completion_logprobs: Sequence[float], completion_tokens: Sequence[int]) -> Estimate:
    """exp of the summed negative log-prob of all completion tokens over their number, all rows together."""
    nats = ratio([-logprob for logprob in completion_logprobs], completion_tokens)
    return {key: value if key == "n" or value is None else math.exp(value) for key, value in nats.items()}


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """The estimate of `factor` times the quantity, for a factor above 0."""
    return {key: value if key == "n" or value is None else value * factor for key, value in estimate.items()}


def accuracy(margins: Sequence[float]) -> Estimate:
    """Share of pairs whose margin is above 0; a tie counts half. Of a margin that is no number, so is the share."""
    return proportion([m if math.isnan(m) else 1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins])


def ngrams(completion: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """The n-grams of a completion, in their order; a completion shorter than n has none."""
    return list(zip(*(completion[start:] for start in range(n)), strict=False))


def distinct(completions: Sequence[Sequence[int]], n: int) -> Estimate:
    """distinct-n (arXiv:1510.03055): different n-grams over all n-grams, of all completions together.

    With a delete-one jackknife interval over completions: a bootstrap would draw completions twice, and find fewer
    different ones. Where a single completion has all n-grams there is no interval. Raises ValueError where there is no
    n-gram.
    """
    from scipy.stats import t

    counts = [Counter(ngrams(completion, n)) for completion in completions]
    together = Counter(gram for own in counts for gram in own.elements())
    total, size = together.total(), len(completions)
    if not total:
        raise ValueError(f"no completion has {n} tokens")
    value = len(together) / total
    if any(own.total() == total for own in counts):
        return estimate(value, None, None, size)
    without = [
        (len(together) - sum(together[gram] == times for gram, times in own.items())) / (total - own.total())
        for own in counts
    ]
    centre = math.fsum(without) / size
    error = math.sqrt(math.fsum((each - centre) ** 2 for each in without) * (size - 1) / size)
    half = float(t.ppf(0.975, size - 1)) * error
    return estimate(value, max(0.0, value - half), min(1.0, value + half), size)


def repetition(completion: Sequence[int], n: int = 3) -> float:
    """The share of a completion's n-grams that it has had before; 0 for a completion shorter than n."""
    grams = ngrams(completion, n)
    return 1 - len({*grams}) / len(grams) if grams else 0.0
