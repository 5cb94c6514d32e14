"""Kills runs at seeded moments by SIGKILL and types the same command again: they must end as if never killed.

    make test-chaos                     or: python -m tests.chaos --seed 7 --only dpo

Real commands on the embedded task, as one process and as two ranks. Each is run once in peace, which tells what it
writes and how long it takes. Then it is killed at any time, or at a write of one phase: just before it, or some
milliseconds later; a fourth of the runs are killed once more while they resume. After a kill every visible JSON file
must be whole. At the end weights, all that was measured, and metrics.jsonl must be those of the run in peace, bit for
bit, but for the mean over a logging interval that a checkpoint cut. Ends with 1 where anything differs.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from dpo_pipeline import checkpoints
from dpo_pipeline.config import CONF
from dpo_pipeline.record import read_json

INTERVAL = 3  # steps between two logs; checkpoints come at every second step, so that some cut it
LOGS = (f"sft.logging_steps={INTERVAL}", f"dpo.logging_steps={INTERVAL}")
NAMES = ("name=tiny", "sft_variant=sft", "variant=dpo")
TWO = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")
PHASES = {  # by what was written last; before any of it, a run is in its start
    "base": r"/base/model",
    "data": r"\.cache/data/",
    "reference": r"\.cache/reference/",
    "training": r"metrics\.jsonl",
    "saving": r"/checkpoint-",
    "final save": r"/final",
    "measuring": r"/(eval|validation|samples|results|generation_samples)\.json",
}
MEASURED = ("eval.json", "validation.json", "results.json", "generation_samples.json")
TIMING = ("runtime", "per_second", "flos", "num_tokens")  # TRL counts tokens anew after a resume
HANGS = 300  # seconds after which a run is held to hang


@dataclass
class Command:
    """A command, the aims of its kills, and its run in peace: where it lies, what it wrote, how long it took."""

    stage: str
    aims: tuple[str, ...]
    typed: tuple[str, ...] = ()
    launcher: tuple[str, ...] = ()
    peace: Path = field(default_factory=Path)
    writes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def start(self, root: Path, at: int = -1, halts: bool = False) -> subprocess.Popen:
        """The command, watched; beside `root` lie what it prints and writes, and a sign once it is `at` that write."""
        from tests.helpers import SMALL

        module = ("-m", *self.launcher, "tests.chaos", f"dpo_pipeline.{self.stage}")
        for kind in ("writes", "here"):
            root.with_suffix(f".{kind}").unlink(missing_ok=True)
        variables = {
            "CHAOS": json.dumps([str(root), at, halts]),
            "TMPDIR": str(root.parent),
            "CUDA_VISIBLE_DEVICES": "",
        }
        with root.with_suffix(".log").open("a") as log:
            call = [sys.executable, *module, *SMALL, *LOGS, *NAMES, f"root={root}", *self.typed]
            return subprocess.Popen(call, cwd=CONF.parent, env=os.environ | variables, stdout=log, stderr=log)

    def folder(self, root: Path) -> Path:
        return root / "tiny" / self.stage / self.stage


COMMANDS = {
    "sft": Command(
        "sft", ("start", "start", "start", "base", "data", "training", "saving", "saving", "final save", "any", "any")
    ),
    "dpo": Command("dpo", ("start", "start", *list(PHASES)[1:], "saving", "measuring", "any", "any")),
    "dpo lora": Command("dpo", ("saving", "final save", "any"), ("lora=r8",)),
    "dpo two ranks": Command(
        "dpo", ("reference", "training", "saving", "saving", "final save", "any"), ("batch.micro_size=4",), TWO
    ),
}


def watched() -> None:
    """Run the module named first, list what rank 0 is about to write, and give a sign, or halt, at one of these."""
    root, at, halts = json.loads(os.environ["CHAOS"])
    listed = os.open(f"{root}.writes", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    number = itertools.count()

    def note(event: str, args: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if not opened and event not in ("os.rename", "os.remove", "os.rmdir"):
            return
        os.write(listed, f"{event} {args}\n".encode())
        if next(number) == at:
            Path(f"{root}.here").touch()
            while halts:
                time.sleep(1)

    if os.environ.get("RANK", "0") == "0":
        sys.addaudithook(note)
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def phase(writes: list[str]) -> str:
    """What a run was doing that has written this."""
    found = (name for line in reversed(writes) for name, pattern in PHASES.items() if re.search(pattern, line))
    return next(found, "start")


def moment_comes(process: subprocess.Popen, sign: Path | None, delay: float) -> bool:
    """Wait for the sign, if any, and `delay` seconds; False where the run ends before."""
    until = time.monotonic() + (HANGS if sign else delay)
    while process.poll() is None and time.monotonic() < until:
        if sign and sign.exists():
            sign, until = None, time.monotonic() + delay
        time.sleep(0.0005)
    return process.poll() is None


def kill(process: subprocess.Popen, one: random.Random | None = None) -> str:
    """SIGKILL all processes of a run, or `one` of its ranks, after which the launcher ends the others; tell which."""
    launcher = psutil.Process(process.pid)
    launcher.suspend()  # so that no rank comes into being that is not in the list
    tree, ranks = launcher.children(recursive=True), launcher.children()
    killed = [one.choice(ranks)] if one and ranks else [*tree, launcher]
    for each in killed:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher.resume()
    process.wait(HANGS)
    psutil.wait_procs(tree, HANGS)
    return "one rank killed" if one and ranks else "killed"


def torn(root: Path) -> list[str]:
    """The visible JSON files that are not whole; `.partial` and an incomplete checkpoint are not visible to a run."""
    found = []
    for file in (*root.rglob("*.json"), *root.rglob("*.jsonl")):
        unfinished = file.parent.name.startswith("checkpoint-") and not checkpoints.is_complete(file.parent)
        if unfinished or ".partial" in str(file.relative_to(root)):
            continue
        text = file.read_text(encoding="utf-8")
        try:
            [json.loads(part) for part in (text.splitlines() if file.suffix == ".jsonl" else [text])]
        except ValueError:
            found.append(f"{file.relative_to(root)} is torn")
    return found


def logged(folder: Path, resumed: Collection[int] = ()) -> list[dict[str, Any]]:
    """metrics.jsonl without timings, and without the means over logging intervals that a step of `resumed` cuts."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "train_loss" not in row]  # the summary of the part since the last start
    for row in rows:
        cut = "loss" in row and any(row["step"] - INTERVAL < step < row["step"] for step in resumed)
        for key in list(row):
            if key.endswith(TIMING) or (cut and key not in ("step", "epoch", "learning_rate", "grad_norm")):
                del row[key]
    return rows


def differences(command: Command, root: Path, resumed: Collection[int]) -> list[str]:
    """What a run ended with that is not what it ended with in peace."""
    mine, theirs = command.folder(root), command.folder(command.peace)
    lost = [file.relative_to(theirs) for file in theirs.rglob("*") if not (mine / file.relative_to(theirs)).exists()]
    if lost:
        return [f"{file} is lost" for file in lost]
    weights = list(theirs.glob("final/*.safetensors"))
    found = [file.name for file in weights if file.read_bytes() != (mine / "final" / file.name).read_bytes()]
    found += ["metrics.jsonl"] * (logged(theirs, resumed) != logged(mine, resumed))
    measured = [file.relative_to(command.peace) for name in MEASURED for file in command.peace.rglob(name)]
    found += [str(file) for file in measured if read_json(command.peace / file) != read_json(root / file)]
    return [f"{name} differs" for name in found]


def survive(command: Command, root: Path, aims: list[str], rng: random.Random, kills: Counter) -> list[str]:
    """Kill a run at each of these aims, let it end, and tell what is wrong with it."""
    found, resumed = [], set()
    for aim in aims:
        of_aim = [
            number
            for number, line in enumerate(command.writes)
            if phase(command.writes[: number + 1]) == aim and (str(command.peace) in line or "remove" in line)
        ]
        at, sign, delay = -1, None, rng.uniform(0.02, 0.9) * command.seconds
        if of_aim:
            at, sign, delay = rng.choice(of_aim), root.with_suffix(".here"), rng.uniform(0, 0.03)
        process = command.start(root, at, halts=rng.random() < 0.6)
        if not moment_comes(process, sign, delay):
            print("ended before it was killed", end=", ", flush=True)
            break
        how = kill(process, rng if command.launcher and rng.random() < 0.5 else None)
        written = root.with_suffix(".writes")
        where = phase(written.read_text().splitlines()) if written.exists() else "start"
        kills[where] += 1
        checkpoint = checkpoints.newest_checkpoint(command.folder(root))
        print(f"{how} in {where} ({checkpoint.name if checkpoint else 'no checkpoint'})", end=", ", flush=True)
        resumed |= {int(checkpoint.name.rsplit("-", 1)[1])} if checkpoint else set()
        found += torn(root)
    else:
        process = command.start(root)
    try:
        code = process.wait(HANGS)
    except subprocess.TimeoutExpired:
        kill(process)
        code = "no end"
    if code != 0:
        said = root.with_suffix(".log").read_text(encoding="utf-8", errors="replace").splitlines()
        return [*found, f"not resumed ({code}): {next(line for line in reversed(said) if line.strip())}"]
    return found + differences(command, root, resumed)


def fresh(command: Command, root: Path) -> Path:
    """A root in which a command has not been run: empty, or for DPO with the finished SFT alone."""
    if command.stage == "dpo":
        shutil.copytree(COMMANDS["sft"].peace, root, ignore=shutil.ignore_patterns(".cache"))
    return root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=COMMANDS, help="the kills of one command")
    given = parser.parse_args()
    places, began, kills, ended = Path(tempfile.mkdtemp(prefix="chaos-")), time.monotonic(), Counter(), Counter()
    for name, command in COMMANDS.items():
        if given.only not in (None, name) and name != "sft":  # which the others start from
            continue
        started, command.peace = time.monotonic(), fresh(command, places / name.replace(" ", "-"))
        if command.start(command.peace).wait(HANGS):
            sys.exit(command.peace.with_suffix(".log").read_text(encoding="utf-8"))
        command.seconds = time.monotonic() - started
        command.writes = command.peace.with_suffix(".writes").read_text().splitlines()
        print(f"{name}: {command.seconds:.0f} s and {len(command.writes)} writes in peace", flush=True)
        for number, aim in enumerate(command.aims if given.only in (None, name) else ()):
            print(f"  {number} aimed at {aim}: ", end="", flush=True)
            rng, root = random.Random(f"{given.seed} {name} {number}"), places / f"{command.peace.name}-{number}"
            found = survive(command, fresh(command, root), [aim, "any"][: 1 + (rng.random() < 0.25)], rng, kills)
            print("; ".join(found) or "equal", flush=True)
            ended["differ" if found else "equal"] += 1
            if not found:
                shutil.rmtree(root)
    told = ", ".join(f"{number} in {where}" for where, number in kills.most_common())
    print(f"{kills.total()} kills: {told}. {ended.total()} runs in {time.monotonic() - began:.0f} s: ", end="")
    if ended["differ"]:
        sys.exit(f"{ended['differ']} did not end as in peace, kept in {places}")
    print("all ended as in peace, no JSON was torn")
    shutil.rmtree(places)


if __name__ == "__main__":
    watched() if "CHAOS" in os.environ else main()
