"""Real models on real pairs, from ../shared where it lies beside the checkout: some steps of each, as a user types."""

import json

import pytest

from dpo_pipeline import record
from dpo_pipeline.config import CONF, compose
from dpo_pipeline.data.report import SPLITS, kept_rows
from dpo_pipeline.data.splits import load_splits
from dpo_pipeline.data.token_table import LengthLimits, tokenize
from dpo_pipeline.dpo import run_dpo
from dpo_pipeline.evaluate import run_evaluate
from dpo_pipeline.inspect_data import run_inspect
from dpo_pipeline.sft import run_sft
from dpo_pipeline.tokenizer import load_tokenizer

SHARED = CONF.parent.parent / "shared"
POLITE = SHARED / "data" / "rasbt_preference" / "instruction-data-with-preference.json"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED.name}/ beside the checkout"),
]


def real(model: str, *typed: str):
    return compose(["model=path", f"model.path={SHARED}/models/{model}", *typed])


@pytest.mark.parametrize("lora", ["none", "r8"])
@pytest.mark.parametrize(
    "data",
    [f"dataset=instruction_preference dataset.path={POLITE} length.max=256",
     # Whose tokens are short: at 256 of them more than half of the dialogues would be cut, which ends a run.
     f"dataset=hh_rlhf dataset.path={SHARED}/data/hh_harmless dataset.subsets=null length.max=512"],
)  # fmt: skip
def test_sft_then_dpo_on_real_pairs(lora, data, tmp_path):
    typed = [
        *(f"root={tmp_path}", f"lora={lora}", "batch.global_size=8", "variant=it"),
        *(
            "evaluation.pairs=40",
            "evaluation.prompts=4",
            "evaluation.max_new_tokens=16",
            "model.learning_rate.dpo=1e-4",
        ),
        *("++sft.max_steps=4", "++dpo.max_steps=4", "dpo.logging_steps=1", "sft.eval_steps=2", "dpo.eval_steps=4"),
    ]
    run = real("stories260K", *data.split(), *typed)
    run_sft(run)
    results = run_dpo(run)["policies"]
    first = next(row for row in record.read_metrics(run.dpo_folder) if "loss" in row)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert results["dpo/it"]["against"]["reference"]["margin_nats"]["n"] == 40
    assert len(record.read_json(run.dpo_folder / "reward_kl_tracker.json")) == 2
    if lora == "r8":
        evaluated_by_a_real_classifier([*data.split(), *typed])
    rows = record.read_json(run.dpo_folder / "manifest.json")["rows"]
    assert rows == ({"train": 934, "validation": 49} if "instruction" in data else {"train": 1501, "validation": 82})


def evaluated_by_a_real_classifier(typed: list[str]) -> None:
    judge = ("judge=[reward_model,length]", f"judge.reward_model.path={SHARED}/models/imdb-sentiment-minilm")
    xstest = f"evaluation.safety_file={SHARED}/data/xstest/xstest_prompts.csv"
    results = run_evaluate(
        real("stories260K", *typed, *judge, "judge.reward_model.label=POSITIVE", "best_of.n=2", xstest)
    )
    own = results["policies"]["dpo/it"]["own"]
    assert 0 < own["score.reward_model"]["value"] < 1
    assert own["win_rate.reward_model.sft"]["n"] == own["win_rate.length.chosen.t0"]["n"] == 4
    assert (own["refusal_unsafe"]["n"], own["over_refusal_safe"]["n"]) == (200, 250)
    assert [point["n"] for point in results["best_of"]["points"]] == [1, 2]


def test_the_polite_rows_split_by_prompt_and_every_completion_ends_once():
    run = real("stories15M", "dataset=instruction_preference", f"dataset.path={POLITE}")
    rows = load_splits(run.dataset, ("chosen", "rejected"), False)
    splits = {split: kept_rows(rows, split) for split in SPLITS}
    prompts = [{row["prompt"] for row in splits[name]} for name in ("train", "validation", "test")]
    assert len(set.union(*prompts)) == sum(map(len, prompts)) == 1069  # of 1,075; in 6 both completions are the same
    assert len(splits["test"]) == 99
    tokenizer = load_tokenizer(run.model)
    table = tokenize(
        splits["test"], ("chosen", "rejected"), tokenizer, [tokenizer.eos_token_id], LengthLimits(256, 128)
    )
    assert len(table) == len(splits["test"])
    for row, words in zip(table, splits["test"], strict=True):
        whole = tokenizer(words["prompt"] + words["chosen"])["input_ids"]
        assert row["prompt_ids"] + row["chosen_ids"] == [*whole, tokenizer.eos_token_id]
    for row in table:
        assert row["prompt_ids"].count(tokenizer.bos_token_id) == 1
        for name in ("chosen_ids", "rejected_ids"):
            assert row[name].count(tokenizer.eos_token_id) == 1
            assert row[name][-1] == tokenizer.eos_token_id


def test_every_row_of_hh_harmless_is_split_at_its_last_reply():
    run = compose(["dataset=hh_rlhf", f"dataset.path={SHARED}/data/hh_harmless"])
    rows = load_splits(run.dataset, ("chosen", "rejected"), False)
    assert len(rows) == 1792 + 256
    for row in kept_rows(rows):
        assert row["prompt"].endswith("\n\nAssistant:")
        assert "\n\nAssistant:" not in row["chosen"]


def test_every_row_of_a_mixture_is_accounted_for_and_shown(tmp_path):
    sets = [
        "dataset=mixture",
        *("+dataset@dataset.sets.hh=hh_rlhf", f"dataset.sets.hh.path={SHARED}/data/hh_harmless"),
        *("dataset.sets.hh.subsets=null", "+dataset@dataset.sets.polite=instruction_preference"),
        *(f"dataset.sets.polite.path={POLITE}", "dataset.rows={hh: 400, polite: 600}", f"root={tmp_path}"),
    ]
    page = run_inspect(real("stories15M", *sets))
    sources = json.loads((page.parent / "data.json").read_text())["sources"]
    assert {name: part["read"] for name, part in sources.items()} == {"hh": 2048, "polite": 1100}
    for part in sources.values():
        assert part["read"] == sum(part["kept"].values()) + sum(part["dropped"].values())
    assert sources["polite"]["dropped"]["identical completions"] == 4
    assert "<script" not in page.read_text()
