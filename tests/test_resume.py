"""Ctrl-C loses nothing: the same command goes on, and ends with the bytes of a run that was never stopped."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dpo_pipeline import checkpoints, run_folder
from dpo_pipeline.cli import interrupt
from dpo_pipeline.hardware import STOPS
from dpo_pipeline.record import read_json
from dpo_pipeline.training.callbacks import Metrics
from tests.commands import start, wait
from tests.helpers import SMALL, train

pytestmark = pytest.mark.slow


def logged(folder) -> list[dict]:
    """The lines of metrics.jsonl without timings, token counts and the closing summary of the resumed part."""
    timing = ("runtime", "per_second", "flos", "num_tokens")  # TRL counts tokens anew after a resume
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "train_runtime" not in row]
    return [{key: value for key, value in row.items() if not key.endswith(timing)} for row in rows]


@pytest.mark.parametrize(
    ("stage", "typed"),
    [
        ("sft", "lora=none"),
        ("sft", "lora=r8"),
        # Step 7 is in epoch 2 of 4 steps, each of four micro batches.
        ("sft", "lora=r8 lora.lora_dropout=0.1 batch.global_size=64 batch.micro_size=16 sft.num_train_epochs=2"),
        ("dpo", "lora=none reference=cached"),
        ("dpo", "lora=r8 reference=cached"),
        ("dpo", "lora=r8 reference=adapter"),
    ],
)
def test_an_interrupted_run_is_resumed_bit_for_bit(stage, typed, small, sft, monkeypatch):
    key, tail = "sft_variant" if stage == "sft" else "variant", typed.replace(" ", "-").replace("=", "")
    whole, stopped = (small(*typed.split(), f"{key}={name}-{tail}") for name in ("whole", "stopped"))
    step_end = Metrics.on_step_end

    def ctrl_c_at_7(self, args, state, control, **kwargs):
        step_end(self, args, state, control, **kwargs)
        if state.global_step == 7:
            signal.raise_signal(signal.SIGINT)

    folder = train(whole, stage)
    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "on_step_end", ctrl_c_at_7)
        with pytest.raises(KeyboardInterrupt):
            train(stopped, stage)
    other = stopped.sft_folder if stage == "sft" else stopped.dpo_folder
    assert run_folder.run_state(other) == "interrupted"
    assert checkpoints.newest_checkpoint(other).name == "checkpoint-7"
    assert not (other / "final").exists()
    train(stopped, stage)
    assert run_folder.run_state(other) == "done"
    weights = "adapter_model.safetensors" if "r8" in typed else "model.safetensors"
    assert (folder / "final" / weights).read_bytes() == (other / "final" / weights).read_bytes()
    assert logged(folder) == logged(other)


def test_how_often_one_evaluates_and_saves_changes_no_byte(small, sft):
    often, seldom = (
        small("variant=often", "dpo.eval_steps=3"),
        small("variant=seldom", "dpo.eval_steps=9", "dpo.logging_steps=4", "++dpo.eval_on_start=true"),
    )
    files = [train(run, "dpo") / "final" / "model.safetensors" for run in (often, seldom)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("sent", STOPS)
def test_a_signal_to_stop_ends_a_command_with_75_and_a_checkpoint(sent, small, sft):
    typed = ("name=small", f"sft_variant=endless-{int(sent)}", "sft.num_train_epochs=200")
    run = small(*typed)
    process = start("dpo_pipeline.sft", *SMALL, f"root={run.root}", *typed)
    deadline = time.monotonic() + 120
    while (status := read_json(run.sft_folder / "status.json")) is None or status["step"] < 3:
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.1)
    os.kill(process.pid, sent)
    done = wait(process)
    assert done.returncode == 75
    assert "Traceback" not in done.stderr
    assert "interrupted: type the same command to go on from" in done.stdout
    assert run_folder.run_state(run.sft_folder) == "interrupted"
    assert checkpoints.newest_checkpoint(run.sft_folder)


COMMAND = """
import atexit, signal, sys
from dpo_pipeline import cli
cli.time.sleep = lambda seconds: signal.raise_signal(signal.SIGTERM)
sys.argv[1:] = [{typed!r}]
cli.main(lambda run: {stage})
"""
MOMENTS = {
    "in code that is a string": ("seed=1", "exec('signal.raise_signal(signal.SIGINT)')", "0"),
    "while Python ends": ("seed=1", "atexit.register(signal.raise_signal, signal.SIGTERM)", "0"),
    "while a rank waits for another to tell the error of both": ("sed=1", "None", "1"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment_ends_the_process_itself_with_75_and_without_a_traceback(moment, tmp_path):
    typed, stage, rank = MOMENTS[moment]
    (tmp_path / "command.py").write_text(COMMAND.format(typed=typed, stage=stage))
    call = [sys.executable, "-m", "command"]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"RANK": rank})
    assert (done.returncode, done.stderr) == (75, "")


def test_a_signal_that_comes_while_python_deletes_something_is_not_lost():
    class Slow:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        gone = Slow()
        del gone  # an exception raised in there is printed and forgotten
        with pytest.raises(KeyboardInterrupt):
            time.sleep(1)
    finally:
        signal.signal(signal.SIGTERM, before)
