"""Each estimate against an independent computation of its value and of its interval."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest, t, ttest_1samp

from dpo_pipeline import estimates

RNG = np.random.default_rng(7)
VALUES = RNG.exponential(2.0, 12).tolist()
TOKENS = RNG.integers(1, 60, 200)
SUMS = 0.7 * TOKENS + RNG.normal(0, 3, 200)


def delta_method(numerators, denominators):
    """A ratio of sums and the half-width of its 95% interval, by linearization."""
    value = numerators.sum() / denominators.sum()
    residuals = (numerators - value * denominators) / denominators.mean()
    return value, 1.96 * residuals.std(ddof=1) / math.sqrt(len(numerators))


@pytest.mark.parametrize("n", [2, 3, 12])
def test_mean_has_the_t_interval(n):
    found = estimates.mean(VALUES[:n])
    interval = ttest_1samp(VALUES[:n], 0).confidence_interval(0.95)
    assert found == pytest.approx(
        {"value": np.mean(VALUES[:n]), "low": interval.low, "high": interval.high, "n": n}, rel=1e-12
    )


def test_mean_of_one_value_has_no_interval():
    assert estimates.mean([3.5]) == {"value": 3.5, "low": None, "high": None, "n": 1}


def test_mean_of_equal_values_is_exact():
    assert estimates.mean([0.0] * 5) == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 5}


@pytest.mark.parametrize(("wins", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (7, 20), (531, 1000)])
def test_share_has_the_wilson_interval(wins, n):
    found = estimates.proportion([1.0] * wins + [0.0] * (n - wins))
    interval = binomtest(wins, n).proportion_ci(0.95, method="wilson")
    expected = {"value": wins / n, "low": interval.low, "high": interval.high, "n": n}
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("share_of_wins", [0.0, 0.1, 1 / 3, 0.5, 0.97, 1.0])
def test_an_interval_holds_its_value_at_every_size(share_of_wins):
    """matplotlib refuses an error bar of a negative length, which one rounding made of a share of 1."""
    for n in range(1, 1001):
        wins = round(share_of_wins * n)
        values = [1.0] * wins + [0.0] * (n - wins)
        for found in (estimates.proportion(values), estimates.mean(values), estimates.accuracy(values)):
            assert found["low"] is None or found["low"] <= found["value"] <= found["high"], (n, found)


def test_a_tie_counts_half_a_win_in_a_share():
    assert estimates.proportion([1.0, 0.5, 0.5, 0.0, 0.0, 0.5, 0.5, 0.0]) == estimates.proportion(
        [1.0] * 3 + [0.0] * 5
    )


def test_accuracy_is_the_share_above_0_with_ties_half():
    assert estimates.accuracy([2.0, 1e-9, -0.1, 0.0]) == estimates.proportion([1.0, 1.0, 0.0, 0.5])
    assert estimates.accuracy([2.0, 1e-9, -0.1, 0.0])["value"] == 0.625
    assert estimates.accuracy([0.0, -0.0, 0.0])["value"] == 0.5
    assert estimates.accuracy([-5.0, -1e-9])["value"] == 0.0


def test_ratio_is_of_sums_with_an_interval_as_wide_as_the_delta_method_s():
    found = estimates.ratio(SUMS.tolist(), TOKENS.tolist())
    value, half = delta_method(SUMS, TOKENS)
    assert found["value"] == pytest.approx(value, rel=1e-12)
    assert found["value"] != pytest.approx((SUMS / TOKENS).mean(), rel=1e-3)
    assert value - found["low"] == pytest.approx(half, rel=0.15)
    assert found["high"] - value == pytest.approx(half, rel=0.15)
    assert found["n"] == 200
    assert estimates.ratio(SUMS.tolist(), TOKENS.tolist()) == found


@pytest.mark.parametrize(("n", "least"), [(60, 0.90), (10, 0.93)])
def test_the_interval_of_a_ratio_holds_the_truth_at_its_rate(n, least):
    """A bootstrap of ten rows would cover 88%."""
    rng, held = np.random.default_rng(4), 0
    for _ in range(300):
        tokens = rng.integers(5, 60, n)
        found = estimates.ratio(0.7 * tokens + rng.normal(0, 3, n), tokens)
        held += found["low"] < 0.7 < found["high"]
    assert least <= held / 300 <= 0.99


def test_the_interval_of_a_mean_is_cut_at_its_minimum():
    assert estimates.mean([0.0, 0.0, 9.0])["low"] < 0
    assert estimates.mean([0.0, 0.0, 9.0], minimum=0.0) == {**estimates.mean([0.0, 0.0, 9.0]), "low": 0.0}


def test_perplexity_is_over_the_tokens_of_all_rows_together():
    rows = [np.log(RNG.uniform(0.02, 1.0 / (1 + i % 3), length)) for i, length in enumerate(TOKENS)]
    nats, count = 0.0, 0
    for row in rows:
        for logprob in row:
            nats, count = nats - float(logprob), count + 1
    sums = np.array([row.sum() for row in rows])
    found = estimates.perplexity(sums.tolist(), TOKENS.tolist())
    assert found["value"] == pytest.approx(math.exp(nats / count), rel=1e-12)
    assert found["value"] != pytest.approx(np.mean([math.exp(-row.mean()) for row in rows]), rel=0.01)
    value, half = delta_method(-sums, TOKENS)
    assert math.log(found["low"]) == pytest.approx(value - half, abs=0.15 * half)
    assert math.log(found["high"]) == pytest.approx(value + half, abs=0.15 * half)
    assert found["n"] == 200


def test_a_uniform_guess_among_k_tokens_has_perplexity_k():
    found = estimates.perplexity([-3 * math.log(7), -math.log(7)], [3, 1])
    assert [found[key] for key in ("value", "low", "high")] == pytest.approx([7, 7, 7])


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_scaling_an_estimate_is_estimating_scaled_values(scale):
    expected = estimates.mean([scale * value for value in VALUES])
    assert estimates.scaled(estimates.mean(VALUES), scale) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("estimate", [estimates.mean, estimates.proportion, estimates.accuracy])
def test_no_values_are_refused(estimate):
    with pytest.raises(ValueError, match="no values"):
        estimate([])


@pytest.mark.parametrize("estimate", [estimates.ratio, estimates.perplexity])
def test_no_rows_are_refused(estimate):
    with pytest.raises(ValueError, match="no values"):
        estimate([], [])


def test_a_ratio_of_lists_that_do_not_match_is_refused_and_of_one_row_has_no_interval():
    with pytest.raises(ValueError, match="the ratio of 2 values to 3"):
        estimates.ratio([1.0, 2.0], [1.0, 2.0, 3.0])
    assert estimates.ratio([3.0], [2.0]) == {"value": 1.5, "low": None, "high": None, "n": 1}
    assert estimates.perplexity([-3.0], [2])["low"] is None


def test_a_margin_that_is_no_number_is_not_a_loss():
    assert math.isnan(estimates.accuracy([1.0, math.nan])["value"])


def completions_of(rng, count, vocabulary=12):
    return [rng.integers(0, vocabulary, rng.integers(1, 9)).tolist() for _ in range(count)]


def counted_distinct(completions, n):
    seen = [tuple(completion[at : at + n]) for completion in completions for at in range(len(completion) - n + 1)]
    return len(set(seen)) / len(seen)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("count", [4, 40])
def test_distinct_has_the_interval_of_leaving_each_completion_out(n, count):
    completions = [[5, 5, 5, 5, 5], [5, 5, 5], [77] * 6, *completions_of(np.random.default_rng(n), count)]
    without = [counted_distinct(completions[:i] + completions[i + 1 :], n) for i in range(len(completions))]
    value, half = counted_distinct(completions, n), np.std(without) * math.sqrt(len(completions) - 1)
    low, high = t.interval(0.95, len(completions) - 1, value, half)
    found = estimates.distinct(completions, n)
    expected = {"value": value, "low": max(0.0, low), "high": min(1.0, high), "n": len(completions)}
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_interval_of_distinct_holds_what_as_many_completions_have_on_average():
    rng = np.random.default_rng(0)
    found = [estimates.distinct(completions_of(rng, 40), 2) for _ in range(200)]
    average = np.mean([each["value"] for each in found])
    assert 0.92 <= np.mean([each["low"] < average < each["high"] for each in found]) <= 0.995


def test_distinct_of_equal_completions_of_different_ones_and_of_a_single_one():
    assert estimates.distinct([[1, 2, 3]] * 4, 2) == {"value": 0.25, "low": 0.25, "high": 0.25, "n": 4}
    assert estimates.distinct([[1, 2], [3, 4], [5, 6]], 2) == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 3}
    assert estimates.distinct([[1, 2, 1, 2], [7]], 2) == {"value": 2 / 3, "low": None, "high": None, "n": 2}


def test_distinct_of_completions_without_an_n_gram_is_refused():
    for completions in ([], [[1], [2, 3], []]):
        with pytest.raises(ValueError, match="no completion has 3 tokens"):
            estimates.distinct(completions, 3)


def test_repetition_is_the_share_of_n_grams_had_before():
    assert estimates.repetition([1, 2, 3, 1, 2, 3, 1, 2]) == 0.5  # 123 231 312 | 123 231 312
    assert estimates.repetition([4, 4, 4, 5], n=1) == 0.5
    assert estimates.repetition([9] * 12) == 0.9
    assert estimates.repetition([9] * 4) == 0.5
    assert estimates.repetition([1, 2, 3, 4]) == estimates.repetition([1, 2]) == estimates.repetition([]) == 0.0
