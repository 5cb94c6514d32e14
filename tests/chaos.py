"""Kills runs at seeded moments by SIGKILL and types the same command again: they must end as if never killed.

    make test-chaos                     or: python -m tests.chaos --seed 7 --only dpo

Real commands on the embedded task, in one process and in two ranks. Some kills are aimed at what a run is doing, by a
file that appears as it begins, others come at any time; a fourth of the runs are killed once more while they resume.
After each kill every JSON file that is visible must be whole. In the end weights, eval.json and all that is measured
must be those of a run that was never killed, bit for bit (two ranks: else within 1e-4), and so must be metrics.jsonl,
but for means of a logging interval that a checkpoint has cut. Ends with 1 where anything differs.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from safetensors.numpy import load_file

from dpo_pipeline import runs
from dpo_pipeline.config import CONF
from tests.conftest import SMALL

NAMES = ("name=tiny", "sft_variant=sft", "variant=dpo", "sft.logging_steps=3", "dpo.logging_steps=3")
MEASURED = ("eval.json", "validation.json", "samples.json", "results.json", "generation_samples.json")
TIMING = ("runtime", "per_second", "flos", "num_tokens")  # TRL counts tokens anew after a resume
TWO = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
HANGS = 300  # seconds after which a run is held to hang

# What appears under the root as a phase begins, and how many seconds after that a kill comes at most.
AIMS = {
    "start": ("tiny/{stage}/{stage}/*", 0.002),
    "base": ("tiny/base/model*", 0.05),
    "data": (".cache/data/*", 0.1),
    "reference": (".cache/reference/.*", 1.0),
    "training": ("tiny/{stage}/{stage}/metrics.jsonl", 1.0),
    "saving": ("tiny/{stage}/{stage}/checkpoints/checkpoint-{step}", 0.03),
    "final": ("tiny/{stage}/{stage}/final.partial", 0.03),
    "reloading": ("tiny/{stage}/{stage}/final", 0.3),
    "measuring": ("tiny/{stage}/{stage}/samples.json*", 0.01),
    "validation": ("tiny/{stage}/{stage}/validation.json*", 0.01),
    "results": ("tiny/results.json*", 0.01),
    "any": ("", 0.95),  # of the time that the run takes which is never killed
}


@dataclass
class Command:
    """A command, the aims of the kills that it must survive, and its run that was never killed."""

    stage: str
    aims: str
    typed: tuple[str, ...] = ()
    launcher: tuple[str, ...] = ()
    truth: Path = field(default_factory=Path)
    seconds: float = 0.0

    def start(self, root: Path) -> subprocess.Popen:
        """The command as a process of its own; what it prints is kept beside its root."""
        module = ("-m", *self.launcher, "-m") if self.launcher else ("-m",)
        call = [sys.executable, *module, f"dpo_pipeline.{self.stage}", *SMALL, *NAMES, f"root={root}", *self.typed]
        with root.with_suffix(".log").open("a") as log:
            return subprocess.Popen(call, cwd=CONF.parent, stdout=log, stderr=subprocess.STDOUT)


COMMANDS = {
    "sft": Command("sft", "start base data training saving saving final reloading any any any"),
    "dpo": Command(
        "dpo",
        "start data reference training saving saving final reloading measuring validation results any any any",
    ),
    "dpo lora": Command("dpo", "start saving final any any", ("lora=r8",)),
    "dpo two ranks": Command(
        "dpo", "data reference training saving saving final measuring any any any", ("batch.micro_size=4",), TWO
    ),
}


def moment_comes(process: subprocess.Popen, root: Path, pattern: str, delay: float) -> bool:
    """Wait until a file of this pattern lies under the root, and `delay` seconds; False where the run ends first."""
    hangs, at = time.monotonic() + HANGS, None
    while process.poll() is None and time.monotonic() < min(hangs, at or hangs):
        if at is None and (not pattern or any(root.glob(pattern))):
            at = time.monotonic() + delay
        time.sleep(0.0005)
    return process.poll() is None


def kill(process: subprocess.Popen, alone: random.Random | None = None) -> None:
    """SIGKILL all processes of a run, or one of its ranks `alone`, after which its launcher ends the others."""
    launcher = psutil.Process(process.pid)
    launcher.suspend()  # so that no rank comes into being that is not in the list
    tree, ranks = launcher.children(recursive=True), launcher.children()
    for each in [alone.choice(ranks)] if alone and ranks else [*tree, launcher]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher.resume()
    process.wait(HANGS)
    while any(map(lives, tree)):
        time.sleep(0.01)


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def phase(root: Path, stage: str, since: float) -> str:
    """What a run that began at `since` was doing, by what it left on disk."""

    def left(pattern: str) -> list[Path]:
        return [place for place in root.glob(pattern) if place.stat().st_mtime >= since]

    folder = f"tiny/{stage}/{stage}"
    if left("tiny/results.json"):
        return "results"
    if runs.state(root / folder) == "done":
        return "measuring"
    if left(f"{folder}/final*"):
        return "final save"
    if not all(map(runs.is_complete, left(f"{folder}/checkpoints/checkpoint-*"))):
        return "saving"
    signs = {
        "training": f"{folder}/metrics.jsonl",
        "reference": ".cache/reference/*",
        "data": ".cache/data/*",
        "base": "tiny/base/model*",
        "start": f"{folder}/*",
    }
    return next((name for name, pattern in signs.items() if left(pattern)), "imports")


def torn(root: Path) -> list[str]:
    """The visible JSON files that are not whole; what is still being written bears `.partial`, or is a checkpoint."""
    found = []
    for file in (*root.rglob("*.json"), *root.rglob("*.jsonl")):
        unfinished = file.parent.name.startswith("checkpoint-") and not runs.is_complete(file.parent)
        if unfinished or ".partial" in str(file.relative_to(root)):
            continue
        text = file.read_text(encoding="utf-8")
        try:
            for part in text.splitlines() if file.suffix == ".jsonl" else [text]:
                json.loads(part)
        except ValueError:
            found.append(f"{file.relative_to(root)} is torn")
    return found


def logged(folder: Path, cut: set[int]) -> list[dict[str, Any]]:
    """metrics.jsonl without timings, and without the means of the logging intervals that end at the steps `cut`."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [{key: value for key, value in row.items() if not key.endswith(TIMING)} for row in rows]
    single = ("step", "epoch", "learning_rate", "grad_norm")
    return [
        {key: row[key] for key in single if key in row} if "loss" in row and row["step"] in cut else row
        for row in rows
        if "train_loss" not in row  # the summary of the part since the last start
    ]


def cut_by(checkpoint: Path | None, truth: Path) -> set[int]:
    """The step at which the logging interval ends that a checkpoint lies within."""
    steps = [row["step"] for row in logged(truth, set()) if "loss" in row]
    step = int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0
    return set() if step in (0, *steps) else {next((later for later in steps if later > step), step)}


def differences(truth: Path, root: Path, stage: str, cut: set[int]) -> list[str]:
    """What of a finished run is not that of the run that was never killed, bit for bit."""
    folder, found = Path("tiny") / stage / stage, []
    for file in truth.glob(f"{folder}/final/*.safetensors"):
        if file.read_bytes() != (root / file.relative_to(truth)).read_bytes():
            found.append(f"{file.name} differs")
    if logged(truth / folder, cut) != logged(root / folder, cut):
        found.append("metrics.jsonl differs")
    for file in (file for name in MEASURED for file in truth.rglob(name)):
        if runs.read_json(file) != runs.read_json(root / file.relative_to(truth)):
            found.append(f"{file.relative_to(truth)} differs")
    lost = {file.relative_to(truth) for file in truth.glob(f"{folder}/**/*")} - {
        file.relative_to(root) for file in root.glob(f"{folder}/**/*")
    }
    return found + [f"{file} is lost" for file in sorted(lost)]


def close(truth: Path, root: Path, stage: str, cut: set[int]) -> bool:
    """Whether weights agree within 1e-4, and losses to five digits."""
    folders = [place / "tiny" / stage / stage for place in (truth, root)]
    weights = [load_file(next(folder.glob("final/*.safetensors"))) for folder in folders]
    losses = [[row["loss"] for row in logged(folder, cut) if "loss" in row] for folder in folders]
    return all(abs(weights[0][name] - weights[1][name]).max() < 1e-4 for name in weights[0]) and all(
        abs(a - b) < 5e-6 for a, b in zip(*losses, strict=True)
    )


def survive(command: Command, root: Path, aims: list[str], rng: random.Random, kills: Counter) -> list[str]:
    """Kill a run at each of these aims, let it end, and tell what is wrong with it."""
    folder, cut, found = root / "tiny" / command.stage / command.stage, set(), []
    for aim in aims:
        pattern, most = AIMS[aim]
        pattern = pattern.format(stage=command.stage, step=2 * rng.randint(1, 8))
        delay = rng.uniform(0, most * (command.seconds if aim == "any" else 1))
        since, process = time.time(), command.start(root)
        if not moment_comes(process, root, pattern, delay):
            break
        kill(process, rng if command.launcher and rng.random() < 0.3 else None)
        kills[where := phase(root, command.stage, since)] += 1
        checkpoint = runs.newest_checkpoint(folder)
        print(f"killed in {where} ({checkpoint.name if checkpoint else 'no checkpoint'})", end=", ", flush=True)
        found += torn(root)
        cut |= cut_by(checkpoint, command.truth / folder.relative_to(root))
    else:
        process = command.start(root)
    try:
        code = process.wait(HANGS)
    except subprocess.TimeoutExpired:
        kill(process)
        code = "no end"
    if code != 0:
        said = root.with_suffix(".log").read_text(encoding="utf-8", errors="replace").split("\n")
        return [*found, f"is not resumed ({code}): {next(line for line in reversed(said) if line.strip())}"]
    apart = differences(command.truth, root, command.stage, cut)
    if apart and command.launcher and close(command.truth, root, command.stage, cut):
        print("not bit for bit", end=", ")
        apart = []
    return found + apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=COMMANDS, help="the kills of one command")
    given = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    places, began = Path(tempfile.mkdtemp(prefix="chaos-")), time.monotonic()
    kills, wrong, count = Counter(), 0, 0
    for name, command in COMMANDS.items():
        if given.only not in (None, name) and name != "sft":
            continue
        command.truth = truth = places / name.replace(" ", "-")
        start = None if command.stage == "sft" else places / "start"
        if start:
            shutil.copytree(start, truth)
        started = time.monotonic()
        if command.start(truth).wait(HANGS):
            sys.exit(truth.with_suffix(".log").read_text(encoding="utf-8"))
        command.seconds = time.monotonic() - started
        if name == "sft":
            shutil.copytree(truth, places / "start", ignore=shutil.ignore_patterns(".cache"))
        print(f"{name}: {command.seconds:.0f} s when it is not killed", flush=True)
        for number, aim in enumerate(command.aims.split() if given.only in (None, name) else ()):
            rng = random.Random(f"{given.seed} {name} {number}")
            root = places / f"{truth.name}-{number}"
            if start:
                shutil.copytree(start, root)
            print(f"  {number} aimed at {aim}: ", end="", flush=True)
            found = survive(command, root, [aim, "any"] if rng.random() < 0.25 else [aim], rng, kills)
            print("; ".join(found) or "equal", flush=True)
            count, wrong = count + 1, wrong + bool(found)
            if not found:
                shutil.rmtree(root)
    told = ", ".join(f"{number} in {where}" for where, number in kills.most_common())
    print(f"{kills.total()} kills ({told}) of {count} runs in {time.monotonic() - began:.0f} s: ", end="")
    print(f"{wrong} differ, kept in {places}" if wrong else "all end as if they had not been killed")
    if not wrong:
        shutil.rmtree(places)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
