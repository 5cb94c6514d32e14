"""A comparison measures each policy once, against one reference, and again only when something it rests on changed."""

import math
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from dpo_pipeline import formatting, record
from dpo_pipeline.data.prepare import Prepared
from dpo_pipeline.dpo import run_dpo
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.evaluation import eval_set, measure, summary
from dpo_pipeline.judges import build
from dpo_pipeline.judges.judge import Judge
from dpo_pipeline.report import comparison, page
from dpo_pipeline.report.verdict import verdict
from tests.helpers import prepare_run, runs_of

STEPS = ("++dpo.max_steps=2", "dpo.learning_rate=1e-3", "lora=none")


@pytest.fixture
def sampled(monkeypatch):
    """The names of the policies that are sampled from while a test runs."""
    labels, sample = [], measure.sample

    def counted(*args):
        labels.append(args[-1].removeprefix("sampling ").split(",")[0])
        return sample(*args)

    monkeypatch.setattr(measure, "sample", counted)
    return labels


def test_base_and_sft_are_measured_once_for_a_name_each_dpo_with_its_own_beta(small, sft, tmp_path, sampled):
    unmeasured = shutil.ignore_patterns("eval.json", "validation.json", "dpo", "records")
    shutil.copytree(small().home, tmp_path / "small", ignore=unmeasured)
    root = f"root={tmp_path}"
    first = run_dpo(small(root, "variant=one", "beta=0.1", *STEPS))["policies"]
    assert sampled == ["dpo/one", "dpo/one", "sft/full", "sft/full", "base"]  # on test and on validation
    second = run_dpo(small(root, "variant=two", "beta=0.5", *STEPS))["policies"]
    assert sampled[5:] == ["dpo/two", "dpo/two"]
    assert list(second) == ["base", "sft/full", "dpo/one", "dpo/two"]
    before, after = (found["sft/full"]["against"]["base"] for found in (first, second))
    assert after == before  # whatever the beta of the job that ran last
    assert after["margin"]["value"] == pytest.approx(0.1 * after["margin_nats"]["value"])  # that of conf/config.yaml
    own = second["dpo/two"]["against"]["base"]
    assert own["margin"]["value"] == pytest.approx(0.5 * own["margin_nats"]["value"])
    assert second["dpo/one"]["settings"]["beta"] == 0.1

    other = small(root, "variant=two", "beta=0.5", "evaluation.prompts=3", *STEPS)
    run_dpo(other)  # done, but asked for other prompts
    assert sampled[7:] == ["dpo/two", "dpo/two", "sft/full", "sft/full", "base"]
    assert first_samples(tmp_path / "small" / "sft" / "full")["row"].tolist() == [0, 1, 2]


def test_run_folders_may_be_links(small, sft, tmp_path):
    shutil.copytree(small().home, tmp_path / "small", ignore=shutil.ignore_patterns("dpo"))
    for folder in ("sft/full", "dpo/linked"):
        (place := tmp_path / "scratch" / folder).mkdir(parents=True)
        link = tmp_path / "small" / folder
        if link.exists():
            shutil.rmtree(place)
            link.rename(place)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(place)
    assert {"sft/full", "dpo/linked"} <= set(run_dpo(small(f"root={tmp_path}", "variant=linked", *STEPS))["policies"])


def test_the_base_against_itself_and_the_shape_of_eval_json(small, sft, monkeypatch, caplog):
    run = small("variant=shape", *STEPS)
    run_dpo(run)
    base, dpo = (record.read_json(folder / "eval.json") for folder in (run.home / "base", run.dpo_folder))
    itself = base["against"]["base"]
    assert itself["preference_accuracy"]["value"] == itself["length_normalised_accuracy"]["value"] == 0.5
    assert [itself[key]["value"] for key in ("margin", "margin_nats", "kl", "kl_per_token")] == [0] * 4
    assert set(dpo["against"]) == {"base", "reference"}
    assert set(base["against"]) == {"base"}
    estimates = [
        "preference_accuracy",
        "margin",
        "margin_nats",
        "reward_chosen",
        "reward_rejected",
        "kl",
        "kl_per_token",
    ]
    for block in dpo["against"].values():
        assert all(set(block[key]) == {"value", "low", "high", "n"} for key in estimates)
        assert set(block["accuracy_by_source"]) == {"reviews"}
        assert sum(part["accuracy"]["n"] for part in block["accuracy_by_length_difference"]) == 20
    assert {"perplexity_chosen", "stop_rate", "completion_tokens", "repetition", "score.truth"} <= set(dpo["own"])
    assert (dpo["policy"], dpo["dataset"]) == ("dpo/shape", "reviews")

    def fail(completions):
        raise PipelineError("no scores today")
        yield

    monkeypatch.setattr(build, "build_judges", lambda *args: {"moody": Judge(fail)})
    assert "score.moody" not in run_dpo(run)["policies"]["dpo/shape"]["own"]  # trained already: its judge failed alone
    assert "judge moody: no scores today" in caplog.text


def first_samples(folder):
    """The lines of the completions that a policy's numbers are of."""
    table = pd.read_parquet(folder / "completions.parquet")
    return table[(table["prompt_set"] == "test") & (table["temperature"] == 1) & (table["draw"] == 0)]


def loop(model, prompt, completion):
    """The summed log-prob of a completion, token by token, in float64."""
    total = 0.0
    for at, token in enumerate(completion):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion[:at]])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
    return total


def test_every_estimate_of_pairs_and_samples_is_that_of_a_plain_loop(small, sft):
    run = small("variant=loop", *STEPS)
    run_dpo(run)
    result = record.read_json(run.dpo_folder / "eval.json")
    on = eval_set.make_eval_sets(run, prepare_run(run, "dpo"))["eval.json"]
    models = {
        name: AutoModelForCausalLM.from_pretrained(path)
        for name, path in (
            ("dpo", run.dpo_folder / "final"),
            ("sft", run.sft_folder / "final"),
            ("base", run.model.path),
        )
    }
    pairs = list(zip(on.prompts, on.chosen, on.rejected, strict=True))
    sums = {name: [(loop(model, p, c), loop(model, p, r)) for p, c, r in pairs] for name, model in models.items()}
    for block, other in (("base", "base"), ("reference", "sft")):
        found = {
            key: e["value"] for key, e in result["against"][block].items() if isinstance(e, dict) and "value" in e
        }
        chosen, rejected = ([a[i] - b[i] for a, b in zip(sums["dpo"], sums[other], strict=True)] for i in (0, 1))
        margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
        tokens = [(len(c), len(r)) for _, c, r in pairs]
        assert found["margin_nats"] == pytest.approx(sum(margins) / 20, abs=1e-4)
        assert found["margin"] == pytest.approx(0.1 * sum(margins) / 20, abs=1e-5)
        assert found["preference_accuracy"] == sum(m > 0 for m in margins) / 20
        assert found["reward_chosen"] == pytest.approx(0.1 * sum(chosen) / 20, abs=1e-5)
        assert found["reward_rejected"] == pytest.approx(0.1 * sum(rejected) / 20, abs=1e-5)
        per_token = [c / n > r / m for c, r, (n, m) in zip(chosen, rejected, tokens, strict=True)]
        assert found["length_normalised_accuracy"] == sum(per_token) / 20
        change = sum(chosen) / sum(n for n, _ in tokens)
        assert found["logprob_change_chosen_per_token"] == pytest.approx(change, abs=1e-5)
        samples = first_samples(run.dpo_folder)
        asked = list(zip(on.prompt_set.ids, [ids.tolist() for ids in samples["ids"]], strict=True))
        gaps = [loop(models["dpo"], p, a) - loop(models[other], p, a) for p, a in asked]
        assert found["kl"] == pytest.approx(sum(gaps) / 4, abs=1e-4)
        lines = samples["logprob"] - samples[f"logprob_{block}"]
        assert lines.tolist() == pytest.approx(gaps, abs=1e-4)
        error = math.sqrt(sum((gap - sum(gaps) / 4) ** 2 for gap in gaps) / 3 / 4)
        assert result["against"][block]["kl_standard_error"] == pytest.approx(error, abs=1e-4)
        assert found["kl_per_token"] == pytest.approx(sum(gaps) / sum(len(a) for _, a in asked), abs=1e-5)
        by_margin = sorted((b[0] - b[1], m) for b, m in zip(sums[other], margins, strict=True))
        bins = result["against"][block]["accuracy_by_reference_margin"]
        assert [part["accuracy"]["n"] for part in bins] == [5] * 4
        for i, part in enumerate(bins):
            own = [m for _, m in by_margin[5 * i : 5 * i + 5]]
            assert part["accuracy"]["value"] == sum(m > 0 for m in own) / 5
            predicted = sum(1 / (1 + math.exp(-0.1 * abs(m))) for m in own) / 5
            assert part["predicted"]["value"] == pytest.approx(predicted, abs=1e-5)
            assert part["from"] == pytest.approx(by_margin[5 * i][0], abs=1e-3)
    perplexity = math.exp(-sum(c for c, _ in sums["dpo"]) / sum(len(c) for _, c, _ in pairs))
    assert result["own"]["perplexity_chosen"]["value"] == pytest.approx(perplexity, rel=1e-5)
    pairs = pd.read_parquet(run.dpo_folder / "pairs.parquet").query("split == 'test'").set_index("row")
    assert pairs["logprob_rejected"].tolist() == pytest.approx([r for _, r in sums["dpo"]], abs=1e-4)
    assert (pairs["source"][3], pairs["tokens_chosen"][3]) == ("reviews", len(on.chosen[3]))


def test_bins_keep_equal_values_together_and_hold_every_pair():
    values, margins = np.array([0.0] * 5 + [1.0, 2.0, 3.0]), np.array([1.0, -1.0, 1.0, 1.0, 0.0, 1.0, -1.0, -1.0])
    bins = summary.accuracy_by_bin(values, margins, 2.0)
    assert [(part["from"], part["to"], part["accuracy"]["n"]) for part in bins] == [(0, 1, 6), (2, 3, 2)]
    assert bins[0]["accuracy"]["value"] == 4.5 / 6
    assert bins[1]["predicted"]["value"] == pytest.approx(1 / (1 + math.exp(-2)))


def test_prompts_leave_room_for_the_completion_in_the_context(small):
    rows = [{"prompt": text, "chosen": "x", "rejected": "y", "source": "s"} for text in "ab"]
    ids = {"prompt_ids": [[1, 5], [1, *range(10, 20)]], "chosen_ids": [[2]] * 2, "rejected_ids": [[3]] * 2}
    tokenizer = SimpleNamespace(batch_decode=lambda rows, **_: [" ".join(map(str, ids)) for ids in rows])
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=20))
    prepared = Prepared("dpo", ("chosen", "rejected"), config, tokenizer, [2], None, None)
    prepared.tables, prepared.rows = {"test": Dataset.from_dict({**ids, "row": [1, 0]})}, {"test": rows}
    test_set = eval_set.make_eval_set(small("evaluation.max_new_tokens=16"), prepared, "test", 20, 4)
    prompt_set = test_set.prompt_set
    assert prompt_set.ids == [[1, 5], [1, 17, 18, 19]]
    assert test_set.prompts[1] == [1, *range(10, 20)]
    assert ([row["prompt"] for row in prompt_set.rows], prompt_set.data_completions[1].prompt) == (["b", "a"], "a")
    assert prompt_set.data_completions[0].text == " 2"  # as it follows its prompt
    one = eval_set.make_eval_set(small("evaluation.max_new_tokens=16"), prepared, "test", 1, 4)
    assert (one.prompts, one.prompt_set.ids) == ([[1, 5]], [[1, 5]])


def test_tables_are_markdown_with_aligned_columns():
    table = formatting.markdown_table(
        [["", "base"], ["accuracy", formatting.format_estimate({"value": 0.5, "low": None, "high": 1234.5, "n": 1})]]
    )
    assert table.splitlines() == [
        "|          | base               |",
        "| -------- | ------------------ |",
        "| accuracy | 0.500 [?, 1,234.5] |",
    ]


ONE = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}


def test_of_many_policies_each_has_a_line_and_of_few_a_column():
    own = {"stop_rate": ONE, "score.truth": ONE, "win_rate.truth.sft": ONE, "win_rate.truth.sft.t0.5": ONE}
    own["win_rate.truth.sft"] = {"value": 1.0, "low": None, "high": None, "n": 2}
    cells = own | {"kl": ONE, "margin": ONE}
    few = comparison.policy_table({"a": cells, "b": cells})
    assert list(few.columns) == ["", "a", "b"]
    assert list(few[""]) == [
        "stop rate", "score by truth", "wins over sft by truth", "wins over sft by truth, temperature 0.5",
        "KL from samples, nats", "margin (with beta)",
    ]  # fmt: skip
    assert page.format_cell(few["a"].iloc[2]) == "1.000 (of 2)"
    assert "| 1.000 (of 2)" in page.as_markdown(few)
    assert list(comparison.policy_table(dict.fromkeys("abcde", own))[""]) == list("abcde")


@pytest.mark.parametrize(("sign", "p", "words"), [(1, 0.01, "better than"), (-1, 0.01, "worse than"),
                                                  (1, 0.2, "no different from sft/full beyond noise")])  # fmt: skip
def test_the_verdict_says_in_words_which_is_better(sign, p, words):
    """The row may name either policy first."""
    row = {"one": "sft/full", "other": "dpo/x", "p": p, "win_rate": ONE}
    row["difference"] = {"value": -0.5 * sign, "low": -0.5 * sign - 0.1, "high": -0.5 * sign + 0.1, "n": 9}
    own = {
        "stop_rate": ONE,
        "completion_tokens": {"value": 9, "low": 8, "high": 10, "n": 9},
        "win_rate.truth.sft": ONE,
    }
    against = {"reference": {"preference_accuracy": ONE, "kl": {"value": 30, "low": 29, "high": 31, "n": 9}}}
    before = {**own, "completion_tokens": {"value": 5, "low": 4, "high": 6, "n": 9}}
    names = {"reference": "sft/full", "sft": "sft/full", "against": against}
    policies = {"dpo/x": {"own": own, **names}, "sft/full": {"own": before, **names}}
    judges = {"truth": {"results": 9, "unreadable": 2}}
    results = {"comparisons": {"truth": [row], "length": [row]}, "judges": judges}
    (part,) = verdict(runs_of(policies, "dpo/x", **results))
    text = part.text
    interval = "0.500 [0.400, 0.600]" if sign == 1 else "-0.500 [-0.600, -0.400]"
    assert f"dpo/x is {words}" in text
    assert f"by truth: difference {interval}" in text
    assert "by length" not in text
    assert "KL is above evaluation.kl_budget=10; its completions are longer" in text
    assert "2 of 9 results of truth are unreadable" in text


def test_a_cell_breaks_no_table_and_sends_nothing_to_the_terminal():
    text = formatting.markdown_table([["name", "a|b"], ["x\ny", "\x1b]0;title\x07"]])
    lines = text.splitlines()
    assert len(lines) == 3
    assert "a\\|b" in lines[0]
    assert not set(text) & set("\x1b\x07")
