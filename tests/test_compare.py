"""A comparison measures each policy once, against one reference, and again only when something it rests on changed."""

import json
import shutil

import pytest

from dpo_pipeline import runs
from dpo_pipeline.dpo import run_dpo
from dpo_pipeline.evaluation import compare, tables

STEPS = ("++dpo.max_steps=2", "dpo.learning_rate=1e-3", "lora=none")


@pytest.fixture
def measured_names(monkeypatch):
    """The names of the policies that are sampled from while a test runs."""
    names, sample = [], compare.sample

    def counted(*args, label, **kwargs):
        names.append(label.removeprefix("sampling "))
        return sample(*args, label=label, **kwargs)

    monkeypatch.setattr(compare, "sample", counted)
    return names


def test_base_and_sft_are_measured_once_for_a_name_and_scaled_to_another_beta(small, sft, tmp_path, measured_names):
    unmeasured = shutil.ignore_patterns("eval.json", "validation.json", "dpo")
    shutil.copytree(small().home, tmp_path / "small", ignore=unmeasured)
    on_test, on_validation = ["sft/full", "base"], ["sft/full"]  # beside the DPO itself
    root = f"root={tmp_path}"
    first = run_dpo(small(root, "variant=one", "beta=0.1", *STEPS))["policies"]
    assert measured_names == ["dpo/one", *on_test, "dpo/one", *on_validation]
    second = run_dpo(small(root, "variant=two", "beta=0.5", *STEPS))["policies"]
    assert measured_names[5:] == ["dpo/two", "dpo/two"]
    assert list(second) == ["base", "sft/full", "dpo/one", "dpo/two"]
    before, after = (found["sft/full"]["against"]["base"] for found in (first, second))
    assert after["margin_nats"] == before["margin_nats"]
    for bound in ("value", "low", "high"):
        assert after["margin"][bound] == pytest.approx(5 * before["margin"][bound])
        assert after["margin"][bound] == pytest.approx(0.5 * after["margin_nats"][bound])
    assert second["dpo/one"]["settings"]["beta"] == 0.1

    run_dpo(
        small(root, "variant=two", "beta=0.5", "evaluation.prompts=3", *STEPS)
    )  # done, but asked for other prompts
    assert measured_names[7:] == ["dpo/two", *on_test, "dpo/two", *on_validation]
    assert len(json.loads((tmp_path / "small" / "sft" / "full" / "samples.json").read_text())) == 3


def test_the_base_against_itself_and_the_shape_of_eval_json(small, sft):
    run = small("variant=shape", *STEPS)
    run_dpo(run)
    base, dpo = (runs.read_json(folder / "eval.json") for folder in (run.home / "base", run.dpo_folder))
    assert base["against"]["base"]["preference_accuracy"]["value"] == 0.5
    assert [base["against"]["base"][key]["value"] for key in ("margin", "margin_nats", "kl", "kl_per_token")] == [
        0
    ] * 4
    estimates = {
        "preference_accuracy",
        "margin",
        "margin_nats",
        "reward_chosen",
        "reward_rejected",
        "kl",
        "kl_per_token",
    }
    assert set(dpo["against"]) == {"base", "reference"}
    assert set(base["against"]) == {"base"}
    for block in dpo["against"].values():
        assert set(block) == estimates
        assert all(set(estimate) == {"value", "low", "high", "n"} for estimate in block.values())
    assert set(dpo["own"]) == {"perplexity_chosen", "stop_rate", "answer_tokens", "score.truth"}
    assert (dpo["policy"], dpo["dataset"]) == ("dpo/shape", "reviews")


def test_prompts_leave_room_for_the_answer_in_the_context():
    from datasets import Dataset

    rows = Dataset.from_dict(
        {"prompt_ids": [[1, *range(10, 20)], [1, 5]], "chosen_ids": [[2]] * 2, "rejected_ids": [[3]] * 2}
    )
    rest = dict.fromkeys(("dataset", "tokenizer", "ends", "beta", "seed", "loading", "batch_size"))
    made = compare.material(rows, pairs=9, prompts=9, context=12, max_new_tokens=8, **rest)
    assert made.questions == [[1, 17, 18, 19], [1, 5]]
    assert made.prompts[0] == [1, *range(10, 20)]


def test_tables_are_markdown_with_aligned_columns():
    table = tables.grid(
        [["", "base"], ["accuracy", tables.shown({"value": 0.5, "low": None, "high": 1234.5, "n": 1})]]
    )
    assert table.splitlines() == [
        "|          | base               |",
        "| -------- | ------------------ |",
        "| accuracy | 0.500 [?, 1,234.5] |",
    ]
