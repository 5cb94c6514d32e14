"""A sweep: each job a process of its own, one that fails costs no other, and what validation recommends."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from hydra import compose, initialize_config_dir
from hydra_plugins.dpo_pipeline import launcher

from dpo_pipeline import checkpoints, locks, run_folder
from dpo_pipeline.config import CONF
from dpo_pipeline.data import prepare
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.record import read_json, write_json
from dpo_pipeline.report import betas, build, page, runs
from dpo_pipeline.sft import run_sft
from tests.commands import run, start, wait
from tests.helpers import train


@pytest.fixture
def typed(small, sft):
    """The command line of the small task, from the SFT that is there."""
    return [*small.typed, f"root={small().root}", "name=small"]


@pytest.mark.slow
def test_a_job_that_fails_leaves_the_others_running_and_the_command_runs_what_is_not_done(typed, small):
    call = ("dpo_pipeline.dpo", "-m", *typed, "++dpo.max_steps=6", "dpo.learning_rate=1e20,1e-4", "seed=7")
    done = run(*call)
    assert done.returncode == 1
    lines = [re.match(r"\[(\d)/2\] (.*?): (done|failed), (.*)", line) for line in done.stdout.splitlines()]
    (failed, state, reason), *other = (line.groups()[1:] for line in lines if line)
    assert (failed, state) == ("dpo.learning_rate=1e+20", "failed")
    assert "is too high" in reason
    assert [line[:2] for line in other] == [("dpo.learning_rate=0.0001", "done")]
    assert "loss 0." in other[0][2]
    assert "error: 1 of 2 jobs did not finish (dpo.learning_rate=1e+20)" in done.stderr
    assert "Traceback" not in done.stderr
    gaps = re.findall("^Without numbers: (.*)$", done.stdout, flags=re.MULTILINE)  # and of other tests' runs
    assert [": failed: " in gap for gap in gaps] == [True, *[False] * (len(gaps) - 1)]
    text = (small().home / "report" / "report.md").read_text()
    assert sum("| failed: " in line for line in text.splitlines()) == 1
    assert (
        len(re.findall(r"^- sigmoid\S+: .*\bdpo.learning_rate=1e\+20\b", text, flags=re.MULTILINE)) == 1
    )  # beside a hash
    for file in ("index.html", "sweep.csv", "betas.png", "reward_kl_frontier.png"):
        assert (small().home / "report" / file).stat().st_size > 100
    again = run(*call)
    assert again.returncode == 1
    assert again.stdout.count("done, already") == 1
    assert again.stdout.count(": running, ") == 1


@pytest.mark.slow
def test_a_killed_job_has_failed_and_ctrl_c_stops_the_others_at_a_checkpoint(typed, small):
    process = start("dpo_pipeline.dpo", "-m", *typed, "dpo.num_train_epochs=99", "seed=21,22")
    folders = {seed: small("dpo.num_train_epochs=99", f"seed={seed}").dpo_folder for seed in (21, 22)}

    def running(seed: int) -> dict:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            status = read_json(folders[seed] / "status.json")
            if status is not None and status["state"] == "running" and status["step"] >= 3:
                return status
            time.sleep(0.2)
        raise AssertionError(f"seed {seed} did not come to step 3")

    os.kill(running(21)["pid"], signal.SIGKILL)
    running(22)
    os.kill(process.pid, signal.SIGINT)
    done = wait(process)
    assert done.returncode == 75, done.stderr
    assert "seed=21: failed, killed by SIGKILL (by hand, or out of memory) (1 to come)" in done.stdout
    assert "stopping 1 job(s) at a checkpoint: type the same command to resume" in done.stdout
    assert re.search(r"seed=22: interrupted, loss 0\.\d+ at step \d+", done.stdout)
    assert run_folder.run_state(folders[22]) == "interrupted"
    assert checkpoints.newest_checkpoint(folders[22])


def test_rows_are_tokenized_once_for_every_beta_loss_and_seed(small, sft, tmp_path, monkeypatch):
    calls, tokenize = [], prepare.tokenize
    monkeypatch.setattr(prepare, "tokenize", lambda *args: calls.append(1) or tokenize(*args))
    run_sft(small(f"root={tmp_path}", "name=once"))
    calls.clear()
    for i, typed in enumerate(("beta=0.05", "beta=0.3 seed=1", "loss=ipo")):
        train(small(f"root={tmp_path}", "name=once", "++dpo.max_steps=2", f"variant=v{i}", *typed.split()), "dpo")
    assert len(calls) == 3  # train, validation, test


# python -m dpo_pipeline.dpo -m hydra/launcher=submitit_slurm hydra.launcher.partition=gpu beta=0.05,0.1,0.3
SUBMITIT = ("hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=1")


def test_the_example_for_submitit_composes():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        made = compose("config", [*SUBMITIT, "hydra.launcher.timeout_min=600"], return_hydra_config=True)
    made = made.hydra.launcher
    assert made._target_ == "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
    assert (made.partition, made.gpus_per_node, made.timeout_min) == ("gpu", 1, 600)


@pytest.mark.skipif(shutil.which("srun") is not None, reason="this is a Slurm cluster")
def test_submitit_without_slurm_is_one_sentence():
    done = run("dpo_pipeline.dpo", "-m", SUBMITIT[0], "policy=base", "beta=0.1,0.2")
    assert done.returncode == 1
    assert "error: the sweep could not be submitted (Could not detect" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_submitit_runs_the_jobs_in_the_folders_that_each_command_alone_has(typed, small):
    overrides = ("++dpo.max_steps=2", "dpo.learning_rate=3e-4")
    done = run("dpo_pipeline.dpo", "-m", "hydra/launcher=submitit_local", *typed, *overrides)
    assert done.returncode == 0, done.stderr
    assert run_folder.run_state(small(*overrides).dpo_folder) == "done"


class FakeProcess:
    """A job's process that ends after some looks at it."""

    started: ClassVar[list] = []

    def __init__(self, call, env, stdout, **options):
        self.call, self.gpus, self.looks, self.returncode = call, env.get("CUDA_VISIBLE_DEVICES"), 0, None
        self.output = os.dup(stdout.fileno())  # the launcher closes its own
        FakeProcess.started.append(self)

    def poll(self):
        self.looks += 1
        if self.looks > 2:
            self.end()
        return self.returncode

    def end(self):
        self.returncode = 0

    terminate = wait = end

    def kill(self):
        assert self.returncode is not None


@pytest.fixture
def launched(small, sft, tmp_path, monkeypatch):
    """`launched(gpus, jobs, options)`: what the launcher starts with these GPUs visible, as fake processes."""

    def launch(gpus: str, values: str, **options):
        FakeProcess.started = []
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        monkeypatch.setattr(subprocess, "Popen", FakeProcess)
        monkeypatch.setattr(launcher.time, "sleep", lambda seconds: None)
        monkeypatch.setattr(sys, "argv", ["dpo"])
        made = launcher.ProcessLauncher(
            **{"jobs": None, "gpus_per_job": 1, "launch_file": "launch/accelerate/ddp.yaml", **options}
        )
        monkeypatch.setattr(made, "report", lambda: None)
        made.config = SimpleNamespace(hydra=SimpleNamespace(sweep=SimpleNamespace(dir=tmp_path)))
        made.stage = "dpo"
        defaults = [*small.typed, f"root={small().root}", "name=small"]
        load = SimpleNamespace(load_sweep_config=lambda _, typed: hydra_config([*defaults, *typed]))
        made.context = SimpleNamespace(config_loader=load)
        made.launch([[f"beta={beta}", "variant=fake-" + beta] for beta in values.split(",")], 0)
        return FakeProcess.started

    return launch


def hydra_config(typed: list[str]):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", typed, return_hydra_config=True)


def test_each_job_has_gpus_of_its_own_and_as_many_run_as_there_are(launched, capsys):
    started = launched("3,5", "0.1,0.2,0.3")
    assert sorted(process.gpus for process in started[:2]) == ["3", "5"]
    assert started[2].gpus in ("3", "5")
    printed = capsys.readouterr().out.splitlines()
    assert "(2 running, 1 to come)" in printed[1]
    assert [process.call[1:3] for process in started] == [["-m", "dpo_pipeline.dpo"]] * 3
    assert all(process.call[-1] == "hydra.mode=RUN" for process in started)


def test_a_job_of_several_gpus_goes_through_accelerate(launched):
    started = launched("0,1,2,3", "0.1,0.2", gpus_per_job=2)
    assert [process.gpus for process in started] == ["0,1", "2,3"]
    for process in started:
        call = " ".join(process.call[1:])
        assert call.startswith(
            "-m accelerate.commands.launch --config_file launch/accelerate/ddp.yaml --num_processes 2 "
            "--main_process_port 0 -m dpo_pipeline.dpo beta="
        )


def test_more_gpus_than_are_visible_are_refused(launched):
    with pytest.raises(PipelineError, match=r"3 job\(s\) at once of 2 GPU\(s\) each want 6, and 4 are visible"):
        launched("0,1,2,3", "0.1,0.2,0.3", gpus_per_job=2, jobs=3)
    assert not FakeProcess.started


def test_a_job_whose_log_is_not_utf8_fails_alone(launched, monkeypatch, capsys):
    def end(process):
        os.write(process.output, b"\xff broken \xff\nerror: no text \xff\n")
        process.returncode = 1

    monkeypatch.setattr(FakeProcess, "end", end)
    with pytest.raises(PipelineError, match="3 of 3 jobs did not finish"):
        launched("3", "0.1,0.2,0.3")
    assert capsys.readouterr().out.count("failed, no text \ufffd") == 3


def test_an_error_of_the_launcher_stops_the_running_jobs(launched, monkeypatch):
    outcome = launcher.Job.outcome

    def broken(job):
        monkeypatch.setattr(launcher.Job, "outcome", outcome)
        raise OSError("the log is gone")

    monkeypatch.setattr(launcher.Job, "outcome", broken)
    with pytest.raises(OSError, match="the log is gone"):
        launched("3,5", "0.1,0.2,0.3")
    assert len(FakeProcess.started) == 2
    assert all(process.returncode is not None for process in FakeProcess.started)


def test_a_stale_running_of_another_host_is_run_again(launched, small, capsys):
    run = small("variant=fake-0.1", "beta=0.1")
    write_json(run.dpo_folder / "manifest.json", {"identity": run_folder.identity(run, "dpo")})
    write_json(
        run.dpo_folder / "status.json", {"state": "running", "step": 1, "host": "elsewhere", "pid": os.getppid()}
    )
    assert len(launched("", "0.1")) == 1
    shutil.rmtree(run.dpo_folder)
    assert ": running" in capsys.readouterr().out


def test_a_job_that_another_sweep_runs_is_waited_for(launched, small, capsys, monkeypatch):
    folder, looks, owner = small("variant=fake-0.1").dpo_folder, [], locks.lock_owner

    def look(place):
        looks.append(place)
        return owner(place) if len(looks) < 6 else None  # then the other one has ended

    monkeypatch.setattr(launcher, "lock_owner", look)
    with locks.run_lock(folder):
        assert len(launched("", "0.1")) == 1
    printed = capsys.readouterr().out
    assert 0 <= printed.index(f"elsewhere, process {os.getpid()} on ") < printed.index(": running")


def estimate(value: float, half: float) -> dict:
    return {"value": value, "low": value - half, "high": value + half, "n": 100}


def lay(home: Path, beta: float, seed: int, kl: float, reward: float | None, nats: float, half=0.05, **status):
    """A DPO that is done, with these numbers on validation and test."""
    folder = home / "dpo" / f"sigmoid-beta{beta:g}-seed{seed}"
    write_json(folder / "status.json", {"state": "done", "step": 9, "error": None, **status})
    write_json(folder / "manifest.json", {"identity": {"beta": beta, "seed": seed, "dpo.x": 1}})
    block = {"preference_accuracy": estimate(0.8, 0.02), "margin_nats": estimate(nats, half), "kl": estimate(kl, 0.1)}
    own = {"completion_tokens": estimate(20, 1)} | ({} if reward is None else {"score.truth": estimate(reward, half)})
    name = f"dpo/{folder.name}"
    settings = {"pairs": 100, "prompts": 50, "max_new_tokens": 8, "quantization": None, "prompts_file": None}
    settings["data"] = "d"
    settings["weights"] = {name: "x", "base": "b", "sft/full": "s"}
    against = {"base": block, "reference": block}
    result = {
        "policy": name,
        "reference": "sft/full",
        "sft": "sft/full",
        "dataset": "d",
        "settings": settings,
        "own": own,
        "against": against,
    }
    for file in ("eval.json", "validation.json"):
        write_json(folder / file, result)
    return folder


def report(home: Path, kl_budget: float = 10, failed: dict | None = None) -> str:
    """What the sections on the variants say, as Markdown."""
    return page.to_markdown("", "", betas.all_variants(runs.load_runs(home, kl_budget, None, {}, failed or {})))


def test_the_largest_reward_within_the_budget_is_recommended(tmp_path):
    lay(tmp_path, 0.01, 0, kl=50, reward=0.9, nats=9)
    lay(tmp_path, 0.1, 0, kl=6, reward=0.7, nats=5)
    lay(tmp_path, 0.3, 0, kl=2, reward=0.3, nats=8)
    text = report(tmp_path)
    assert (
        "Recommended: beta 0.1, reward 0.700 [0.650, 0.750] (largest reward on validation with a KL of at most 10 "
        in text
    )
    assert "Within noise" not in text
    assert "All against sft/full: 100 test pairs and 50 sampled completions" in text
    assert "Recommended: beta 0.01," in report(tmp_path, 60)
    assert "Recommended: none; no beta has a KL of at most 1 nats" in report(tmp_path, 1)


def test_the_choice_reads_validation_and_never_test(tmp_path):
    for beta, on_validation, on_test in ((0.1, 0.7, 0.2), (0.3, 0.3, 0.9)):
        folder = lay(tmp_path, beta, 0, kl=5, reward=on_validation, nats=5)
        result = read_json(folder / "eval.json")
        result["own"]["score.truth"] = estimate(on_test, 0.05)
        result["against"]["reference"]["kl"] = estimate(50 if beta == 0.1 else 1, 0.1)
        write_json(folder / "eval.json", result)
    text = report(tmp_path)
    assert "Recommended: beta 0.1, reward 0.700" in text
    test, validation = text.split("## Validation, by which beta is chosen")
    assert "0.900 [0.850, 0.950]" in test
    assert "0.700 [0.650, 0.750]" in validation
    assert runs.load_runs(tmp_path, 10, None, {}, {}).subject == "dpo/sigmoid-beta0.1-seed0"


def test_without_a_reward_the_largest_margin_in_nats_is_recommended(tmp_path):
    lay(tmp_path, 0.1, 0, kl=6, reward=None, nats=5)
    lay(tmp_path, 0.3, 0, kl=2, reward=None, nats=4)  # with beta its margin would be 1.2, and that of 0.1 only 0.5
    assert "Recommended: beta 0.1, margin_nats 5.000" in report(tmp_path)


def test_differences_within_noise_are_told(tmp_path):
    lay(tmp_path, 0.1, 0, kl=6, reward=0.70, nats=5)
    lay(tmp_path, 0.3, 0, kl=2, reward=0.65, nats=4)
    lay(tmp_path, 1, 0, kl=1, reward=0.1, nats=4)
    assert "Within noise of it: beta 0.3;" in report(tmp_path)


def test_seeds_are_one_point_whose_interval_holds_their_spread_and_that_of_the_rows(tmp_path):
    for seed, reward in enumerate((0.6, 0.7, 0.8)):
        lay(tmp_path, 0.1, seed, kl=6, reward=reward, nats=5)
    # Student's t over three seeds is 4.3027 * 0.1 / sqrt(3) = 0.2484; with 0.05 of the rows, 0.2534.
    assert "reward 0.700 [0.447, 0.953]" in report(tmp_path)


def test_what_has_no_numbers_is_a_gap_with_its_reason(tmp_path):
    lay(tmp_path, 0.1, 0, kl=6, reward=0.7, nats=5)
    folder = lay(tmp_path, 0.3, 0, kl=2, reward=0.9, nats=4, state="failed", error="out of memory")
    (folder / "eval.json").unlink()
    (lay(tmp_path, 0.5, 0, kl=2, reward=0.9, nats=4) / "validation.json").unlink()
    lay(tmp_path, 1, 0, kl=2, reward=0.9, nats=4)
    failures = {"sigmoid-beta1-seed0": "failed: killed", "never-begun": "failed: no folder"}
    text = report(tmp_path, 10, failures)
    assert re.search(r"beta0.3-seed0 +\|.*\| failed at step 9: out of memory", text)
    assert re.search(r"beta0.5-seed0 +\| 0.800", text)  # on test, and nothing to be chosen by
    assert re.search(r"beta1-seed0 +\|.*\| failed: killed", text)
    assert re.search(r"never-begun +\|.*\| failed: no folder", text)
    assert "Recommended: beta 0.1" in text
    build.write_csv(tmp_path / "sweep.csv", runs.load_runs(tmp_path, 10, None, {}, failures))
    with (tmp_path / "sweep.csv").open() as stream:
        rows = {row["name"]: row for row in csv.DictReader(stream)}
    assert rows["sigmoid-beta0.1-seed0"]["test.kl.value"] == "6"
    assert rows["sigmoid-beta0.1-seed0"]["validation.score.truth.high"] == "0.75"
    assert rows["sigmoid-beta1-seed0"]["test.kl.value"] == ""
    assert rows["never-begun"]["problem"] == "failed: no folder"


def test_variants_of_two_references_are_shown_against_the_base(tmp_path):
    lay(tmp_path, 0.1, 0, kl=6, reward=0.7, nats=5)
    folder = lay(tmp_path, 0.3, 0, kl=2, reward=0.9, nats=4)
    result = json.loads((folder / "eval.json").read_text())
    result["settings"]["weights"]["sft/full"] = "another"
    write_json(folder / "eval.json", result)
    assert "All against the base model:" in report(tmp_path)


def test_a_variant_measured_on_other_prompts_is_a_gap(tmp_path):
    for beta in (0.1, 0.3, 0.5):
        folder = lay(tmp_path, beta, 0, kl=6, reward=0.7, nats=5)
    result = read_json(folder / "eval.json")
    result["settings"]["prompts"] = 60
    write_json(folder / "eval.json", result)
    assert re.search(
        r"beta0.5-seed0 +\|.*\| measured on 100 pairs and 60 prompts, or others: run evaluate", report(tmp_path)
    )
