"""Estimates with 95% intervals: `{"value", "low", "high", "n"}`, never a bare mean."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

Estimate = dict[str, float | int | None]
MIN_BOOTSTRAP = 30  # rows


def estimate(value: float, low: float | None, high: float | None, n: int) -> Estimate:
    """An estimate whose interval holds its value: a rounding never puts `value` outside `low` and `high`."""
    if low is not None and high is not None and not math.isnan(value):
        low, high = min(low, value), max(high, value)
    return {"value": value, "low": low, "high": high, "n": n}


def t_interval(value: float, error: float, n: int) -> tuple[float, float]:
    """Student's t interval of a value with this standard error, estimated from n rows."""
    from scipy.stats import t

    half = float(t.ppf(0.975, n - 1)) * error
    return value - half, value + half


def mean(values: Sequence[float], minimum: float = -math.inf) -> Estimate:
    """The mean with Student's t interval, cut at the `minimum` that a value can have; one value has no interval.

    Raises ValueError for no values.
    """
    n = len(values)
    if not n:
        raise ValueError("the mean of no values")
    value = math.fsum(values) / n
    if n == 1:
        return estimate(value, None, None, 1)
    error = math.sqrt(math.fsum((v - value) ** 2 for v in values) / (n - 1) / n)
    low, high = t_interval(value, error, n)
    return estimate(value, max(minimum, low), high, n)


def proportion(values: Sequence[float]) -> Estimate:
    """The mean of values 0, 0.5 (a tie) or 1, with Wilson's interval. Raises ValueError for no values.

    A tie counts half a success. Its variance is below that of a trial, so the interval is, if anything, too wide.
    """
    n = len(values)
    if not n:
        raise ValueError("the share of no values")
    value, z = math.fsum(values) / n, 1.959963984540054
    centre = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    return estimate(value, max(0.0, centre - half), min(1.0, centre + half), n)


def accuracy(margins: Sequence[float]) -> Estimate:
    """The share of pairs whose margin is above 0; a tie counts half, and one NaN makes the share NaN."""
    return proportion([m if math.isnan(m) else 1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins])


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """The sum of numerators over the sum of denominators, with a seeded bootstrap interval over rows (2,000 draws).

    Below 30 rows, where a bootstrap covers too little, Student's t interval of the linearized ratio (the
    delta method). One row has no interval. Raises ValueError for no rows, or for lists of different lengths.
    """
    import numpy as np

    n = len(numerators)
    if not n or n != len(denominators):
        raise ValueError(f"the ratio of {n or 'no'} values to {len(denominators)}")
    top, bottom = np.asarray(numerators, float), np.asarray(denominators, float)
    value = float(top.sum() / bottom.sum())
    if n == 1:
        return estimate(value, None, None, 1)
    if n < MIN_BOOTSTRAP:
        error = float((top - value * bottom).std(ddof=1) / bottom.mean() / math.sqrt(n))
        return estimate(value, *t_interval(value, error, n), n)
    rows = np.random.default_rng(0).integers(0, n, (2000, n))
    low, high = np.quantile(top[rows].sum(1) / bottom[rows].sum(1), [0.025, 0.975])
    return estimate(value, float(low), float(high), n)


def transform(estimate: Estimate, function: Callable[[float], float]) -> Estimate:
    """The estimate of an increasing function of the quantity."""
    return {key: value if key == "n" or value is None else function(value) for key, value in estimate.items()}


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """The estimate of `factor` times the quantity, for a factor above 0."""
    return transform(estimate, lambda value: value * factor)


def perplexity(completion_logprobs: Sequence[float], completion_tokens: Sequence[int]) -> Estimate:
    """exp of the summed negative log-prob of all completion tokens over their number, all rows together."""
    return transform(ratio([-logprob for logprob in completion_logprobs], completion_tokens), math.exp)


def ngrams(completion: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """The n-grams of a completion, in their order; a completion shorter than n has none."""
    return list(zip(*(completion[start:] for start in range(n)), strict=False))


def distinct(completions: Sequence[Sequence[int]], n: int) -> Estimate:
    """distinct-n (arXiv:1510.03055): different n-grams over all n-grams, of all completions together.

    The interval is a delete-one jackknife over completions: a bootstrap draws completions twice, and finds fewer
    different n-grams. There is none if a single completion has all n-grams. Raises ValueError for no n-gram.
    """
    counts = [Counter(ngrams(completion, n)) for completion in completions]
    all_counts = Counter(gram for counter in counts for gram in counter.elements())
    total, size = all_counts.total(), len(completions)
    if not total:
        raise ValueError(f"no completion has {n} tokens")
    value = len(all_counts) / total
    if any(counter.total() == total for counter in counts):
        return estimate(value, None, None, size)
    deleted = []  # the value without each completion
    for counter in counts:
        unique_grams = sum(all_counts[gram] == count for gram, count in counter.items())
        deleted.append((len(all_counts) - unique_grams) / (total - counter.total()))
    centre = math.fsum(deleted) / size
    error = math.sqrt(math.fsum((v - centre) ** 2 for v in deleted) * (size - 1) / size)
    low, high = t_interval(value, error, size)
    return estimate(value, max(0.0, low), min(1.0, high), size)


def repetition(completion: Sequence[int], n: int = 3) -> float:
    """The share of a completion's n-grams that repeat an earlier one; 0 for a completion shorter than n."""
    grams = ngrams(completion, n)
    return 1 - len({*grams}) / len(grams) if grams else 0.0
