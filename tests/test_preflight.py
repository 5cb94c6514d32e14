"""Each invariant that holds before step 1, and each guard during training, is broken on purpose and caught."""

import contextlib
import dataclasses
import inspect
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from transformers.training_args import OptimizerNames

from dpo_pipeline import record
from dpo_pipeline.config import compose
from dpo_pipeline.dpo import run_dpo
from dpo_pipeline.errors import OneRankError, PipelineError
from dpo_pipeline.models import load_options, load_policy
from dpo_pipeline.sft import run_sft
from dpo_pipeline.training import arguments, memory, preflight
from dpo_pipeline.training.arguments import training_arguments
from dpo_pipeline.training.before_loading import check_learning_rate, plan_steps
from dpo_pipeline.training.fingerprint import check_start
from dpo_pipeline.training.pair_trainer import PairTrainer
from dpo_pipeline.training.similar_lengths import row_lengths
from tests.helpers import SMALL, build
from tests.test_models import save_base

STEPS = ("++dpo.max_steps=3", "dpo.learning_rate=1e-3")


@pytest.fixture
def built(small, sft, tmp_path):
    """Builds the trainer of a run, not trained yet: `built("dpo", "lora=r8")`."""
    return lambda stage, *overrides, **models: build(small(*overrides), stage, tmp_path, **models)


def check_reference(dpo):
    """Preflight's check of the reference."""
    preflight.check_reference(dpo.trainer, preflight.two_rows(dpo.trainer), "the SFT", None)


def moved(model, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return model


@pytest.mark.parametrize(
    "typed", ["lora=none reference=cached", "lora=none reference=frozen", "lora=r8 reference=adapter"]
)
def test_a_right_reference_passes_with_rewards_of_zero_and_a_loss_of_ln_2(typed, built, caplog):
    dpo = built("dpo", *typed.split())
    caplog.set_level("INFO")
    check_reference(dpo)
    assert "largest reward 0 nats, loss 0.6931" in caplog.text
    assert not dpo.trainer._metrics["train"]  # nothing of it is logged with step 1


def test_a_reference_of_another_seed_is_refused(built, small, sft):
    other = moved(load_policy(sft["none"] / "final", load_options(small("lora=none"))))
    with pytest.raises(PipelineError, match="a step-0 reward is .* nats, expected 0 .*reference=cached or frozen"):
        check_reference(built("dpo", "lora=none", "reference=frozen", reference=other))


def test_the_bare_base_as_reference_of_a_continued_adapter_is_refused(built, small, sft):
    run = small("lora=r8")
    base = load_policy(run.model.path, load_options(run))
    with pytest.raises(PipelineError, match="the reference is not the starting policy"):
        check_reference(built("dpo", "lora=r8", "reference=frozen", reference=base))


def test_a_reference_named_on_purpose_is_told_and_trains(small, sft):
    run = small("reference.path=" + str(sft["none"].parents[1] / "base" / "model"), "variant=on-purpose", *STEPS)
    run_dpo(run)
    log = (run.dpo_folder / "train.log").read_text()
    assert "base/model, as asked; first margins" in log
    first = json.loads((run.dpo_folder / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["loss"] - math.log(2)) > 1e-4


@pytest.mark.parametrize("lora", ["none", "r8"])
def test_an_sft_policy_that_was_not_loaded_is_refused(lora, built, small, sft):
    run = small(f"lora={lora}")
    fingerprint = record.read_json(sft[lora] / "manifest.json")["final"]["probe"]
    check_start(built("dpo", f"lora={lora}").trainer, fingerprint, True, "the SFT")
    base = load_policy(run.model.path, load_options(run), trainable=True)
    wrong = built("dpo", "lora=none", policy=base).trainer
    with pytest.raises(PipelineError, match="not what SFT ended with .*its weights or its adapter were not loaded"):
        check_start(wrong, fingerprint, True, "the SFT")


def test_an_sft_that_changed_nothing_is_refused(built, sft):
    fingerprint = record.read_json(sft["none"] / "manifest.json")["final"]["probe"]
    unchanged = {**fingerprint, "after": fingerprint["before"]}
    with pytest.raises(PipelineError, match="is the bare base, .*train it again"):
        check_start(built("dpo", "lora=none").trainer, unchanged, True, "the SFT")


def test_a_continued_adapter_that_is_all_zero_is_refused(built, small, sft):
    policy = load_policy(sft["r8"] / "final", load_options(small("lora=r8")), trainable=True)
    dpo = built("dpo", "lora=r8", policy=policy).trainer
    preflight.check_adapter(dpo, "here")
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.zero_()
    with pytest.raises(PipelineError, match="the adapter in here changes nothing"):
        preflight.check_adapter(dpo, "here")


def test_a_frozen_model_is_refused(built):
    dpo = built("dpo", "lora=none").trainer
    dpo.model.requires_grad_(False)
    with pytest.raises(PipelineError, match="no weight of the policy is trainable"):
        preflight.check_trainable(dpo)


def prepared_with(eos_ids, completion="drop"):
    """What `check_completions` reads of prepared data, with BOS 1."""
    limits = SimpleNamespace(completion=completion)
    return SimpleNamespace(eos_ids=eos_ids, tokenizer=SimpleNamespace(bos_token_id=1), limits=limits)


@pytest.mark.parametrize(
    ("prompt", "completion", "sentence"),
    [
        ([1, 5, 6], [7, 8], "completion 0 has 0 end tokens, expected one"),
        ([1, 5, 6], [7, 2, 8], "completion 0 has 1 end tokens, expected one, as the last"),
        ([1, 5, 6], [7, 2, 2], "completion 0 has 2 end tokens"),
        ([1, 5, 6], [7, 2, 8, 9], "would not learn to stop"),
        ([1, 1, 5], [7, 2], "row 0 holds the BOS token twice"),
        ([1, 5], [1, 7, 2], "row 0 holds the BOS token twice"),
    ],
)
def test_a_completion_without_its_one_end_or_a_second_bos_is_caught(prompt, completion, sentence):
    preflight.check_completions([([1, 5, 6], [7, 8, 2]), ([5], [2])], prepared_with([2, 9]))
    with pytest.raises(PipelineError, match=sentence):
        preflight.check_completions([(prompt, completion)], prepared_with([2]))


def test_a_completion_that_was_cut_needs_no_end_but_may_have_no_second():
    cut = prepared_with([2], completion="cut")
    preflight.check_completions([([1, 5, 6], [7, 8])], cut)
    with pytest.raises(PipelineError, match="completion 0 has 2 end tokens"):
        preflight.check_completions([([1, 5, 6], [7, 2, 2])], cut)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_what_the_trainer_learns_from_is_each_completion_whole_and_nothing_else(stage, built):
    run = built(stage, "lora=none")
    pairs = preflight.unpack_batch(preflight.first_batch(run.trainer))
    names = ["completion_ids"] if stage == "sft" else ["chosen_ids", "rejected_ids"]
    rows = run.prepared.tables["train"]
    expected = {(tuple(row["prompt_ids"]), tuple(row[name])) for row in rows for name in names}
    assert len(pairs) == 16 * len(names)
    assert {(tuple(prompt), tuple(completion)) for prompt, completion in pairs} <= expected


def test_a_batch_whose_mask_skips_a_token_of_the_completion_is_refused(built):
    run = built("sft", "lora=none")
    batch = preflight.first_batch(run.trainer)
    token = int((batch["labels"][0] != -100).nonzero()[2])
    batch["labels"][0, token] = -100
    with pytest.raises(PipelineError, match="0 end tokens"):
        preflight.check_completions(preflight.unpack_batch(batch), run.prepared)
    batch["labels"][0] = -100
    with pytest.raises(PipelineError, match="learns nothing"):
        preflight.unpack_batch(batch)


def state_of(trainer) -> dict:
    """All that a trial step could leave behind, as bytes or values."""
    return {
        "model": {name: weight.detach().clone() for name, weight in trainer.model.state_dict().items()},
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "args": trainer.args.to_dict(),
        "rows": trainer.train_dataset.to_dict(),
        "metrics": dict(trainer._metrics["train"]),
        "gradients": [p.grad for p in trainer.model.parameters()],
        "trainer": {key: id(value) for key, value in vars(trainer).items()},
        "modes": [module.training for module in trainer.model.modules()],
        "hooks": [len(module._forward_hooks) for module in trainer.model.modules()],
        "callbacks": list(trainer.callback_handler.callbacks),
    }


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


@pytest.mark.parametrize(
    ("stage", "typed"),
    [("sft", "lora=none"), ("sft", "lora=r8 ++lora.lora_dropout=0.5"), ("dpo", "lora=none"),
     ("dpo", "lora=r8 reference=adapter"), ("dpo", "lora=none reference=frozen batch.micro_size=4"),
     ("dpo", "lora=r8 precision=bf16 model.dtype=float32"), ("dpo", "lora=none dpo.activation_checkpointing=true"),
     ("dpo", "lora=r8 sft_variant=full quantization=nf4")],
)  # fmt: skip
def test_the_longest_batch_leaves_everything_bit_for_bit(stage, typed, built, monkeypatch):
    trainer, steps = built(stage, *typed.split()).trainer, []
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: steps.append(float(loss)) or backward(loss))
    trainer.model.eval()
    before = state_of(trainer)
    memory.run_longest_batch(trainer, trainer.train_dataset[0])
    after = state_of(trainer)
    assert [key for key in before if not same(before[key], after[key])] == []
    assert len(steps) == 1


@pytest.mark.parametrize("typed", ["lora=none", "lora=r8 model.dtype=float32"])
def test_bf16_is_that_of_training_in_preflight_too(typed, small, sft, monkeypatch):
    seen = set()
    compute_loss = PairTrainer._compute_loss

    def look(self, *args, **options):
        (layer,) = [m for name, m in self.model.named_modules() if name.endswith("layers.0.mlp.down_proj")]
        hook = layer.register_forward_hook(
            lambda *_: seen.add((self.state.global_step > 0, torch.is_autocast_enabled("cpu")))
        )
        loss = compute_loss(self, *args, **options)
        hook.remove()
        return loss

    monkeypatch.setattr(PairTrainer, "_compute_loss", look)
    run = small(*typed.split(), "precision=bf16", "reference=frozen", "variant=bf16-" + typed[5:7], *STEPS)
    run_dpo(run)
    assert seen == {(False, True), (True, True)}
    first = json.loads((run.dpo_folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0


@pytest.mark.parametrize(
    "typed",
    ["++dpo.loss_weights=[0.5]", "++dpo.use_weighting=true", "loss=ipo", "loss=cdpo", "loss=sigmoid_sft",
     "dpo.lr_scheduler_type=polynomial"],
)  # fmt: skip
def test_a_right_run_of_another_loss_or_schedule_passes(typed, small, sft):
    run_dpo(small(typed, "variant=right" + "".join(filter(str.isalnum, typed)), *STEPS))


@pytest.mark.parametrize("lora", ["none", "r8"])
@pytest.mark.parametrize("stage", [run_sft, run_dpo])
def test_training_after_preflight_gives_the_bytes_of_training_without(stage, lora, small, sft, monkeypatch):
    weights = "adapter_model.safetensors" if lora == "r8" else "model.safetensors"
    variant, finals = "variant" if stage is run_dpo else "sft_variant", []
    for name in ("checked", "unchecked"):
        typed = (
            (f"{variant}={name}-{lora}", "++sft.max_steps=3")
            if stage is run_sft
            else (f"{variant}={name}-{lora}", *STEPS)
        )
        run = small(f"lora={lora}", *typed)
        stage(run)
        folder = run.dpo_folder if stage is run_dpo else run.sft_folder
        finals.append((folder / "final" / weights).read_bytes())
        for check in ("check_memory", "check_reference"):
            monkeypatch.setattr(preflight, check, lambda *args: None)
    assert finals[0] == finals[1]


def test_a_row_pads_a_batch_by_its_prompt_and_longest_completion():
    pairs = {
        "prompt_ids": [[1] * 5, [1] * 2, [1] * 3],
        "chosen_ids": [[1], [1] * 4, [1] * 2],
        "rejected_ids": [[1], [1], [1] * 6],
    }
    assert row_lengths(Dataset.from_dict(pairs)).tolist() == [6, 6, 9]
    sft = Dataset.from_dict({"prompt_ids": [[1], [1] * 7], "completion_ids": [[1], [1] * 2], "row": [0, 1]})
    assert row_lengths(sft).tolist() == [2, 9]


def test_the_state_of_the_optimizer_is_what_it_takes_after_a_step(built):
    trainer = built("dpo", "lora=r8").trainer
    optimizer = trainer.create_optimizer()
    for weight in trainer.model.parameters():
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    optimizer.step()
    states = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert memory.state_bytes(trainer) == sum(value.numel() * value.element_size() for value in states) > 0


def test_optimizers_of_8_bits_take_a_quarter_and_paged_or_stateless_ones_nothing(built):
    trainer = built("dpo", "lora=none").trainer
    adamw = memory.state_bytes(trainer)
    shares = {}
    for name in ("adamw_8bit", "paged_adamw_8bit", "sgd", "adafactor"):
        trainer.args.optim = OptimizerNames(name)
        shares[name] = memory.state_bytes(trainer) / adamw
    assert shares == {"adamw_8bit": 0.25, "paged_adamw_8bit": 0, "sgd": 0, "adafactor": 0}


@pytest.mark.parametrize("is_enough", [True, False])
def test_a_gpu_that_the_optimizer_fills_is_refused_before_step_1(is_enough, built, small, sft, monkeypatch):
    dpo = built("dpo", "lora=none")
    trainer = dpo.trainer
    peak, state = 10**9, memory.state_bytes(trainer)
    monkeypatch.setattr(memory, "device", lambda: "cuda")
    monkeypatch.setattr(memory, "peak_memory", lambda: peak)
    free = peak + state - (0 if is_enough else 1)
    for name, value in (("mem_get_info", (free, 0)), ("memory_reserved", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    run = small("lora=none")
    refused = pytest.raises(OneRankError, match=r"^out of memory: 16 rows at once.*batch.micro_size=8 ")
    with contextlib.nullcontext() if is_enough else refused, memory.explain_oom(run, "dpo", dpo.prepared):
        memory.check_memory(trainer, dpo.prepared)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize(
    "typed",
    ["", "reference=frozen", "lora=r16", "lora=r16 quantization=nf4", "batch.micro_size=1", "length.max=100",
     "batch.global_size=6 batch.micro_size=3", "sft.activation_checkpointing=true dpo.activation_checkpointing=true"],
)  # fmt: skip
@pytest.mark.parametrize("machine", ["cpu", "cuda"])
def test_no_advice_on_memory_repeats_a_present_value(machine, typed, stage, monkeypatch):
    monkeypatch.setattr(memory, "device", lambda: machine)
    overrides, longest = typed.split(), 100
    run = compose(overrides)
    for settings in memory.cheaper_settings(run, stage, longest):
        (key, value), *_ = re.findall(r"([\w.]+)=(\S+)", settings)
        changed = compose([item for item in overrides if not item.startswith(f"{key}=")] + [f"{key}={value}"])
        assert changed != run, settings
        if key in ("batch.micro_size", "length.max"):
            assert int(value) < {"batch.micro_size": run.batch.micro_size, "length.max": longest}[key]


@pytest.mark.slow
def test_running_out_of_memory_is_explained_with_what_to_type(small, sft):
    """Out of memory for real: a process that may hold little more than it does is given rows that need far more."""
    run = small("lora=none")
    code = f"""
import resource, sys
from pathlib import Path
from dpo_pipeline.config import compose
from dpo_pipeline.errors import OneRankError, PipelineError
from dpo_pipeline.training import memory
from tests.helpers import build
typed = {[f"root={run.root}", "name=small", *small.typed]!r}
rows = ["batch.global_size=4096", "batch.micro_size=4096", "dpo.activation_checkpointing=false"]
run = compose([*typed, *rows])
built = build(run, "dpo", Path(sys.argv[1]))
used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000, used + 300_000_000))
try:
    with memory.explain_oom(run, "dpo", built.prepared):
        memory.check_memory(built.trainer, built.prepared)
except PipelineError as error:
    print("SENTENCE", error)
"""
    done = subprocess.run([sys.executable, "-c", code, run.root + "/oom"], capture_output=True, text=True)
    assert "SENTENCE out of memory: 4096 rows at once, weights and optimizer need" in done.stdout, done.stderr
    place = done.stdout.index
    cheaper = (
        "batch.micro_size=2048",
        "dpo.activation_checkpointing=true",
        "lora=r16 sft_variant=full",
        "length.max=23",
    )
    assert [place(item) for item in cheaper] == sorted(place(item) for item in cheaper)


@pytest.mark.parametrize(
    ("typed", "warned"),
    [("", False), ("lora=r16", False), ("dpo.learning_rate=2e-5", False), ("dpo.learning_rate=0.01", True),
     ("dpo.learning_rate=1e-10", True), ("model=gpt2 dpo.learning_rate=2e-4", True), ("model=gpt2", False),
     ("model=gpt2 lora=r16 dpo.learning_rate=2e-4", False), ("model=gpt2 lora=r16 dpo.learning_rate=2e-2", True)],
)  # fmt: skip
def test_a_rate_far_from_the_known_ones_warns_with_its_source(typed, warned, caplog):
    check_learning_rate(compose(typed.split()), "dpo")
    assert bool(caplog.text) == warned
    if warned:
        assert "far from what is known to work for DPO" in caplog.text
        assert "arXiv" in caplog.text or "TRL's examples" in caplog.text


class Scaled:
    """What the guard reads of a trainer."""

    _tr_loss = 0.5
    is_deepspeed_enabled = False


@pytest.mark.parametrize("lora", ["none", "r8"])
@pytest.mark.parametrize("stage", [run_sft, run_dpo])
def test_a_check_leaves_nothing_and_says_what_would_be_done(stage, lora, small, tmp_path, capsys):
    run = compose([*small.typed, f"root={tmp_path}/outputs", "name=unseen", f"lora={lora}", "check=true"])
    stage(run)
    assert not list(tmp_path.iterdir())
    out = capsys.readouterr().out
    assert f"check: {stage.__name__[4:].upper()} of" in out
    assert "free" in out
    if stage is run_dpo:
        assert "its SFT is still to come" in out


def test_a_check_finds_what_a_run_would(small, sft, monkeypatch):
    with pytest.raises(PipelineError, match="holds another run"):
        run_sft(small("lora=none", "sft.learning_rate=1e-5", "check=true"))
    with pytest.raises(PipelineError, match="dataset.rows=1: .*16"):
        run_dpo(small("dataset.test_rows=0", "dataset.rows=1", "check=true", "name=unseen"))
    with monkeypatch.context() as patch:  # as on a disk that is mounted read-only
        patch.setattr("os.access", lambda path, mode: not mode & os.W_OK)
        with pytest.raises(PipelineError, match="cannot be written to: .*root="):
            run_sft(small("check=true", "name=unseen"))
    usage = namedtuple("usage", "total used free")(10**6, 0, 10**6)
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage)  # a megabyte
    for typed in ("check=true", "check=false"):
        with pytest.raises(
            PipelineError, match=r"the disk of .* has 0.0 GB left and this run writes up to 0.0 GB.*root="
        ):
            run_sft(small(typed, "name=unseen"))


def test_a_check_of_a_local_model_reads_its_weights_file_headers(small, sft, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(small().model.path, folder)
    typed = ["model=path", f"model.path={folder}", f"root={tmp_path}/outputs", "check=true", "dataset.rows=300"]
    run_sft(compose(typed))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(PipelineError, match="no model could be loaded"):
        run_sft(compose(typed))
    file.unlink()
    with pytest.raises(PipelineError, match="holds no weights"):
        run_sft(compose(typed))
    assert not (tmp_path / "outputs").exists()


def test_a_model_with_a_layer_before_its_head_is_refused(tmp_path):
    """TRL's log-probs leave that layer out."""
    save_base(tmp_path / "base", "modernbert-decoder")
    typed = [item for item in SMALL if not item.startswith("model.builder")]
    with pytest.raises(PipelineError, match="TRL's log-probs differ .*modernbert-decoder .*choose another model="):
        run_sft(compose([*typed, "model=path", f"model.path={tmp_path}/base", f"root={tmp_path}", "length.max=100"]))


@pytest.mark.parametrize("cause", ["weights that hold NaN: .*up_proj", "none of its weights, .* lora="])
def test_log_probs_that_are_no_numbers_are_told_as_such(cause, built):
    dpo = built("dpo", "lora=r8", *(["lora.lora_alpha=nan", "policy=base"] if "lora=" in cause else []))
    if "up_proj" in cause:
        dpo.trainer.model.base_model.model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    batch = preflight.first_batch(dpo.trainer)
    with pytest.raises(PipelineError, match=f"log-probs that are no numbers; {cause}" if "up" in cause else cause):
        preflight.check_forward(dpo.trainer, batch, dpo.prepared.load_options)


@pytest.mark.parametrize(
    ("typed", "rows", "plan", "warned"),
    [
        ("", 6400, (-1, 0.1, 10), None),
        ("batch.global_size=64", 48, (-1, 0, 0), r"only 1 steps.* dpo\.num_train_epochs=20 "),
        ("dpo.max_steps=2", 6400, (2, 0.1, 1), r"only 2 steps.* dpo\.max_steps=20 "),
        ("dpo.warmup_steps=70", 6400, (-1, 70, 70), r"warm-up takes 70 of 100 steps: type dpo\.warmup_steps=0\.1"),
        ("debug=true", 90, (-1, 0.1, 5), r"debug=true: 45 steps on 90 rows .* mean nothing"),
        ("debug=true dpo.num_train_epochs=2", 100, (50, 0.1, 5), "mean nothing"),
    ],
)
def test_steps_are_told_and_one_that_would_not_count_has_no_warm_up(typed, rows, plan, warned, tmp_path, caplog):
    caplog.set_level("INFO")
    run = compose(typed.split())
    args = training_arguments(run, "dpo", tmp_path)
    plan_steps(run, "dpo", args, rows)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(rows / run.batch.global_size)
    assert (args.max_steps, args.warmup_steps, args.get_warmup_steps(steps)) == plan
    assert f"{steps} steps of {run.batch.global_size} rows (epochs: " in caplog.text
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == bool(warned)
    assert not warned or re.search(warned, warnings[0])


def test_a_run_of_one_step_moves_the_policy(small, sft):
    run_dpo(run := small("lora=none", "variant=one-step", "dpo.max_steps=1"))
    weights = [(folder / "final" / "model.safetensors").read_bytes() for folder in (sft["none"], run.dpo_folder)]
    assert weights[0] != weights[1]


# Of the fields that TRL adds to transformers': those that act on tokenized rows and a model that is loaded already.
ACTS = {
    "sft": "learning_rate router_aux_loss_coef pad_to_multiple_of loss_type activation_offloading",
    "dpo": "learning_rate router_aux_loss_coef pad_to_multiple_of loss_type loss_weights ld_alpha f_divergence_type "
    "f_alpha_divergence_coef label_smoothing use_weighting discopop_tau activation_offloading sync_ref_model "
    "ref_model_mixup_alpha ref_model_sync_steps",
}


@pytest.mark.parametrize(("stage", "config"), [("sft", trl.SFTConfig), ("dpo", trl.DPOConfig)])
def test_every_field_of_trl_acts_or_is_decided_by_a_key_or_refused(stage, config, tmp_path):
    own = {field.name for field in dataclasses.fields(config) if field.name in config.__annotations__}
    run = compose([])
    decided = arguments.fixed_arguments(run, tmp_path) | arguments.batch_arguments(run)
    decided |= arguments.sft_arguments(run) if stage == "sft" else arguments.dpo_arguments(run)
    groups = [set(ACTS[stage].split()), set(decided) & own, arguments.NO_EFFECT & own]
    assert sorted(name for group in groups for name in group) == sorted(own)
    # TRL reads a refused one where it loads and tokenizes, and in what PairTrainer replaces.
    trainer_class = {"sft": trl.SFTTrainer, "dpo": trl.DPOTrainer}[stage]
    for name in groups[2]:
        for method in ("compute_loss", "training_step", "log", *(["_compute_loss"] if stage == "dpo" else [])):
            assert f"args.{name}" not in inspect.getsource(getattr(trainer_class, method)), (name, method)
        with pytest.raises(PipelineError, match=rf"{stage}\.{name} has no effect here.*take it out"):
            training_arguments(compose([f"++{stage}.{name}=1"]), stage, tmp_path)
