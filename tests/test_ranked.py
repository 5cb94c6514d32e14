"""Lists of scored completions become pairs: which, and what is counted."""

from itertools import combinations

import pytest

from dpo_pipeline.config import compose
from dpo_pipeline.data.report import count_rows, kept_rows, print_report
from dpo_pipeline.data.splits import load_splits
from dpo_pipeline.errors import PipelineError
from tests.test_data import loaded, write
from tests.test_forms import read_row

SCORED = {"prompt": "q", "completions": ["a", "b", "c", "d"], "scores": [1, 7.5, 7.5, 3]}


def pairs_of(tmp_path, raw, *typed) -> list[dict]:
    return loaded("json", write(tmp_path / "a.jsonl", [raw]), *typed)["train"]


def texts_of(rows) -> list[str]:
    return [row["chosen"] + row["rejected"] for row in rows]


def test_best_and_worst_make_one_pair(tmp_path):
    (row,) = pairs_of(tmp_path, SCORED)
    assert (row["prompt"], row["chosen"], row["rejected"], row["reason"]) == ("q", "b", "a", None)
    assert row["origin"].endswith("a.jsonl, line 1, completions 2 and 1")
    assert row["unused"] == ()


@pytest.mark.parametrize("gap", [0, 2, 4.5, 6.6])
def test_all_pairs_are_those_of_an_enumeration(gap, tmp_path):
    rows = pairs_of(tmp_path, SCORED, "dataset.pairs=all", f"dataset.min_score_gap={gap}")
    score = dict(zip(SCORED["completions"], SCORED["scores"], strict=True))
    expected, reasons = set(), []
    for one, other in combinations(score, 2):
        better, worse = sorted((one, other), key=score.get, reverse=True)
        difference = score[better] - score[worse]
        if difference and difference >= gap:
            expected.add(better + worse)
        else:
            reasons.append("a tie (equal scores)" if not difference else f"scores closer than {gap:g}")
    assert sorted(texts_of(kept_rows(rows))) == sorted(expected)
    assert sorted(row["reason"] for row in rows if row["reason"]) == sorted(reasons)


def test_decimal_scores_as_far_apart_as_asked_are_kept(tmp_path):
    raw = {"prompt": "q", "completions": ["a", "b"], "scores": [0.1, 0.3]}
    assert pairs_of(tmp_path, raw, "dataset.min_score_gap=0.2")[0]["reason"] is None
    assert pairs_of(tmp_path, raw, "dataset.min_score_gap=0.21")[0]["reason"] == "scores closer than 0.21"


FORMS = {
    "UltraFeedback": (
        {"instruction": "q", "completions": [{"response": t, "overall_score": s, "model": "m"}
                                             for t, s in (("w", 1), ("x", 2), ("b", 9))], "models": ["m"] * 3}, [],
    ),
    "responses and ratings": ({"instruction": "q", "responses": ["w", "b", "x"], "ratings": [1, 3, 2]}, []),
    "ranks": (
        {"q": "q", "answers": [{"text": "b", "rank": 1}, {"text": "w", "rank": 7}, {"text": "x", "rank": 2}]},
        ["dataset.columns={question: q, completions: answers.*.text, ranks: answers.*.rank}"],
    ),
    "a struct of lists": (
        {"prompt": "q", "made": {"text": ["b", "w"], "score": [9, 1]}},
        ["dataset.columns={prompt: prompt, completions: made.text, scores: made.score}"],
    ),
    "messages": (
        {"prompt": "q", "completions": [[{"role": "assistant", "content": t}] for t in "wb"], "scores": [0.1, 0.2]},
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_published_form_of_lists_is_read(form, tmp_path):
    raw, typed = FORMS[form]
    row = read_row(tmp_path, raw, *typed)
    assert (row["prompt"], row["chosen"], row["rejected"]) == ([{"role": "user", "content": "q"}], "b", "w")
    assert row["unused"] == (("models",) if "models" in raw else ())


@pytest.mark.parametrize("choice", ["best_worst", "all"])
def test_each_raw_row_is_counted_once(choice, tmp_path):
    raws = [
        SCORED,
        {**SCORED, "prompt": "tie", "scores": [2, 2, 2, 2]},
        {**SCORED, "prompt": "none", "scores": [2, None, 2, 1]},
        {**SCORED, "prompt": "short", "scores": [2, 1]},
        {**SCORED, "prompt": "one", "completions": ["a"], "scores": [1]},
        *({"prompt": f"q{i}", "completions": ["a", "b"], "scores": [i, -1]} for i in range(50)),
    ]
    node = compose(["dataset=json", f"dataset.path={write(tmp_path / 'a.jsonl', raws)}", f"dataset.pairs={choice}"])
    rows = load_splits(node.dataset, ("chosen", "rejected"), False)
    (source,) = count_rows(rows)["sources"].values()
    assert source["read"] == len(raws)
    assert source["rows"] == len(rows) == {"best_worst": 55, "all": 65}[choice]
    assert sum(source["kept"].values()) + sum(source["dropped"].values()) == len(rows)
    assert source["dropped"] == {
        "a tie (equal scores)": {"best_worst": 1, "all": 7}[choice],
        "not one number for each completion": 2,
        "fewer than two completions": 1,
    }
    assert ("55 (65 pairs)" in print_report(count_rows(rows), rows)) == (choice == "all")


def test_sft_learns_the_best_completion_of_a_list(tmp_path):
    raws = [{"prompt": f"q{i}", "completions": ["a", "b", "c"], "scores": [1, 9, 5]} for i in range(40)]
    path = write(tmp_path / "a.jsonl", raws)
    for typed in ("dataset.pairs=best_worst", "dataset.pairs=all"):
        node = compose(["dataset=json", f"dataset.path={path}", typed])
        rows = kept_rows(load_splits(node.dataset, ("chosen",), False))
        assert [row["chosen"] for row in rows if row["split"] != "test"] == ["b"] * 36


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ("{prompt: prompt, completions: completions}", "completions and their scores"),
        ("{prompt: prompt, completions: completions, scores: scores, ranks: scores}", "completions and their scores"),
        ("{prompt: prompt, completions: prompt, scores: scores}", "not a list"),
        ("{prompt: prompt, completions: completions.*.text, scores: scores}", "there is no text"),
    ],
)
def test_columns_that_name_no_lists_are_refused(columns, sentence, tmp_path):
    with pytest.raises(PipelineError, match=sentence):
        pairs_of(tmp_path, SCORED, f"dataset.columns={columns}")
