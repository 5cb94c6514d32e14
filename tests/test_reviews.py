"""The embedded task: its rows are what they are said to be, its reward is the formula, its judge is the reward."""

import math
from statistics import mean, stdev

import pytest
from pydantic import ValidationError

from dpo_pipeline.data.reviews import VOCABULARY, load, reward
from dpo_pipeline.judges.judge import Completion
from dpo_pipeline.judges.truth import truth

ROWS, SLOPE = 8800, 3.0
AS = (False, "reviews")  # as text; what the rows are called
COMPLETIONS = ("chosen", "rejected", "demonstration")


@pytest.fixture(scope="module")
def splits():
    return load(ROWS, SLOPE, 0, *AS)


def test_rows_are_a_function_of_the_seed_and_an_eighth_of_them_is_test_at_most_1000(splits):
    one = load(400, SLOPE, 1, *AS)
    assert one == load(400, SLOPE, 1, *AS)
    assert one != load(400, SLOPE, 2, *AS)
    assert {name: len(rows) for name, rows in one.items()} == {"test": 50, "train": 350}
    assert {name: len(rows) for name, rows in splits.items()} == {"test": 1000, "train": ROWS - 1000}
    with pytest.raises(ValidationError, match="less than or equal to 120960"):  # more rows than films
        load(120_961, SLOPE, 0, *AS)


def test_prompts_are_distinct_and_completions_continue_them_in_known_words(splits):
    rows = [row for part in splits.values() for row in part]
    assert len({row["prompt"] for row in rows}) == ROWS
    words = set()
    for row in rows:
        assert row["prompt"].endswith(" review :")
        assert all(row[key] == " " + " ".join(row[key].split()) for key in COMPLETIONS)
        words.update(*(row[key].split() for key in ("prompt", *COMPLETIONS)))
    assert words <= set(VOCABULARY)


def test_train_labels_err_as_bradley_and_terry_say_and_test_labels_never(splits):
    assert min(reward(row["chosen"]) - reward(row["rejected"]) for row in splits["test"]) > 0
    gaps = [reward(row["chosen"]) - reward(row["rejected"]) for row in splits["train"]]
    flipped = mean(gap < 0 for gap in gaps)
    chances = [1 / (1 + math.exp(SLOPE * abs(gap))) for gap in gaps]
    spread = math.sqrt(sum(p * (1 - p) for p in chances)) / len(chances)
    assert min(map(abs, gaps)) > 0
    assert abs(flipped - mean(chances)) < 4 * spread
    assert 0.03 < flipped < 0.09


@pytest.mark.parametrize(("slope", "low", "high"), [(0.0, 0.42, 0.58), (1000.0, 0.0, 0.0)])
def test_slope_0_labels_at_random_and_a_steep_one_without_error(slope, low, high):
    rows = load(1000, slope, 0, *AS)["train"]
    assert low <= mean(reward(row["chosen"]) < reward(row["rejected"]) for row in rows) <= high


def test_demonstrations_are_of_mixed_mood_and_rewards_lie_between_minus_1_and_1(splits):
    rewards = {key: [reward(row[key]) for row in splits["train"]] for key in COMPLETIONS}
    assert abs(mean(rewards["demonstration"])) < 0.03
    assert stdev(rewards["demonstration"]) > 0.3
    every = [value for values in rewards.values() for value in values]
    assert -1 <= min(every) < -0.8
    assert 0.8 < max(every) <= 1


REWARDS = {
    "the acting was superb .": math.tanh(2),
    "the acting was warm .": math.tanh(1),
    "the acting was boring .": math.tanh(-2),
    "i loved the cast . the plot was flat .": math.tanh((2 - 1) / 2),
    "the cast was warm . the plot felt clever .": math.tanh(1),  # no more for saying it twice
    "i would gladly see it again .": math.tanh(1),
    "i would never see it again .": math.tanh(-1),
    "the acting was very superb .": math.tanh(3),
    "the acting was rather superb .": math.tanh(1),
    "the acting was truly boring .": math.tanh(-3),
    "very , superb": math.tanh(2),
    "the acting was": 0.0,
    "superb acting story superb acting story": math.tanh(4) - 1 / 4,
    "cast cast cast cast cast cast": -3 / 4,
    "superb zebra": math.tanh(2) - 0.2,
    "zebra superb zebra giraffe": math.tanh(2) - 0.6,
    "zebra " * 20: -1.0,
    "": -1.0,
    "  ": -1.0,
}


def test_reward_is_the_formula_and_a_completion_that_never_ends_costs_half_a_point():
    for completion, expected in REWARDS.items():
        assert reward(completion) == pytest.approx(expected, abs=1e-12), completion
        assert reward(f" {completion}") == reward(completion)
        assert reward(completion, ended=False) == pytest.approx(max(-1, expected - 0.5), abs=1e-12), completion


def test_the_judge_is_the_reward(splits):
    completions = [row[key] for row in splits["test"][:100] for key in COMPLETIONS]
    ended = [i % 3 > 0 for i in range(len(completions))]
    expected = [reward(completion, end) for completion, end in zip(completions, ended, strict=True)]
    given = [Completion("film :", text, end, (1,), (2,)) for text, end in zip(completions, ended, strict=True)]
    assert list(truth().score(given)) == list(enumerate(expected))
    assert expected != [reward(completion) for completion in completions]
