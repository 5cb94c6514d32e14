"""The cache of reference log-probs: what it depends on, that it is never trusted unseen, and that one job makes it."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo_pipeline import run_folder
from dpo_pipeline.data import prepare
from dpo_pipeline.dpo import run_dpo
from dpo_pipeline.models import load_tokenizer
from dpo_pipeline.training import preflight, reference, starting_policy, trainer
from dpo_pipeline.training.arguments import training_arguments


@pytest.fixture
def built(small, sft, tmp_path):
    """A DPO trainer whose rows hold no log-probs yet, and a place for them."""

    def make(*typed: str):
        run = small(*typed)
        begin = starting_policy.dpo_start(run)
        tokenizer = load_tokenizer(run.model)
        rows = prepare.prepare_tables(run, "dpo", tokenizer, "train", "validation")[0]
        args = training_arguments(run, "dpo", tmp_path)
        return trainer.build_dpo(starting_policy.load_start(run, begin), None, begin.lora, tokenizer, args, rows)

    return make


def logps(made) -> torch.Tensor:
    return torch.tensor([made.train_dataset[name][:] for name in reference.COLUMNS])


def test_the_key_is_what_the_log_probs_depend_on_and_nothing_else(small, sft):
    loading = starting_policy.load_options(small("lora=none"))
    args = SimpleNamespace(bf16=False, fp16=False, ld_alpha=None)
    rows = {"train": "a", "validation": "b"}

    def place(run=None, weights=sft["none"] / "final", loading=loading, rows=rows, **changed):
        values = SimpleNamespace(**{**vars(args), **changed})
        return reference.cache_path(run or small("lora=none"), weights, loading, rows, values)

    same = [
        place(small("lora=none", *typed.split()))
        for typed in ("beta=0.3", "loss=ipo", "seed=3", "dpo.learning_rate=1e-3 variant=x", "reference=frozen")
    ]
    assert {place(), *same, place(beta=7)} == {place()}
    other = [
        place(weights=sft["r8"] / "final"),
        place(rows={**rows, "train": "c"}),
        place(rows={**rows, "validation": "c"}),
        place(loading=starting_policy.load_options(small("lora=r8", "quantization=nf4"))),
        place(loading=starting_policy.load_options(small("lora=r8", "model.dtype=bfloat16"))),
        place(bf16=True),
        place(ld_alpha=0.5),
    ]
    assert len({place(), *other}) == len(other) + 1


@pytest.mark.parametrize("typed", ["lora=none", "lora=r8", "lora=r8 sft_variant=full"])
def test_what_is_read_is_what_was_computed(typed, built, tmp_path, caplog):
    first, second = (
        built(*typed.split()),
        built(*typed.split(), "beta=0.3", "loss=ipo", "batch.micro_size=3", "batch.global_size=3"),
    )
    with caplog.at_level("INFO", logger="dpo_pipeline"):
        for made in (first, second):
            reference.add_reference_logps(made, tmp_path / "kept", preflight.padding_tolerance)
    assert torch.equal(logps(first), logps(second))
    assert caplog.text.count("reference log-probs of") == 1
    # TRL's own pass, row by row in the order of the rows.
    fresh = built(*typed.split())
    theirs = [
        fresh.compute_ref_log_probs(fresh.model, fresh.data_collator([row])) for row in list(fresh.train_dataset)[:20]
    ]
    expected = torch.tensor([[float(side) for side in sides] for sides in zip(*theirs, strict=True)])
    assert torch.allclose(logps(first)[:, :20], expected, atol=1e-4)


@pytest.mark.parametrize("damage", ["cut", "empty", "short", "other", "names"])
def test_a_damaged_cache_or_one_of_another_reference_is_told_and_computed_anew(damage, built, tmp_path, caplog):
    first = built("lora=none")
    reference.add_reference_logps(first, tmp_path / "kept", preflight.padding_tolerance)
    file = tmp_path / "kept" / "logps.safetensors"
    values = {key: value.clone() for key, value in load_file(file).items()}  # not the mapped file itself
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-50])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "short":
        save_file({key: value[:-1].clone() for key, value in values.items()}, file)
    elif damage == "other":
        save_file({key: value - 1 for key, value in values.items()}, file)
    else:
        save_file({key.upper(): value for key, value in values.items()}, file)
    again = built("lora=none")
    reference.add_reference_logps(again, tmp_path / "kept", preflight.padding_tolerance)
    assert torch.equal(logps(first), logps(again))
    assert ("are not those of this reference" if damage == "other" else "are damaged") in caplog.text
    assert torch.equal(load_file(file)["train.ref_chosen_logps"], values["train.ref_chosen_logps"])


def test_of_two_jobs_at_once_one_computes(built, tmp_path, monkeypatch):
    passes, computed = [], reference.compute_reference_logps

    def slow(made, rows, *told):
        passes.extend(told)
        time.sleep(0.5)
        return computed(made, rows, *told)

    monkeypatch.setattr(reference, "compute_reference_logps", slow)
    both = [built("lora=none"), built("lora=none", "beta=0.5")]
    threads = [
        threading.Thread(
            target=reference.add_reference_logps, args=(made, tmp_path / "kept", preflight.padding_tolerance)
        )
        for made in both
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert passes == ["reference on train", "reference on validation"]
    assert torch.equal(*map(logps, both))


def test_a_run_from_the_cache_has_the_bytes_of_one_that_computed_it(small, sft, tmp_path):
    files = []
    for variant in ("computed", "read"):
        run = small("lora=none", f"variant=cache-{variant}", "++dpo.max_steps=6", "dataset.split_seed=5")
        run_dpo(run)
        files.append(run.dpo_folder / "final" / "model.safetensors")
    assert "reference log-probs of" not in (files[0].parents[1] / "train.log").read_text()
    assert "reference log-probs of 250 pairs: read from" in (files[1].parents[1] / "train.log").read_text()
    assert files[0].read_bytes() == files[1].read_bytes()
    assert run_folder.read_json(files[0].parents[1] / "manifest.json")["versions"]["torch"]
