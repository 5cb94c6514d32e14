"""The embedded task: its rows are what they are said to be, its reward is the formula, its judge is the reward."""

import math
from statistics import mean, stdev

import pytest
from pydantic import ValidationError

from dpo_pipeline.data.reviews import VOCABULARY, load, reward
from dpo_pipeline.judges.judge import Completion
from dpo_pipeline.judges.truth import truth

ROWS, SLOPE = 8000, 3.0
AS = (False, "reviews")  # as text; what the rows are called
COMPLETIONS = ("chosen", "rejected", "demonstration")


@pytest.fixture(scope="module")
def splits():
    return load(ROWS, SLOPE, 0, *AS)


def test_rows_are_a_function_of_the_seed():
    assert load(300, SLOPE, 1, *AS) == load(300, SLOPE, 1, *AS)
    assert load(300, SLOPE, 1, *AS) != load(300, SLOPE, 2, *AS)


@pytest.mark.parametrize(("rows", "test"), [(400, 50), (8800, 1000)])
def test_an_eighth_is_test_and_at_most_1000(rows, test):
    assert {name: len(split) for name, split in load(rows, SLOPE, 0, *AS).items()} == {
        "test": test,
        "train": rows - test,
    }


def test_every_prompt_is_distinct_within_and_between_splits(splits):
    assert len({row["prompt"] for rows in splits.values() for row in rows}) == ROWS


def test_all_words_are_in_the_vocabulary(splits):
    texts = (row[key] for rows in splits.values() for row in rows for key in ("prompt", *COMPLETIONS))
    assert {word for text in texts for word in text.split(" ")[text.startswith(" ") :]} <= set(VOCABULARY)


def test_a_completion_continues_its_prompt_after_one_space(splits):
    for row in splits["train"]:
        assert row["prompt"].endswith(" review :")
        for key in COMPLETIONS:
            assert row[key] == " " + " ".join(row[key].split())


def test_test_labels_agree_with_the_reward(splits):
    assert min(reward(row["chosen"]) - reward(row["rejected"]) for row in splits["test"]) > 0


def test_train_labels_err_as_bradley_and_terry_say(splits):
    gaps = [reward(row["chosen"]) - reward(row["rejected"]) for row in splits["train"]]
    flipped = mean(gap < 0 for gap in gaps)
    chances = [1 / (1 + math.exp(SLOPE * abs(gap))) for gap in gaps]
    spread = math.sqrt(sum(p * (1 - p) for p in chances)) / len(chances)
    assert min(map(abs, gaps)) > 0
    assert abs(flipped - mean(chances)) < 4 * spread


def test_a_few_percent_of_train_labels_are_wrong(splits):
    wrong = mean(reward(row["chosen"]) < reward(row["rejected"]) for row in splits["train"])
    assert 0.03 < wrong < 0.09


@pytest.mark.parametrize(("slope", "low", "high"), [(0.0, 0.45, 0.55), (1000.0, 0.0, 0.0)])
def test_slope_0_labels_at_random_and_a_steep_one_without_error(slope, low, high):
    rows = load(3000, slope, 0, *AS)["train"]
    assert low <= mean(reward(row["chosen"]) < reward(row["rejected"]) for row in rows) <= high


def test_demonstrations_are_of_mixed_mood(splits):
    rewards = [reward(row["demonstration"]) for row in splits["train"]]
    assert abs(mean(rewards)) < 0.03
    assert stdev(rewards) > 0.3


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("the acting was superb .", math.tanh(2)),
        ("the acting was warm .", math.tanh(1)),
        ("the acting was boring .", math.tanh(-2)),
        ("i loved the cast . the plot was flat .", math.tanh((2 - 1) / 2)),
        ("the cast was warm . the plot felt clever .", math.tanh(1)),  # no more for saying it twice
        ("i would gladly see it again .", math.tanh(1)),
        ("i would never see it again .", math.tanh(-1)),
        ("the acting was very superb .", math.tanh(3)),
        ("the acting was rather superb .", math.tanh(1)),
        ("the acting was truly boring .", math.tanh(-3)),
        ("very , superb", math.tanh(2)),
        ("the acting was", 0.0),
        ("superb acting story superb acting story", math.tanh(4) - 1 / 4),
        ("cast cast cast cast cast cast", -3 / 4),
        ("superb zebra", math.tanh(2) - 0.2),
        ("zebra superb zebra giraffe", math.tanh(2) - 0.6),
        ("zebra " * 20, -1.0),
        ("", -1.0),
        ("  ", -1.0),
    ],
)
def test_reward_is_the_formula(completion, expected):
    assert reward(completion) == pytest.approx(expected, abs=1e-12)
    assert reward(f" {completion}") == reward(completion)


def test_a_completion_that_never_ends_costs_half_a_point():
    assert reward("the acting was superb .", ended=False) == pytest.approx(math.tanh(2) - 0.5)
    assert reward("the acting was rather weak .", ended=False) == pytest.approx(math.tanh(-0.5) - 0.5)
    assert reward("i hated it . dreadful boring painful", ended=False) == -1.0
    assert reward("", ended=False) == -1.0


def test_reward_lies_between_minus_1_and_1(splits):
    rewards = [reward(row[key]) for row in splits["train"] for key in COMPLETIONS]
    assert -1 <= min(rewards) < -0.8
    assert 0.8 < max(rewards) <= 1


def test_the_judge_is_the_reward(splits):
    completions = [row[key] for row in splits["test"][:100] for key in COMPLETIONS]
    ended = [i % 3 > 0 for i in range(len(completions))]
    expected = [reward(completion, end) for completion, end in zip(completions, ended, strict=True)]
    given = [Completion("film :", text, end, (1,), (2,)) for text, end in zip(completions, ended, strict=True)]
    assert list(truth().score(given)) == list(enumerate(expected))
    assert expected != [reward(completion) for completion in completions]


def test_more_rows_than_films_are_refused():
    with pytest.raises(ValidationError, match="less than or equal to 120960"):
        load(120_961, SLOPE, 0, *AS)
