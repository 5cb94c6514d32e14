"""Checks one GPU in under 8 minutes and prints one table: check, result, seconds, numbers.

    make test-gpu                      or: python -m tests.gpu --only bf16 "QLoRA DPO 7B"
    python -m tests.gpu --device cpu   what a CPU can do, on tiny sizes

The product's own commands train on the embedded task, and on models of random weights that are made here, without
network. A failed check shows its error, its traceback goes to the log, the rest goes on, and the exit code is 1.
Tokens/s are those of the steps after the first, prompts included; peak memory is PyTorch's, on a CPU the process's.
"""

import argparse
import gc
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import SkipTest
from unittest.mock import patch

os.environ.update(TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import psutil
import torch
from transformers import TrainerCallback

from dpo_pipeline.config import compose
from dpo_pipeline.dpo import run_dpo
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.hardware import mixed_precision
from dpo_pipeline.quiet import quiet
from dpo_pipeline.record import read_json, read_metrics
from dpo_pipeline.sft import run_sft
from tests.shapes import SHAPES, TINY, make_model, write_pairs

GIB = 2**30
LOG = Path(tempfile.gettempdir()) / "dpo-pipeline-gpu.log"
EMBEDDED = "name=embedded model.builder.hidden_size=32 model.builder.layers=2 model.builder.heads=2".split()
EMBEDDED += "model.builder.steps=40 dataset.rows=300".split()
SHORT = "evaluation.tracker_prompts=0 sft_best=last sft.logging_steps=1 dpo.logging_steps=1".split()
SHORT += "sft.eval_steps=100000 dpo.eval_steps=100000 batch.global_size=16".split()
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.05}  # of the losses of equal runs, in nats


class Bench:
    """The folder of all runs, whether a GPU does them, and what became of each training."""

    def __init__(self, root: Path, on_gpu: bool, steps: int):
        self.root, self.on_gpu, self.steps = root, on_gpu, steps
        self.trainings: dict[str, dict[str, Any]] = {}

    def train(self, stage: str, variant: str, *overrides: str) -> dict[str, Any]:
        """Train by the stage's command, without its comparison of policies: manifest, losses, loss scale, speed."""
        from dpo_pipeline.training import preflight, trainer

        ends, limits, facts = [], [], {}
        clock = TrainerCallback()
        clock.on_step_end = lambda *args, **state: ends.append(time.monotonic())

        def train_with_clock(the_trainer, folder, callbacks, train=trainer.train):
            train(the_trainer, folder, [*callbacks, clock])
            scaler = the_trainer.accelerator.scaler
            facts.update(folder=folder, loss_scale=scaler.get_scale() if scaler else None)

        def note_limit(*args, tolerance=preflight.tolerance):
            limits.append(float(tolerance(*args).min()))
            return tolerance(*args)

        command, key = {"sft": (run_sft, "sft_variant"), "dpo": (run_dpo, "variant")}[stage]
        run = compose([f"root={self.root}", *SHORT, f"{stage}.max_steps={self.steps}", f"{key}={variant}", *overrides])
        with patch.object(trainer, "train", train_with_clock), patch.object(preflight, "tolerance", note_limit):
            command(run)
        rows = [row for row in read_metrics(facts["folder"]) if "loss" in row]
        losses, tokens = [row["loss"] for row in rows], rows[-1]["num_tokens"] - rows[0]["num_tokens"]
        facts |= {"losses": losses, "speed": tokens / (ends[-1] - ends[0])}
        if limits:
            reward = re.search(r"largest reward (\S+) nats", (facts["folder"] / "train.log").read_text("utf-8"))
            facts |= {"reward": float(reward[1]), "limit": min(limits)}
        facts |= read_json(facts["folder"] / "manifest.json")
        self.trainings[f"{variant} {stage}"] = facts
        return facts

    def train_shape(self, stage: str, shape: str, tokens: int, *overrides: str, layers: int = 0) -> dict[str, Any]:
        """Train a model of a shape on random words, so many tokens a row; DPO starts from that base too."""
        model, data = self.root / f"model-{shape}", self.root / f"{tokens}.jsonl"
        make_model(model, SHAPES[shape] if self.on_gpu else TINY, layers)
        write_pairs(data, 40_000 // tokens, tokens)
        keys = ("model=path", f"model.path={model}", "policy=base", "dataset=json", f"dataset.path={data}")
        return self.train(stage, shape, *keys, f"name={tokens}", f"length.max={tokens}", *overrides)


def cap_memory(size: float) -> None:
    """Let PyTorch allocate at most so many bytes of the GPU, until the check ends."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / torch.cuda.get_device_properties(0).total_memory))


def compare_losses(losses: list[float], others: list[float], precision: str) -> str:
    """The largest difference of two runs' losses; raises ValueError beyond the tolerance."""
    gap = max(abs(a - b) for a, b in zip(losses, others, strict=True))
    if gap > TOLERANCE[precision]:
        raise ValueError(f"{precision}: losses differ by {gap:.3g}, more than {TOLERANCE[precision]:g}")
    return f"{gap:.2g}"


def check_precision(bench: Bench, precision: str) -> str:
    """SFT and DPO of all weights against float32; fp16 is what `auto` takes where the GPU has no bf16, as a T4."""
    if precision == "bf16" and mixed_precision("auto") == "fp16":
        raise SkipTest("this GPU has no bf16")
    gaps, requested = [], {"fp16": "auto"}.get(precision, precision)
    for stage in ("sft", "dpo"):
        start = [*EMBEDDED, "sft_variant=fp32"] if stage == "dpo" else EMBEDDED
        exact = bench.trainings.get(f"fp32 {stage}") or bench.train(stage, "fp32", "precision=fp32", *start)
        with patch("torch.cuda.is_bf16_supported", lambda **options: precision == "bf16"):
            facts = bench.train(stage, precision, f"precision={requested}", *start)
        if facts["precision"] != precision:
            raise ValueError(f"precision={requested} trained in {facts['precision']}")
        gaps.append(f"{stage} {compare_losses(exact['losses'], facts['losses'], precision)}")
    return f"losses differ from fp32: {', '.join(gaps)}; loss scale {facts['loss_scale']}"


def check_nf4(bench: Bench) -> str:
    """An adapter on a 4-bit base; on a GPU in fp16, whose gradients pass the scaler."""
    keys = (*EMBEDDED, "lora=r8", "quantization=nf4", f"precision={'fp16' if bench.on_gpu else 'fp32'}")
    bench.train("sft", "nf4", *keys)
    facts = bench.train("dpo", "nf4", "sft_variant=nf4", *keys)
    losses, scale = facts["losses"], facts["loss_scale"]
    if (scale is None) == bench.on_gpu or losses[-1] == losses[0]:
        raise ValueError(f"loss scale {scale}, losses {losses}")
    return f"{facts['precision']}: dpo loss {losses[0]:.4f} to {losses[-1]:.4f}, loss scale {scale}"


def check_references(bench: Bench) -> str:
    """A continued adapter has the same losses with each reference."""
    gaps = []
    for precision in dict.fromkeys(("fp32", mixed_precision("auto"))):
        keys = (*EMBEDDED, "lora=r8", f"precision={precision}", f"sft_variant=lora-{precision}")
        bench.train("sft", f"lora-{precision}", *keys)
        modes = ("cached", "frozen", "adapter")
        cached, *others = (bench.train("dpo", f"{m}-{precision}", *keys, f"reference={m}")["losses"] for m in modes)
        gaps += [f"{precision} {compare_losses(cached, losses, precision)}" for losses in others]
    return f"losses of frozen and adapter differ from cached: {', '.join(gaps)}"


def check_out_of_memory(bench: Bench) -> str:
    """135M parameters in 0.9 GiB: the weights fit, gradients do not."""
    cap_memory(torch.cuda.memory_allocated() + 0.9 * GIB)
    try:
        bench.train_shape("dpo", "135M", 256, "batch.micro_size=16")
    except PipelineError as error:
        if re.search(r"out of memory.*batch\.micro_size=8", str(error)):
            return str(error).split("Add one of these, ")[1]
        raise
    raise ValueError("trained in 0.9 GiB")


def measure_speed(bench: Bench, stage: str, shape: str, *overrides: str, tokens: int = 512, layers: int = 0) -> str:
    tokens = tokens if bench.on_gpu else 64
    facts = bench.train_shape(stage, shape, tokens, *overrides, layers=layers)
    sizes = f"{facts['trainable_parameters'] / 1e6:,.1f}M of {facts['parameters'] / 1e6:,.1f}M parameters"
    speed, peak = f"{facts['speed']:,.0f} tokens/s of {tokens} a row", facts["peak_memory_bytes"] / GIB
    return f"{facts['precision']}, {sizes}: {speed}, peak {peak:.2f} GiB"


def check_shared_prompts(bench: Bench) -> str:
    """Prompts read once a pair against twice: equal losses, and how much faster."""
    tokens = 512 if bench.on_gpu else 64
    shared, plain = (
        bench.train_shape(
            "dpo", "135M", tokens, "batch.micro_size=8", f"training.shared_prefix={choice}", f"variant={choice}"
        )
        for choice in ("on", "off")
    )
    gap = compare_losses(shared["losses"], plain["losses"], shared["precision"])
    return f"losses differ by {gap}, {shared['speed'] / plain['speed']:.2f} times as fast"


def check_qlora(bench: Bench) -> str:
    """QLoRA DPO of 7B at 1,024 tokens within 14.5 GiB; fewer layers where the disk or the host is short."""
    layers = 2
    if bench.on_gpu:
        room = min(shutil.disk_usage(bench.root).free, psutil.virtual_memory().available) - 4e9
        layers = max(2, min(32, int(room // 0.41e9)))  # the bytes of a layer in bfloat16
        cap_memory(14.5 * GIB)
    keys = "lora=r16 quantization=nf4 model.activation_checkpointing=true dpo.max_steps=3".split()
    keys += ["batch.global_size=4", "batch.micro_size=1"]
    return f"{layers} layers, {measure_speed(bench, 'dpo', '7B', *keys, tokens=1024, layers=layers)}"


def check_preflight(bench: Bench) -> str:
    """How much of preflight's tolerances the trainings above used."""
    dpo = {name: facts for name, facts in bench.trainings.items() if "limit" in facts}
    name, worst = max(dpo.items(), key=lambda item: item[1]["reward"] / item[1]["limit"])
    reload = max(facts["final"]["reload_difference_nats"] for facts in bench.trainings.values())
    used = f"at most {worst['reward']:.2g} of {worst['limit']:.2g} nats ({name})"
    return f"reward at step 0 of {len(dpo)} DPO: {used}; final/ loaded back: {reload:.2g} nats"


CHECKS = {
    "bf16": lambda bench: check_precision(bench, "bf16"),
    "fp16 alone": lambda bench: check_precision(bench, "fp16"),
    "nf4 + fp16": check_nf4,
    "references": check_references,
    "out of memory": check_out_of_memory,
    "shared prompts": check_shared_prompts,
    "SFT 135M": lambda bench: measure_speed(bench, "sft", "135M", "batch.micro_size=8"),
    "DPO 135M": lambda bench: measure_speed(bench, "dpo", "135M", "batch.micro_size=8"),
    "SFT 1.4B": lambda bench: measure_speed(bench, "sft", "1.4B", "batch.micro_size=2", "lora=r16"),
    "DPO 1.4B": lambda bench: measure_speed(bench, "dpo", "1.4B", "batch.micro_size=2", "lora=r16"),
    "QLoRA DPO 7B": check_qlora,
    "preflight": check_preflight,  # reads the others
}
NEEDS_GPU = ("fp16 alone", "out of memory")


def main(arguments: list[str] | None = None) -> int:
    """Run the checks and print their table; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", default=list(CHECKS), choices=CHECKS, metavar="CHECK")
    parser.add_argument("--steps", type=int, default=6, help="of each training")
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu if on_gpu else ""  # before CUDA starts
    quiet()
    if on_gpu and not torch.cuda.is_available():
        parser.error("no GPU is visible: type --device cpu for what a CPU can do")
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"{name}, torch {torch.__version__}; log: {LOG}\n\n| check         | result  | seconds | numbers")
    print("| ------------- | ------- | ------- | -------", flush=True)
    results = []
    no_comparison = patch("dpo_pipeline.evaluation.compare.compare_policies")
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder, LOG.open("w") as log, no_comparison:
        bench = Bench(Path(folder).resolve(), on_gpu, options.steps)
        for check in options.only:
            start = time.monotonic()
            try:
                if check in NEEDS_GPU and not on_gpu:
                    raise SkipTest("needs a GPU")
                with redirect_stdout(log), redirect_stderr(log):
                    result, numbers = "ok", CHECKS[check](bench)
            except SkipTest as reason:
                result, numbers = "skipped", str(reason)
            except Exception as error:
                result, numbers = "FAILED", f"{type(error).__name__}: {' '.join(str(error).split())}"
                traceback.print_exc(file=log)
            results.append(result)
            print(f"| {check:13} | {result:7} | {time.monotonic() - start:7.1f} | {numbers}", flush=True)
            gc.collect()
            if on_gpu:
                torch.cuda.set_per_process_memory_fraction(1.0)
    return int("FAILED" in results)


if __name__ == "__main__":
    sys.exit(main())
