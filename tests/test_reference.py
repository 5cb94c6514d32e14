"""The cached reference log-probs: what they depend on, that one job computes them, and that damage is repaired."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset

from dpo_pipeline.models import load_options
from dpo_pipeline.sft import run_sft
from dpo_pipeline.training.pair_trainer import PairTrainer
from dpo_pipeline.training.reference import add_reference_logps, reference_key
from dpo_pipeline.training.similar_lengths import row_lengths
from tests.helpers import build, prepare_run, train

COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
CHECKED = 3  # rows that each run computes again


@pytest.fixture
def new_trainer(small, sft, tmp_path):
    """Builds a DPO trainer whose rows hold no log-probs yet."""
    return lambda *overrides: build(small(*overrides), "dpo", tmp_path).trainer


@pytest.fixture
def key(tmp_path):
    """A key that no other test uses."""
    return str(tmp_path)


@pytest.fixture
def forwards(monkeypatch):
    """The rows of each forward of a reference pass, as they come."""
    rows, compute = [], PairTrainer.compute_ref_log_probs

    def counted(self, model, batch):
        rows.append(len(batch["input_ids"]) // 2)
        return compute(self, model, batch)

    monkeypatch.setattr(PairTrainer, "compute_ref_log_probs", counted)
    return rows


def logps(trainer) -> torch.Tensor:
    return torch.tensor([trainer.train_dataset[name][:] for name in COLUMNS])


def all_rows(trainer) -> int:
    return len(trainer.train_dataset) + len(trainer.eval_dataset)


def cached_file(trainer) -> Path:
    """The file of the training rows' log-probs."""
    return Path(trainer.train_dataset.cache_files[-1]["filename"])


def test_the_key_is_what_log_probs_depend_on_beside_the_rows(small):
    plain, args = (
        load_options(small("lora=none")),
        SimpleNamespace(bf16=False, fp16=False, ld_alpha=None),
    )
    quantized = load_options(small("lora=r8", "quantization=nf4"))
    bfloat16 = load_options(small("lora=r8", "model.dtype=bfloat16"))

    def changed(**values):
        return SimpleNamespace(**{**vars(args), **values})

    different = [
        reference_key("b", plain, args),
        reference_key("a", quantized, args),
        reference_key("a", bfloat16, args),
        reference_key("a", plain, changed(bf16=True)),
        reference_key("a", plain, changed(fp16=True)),
        reference_key("a", plain, changed(ld_alpha=0.5)),
    ]
    assert len({reference_key("a", plain, args), *different}) == len(different) + 1
    other_run = load_options(small("lora=none", "beta=0.3", "loss=ipo", "seed=3"))
    assert reference_key("a", other_run, changed(beta=7)) == reference_key("a", plain, args)


@pytest.mark.parametrize("lora", ["none", "r8"])
def test_what_is_read_is_what_was_computed(lora, new_trainer, key, forwards):
    first = new_trainer(f"lora={lora}")
    add_reference_logps(first, key)
    assert sum(forwards) == all_rows(first) + CHECKED
    forwards.clear()
    second = new_trainer(f"lora={lora}", "beta=0.3", "loss=ipo", "seed=3", "batch.micro_size=3", "batch.global_size=3")
    add_reference_logps(second, key)
    assert sum(forwards) == CHECKED
    assert torch.equal(logps(first), logps(second))
    fresh = new_trainer(f"lora={lora}")
    assert fresh.train_dataset["prompt_ids"][:] == second.train_dataset["prompt_ids"][:]  # in the order of the rows
    one_by_one = [
        fresh.compute_ref_log_probs(fresh.model, fresh.data_collator([fresh.train_dataset[i]])) for i in range(20)
    ]
    expected = torch.tensor([[float(side) for side in sides] for sides in zip(*one_by_one, strict=True)])
    assert torch.allclose(logps(first)[:, :20], expected, atol=1e-4)


def test_a_reference_of_another_key_is_computed(new_trainer, key, forwards):
    add_reference_logps(new_trainer("lora=none"), "one")
    forwards.clear()
    other = new_trainer("lora=none")
    add_reference_logps(other, "other")
    assert sum(forwards) == all_rows(other) + CHECKED


@pytest.mark.parametrize("damage", ["cut", "empty", "short", "other", "names"])
def test_damaged_or_wrong_log_probs_are_reported_and_computed_again(damage, new_trainer, key, caplog):
    first = new_trainer("lora=none")
    add_reference_logps(first, key)
    file, expected = cached_file(first), logps(first)
    columns = Dataset.from_file(str(file)).to_dict()
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-500])
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        changed = {
            "short": {name: values[:-1] for name, values in columns.items()},
            "other": {name: [value - 1 for value in values] for name, values in columns.items()},
            "names": {name.upper(): values for name, values in columns.items()},
        }[damage]
        Dataset.from_dict(changed).map(lambda row: row, cache_file_name=str(file), load_from_cache_file=False)
    again = new_trainer("lora=none")
    add_reference_logps(again, key)
    assert torch.equal(expected, logps(again))
    assert caplog.text.count("are damaged or wrong: computed again") == 1
    assert Dataset.from_file(str(file)).to_dict() == columns


def test_a_job_killed_while_it_writes_leaves_nothing_that_is_read(new_trainer, key, forwards, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("datasets.arrow_dataset.shutil.move", killed)
        with pytest.raises(KeyboardInterrupt):
            add_reference_logps(new_trainer("lora=none"), key)
    forwards.clear()
    again = new_trainer("lora=none")
    add_reference_logps(again, key)
    assert sum(forwards) == all_rows(again) + CHECKED


def test_of_two_jobs_at_once_one_computes(new_trainer, key, forwards, monkeypatch):
    counted = PairTrainer.compute_ref_log_probs
    monkeypatch.setattr(PairTrainer, "compute_ref_log_probs", lambda *args: time.sleep(0.02) or counted(*args))
    trainers = [new_trainer("lora=none"), new_trainer("lora=none", "beta=0.5")]
    threads = [threading.Thread(target=add_reference_logps, args=(trainer, key)) for trainer in trainers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(forwards) == all_rows(trainers[0]) + 2 * CHECKED
    assert torch.equal(*map(logps, trainers))


def test_another_process_finds_the_rows_of_this_one(small, sft):
    """The cache is keyed by the fingerprint of the table, after its rows were sorted."""
    table = prepare_run(small("lora=none"), "dpo").tables["train"]
    folder = Path(table.cache_files[0]["filename"]).parent
    order = np.argsort(-row_lengths(table), kind="stable")
    code = (
        "import sys, numpy, datasets\n"
        "table = datasets.load_from_disk(sys.argv[1])\n"
        "order = numpy.array([int(i) for i in sys.argv[2].split()])\n"
        "print(table.select(order).flatten_indices()._fingerprint)"
    )
    call = [sys.executable, "-c", code, str(folder), " ".join(map(str, order))]
    other = subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
    assert other == table.select(order).flatten_indices()._fingerprint


def test_one_pass_serves_every_beta_loss_and_seed_and_changes_no_byte(small, tmp_path, forwards):
    run = small(f"root={tmp_path}", "name=once", "++sft.max_steps=4")
    run_sft(run)
    finals, counts = [], []
    for i, typed in enumerate(("beta=0.1", "beta=0.1", "beta=0.3 loss=ipo", "beta=0.3 seed=1 loss=ipo", "seed=1")):
        run = small(
            *(f"root={tmp_path}", "name=once", "++sft.max_steps=4", f"variant=v{i}", *typed.split()),
            *("batch.global_size=128", "batch.micro_size=16"),  # two steps on all rows
        )
        train(run, "dpo")
        finals.append((run.dpo_folder / "final" / "model.safetensors").read_bytes())
        counts.append(sum(forwards))
        forwards.clear()
    assert len(set(counts[1:])) == 1  # preflight's rows and those computed again
    assert counts[0] - counts[1] == 250 + 13  # training and validation pairs
    assert finals[0] == finals[1]  # computed, and read
    assert len(set(finals)) == 4


@pytest.mark.parametrize("typed", ["seed=5", "seed=6 dpo.num_train_epochs=3 batch.micro_size=4"])
def test_a_run_that_reads_few_rows_computes_no_others(typed, small, sft, forwards, monkeypatch):
    """A row that training reads without its log-probs would make the loss NaN, which ends a run."""
    read, compute_loss = set(), PairTrainer.compute_loss

    def seen(self, model, batch, *args, **options):
        if model.training and self.is_in_train:
            read.update(batch["ref_chosen_logps"].tolist())
        return compute_loss(self, model, batch, *args, **options)

    monkeypatch.setattr(PairTrainer, "compute_loss", seen)
    train(small("lora=none", f"variant=few{len(typed)}", "dpo.max_steps=3", *typed.split()), "dpo")
    computed = sum(forwards) - CHECKED - 4 * 2  # two rows of policy and reference, two with shared prompts and without
    assert computed in (3 * 16 + 13, 3 * 16)  # those of validation may be there
    assert len(read) > 40
    assert not any(map(np.isnan, read))
