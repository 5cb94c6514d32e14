"""Each invariant that holds before step 1, and each guard during training, is broken on purpose and caught."""

import copy
import json
import math
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from dpo_pipeline import run_folder
from dpo_pipeline.config import compose
from dpo_pipeline.data import prepare
from dpo_pipeline.dpo import run_dpo
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.models import load_policy, load_tokenizer
from dpo_pipeline.sft import run_sft
from dpo_pipeline.training import guards, preflight, reference, starting_policy, trainer
from dpo_pipeline.training.arguments import training_arguments

STEPS = ("++dpo.max_steps=3", "dpo.learning_rate=1e-3")


@pytest.fixture
def built(small, sft, tmp_path):
    """Builds the trainer of a run, not trained yet: `built("dpo", "lora=r8")`."""

    def build(stage: str, *typed: str, policy=None, reference=None):
        run = small(*typed)
        args, loading = training_arguments(run, stage, tmp_path), starting_policy.load_options(run)
        begin = starting_policy.sft_start(run) if stage == "sft" else starting_policy.dpo_start(run)
        tokenizer = load_tokenizer(run.model)
        rows = prepare.prepare_tables(run, stage, tokenizer, "train", "validation")[0]
        policy = policy or starting_policy.load_start(run, begin)
        if stage == "sft":
            return run, trainer.build_sft(policy, begin.lora, tokenizer, args, rows)
        reference = reference or starting_policy.second_model(run, begin)
        assert loading.dtype == torch.float32
        return run, trainer.build_dpo(policy, reference, begin.lora, tokenizer, args, rows)

    return build


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
    _, dpo = built("dpo", *typed.split())
    caplog.set_level("INFO")
    preflight.check_reference(dpo, preflight.first_batch(dpo), "the SFT", None)
    assert "largest reward 0 nats, loss 0.6931" in caplog.text
    assert not dpo._metrics["train"]  # nothing of it is logged with step 1


def test_a_reference_of_another_seed_is_caught(built, small, sft):
    run = small("lora=none")
    other = moved(load_policy(sft["none"] / "final", starting_policy.load_options(run)))
    _, dpo = built("dpo", "lora=none", "reference=frozen", reference=other)
    with pytest.raises(
        PipelineError, match=r"a step-0 reward is .* nats, expected 0 .*the reference is not the starting"
    ):
        preflight.check_reference(dpo, preflight.first_batch(dpo), "the SFT", None)


def test_the_bare_base_as_reference_of_a_continued_adapter_is_caught(built, small, sft):
    run = small("lora=r8")
    base = load_policy(run.model.path, starting_policy.load_options(run))
    _, dpo = built("dpo", "lora=r8", "reference=frozen", reference=base)
    with pytest.raises(PipelineError, match="the reference is not the starting policy"):
        preflight.check_reference(dpo, preflight.first_batch(dpo), "the SFT", None)


def test_a_reference_named_on_purpose_is_told_and_trains(small, sft):
    run = small("reference.path=" + str(sft["none"].parents[1] / "base" / "model"), "variant=on-purpose", *STEPS)
    run_dpo(run)
    log = (run.dpo_folder / "train.log").read_text()
    assert "base/model, as asked; first margins" in log
    first = json.loads((run.dpo_folder / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["loss"] - math.log(2)) > 1e-4


@pytest.mark.parametrize("lora", ["none", "r8"])
def test_an_sft_policy_that_was_not_loaded_is_caught(lora, built, small, sft):
    run = small(f"lora={lora}")
    left = run_folder.read_json(sft[lora] / "manifest.json")["final"]["probe"]
    _, right = built("dpo", f"lora={lora}")
    preflight.check_start(right, left, True, "the SFT")
    base = load_policy(run.model.path, starting_policy.load_options(run), trainable=True)
    _, wrong = built("dpo", "lora=none", policy=base)
    with pytest.raises(PipelineError, match="not what SFT ended with .*its weights or its adapter were not loaded"):
        preflight.check_start(wrong, left, True, "the SFT")


def test_an_sft_that_changed_nothing_is_caught(built, sft):
    left = copy.deepcopy(run_folder.read_json(sft["none"] / "manifest.json")["final"]["probe"])
    _, dpo = built("dpo", "lora=none")
    with pytest.raises(PipelineError, match="is the bare base: its training changed nothing"):
        preflight.check_start(dpo, {**left, "after": left["before"]}, True, "the SFT")


def test_a_continued_adapter_that_is_all_zero_is_caught(built, small, sft):
    policy = load_policy(sft["r8"] / "final", starting_policy.load_options(small("lora=r8")), trainable=True)
    _, dpo = built("dpo", "lora=r8", policy=policy)
    preflight.check_adapter(dpo, "here")
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.zero_()
    with pytest.raises(PipelineError, match="the adapter in here changes nothing"):
        preflight.check_adapter(dpo, "here")


def test_a_frozen_model_is_caught(built):
    _, dpo = built("dpo", "lora=none")
    dpo.model.requires_grad_(False)
    with pytest.raises(PipelineError, match="no weight of the policy is trainable"):
        preflight.check_policy(dpo, [2], 1, dpo.train_dataset)


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
    preflight.check_completions([([1, 5, 6], [7, 8, 2]), ([5], [2])], [2, 9], 1)
    with pytest.raises(PipelineError, match=sentence):
        preflight.check_completions([(prompt, completion)], [2], 1)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_what_the_trainer_learns_from_is_each_completion_whole_and_nothing_else(stage, built):
    _, made = built(stage, "lora=none")
    pairs = preflight.unpack_batch(preflight.first_batch(made))
    rows = made.train_dataset
    if stage == "sft":
        wanted = {(tuple(i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100),
                   tuple(label for label in row["labels"] if label != -100)) for row in rows}  # fmt: skip
    else:
        wanted = {
            (tuple(row["prompt_ids"]), tuple(row[name])) for row in rows for name in ("chosen_ids", "rejected_ids")
        }
    assert len(pairs) == 16 * (1 if stage == "sft" else 2)
    assert {(tuple(p), tuple(a)) for p, a in pairs} <= wanted


def test_a_batch_whose_mask_skips_a_token_of_the_completion_is_caught(built):
    _, made = built("sft", "lora=none")
    batch = preflight.first_batch(made)
    at = int((batch["labels"][0] != -100).nonzero()[2])
    batch["labels"][0, at] = -100
    with pytest.raises(PipelineError, match="learns from something else than one completion"):
        preflight.unpack_batch(batch)


def state_of(made) -> dict:
    """All that a rehearsal could leave behind, as bytes or values."""
    import random

    import numpy as np

    model = {name: p.detach().clone() for name, p in made.model.state_dict().items()}
    return {
        "model": model,
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "args": made.args.to_dict(),
        "rows": made.train_dataset.to_dict(),
        "optimizer": made.optimizer,
        "grads": [p.grad for p in made.model.parameters()],
        "trainer": {key: id(value) for key, value in vars(made).items() if key not in ("_metrics", "model_wrapped")},
        "module": {key: id(value) for key, value in vars(made.model).items()},
        "callbacks": list(made.callback_handler.callbacks),
    }


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


@pytest.mark.parametrize(
    ("stage", "typed"),
    [("sft", "lora=none"), ("sft", "lora=r8"), ("dpo", "lora=none"), ("dpo", "lora=r8 reference=adapter"),
     ("dpo", "lora=none reference=frozen batch.micro_size=4"), ("dpo", "lora=r8 precision=bf16 model.dtype=float32")],
)  # fmt: skip
def test_the_rehearsal_puts_everything_back_bit_for_bit(stage, typed, built, monkeypatch):
    _, made = built(stage, *typed.split())
    steps = []
    inner = made.training_step
    monkeypatch.setattr(made, "training_step", lambda *args, **options: steps.append(1) or inner(*args, **options))
    before = state_of(made)
    preflight.run_trial_steps(made, preflight.longest_row(made.train_dataset)[0], stage)
    after = state_of(made)
    assert [key for key in before if not same(before[key], after[key])] == []
    accumulated = min(2, made.args.gradient_accumulation_steps)
    assert len(steps) == 2 * accumulated  # two whole steps were made


@pytest.mark.parametrize("typed", ["lora=none", "lora=r8 model.dtype=float32"])
def test_training_in_bf16_is_in_bf16_after_the_rehearsal_too(typed, small, sft, monkeypatch):
    """Accelerate prepares a model once: a rehearsal that left it marked as prepared would leave out its autocast."""
    seen: dict[int, set] = {}
    shutil.rmtree(Path(small().root) / ".cache" / "rehearsed", ignore_errors=True)

    def look(self, *args, **options):
        (layer,) = [m for name, m in self.model.named_modules() if name.endswith("layers.0.mlp.down_proj")]
        hook = layer.register_forward_hook(
            lambda *_: (
                self.model.training and seen.setdefault(id(self.args), set()).add(torch.is_autocast_enabled("cpu"))
            )
        )
        loss = inner(self, *args, **options)
        hook.remove()
        return loss

    inner = trainer.PairTrainer._compute_loss
    monkeypatch.setattr(trainer.PairTrainer, "_compute_loss", look)
    run_dpo(small(*typed.split(), "precision=bf16", "reference=frozen", "variant=bf16-" + typed[5:7], *STEPS))
    assert list(seen.values()) == [{True}] * 2  # in the rehearsal (with args of its own) and in training
    first = json.loads((small("variant=bf16-" + typed[5:7]).dpo_folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0


def test_a_wrong_cache_of_the_reference_is_caught(built, tmp_path):
    _, dpo = built("dpo", "lora=r8", "reference=cached")
    reference.add_reference_logps(dpo, tmp_path / "reference", preflight.padding_tolerance)
    preflight.check_cache(dpo, "the SFT")
    columns = {name: dpo.train_dataset[name][::-1] for name in ("ref_chosen_logps", "ref_rejected_logps")}
    rows = dpo.train_dataset.remove_columns(list(columns))
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    dpo.train_dataset = rows
    with pytest.raises(
        PipelineError, match="cached reference log-probs are .* nats from those of the starting policy"
    ):
        preflight.check_cache(dpo, "the SFT")


@pytest.mark.parametrize(
    "typed",
    ["++dpo.loss_weights=[0.5]", "++dpo.use_weighting=true", "loss=ipo", "loss=cdpo", "loss=sigmoid_sft",
     "dpo.lr_scheduler_type=polynomial"],
)  # fmt: skip
def test_a_right_run_of_another_loss_or_schedule_passes(typed, small, sft):
    run_dpo(small(typed, "variant=right" + "".join(filter(str.isalnum, typed)), *STEPS))


@pytest.mark.parametrize("lora", ["none", "r8"])
def test_training_after_preflight_gives_the_bytes_of_training_without(lora, small, sft, monkeypatch):
    weights = "adapter_model.safetensors" if lora == "r8" else "model.safetensors"
    looked = small(f"lora={lora}", "variant=looked-" + lora, *STEPS)
    run_dpo(looked)
    for name in ("check_memory", "check_reference", "check_cache"):
        monkeypatch.setattr(preflight, name, lambda *args: None)
    blind = small(f"lora={lora}", "variant=blind-" + lora, *STEPS)
    run_dpo(blind)
    files = [run.dpo_folder / "final" / weights for run in (looked, blind)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_longest_row_is_the_one_that_pads_most():
    pairs = {
        "prompt_ids": [[1] * 5, [1] * 2, [1] * 3],
        "chosen_ids": [[1], [1] * 4, [1] * 2],
        "rejected_ids": [[1], [1], [1] * 6],
    }
    row, length = preflight.longest_row(Dataset.from_dict(pairs))
    assert (row["prompt_ids"], length) == ([[1] * 3], 9)
    row, length = preflight.longest_row(Dataset.from_dict({"input_ids": [[1], [1] * 7], "labels": [[1], [1] * 7]}))
    assert length == 7


@pytest.mark.slow
def test_memory_that_does_not_suffice_is_told_with_what_to_type(small, sft):
    """Out of memory for real: a process that may hold little more than it does is given rows that need far more."""
    run = small("lora=none")
    code = f"""
import resource, sys
from pathlib import Path
from dpo_pipeline.config import compose
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.models import load_tokenizer
from dpo_pipeline.data import prepare
from dpo_pipeline.training import preflight, starting_policy, trainer
from dpo_pipeline.training.arguments import training_arguments
typed = {[f"root={run.root}", "name=small", *small.typed]!r}
run = compose([*typed, "batch.global_size=4096", "batch.micro_size=4096"])
tokenizer = load_tokenizer(run.model)
begin = starting_policy.dpo_start(run)
made = trainer.build_dpo(starting_policy.load_start(run, begin), None, begin.lora, tokenizer,
    training_arguments(run, "dpo", Path(sys.argv[1])),
    prepare.prepare_tables(run, "dpo", tokenizer, "train", "validation")[0])
used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000, used + 300_000_000))
try:
    with preflight.explain_oom(run, "dpo"):
        preflight.run_trial_steps(made, preflight.longest_row(made.train_dataset)[0], "dpo")
except PipelineError as error:
    print("SENTENCE", error)
"""
    done = subprocess.run([sys.executable, "-c", code, run.root + "/oom"], capture_output=True, text=True)
    assert "SENTENCE out of memory: 4096 rows at once reached" in done.stdout, done.stderr
    found = done.stdout.index
    cheaper = (
        "batch.micro_size=2048",
        "dpo.activation_checkpointing=true",
        "lora=r16 sft_variant=full",
        "length.max=256",
    )
    assert [found(item) for item in cheaper] == sorted(found(item) for item in cheaper)


@pytest.mark.parametrize(
    ("typed", "warned"),
    [("", False), ("lora=r16", False), ("dpo.learning_rate=2e-5", False), ("dpo.learning_rate=0.01", True),
     ("dpo.learning_rate=1e-10", True), ("model=gpt2 dpo.learning_rate=2e-4", True), ("model=gpt2", False),
     ("model=gpt2 lora=r16 dpo.learning_rate=2e-4", False), ("model=gpt2 lora=r16 dpo.learning_rate=2e-2", True)],
)  # fmt: skip
def test_a_rate_far_from_the_known_ones_warns_with_its_source(typed, warned, caplog):
    preflight.check_rate(compose(typed.split()), "dpo")
    assert bool(caplog.text) == warned
    if warned:
        assert "far from what is known to work for DPO" in caplog.text
        assert "arXiv" in caplog.text or "TRL's examples" in caplog.text


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("dpo.learning_rate=1e-30", "no weight has moved in 10 steps: the learning rate 1e-30 is too small"),
        ("dpo.learning_rate=1e30 dpo.max_grad_norm=0", "is no number at step"),
    ],
)
def test_a_rate_that_moves_nothing_or_destroys_everything_ends_the_run(typed, sentence, small, sft):
    run = small(*typed.split(), "dpo.warmup_steps=0", "variant=guard" + str(len(sentence)))
    with pytest.raises(PipelineError, match=sentence):
        run_dpo(run)
    assert run_folder.run_state(run.dpo_folder) == "failed"
    assert sentence.split(":")[0] in run_folder.read_json(run.dpo_folder / "status.json")["error"]


def test_a_loss_that_is_no_number_ends_the_run_at_its_step(small, sft, monkeypatch):
    from dpo_pipeline.training.trainer import PairTrainer

    inner = PairTrainer._compute_loss

    def broken(self, *args):
        loss = inner(self, *args)
        return loss * float("nan") if self.state.global_step == 4 and self.model.training else loss

    monkeypatch.setattr(PairTrainer, "_compute_loss", broken)
    with pytest.raises(PipelineError, match="the loss is no number at step 5: the learning rate .* lower it tenfold"):
        run_dpo(small("variant=nan", "dpo.eval_steps=99"))


def test_no_gradient_in_the_first_steps_ends_the_run_and_later_does_not(small, sft, monkeypatch):
    from dpo_pipeline.training.trainer import PairTrainer

    inner, first = PairTrainer._compute_loss, [True]

    def resting(self, *args):
        loss = inner(self, *args)
        return loss * 0 if self.model.training and (first[0] or self.state.global_step >= 2) else loss

    monkeypatch.setattr(PairTrainer, "_compute_loss", resting)
    with pytest.raises(PipelineError, match="no weight has a gradient in the first 3 steps"):
        run_dpo(small("variant=rest0", "loss=hinge"))
    first[0] = False
    run_dpo(small("variant=rest2", "loss=hinge", "++dpo.max_steps=8"))


class Scaled:
    """What the guard reads of a trainer."""

    _tr_loss = 0.5
    is_deepspeed_enabled = False


@pytest.mark.parametrize(("fp16", "bad", "stops"), [(False, 1, True), (True, 9, False), (True, 10, True)])
def test_ten_overflows_in_a_row_end_an_fp16_run_and_one_any_other(fp16, bad, stops):
    from types import SimpleNamespace

    model = torch.nn.Linear(2, 2)
    args = SimpleNamespace(fp16=fp16, learning_rate=1e-3, get_warmup_steps=lambda n: 0)
    state = SimpleNamespace(global_step=0, max_steps=50)
    guard = guards.NumericalGuard(Scaled())
    guard.on_train_begin(args, state, None, model=model)

    def step(value: float) -> None:
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        guard.on_pre_optimizer_step(args, state, None, model=model)
        state.global_step += 1

    for _ in range(bad - 1):
        step(math.inf)
    if stops:
        with pytest.raises(PipelineError, match=f"the gradient is no number at step {bad}, {bad} time"):
            step(math.inf)
    else:
        step(math.inf)
        step(1.0)
        assert guard.overflows == 0


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
    with pytest.raises(PipelineError, match="train, validation and test need 16 at least"):
        run_dpo(small("dataset.test_rows=0", "dataset.rows=1", "check=true", "name=unseen"))
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
