"""Win rates, ratings, paired tests and Best-of-N against enumeration, SciPy's optimizers and simulated judges."""

import itertools
import math
from statistics import fmean

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import beta, bootstrap, entropy, ttest_rel

from dpo_pipeline import estimates
from dpo_pipeline.evaluation import statistics
from dpo_pipeline.evaluation.statistics import elo, holm, length_controlled, paired_test, win_rate


def judged(rng, log_odds, ties=0.2):
    """Verdicts of a judge with these log-odds, a share of them ties whatever the completions are."""
    wins = (rng.random(np.shape(log_odds)) < expit(log_odds)).astype(float)
    return np.where(rng.random(wins.shape) < ties, 0.5, wins).tolist()


def minimized(wins, losses, features, ridge):
    """The coefficients of one logistic fit by SciPy, from another start."""

    def loss(found):
        odds = features @ found
        return wins @ np.logaddexp(0, -odds) + losses @ np.logaddexp(0, odds) + np.square(found) @ ridge / 2

    return minimize(loss, np.full(features.shape[1], 0.3), method="BFGS", options={"gtol": 1e-7}).x


def holds(estimate, truth):
    return estimate["low"] <= truth <= estimate["high"]


# Win rates


def test_a_win_rate_is_the_mean_with_a_bootstrap_interval():
    verdicts = judged(np.random.default_rng(1), np.full(150, 0.6))
    found = win_rate(verdicts)
    expected = bootstrap((verdicts,), np.mean, n_resamples=20000, method="percentile", rng=np.random.default_rng(2))
    assert found["value"] == pytest.approx(fmean(verdicts), rel=1e-12)
    assert found["n"] == 150
    assert [found["low"], found["high"]] == pytest.approx(list(expected.confidence_interval), abs=0.01)
    assert win_rate(verdicts) == found


@pytest.mark.parametrize("verdict", [0.0, 0.5, 1.0])
def test_equal_verdicts_have_wilsons_interval(verdict):
    found = win_rate([verdict] * 40)
    assert found == estimates.proportion([verdict] * 40)
    assert found["high"] - found["low"] > 0.05


@pytest.mark.parametrize("distinct", [1, 9, 10, 40])
def test_the_interval_of_a_win_rate_is_over_distinct_comparisons(distinct):
    verdicts = judged(np.random.default_rng(2), np.full(distinct, 0.6))
    found = win_rate(verdicts * 6, list(range(distinct)) * 6)
    assert (found["value"], found["n"]) == (pytest.approx(fmean(verdicts)), distinct)
    assert found == pytest.approx(win_rate(verdicts))
    assert (found["low"] is None) == (distinct < 10)


def test_one_comparison_counted_three_hundred_times_has_no_interval():
    assert win_rate([1.0] * 300, [0] * 300) == {"value": 1.0, "low": None, "high": None, "n": 1}
    assert length_controlled([1.0] * 4 + [0.5] * 296, [-2] * 4 + [-1] * 296, [0] * 4 + [1] * 296) is None


# Length control


@pytest.mark.parametrize("kind", ["likes length", "ignores length", "only length"])
def test_the_fit_is_the_minimum_of_its_loss(kind):
    rng = np.random.default_rng(3)
    lengths = np.round(rng.normal(20, 30, 80))
    odds = {"likes length": lengths / 30, "only length": lengths * 1e6}.get(kind, np.full(80, 0.5))
    verdicts = judged(rng, odds, ties=0.0 if kind == "only length" else 0.2)
    features = np.column_stack([np.ones(80), lengths / lengths.std()])
    won, ridge = np.array(verdicts), np.array([0.0, statistics.RIDGE])
    intercept = minimized(won, 1 - won, features, ridge)[0]
    assert length_controlled(verdicts, lengths.tolist())["value"] == pytest.approx(expit(intercept), abs=1e-5)


def test_each_of_several_fits_is_the_minimum_of_its_own_loss():
    rng = np.random.default_rng(4)
    features, ridge = rng.normal(0, 2, (30, 3)), [0.0, 0.1, 2.0]
    weights = rng.exponential(size=(6, 30))
    won = np.array([*judged(rng, features[:, 0]), *judged(rng, 1e6 * features[:, 1], 0)]).reshape(2, 30)[[0, 1] * 3]
    found = statistics.log_odds(weights * won, weights * (1 - won), features, ridge)
    for line, w, y in zip(found, weights, won, strict=True):
        assert line == pytest.approx(minimized(w * y, w * (1 - y), features, np.array(ridge)), abs=1e-4)


@pytest.mark.parametrize("lost", [1e-3, 1e-9, 1e-13])
def test_a_fit_keeps_its_digits_where_next_to_nothing_is_lost(lost):
    wins, losses = np.array([[100.0], [lost]]), np.array([[lost], [100.0]])
    found = statistics.log_odds(wins, losses, np.ones((1, 1)), [0.0])
    assert found[:, 0] == pytest.approx([math.log(100 / lost), math.log(lost / 100)], rel=1e-9)


@pytest.mark.parametrize("slope", [1 / 30, 1e6], ids=["likes", "always takes"])
@pytest.mark.parametrize("seed", range(2))
def test_a_judge_of_length_alone_finds_no_winner_at_equal_length(seed, slope):
    rng = np.random.default_rng(seed)
    lengths = np.round(rng.normal(40, 40, 400))
    verdicts = np.where(lengths == 0, 0.5, judged(rng, lengths * slope, ties=0.2 if slope < 1 else 0.0)).tolist()
    raw, controlled = win_rate(verdicts), length_controlled(verdicts, lengths)
    assert raw["low"] > 0.6
    assert holds(controlled, 0.5)


def test_a_judge_that_ignores_length_is_left_as_it_is():
    rng = np.random.default_rng(6)
    lengths, verdicts = rng.normal(20, 40, 500), judged(rng, np.full(500, 0.8))
    raw, controlled = win_rate(verdicts), length_controlled(verdicts, lengths)
    assert controlled["value"] == pytest.approx(raw["value"], abs=0.03)
    assert controlled["high"] - controlled["low"] < 1.5 * (raw["high"] - raw["low"])


def test_the_interval_at_equal_length_holds_the_truth_at_its_rate(monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", 500)
    rng, held = np.random.default_rng(7), 0
    for _ in range(200):
        lengths = rng.normal(20, 40, 100)
        held += holds(length_controlled(judged(rng, 0.6 + lengths / 40, ties=0.0), lengths), expit(0.6))
    assert 0.90 <= held / 200 <= 0.985


def test_the_other_sides_rate_at_equal_length_is_the_rest_and_units_do_not_matter():
    rng = np.random.default_rng(8)
    lengths = rng.normal(10, 30, 60)
    verdicts = judged(rng, lengths / 20)
    found = length_controlled(verdicts, lengths)
    assert length_controlled(verdicts, 7 * lengths) == pytest.approx(found, abs=1e-9)
    other = length_controlled([1 - verdict for verdict in verdicts], -lengths)
    assert [1 - other[key] for key in ("value", "high", "low")] == pytest.approx([*found.values()][:3], abs=1e-9)
    assert found["n"] == other["n"] == 60


@pytest.mark.parametrize("padded", ["all", "half"])
def test_a_copy_padded_with_filler_does_not_win_at_equal_length(padded):
    """A judge that likes length alone; where every copy is longer, nothing says what it would do at equal length."""
    rng = np.random.default_rng(9)
    lengths = rng.integers(1, 20, 300) * (1 if padded == "all" else rng.choice([1, 1, 0, -1], 300))
    verdicts = np.select([lengths > 0, lengths == 0], [(rng.random(300) < 0.9), 0.5], rng.random(300) < 0.1).tolist()
    found = length_controlled(verdicts, lengths.tolist())
    assert win_rate(verdicts)["low"] > 0.55
    assert found is None if padded == "all" else holds(found, 0.5)


def test_a_fit_needs_wins_and_losses_and_without_a_difference_in_length_it_is_the_plain_rate():
    verdicts = judged(np.random.default_rng(9), np.zeros(60))
    assert length_controlled(verdicts, [0] * 60) == win_rate(verdicts)
    assert length_controlled(verdicts, [12] * 60) is None
    assert length_controlled([1.0] * 40 + [0.0] * 9 + [0.5] * 40, list(range(-44, 45))) is None  # ties are no losses


# Ratings


@pytest.mark.parametrize(("wins", "losses", "ties"), [(70, 30, 0), (40, 20, 40), (100, 0, 0), (3, 0, 0), (0, 50, 0)])
def test_the_rating_of_one_against_another_is_its_log_odds_with_a_tie_more(wins, losses, ties):
    found = elo({("one", "other"): [1.0] * wins + [0.0] * losses + [0.5] * ties}, "other")
    won, lost = wins + ties / 2 + 0.5, losses + ties / 2 + 0.5
    assert found["one"]["value"] == pytest.approx(1000 + 400 * math.log10(won / lost), abs=1e-6)
    assert found["one"]["n"] == wins + losses + ties
    assert found["other"] == pytest.approx({"value": 1000, "low": 1000, "high": 1000, "n": wins + losses + ties})
    if not ties:  # Jeffreys' interval of a share
        shares = beta.ppf([0.025, 0.975], won, lost)
        found = [expit((found["one"][key] - 1000) * math.log(10) / 400) for key in ("low", "high")]
        assert found == pytest.approx(shares.tolist(), abs=0.012)


def tournament(rng, strengths, prompts, missing=0.1):
    """Verdicts on all pairs, by prompt; the named strengths are in log-odds."""
    verdicts = {}
    for one, other in itertools.combinations(strengths, 2):
        said = judged(rng, np.full(prompts, strengths[one] - strengths[other]), ties=0.0)
        verdicts[one, other] = [math.nan if rng.random() < missing else verdict for verdict in said]
    return verdicts


STRENGTHS = {"a": 0.0, "b": 0.4, "c": -0.7, "d": 1.5, "e": 1.2}


def test_ratings_maximise_the_likelihood():
    verdicts = tournament(np.random.default_rng(10), STRENGTHS, 60)
    games = [(one, other, v) for (one, other), said in verdicts.items() for v in said if v == v]
    games += [(one, other, 0.5) for one, other in verdicts]  # the tie more

    def loss(found):
        at = {**dict(zip("abde", found, strict=True)), "c": 0.0}
        return sum(
            v * math.log1p(math.exp(at[y] - at[x])) + (1 - v) * math.log1p(math.exp(at[x] - at[y]))
            for x, y, v in games
        )

    best = minimize(loss, np.zeros(4)).x * 400 / math.log(10) + 1000
    found = elo(verdicts, "c")
    assert [found[name]["value"] for name in "abde"] == pytest.approx(best.tolist(), abs=0.05)
    assert list(found) == list("abcde")


def test_ratings_hold_known_strengths_at_their_rate(monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", 500)
    rng, held = np.random.default_rng(11), []
    for _ in range(60):
        found = elo(tournament(rng, STRENGTHS, 80), "a")
        held += [holds(found[name], 1000 + 400 / math.log(10) * STRENGTHS[name]) for name in "bcde"]
    assert 0.90 <= fmean(held) <= 0.985


def test_another_anchor_moves_all_ratings_alike():
    verdicts = tournament(np.random.default_rng(12), STRENGTHS, 40)
    one, other = elo(verdicts, "a"), elo(verdicts, "d")
    moved = [one[name]["value"] - other[name]["value"] for name in "abcde"]
    assert moved == pytest.approx([moved[0]] * 5, abs=1e-6)
    assert one["d"]["low"] == pytest.approx(2000 - other["a"]["high"], abs=1e-6)


def test_the_order_of_a_pair_does_not_matter():
    verdicts = tournament(np.random.default_rng(13), STRENGTHS, 40, missing=0.0)
    turned = {(other, one): [1 - verdict for verdict in said] for (one, other), said in verdicts.items()}
    for name, expected in elo(verdicts, "a").items():
        assert elo(turned, "a")[name]["value"] == pytest.approx(expected["value"], abs=1e-6)
        assert elo(turned, "a")[name]["low"] == pytest.approx(
            expected["low"], abs=8
        )  # the prior is drawn the other way


def test_all_verdicts_on_a_prompt_are_drawn_together():
    said = judged(np.random.default_rng(14), np.full(400, 0.8), ties=0.0)
    alone = elo({("c", "a"): said}, "a")["c"]
    # b is a by another name: its verdicts tell nothing more, however many there are
    doubled = elo({("c", "a"): said, ("c", "b"): said, ("a", "b"): [0.5] * 400}, "a")["c"]
    assert doubled["value"] == pytest.approx(alone["value"], abs=1)
    assert doubled["high"] - doubled["low"] == pytest.approx(alone["high"] - alone["low"], rel=0.08)


def test_nan_is_no_verdict_and_who_is_not_linked_to_the_anchor_is_left_out():
    nan = math.nan
    verdicts = {("a", "b"): [1.0, nan, 0.0, 1.0], ("c", "b"): [nan, 0.5, nan, nan], ("a", "d"): [nan] * 4}
    verdicts |= {("x", "y"): [1.0, 0.0, 1.0, 1.0]}
    found = elo(verdicts, "a")
    assert list(found) == ["a", "b", "c"]
    assert [found[name]["n"] for name in "abc"] == [3, 4, 1]
    assert found["b"]["value"] == pytest.approx(1000 - 400 * math.log10(2.5 / 1.5), abs=1e-6)
    assert found["c"]["value"] == pytest.approx(found["b"]["value"], abs=1e-6)
    assert found["c"]["low"] is found["c"]["high"] is None


def test_a_chain_links_to_the_anchor_whatever_the_order_of_its_pairs():
    names = ["anchor", "m", "f", "q", "b"]
    pairs = list(itertools.pairwise(names))
    for order in (pairs, pairs[::-1]):
        found = elo({pair: [1.0, 0.0, 0.5] for pair in order}, "anchor")
        assert sorted(found) == sorted(names)
        assert [each["value"] for each in found.values()] == pytest.approx([1000] * 5)


def test_an_anchor_without_a_verdict_rates_nobody_and_lists_of_different_lengths_are_refused():
    for verdicts in ({}, {("b", "c"): [1.0]}, {("a", "b"): [math.nan], ("b", "c"): [1.0]}):
        assert elo(verdicts, "a") == {}
    with pytest.raises(ValueError, match="inhomogeneous"):
        elo({("a", "b"): [1.0, 0.0], ("a", "c"): [1.0]}, "a")


# Paired tests


@pytest.mark.parametrize("shift", [0.0, 0.6, -1.5])
def test_p_is_that_of_all_signs_for_few_prompts(shift):
    rng = np.random.default_rng(15)
    one, other = rng.normal(shift, 1, 8), rng.normal(0, 1, 8)
    signed = [abs(fmean(np.array(signs) * (one - other))) for signs in itertools.product((1, -1), repeat=8)]
    found = paired_test(one.tolist(), other.tolist())
    assert found["p"] == fmean(each >= abs(fmean(one - other)) - 1e-12 for each in signed)
    assert found["difference"] == pytest.approx(estimates.mean((one - other).tolist()))


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.2])
def test_p_is_near_students_for_many_prompts_and_the_same_each_time(shift):
    rng = np.random.default_rng(16)
    prompts = rng.normal(0, 3, 200)
    one, other = (prompts + rng.normal(mean, 1, 200) for mean in (shift, 0))
    found = paired_test(one.tolist(), other.tolist())
    test = ttest_rel(one, other)
    assert found["p"] == pytest.approx(test.pvalue, abs=0.02)
    interval = test.confidence_interval()
    assert [found["difference"][key] for key in ("low", "high")] == pytest.approx([interval.low, interval.high])
    assert paired_test(one.tolist(), other.tolist()) == found


def test_a_large_difference_over_many_prompts_has_the_least_p_that_draws_can_give():
    assert paired_test([1.0] * 40, [0.0] * 40)["p"] == pytest.approx(2 / 10000)


def test_equal_policies_and_single_prompts_show_nothing():
    assert paired_test([0.3, 2.0, 0.7] * 20, [0.3, 2.0, 0.7] * 20) == {
        "difference": {"value": 0.0, "low": 0.0, "high": 0.0, "n": 60}, "p": 1.0,
    }  # fmt: skip
    assert paired_test([2.0], [1.5])["p"] == 1.0
    assert paired_test([2.0, 3.0], [1.5, 1.0])["p"] == 0.5


@pytest.mark.parametrize("ps", [[0.01, 0.04, 0.03, 0.005], [0.5, 0.02, 0.02, 0.9, 0.011], [0.6, 0.2, 0.7], [0.2], []])
def test_holms_p_is_that_of_the_closed_test_with_bonferronis(ps):
    subsets = [s for size in range(1, len(ps) + 1) for s in itertools.combinations(range(len(ps)), size)]
    closed = [
        max(min(1.0, len(subset) * min(ps[j] for j in subset)) for subset in subsets if i in subset)
        for i in range(len(ps))
    ]
    assert holm(ps) == pytest.approx(closed)


# Best-of-N


def mean_of_picked(picks, values, k):
    """Over all k-subsets, the value of the completion picked; of equal ones their mean."""
    found = []
    for subset in itertools.combinations(range(len(picks)), k):
        best = max(picks[i] for i in subset)
        found.append(fmean(values[i] for i in subset if picks[i] == best))
    return fmean(found)


@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("picks", [[0.3, -1, 2, 7, 1.5, 0, 4, -2], [1, 0, 1, 1, 0, 2, 2, 0], [3] * 8])
def test_the_best_of_k_is_over_all_subsets(picks, k):
    values = [4.0, -1.0, 0.5, 9.0, 2.0, -3.0, 8.0, 1.0]
    assert statistics.expected_best(picks, values, k) == pytest.approx(mean_of_picked(picks, values, k), rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 64, 127, 128])
def test_the_best_rank_of_128_is_exact(k):
    ranks = np.random.default_rng(17).permutation(128) + 1.0
    assert statistics.expected_best(ranks.tolist(), ranks.tolist(), k) == pytest.approx(k * 129 / (k + 1), rel=1e-13)
    assert statistics.expected_best([0.0] * 128, ranks.tolist(), k) == pytest.approx(64.5, rel=1e-13)


def best_of_n_kl(probabilities, n):
    """KL of the best of n to its distribution, over completions in the order of their scores."""
    reached = np.cumsum(probabilities)
    best = np.diff(reached**n, prepend=0)
    return float(entropy(best, probabilities))


@pytest.mark.parametrize("n", [1, 2, 4, 128])
def test_the_kl_of_the_best_of_n_is_below_its_bound_and_near_it_where_no_completion_is_likely(n):
    bound = statistics.kl_bound(n)
    assert best_of_n_kl(np.full(200_000, 1 / 200_000), n) == pytest.approx(bound, abs=1e-3)
    likely = best_of_n_kl(np.array([0.1, 0.5, 0.2, 0.2]), n)
    assert likely == pytest.approx(0, abs=1e-12) if n == 1 else likely < bound
    assert bound >= 0
