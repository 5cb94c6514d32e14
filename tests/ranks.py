"""Two ranks of a command.

Run as a module under a launcher, this file is the command itself, in ranks that record what they saw.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from trl import SFTTrainer

from dpo_pipeline.cli import main
from dpo_pipeline.config import CONF
from dpo_pipeline.data import prepare
from dpo_pipeline.dpo import run_dpo
from dpo_pipeline.sft import run_sft
from dpo_pipeline.training import callbacks, reference, trainer

ROOT = CONF.parent
LAUNCH = ROOT / "launch" / "accelerate"
TWO = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
STAGES = {"sft": run_sft, "dpo": run_dpo}
FSDP2 = {"ACCELERATE_USE_FSDP": "true"} | {
    key.upper(): str(value).lower() if isinstance(value, bool) else str(value)
    for key, value in load_config_from_file(str(LAUNCH / "fsdp2.yaml")).fsdp_config.items()
}


def a_rank() -> None:
    """The commands of COMMANDS, each a stage with its overrides; leaves what this rank saw of each in the folder SEEN.

    With SIGNAL, say `launcher SIGINT`, that signal comes at step 7, to `rank` 1 alone or to the `launcher`.
    """
    rank, seen = int(os.environ["RANK"]), {}
    sent, _, name = os.environ.get("SIGNAL", "").partition(" ")
    os.umask(0 if rank else 0o022)  # who made a file shows
    if os.environ.get("ACCELERATE_USE_FSDP"):
        fsdp_on_cpu()
    tokenize, cache, train = prepare.tokenize, reference.add_reference_logps, trainer.train
    step_end, save = callbacks.Metrics.on_step_end, SFTTrainer._save_optimizer_and_scheduler

    def counted(*args):
        seen["tokenized"] += 1
        return tokenize(*args)

    def cached(made, *args):
        cache(made, *args)
        seen["reference"] = [made.train_dataset[f"ref_{side}_logps"][:] for side in ("chosen", "rejected")]

    def trained(made, *args):
        try:
            train(made, *args)
        finally:
            seen["step"] = made.state.global_step
            seen["parts"] = [
                p.to_local().numel() / p.numel() for p in made.model.parameters() if isinstance(p, DTensor)
            ]
            group = torch.distributed.distributed_c10d._get_default_group()
            seen["timeout"] = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()

    def signalled(self, args, state, control, **kwargs):
        step_end(self, args, state, control, **kwargs)
        if sent == "rank" and rank == 1 and state.global_step == 7:
            signal.raise_signal(signal.Signals[name])
        if sent == "launcher" and rank == 0 and state.global_step == 7:
            os.kill(os.getppid(), signal.Signals[name])  # its children, in sessions of their own, hear of it from it
        if sent == "launcher" and state.global_step >= 7:
            time.sleep(0.5)

    def told(run):
        seen["run"] = run.model_dump()
        return STAGES[os.environ["STAGE"]](run)

    def slow(self, folder):
        time.sleep(3)  # as a large model's checkpoint takes its time
        save(self, folder)

    prepare.tokenize, reference.add_reference_logps, trainer.train = counted, cached, trained
    callbacks.Metrics.on_step_end = signalled
    if sent and rank == 0:
        SFTTrainer._save_optimizer_and_scheduler = trainer.PairTrainer._save_optimizer_and_scheduler = slow
    everything = []
    for command in json.loads(os.environ["COMMANDS"]):
        os.environ["STAGE"], *sys.argv[1:] = command
        seen["tokenized"] = 0
        try:
            main(told)
        finally:
            everything.append(dict(seen))
            seen.clear()
            (Path(os.environ["SEEN"]) / f"{rank}.json").write_text(json.dumps(everything))


def fsdp_on_cpu() -> None:
    """Have Accelerate do with FSDP on CPU ranks what it does on GPUs; it leaves it out there, without a word."""
    init = AcceleratorState.__init__

    def patched(self, *args, fsdp_plugin=None, **options):
        init(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = patched


def launched(*call: str, **variables: str) -> subprocess.CompletedProcess:
    """What a launcher makes of a command."""
    options = {"cwd": ROOT, "env": os.environ | variables, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-m", *call], **options, text=True) as process:
        try:
            printed, told = process.communicate(timeout=400)
        finally:
            if process.poll() is None:
                process.terminate()  # which ends its ranks
    sys.stderr.write(told[-3000:])  # shown where the test fails
    return subprocess.CompletedProcess(call, process.returncode, printed, told)


def two_ranks(seen: Path, stage: str, *overrides: str, **variables: str) -> tuple[subprocess.CompletedProcess, list]:
    """A stage in two ranks of four rows at once, and what each rank saw."""
    done, (ranks,) = commands_in_two_ranks(seen, [(stage, *overrides)], **variables)
    return done, ranks


def commands_in_two_ranks(
    seen: Path, commands: list[tuple[str, ...]], **variables: str
) -> tuple[subprocess.CompletedProcess, list[list]]:
    """Several commands, one after the other in the same two ranks; and for each of them, what each rank saw."""
    calls = json.dumps([(*command, "batch.micro_size=4") for command in commands])
    done = launched(*TWO, "-m", "tests.ranks", COMMANDS=calls, SEEN=str(seen), **variables)
    return done, list(zip(*(json.loads((seen / f"{rank}.json").read_text()) for rank in (0, 1)), strict=True))


if __name__ == "__main__":
    a_rank()
    sys.exit()
