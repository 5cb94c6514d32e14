"""A rank of a command: run as a module, this file is the command itself, and records what its rank sees."""

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess

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
from dpo_pipeline.evaluation import compare
from dpo_pipeline.sft import run_sft
from dpo_pipeline.training import callbacks, reference, trainer
from dpo_pipeline.training.pair_trainer import PairTrainer
from tests.commands import TWO_RANKS, launch, run_two_ranks

LAUNCH = CONF.parent / "launch" / "accelerate"
STAGES = {"sft": run_sft, "dpo": run_dpo}
FSDP2 = {"ACCELERATE_USE_FSDP": "true"} | {
    key.upper(): str(value).lower() if isinstance(value, bool) else str(value)
    for key, value in load_config_from_file(str(LAUNCH / "fsdp2.yaml")).fsdp_config.items()
}
STEP = 7  # at which a signal comes


def run_rank() -> None:
    """The commands of COMMANDS, each a stage with its overrides; leaves facts of each in the folder FACTS.

    With SIGNAL, say `launcher SIGINT`, that signal comes at STEP, to `rank` 1 alone, to `both` or to the `launcher`.
    """
    rank, facts = int(os.environ["RANK"]), {}
    receiver, _, name = os.environ.get("SIGNAL", "").partition(" ")
    os.umask(0 if rank else 0o022)  # the mode of a file shows which rank wrote it
    if os.environ.get("ACCELERATE_USE_FSDP"):
        shard_on_cpu()
    if os.environ.get("COMPARES") == "no":
        compare.compare_policies = lambda *args: {}
    tokenize, add_logps, train = prepare.tokenize, reference.add_reference_logps, trainer.train
    step_end, save = callbacks.Metrics.on_step_end, SFTTrainer._save_optimizer_and_scheduler

    def count_tables(*args):
        facts["tokenized"] += 1
        return tokenize(*args)

    def note_logps(dpo, *args):
        add_logps(dpo, *args)
        facts["reference"] = [dpo.train_dataset[f"ref_{side}_logps"][:] for side in ("chosen", "rejected")]

    def note_training(trainer, *args):
        try:
            train(trainer, *args)
        finally:
            facts["step"] = trainer.state.global_step
            parameters = (weight for weight in trainer.model.parameters() if isinstance(weight, DTensor))
            facts["parts"] = [weight.to_local().numel() / weight.numel() for weight in parameters]
            group = torch.distributed.distributed_c10d._get_default_group()
            facts["timeout"] = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()

    def send_signal(self, args, state, control, **kwargs):
        step_end(self, args, state, control, **kwargs)
        if state.global_step == STEP and (receiver == "both" or (receiver == "rank" and rank == 1)):
            signal.raise_signal(signal.Signals[name])
        if state.global_step == STEP and receiver == "launcher" and rank == 0:
            os.kill(os.getppid(), signal.Signals[name])  # which sends it on to its ranks, in sessions of their own
        if state.global_step >= STEP and receiver == "launcher":
            time.sleep(0.5)

    def save_slowly(self, folder):
        time.sleep(3)  # as a large model's checkpoint takes its time
        save(self, folder)

    def run_stage(stage, run):
        facts["run"] = run.model_dump()
        return STAGES[stage](run)

    prepare.tokenize, reference.add_reference_logps, trainer.train = count_tables, note_logps, note_training
    callbacks.Metrics.on_step_end = send_signal
    if receiver == "launcher" and rank == 0:
        SFTTrainer._save_optimizer_and_scheduler = PairTrainer._save_optimizer_and_scheduler = save_slowly
    facts_of_all = []
    for stage, *overrides in json.loads(os.environ["COMMANDS"]):
        sys.argv[1:] = overrides
        facts["tokenized"] = 0
        try:
            main(partial(run_stage, stage))
        finally:
            facts_of_all.append(dict(facts))
            facts.clear()
            (Path(os.environ["FACTS"]) / f"{rank}.json").write_text(json.dumps(facts_of_all))


def shard_on_cpu() -> None:
    """Have Accelerate do with FSDP on CPU ranks what it does on GPUs; it leaves it out there, without a word."""
    init = AcceleratorState.__init__

    def init_sharded(self, *args, fsdp_plugin=None, **options):
        init(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init_sharded


def two_ranks(folder: Path, *commands: tuple[str, ...], **variables: str) -> tuple[CompletedProcess, list[list]]:
    """Commands, one after the other in the same two ranks of four rows at once; the facts of both ranks for each.

    Each command is a stage with its overrides. A real launcher starts the ranks where it is to be sent a signal.
    """
    calls = json.dumps([(*command, "batch.micro_size=4") for command in commands])
    variables |= {"COMMANDS": calls, "FACTS": str(folder)}
    if variables.get("SIGNAL", "").startswith("launcher"):
        done = launch(*TWO_RANKS, "tests.ranks", **variables)
    else:
        done = run_two_ranks("tests.ranks", **variables)
    return done, list(zip(*(json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)), strict=True))


if __name__ == "__main__":
    run_rank()
    sys.exit()
