"""launch/slurm in a real Slurm, two nodes of it on this machine: the warning, the requeue, an array, two launchers."""

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_pipeline import checkpoints
from dpo_pipeline.config import CONF
from dpo_pipeline.record import read_json
from tests.helpers import SMALL

ROOT = CONF.parent
SLURM = ROOT / ".slurm"
FILES = [file for folder in ("launch", "tests/slurm") for file in sorted((ROOT / folder).rglob("*"))]
SCRIPTS = [file for file in FILES if file.suffix in (".sbatch", ".sh")]
BIN = Path(sys.executable).parent


def in_slurm(test):
    missing = pytest.mark.skipif(not SLURM.is_dir(), reason="no Slurm in .slurm: run make test-slurm")
    return pytest.mark.slurm(missing(test))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_one(script):
    subprocess.run(["bash", "-n", script], check=True)
    if shellcheck := shutil.which("shellcheck", path=f"{BIN}:{os.environ['PATH']}"):
        subprocess.run([shellcheck, script], check=True)


class Slurm:
    """A Slurm in a folder of its own; called, one of its commands, typed at the top of the checkout."""

    def __init__(self, temp: Path):
        (plugins,) = SLURM.glob("usr/lib/*/slurm-wlm")
        places = f"{SLURM}/usr/bin:{SLURM}/usr/sbin:{BIN}:{os.environ['PATH']}"
        self.temp, self.conf, self.daemons = temp, temp / "slurm.conf", []
        self.variables = {
            "PATH": places,
            "LD_LIBRARY_PATH": f"{plugins.parent}:{plugins}",
            "SLURM_CONF": f"{self.conf}",
        }
        sockets = [socket.create_server(("", 0)) for _ in range(3)]
        facts = {"ports": [each.getsockname()[1] for each in sockets], "plugins": plugins, "temp": temp}
        for each in sockets:
            each.close()
        facts |= {"host": socket.gethostname().split(".")[0], "user": pwd.getpwuid(os.getuid()).pw_name}
        self.conf.write_text((ROOT / "tests/slurm/slurm.conf").read_text().format(**facts))
        (temp / "state").mkdir()

    def __call__(self, *call: str, **variables: str) -> str:
        environment = os.environ | self.variables | variables
        options = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "text": True, "timeout": 60}
        return subprocess.run(call, check=True, **options).stdout

    def start(self) -> None:
        stepd = f"{SLURM}/usr/sbin/slurmstepd-wlm"
        self.started = time.monotonic()
        for daemon in (["slurmctld-wlm"], *(["slurmd-wlm", "-N", node, "-d", stepd] for node in ("n1", "n2"))):
            call = ["setpriv", "--pdeathsig", "KILL", *daemon, "-D"]  # not even a test that is killed leaves them
            options = {"env": os.environ | self.variables, "stderr": subprocess.DEVNULL}
            self.daemons.append(subprocess.Popen(call, **options))
        until(lambda: "2 idle" in self("sinfo", "--noheader", "--format=%D %t"))

    def stop(self) -> None:
        """End the daemons, then whatever is left of their jobs."""
        for daemon in self.daemons:
            daemon.terminate()
        time.sleep(1)
        while left := [int(process.name) for process in Path("/proc").glob("[0-9]*") if self.began(process)]:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        for daemon in self.daemons:
            daemon.wait()

    def began(self, process: Path) -> bool:
        try:
            return f"SLURM_CONF={self.conf}".encode() in (process / "environ").read_bytes().split(b"\0")
        except OSError:  # it is gone, or another user's
            return False

    def submit(self, typed: list[str], *options: str, **variables: str) -> str:
        """The id of a job of train.sbatch."""
        call = ("sbatch", "--parsable", f"--output={self.temp}/%j.txt", *options, "launch/slurm/train.sbatch")
        return self(*call, **{"STAGE": "sft", "ARGS": " ".join(typed), **variables}).strip()

    def ended(self, job: str) -> dict[str, str]:
        """What Slurm tells of a job once that has ended."""
        told = {}

        def over() -> bool:
            told.update(re.findall(r"(\w+)=(\S*)", self("scontrol", "show", "job", job)))
            return told["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED")

        until(over)
        return told


@pytest.fixture
def slurm(tmp_path):
    slurm = Slurm(tmp_path)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
        for file in tmp_path.glob("*.txt"):
            print(file.read_text()[-3000:])  # shown where a test fails


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def status(folder: Path) -> dict:
    return read_json(folder / "status.json") or {"state": "none", "step": 0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An SFT that nothing interrupted: what was typed, its folder, and the seconds that half of it took."""
    root = tmp_path_factory.mktemp("outputs")
    typed = [*SMALL, f"root={root}", "name=small", "++sft.max_steps=1600", "sft.logging_steps=10"]
    folder, began = root / "small" / "sft" / "full", time.monotonic()
    with subprocess.Popen([sys.executable, "-m", "dpo_pipeline.sft", *typed], cwd=ROOT) as process:
        until(lambda: status(folder)["step"] >= 800)
        half = time.monotonic() - began
    assert process.returncode == 0
    return typed, folder, half


def weights(folder: Path) -> bytes:
    return (folder / "final" / "model.safetensors").read_bytes()


@in_slurm
def test_what_the_limit_interrupts_is_requeued_and_ends_with_the_same_bytes(whole, slurm):
    typed, folder, half = whole
    other = folder.parent / "stopped"
    # Slurm looks at limits every 30 s, and warns 30 s early: at one of these looks the job is to be half done.
    time.sleep((slurm.started - time.monotonic() - half) % 30)
    warning = f"--signal=B:USR1@{600 - 30 - int(half - 15)}"
    job = slurm.submit([*typed, "sft_variant=stopped"], "--time=10", warning)
    until(lambda: status(other)["state"] == "interrupted")
    slurm("scontrol", "update", f"JobId={job}", "TimeLimit=60")  # so that the rest is not interrupted
    stopped = checkpoints.newest_checkpoint(other)
    assert stopped.name == f"checkpoint-{status(other)['step']}"
    told = slurm.ended(job)
    assert (told["JobState"], told["Restarts"], status(other)["state"]) == ("COMPLETED", "1", "done")
    assert f"resuming from {stopped}" in (other / "train.log").read_text()
    assert weights(other) == weights(folder)


@in_slurm
def test_an_array_is_a_sweep_and_a_warned_task_alone_is_requeued(whole, slurm):
    typed, folder, _ = whole
    home = folder.parents[1] / "dpo"
    betas = ("0.05", "0.3")
    given = {"STAGE": "dpo", "SWEEP": " ".join(f"beta={beta}" for beta in betas)}
    job = slurm.submit([*typed, "dpo.num_train_epochs=20"], "--array=0-1%1", **given)
    until(lambda: any(status(second)["step"] for second in home.glob("sigmoid-beta0.3-*")))
    slurm("scancel", "--batch", "--signal=USR1", f"{job}_1")
    folders = [next(home.glob(f"sigmoid-beta{beta}-*")) for beta in betas]
    until(lambda: status(folders[1])["state"] == "interrupted")
    told = [slurm.ended(f"{job}_{task}") for task in (1, 0)]
    assert [(task["JobState"], task["Restarts"]) for task in told] == [("COMPLETED", "1"), ("COMPLETED", "0")]
    assert [status(each)["state"] for each in folders] == ["done", "done"]


@in_slurm
def test_two_nodes_train_together_and_stop_and_go_on_together(whole, slurm):
    typed, folder, _ = whole
    other = folder.parent / "two"
    job = slurm.submit([*typed, "sft_variant=two", "++sft.max_steps=200"], "--nodes=2", GPUS="1")
    until(lambda: status(other)["step"] >= 20)
    slurm("scancel", "--batch", "--signal=USR1", job)
    until(lambda: status(other)["state"] == "interrupted")
    told = slurm.ended(job)
    assert (told["JobState"], told["Restarts"], status(other)["state"]) == ("COMPLETED", "1", "done")
    assert read_json(other / "manifest.json")["world_size"] == 2
