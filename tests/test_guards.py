"""Guards during training, each broken on purpose: NaN, zero gradients, weights that rest; and signals to stop."""

import math
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from dpo_pipeline import checkpoints, record, run_folder
from dpo_pipeline.dpo import run_dpo
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.training import callbacks, guards
from dpo_pipeline.training.pair_trainer import PairTrainer
from tests.helpers import train


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("dpo.learning_rate=1e-30", "no weight has moved in 10 steps: the learning rate 1e-30 is too small"),
        ("dpo.learning_rate=1e30 dpo.max_grad_norm=0", "(loss|gradient norm) is (nan|inf) .* is too high"),
    ],
)
def test_a_rate_that_moves_nothing_or_destroys_everything_ends_the_run(typed, sentence, small, sft):
    run = small(*typed.split(), "dpo.warmup_steps=0", "variant=guard" + str(len(sentence)))
    with pytest.raises(PipelineError, match=sentence):
        run_dpo(run)
    assert run_folder.run_state(run.dpo_folder) == "failed"
    assert "the learning rate" in record.read_json(run.dpo_folder / "status.json")["error"]


def test_a_loss_that_is_no_number_ends_the_run_at_its_step(small, sft, monkeypatch):
    inner = PairTrainer._compute_loss

    def broken(self, *args):
        loss = inner(self, *args)
        return loss * float("nan") if self.state.global_step == 4 and self.model.training else loss

    monkeypatch.setattr(PairTrainer, "_compute_loss", broken)
    with pytest.raises(PipelineError, match="the loss is nan by step 5: the learning rate .* lower it tenfold"):
        run_dpo(small("variant=nan", "dpo.eval_steps=99"))


def test_no_gradient_in_the_first_steps_ends_the_run_and_later_does_not(small, sft, monkeypatch):
    inner, first = PairTrainer._compute_loss, [True]

    def resting(self, *args):
        loss = inner(self, *args)
        return loss * 0 if self.model.training and (first[0] or self.state.global_step >= 2) else loss

    monkeypatch.setattr(PairTrainer, "_compute_loss", resting)
    with pytest.raises(PipelineError, match="the gradients are zero in the first 2 steps: .*lora.target_modules"):
        run_dpo(small("variant=rest0", "loss=hinge"))
    first[0] = False
    train(small("variant=rest2", "loss=hinge", "++dpo.max_steps=8"), "dpo")


def test_no_checkpoint_is_written_before_its_loss_is_looked_at(small, sft, monkeypatch):
    inner = PairTrainer._compute_loss

    def break_after_3(self, *args):
        loss = inner(self, *args)
        return loss * float("nan") if self.state.global_step >= 3 and self.model.training else loss

    monkeypatch.setattr(PairTrainer, "_compute_loss", break_after_3)
    run = small("variant=late-nan", "dpo.logging_steps=99", "dpo.save_steps=2", "dpo.eval_steps=99")
    with pytest.raises(PipelineError, match="the loss is nan by step 4"):
        run_dpo(run)
    assert checkpoints.newest_checkpoint(run.dpo_folder).name == "checkpoint-2"


def guard_at(step: int, fp16: bool = False, **trainer: float) -> tuple:
    """A guard at the start of a training from `step`, and a function that gives it a log."""
    guard = guards.NumericalGuard(SimpleNamespace(is_deepspeed_enabled=False, **trainer))
    args = SimpleNamespace(fp16=fp16, learning_rate=1e-3, get_warmup_steps=lambda steps: 0)
    state = SimpleNamespace(global_step=step, max_steps=50)
    guard.on_train_begin(args, state, None, model=torch.nn.Linear(2, 2))

    def log(step: int, **logs: float) -> None:
        state.global_step = step
        guard.on_log(args, state, None, logs=logs)

    return guard, log


def test_one_gradient_overflow_ends_a_run_and_an_fp16_run_only_where_the_scale_cannot_be_the_cause():
    _, log = guard_at(0)
    with pytest.raises(PipelineError, match="gradient norm is inf from step 1 to 1: .*precision=bf16"):
        log(1, loss=0.5, grad_norm=math.inf)
    _, log = guard_at(0, fp16=True)
    for step in (1, 10, 20):
        log(step, loss=0.5, grad_norm=math.nan)
    log(25, eval_loss=0.5)
    with pytest.raises(PipelineError, match="gradient norm is nan from step 1 to 30: .*precision=bf16"):
        log(30, loss=0.5, grad_norm=math.nan)
    _, log = guard_at(0, fp16=True)
    for step, norm in ((1, math.inf), (20, 1.0), (30, math.inf), (40, math.inf)):
        log(step, loss=0.5, grad_norm=norm)


@pytest.mark.parametrize("norms", [(math.inf,), (0.0, 0.0)])
def test_a_beta_without_sense_is_told_as_the_cause(norms):
    _, log = guard_at(0, beta=1e30)
    for norm in norms[:-1]:
        log(1, loss=0.7, grad_norm=norm)
    with pytest.raises(PipelineError, match=r"beta=1e\+30 saturates the loss, .*type beta=0.1"):
        log(2, loss=0.7, grad_norm=norms[-1])


def test_zero_gradients_end_a_run_at_its_start_alone():
    _, log = guard_at(0)
    log(1, loss=1.0, grad_norm=0.0)
    with pytest.raises(PipelineError, match="zero in the first 10 steps"):
        log(10, loss=1.0, grad_norm=0.0)
    for start, norms in ((0, (0.5, 0.0, 0.0)), (0, (0.0, 0.5, 0.0, 0.0)), (20, (0.0, 0.0, 0.0))):
        _, log = guard_at(start)
        for step, norm in enumerate(norms, start + 1):
            log(step, loss=1.0, grad_norm=norm)


def test_weights_are_looked_at_once_and_not_after_a_skipped_step():
    guard, _ = guard_at(0)
    args, state, control = SimpleNamespace(learning_rate=1e-3), SimpleNamespace(global_step=10), SimpleNamespace()
    control.should_log, control.should_save = False, True
    still = torch.nn.Linear(2, 2)
    guard.start_weights = guards.sample_weights(still)
    guard.trainer.accelerator = SimpleNamespace(optimizer_step_was_skipped=True)
    guard.on_step_end(args, state, control, model=still)
    assert control.should_log
    guard.trainer.accelerator.optimizer_step_was_skipped = False
    with pytest.raises(PipelineError, match="no weight has moved in 10 steps: .* raise it"):
        guard.on_step_end(args, state, control, model=still)
    guard.on_step_end(args, state, control, model=still)


@pytest.fixture
def steps(monkeypatch):
    """Gives a callback its steps on one of `world_size` ranks; counts all-reduces, and adds what others reduce."""
    others, reduced = [], []

    def all_reduce(flag):
        reduced.append(float(flag))
        flag += sum(others)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)

    def take(callback, world_size: int, first: int, last: int) -> int | None:
        args = SimpleNamespace(world_size=world_size, device="cpu")
        for step in range(first, last + 1):
            control = SimpleNamespace(should_save=False, should_training_stop=False)
            callback.on_step_end(args, SimpleNamespace(global_step=step), control)
            if control.should_save and control.should_training_stop:
                return step
        return None

    take.others, take.reduced = others, reduced
    return take


def test_a_single_process_says_that_it_heard_a_signal_and_stops_after_that_step(steps, caplog):
    interrupt = callbacks.CheckpointOnInterrupt()
    assert steps(interrupt, 1, 1, 6) is None
    for _ in range(2):
        interrupt.note(signal.SIGTERM, None)
    assert caplog.messages == ["SIGTERM: stops with a checkpoint after this step or evaluation"]
    assert steps(interrupt, 1, 7, 9) == 7
    assert steps.reduced == []


def test_several_processes_stop_together_at_a_step_that_all_of_them_reduce_at(steps):
    interrupt, every = callbacks.CheckpointOnInterrupt(), callbacks.SIGNAL_STEPS
    assert steps(interrupt, 2, 1, every) is None
    steps.others.append(1.0)  # the other rank has a signal
    assert steps(interrupt, 2, every + 1, 3 * every) == 2 * every
    assert steps.reduced == [0.0, 0.0]
    interrupt = callbacks.CheckpointOnInterrupt()
    steps.others.clear()
    interrupt.note(signal.SIGUSR1, None)
    assert steps(interrupt, 2, every + 1, 2 * every - 1) is None
    assert not interrupt.interrupted  # not before the other rank knows
    interrupt.on_train_end(SimpleNamespace(world_size=2, device="cpu"), None, None)
    assert interrupt.interrupted


def test_a_second_ctrl_c_stops_at_once_but_not_the_copy_that_a_launcher_sends_on(monkeypatch):
    interrupt, now = callbacks.CheckpointOnInterrupt(), [100.0]
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now[0])
    for seconds in (0.0, 1.5):
        now[0] = 100.0 + seconds
        interrupt.note(signal.SIGINT, None)
    now[0] = 103.0
    interrupt.note(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        interrupt.note(signal.SIGINT, None)


def saved_checkpoint(folder, step: int):
    """A checkpoint with the kinds of files that a trainer writes."""
    place = folder / "checkpoints" / f"checkpoint-{step}"
    record.write_json(place / "trainer_state.json", {})
    save_file({"a": torch.ones(9)}, place / "model.safetensors")
    for name in ("optimizer.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"a": torch.ones(9)}, place / name)
    return place


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: b"", lambda data: bytes(len(data))])
def test_a_run_falls_back_to_the_checkpoint_before_a_damaged_one(file, damage, tmp_path, caplog):
    whole, damaged = (saved_checkpoint(tmp_path, step) for step in (5, 10))
    assert checkpoints.newest_checkpoint(tmp_path) == damaged
    (damaged / file).write_bytes(damage((damaged / file).read_bytes()))
    assert checkpoints.newest_checkpoint(tmp_path) == whole
    checkpoints.rollback_to_checkpoint(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-5"]
    assert "checkpoint-10: it is incomplete or damaged" in caplog.text


def test_what_is_no_checkpoint_of_the_run_is_neither_read_nor_deleted(tmp_path):
    home, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    own = saved_checkpoint(home, 5)
    saved_checkpoint(elsewhere, 7)
    torn = saved_checkpoint(elsewhere, 8)
    (torn / "optimizer.pt").write_bytes(b"")
    for step in (7, 8):
        (home / "checkpoints" / f"checkpoint-{step}").symlink_to(elsewhere / "checkpoints" / f"checkpoint-{step}")
    for name in ("checkpoint-5.bak", "checkpoint-abc"):
        shutil.copytree(own, home / "checkpoints" / name)
    before = sorted(elsewhere.rglob("*"))
    assert checkpoints.newest_checkpoint(home) == own
    checkpoints.rollback_to_checkpoint(home)
    assert sorted(elsewhere.rglob("*")) == before
    others = {f"other-checkpoint-{name}" for name in ("5.bak", "7", "8", "abc")}
    assert {path.name for path in (home / "checkpoints").iterdir()} == {"checkpoint-5", *others}
