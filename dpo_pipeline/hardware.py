"""What this machine is and can do: its device, precision, memory, and the versions of its software."""

import os
import platform
import re
import signal
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dpo_pipeline.distributed import processes
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.schema import Run

# Ctrl-C, what schedulers send before they kill, Slurm's warning before the time limit, and a terminal that is closed.
STOPS = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
LIBRARIES = ("torch", "trl", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")


def device() -> str:
    """`cuda`, `mps` or `cpu`: where this machine trains, measures and samples."""
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(command: str) -> None:
    """Raise PipelineError where the installed torch or this process cannot use the GPUs; `command` names the stage."""
    import torch

    if device() != "cuda":
        return
    if not has_kernels(*torch.cuda.get_device_capability()):
        major, minor = torch.cuda.get_device_capability()
        raise PipelineError(
            f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, and torch {torch.__version__} "
            f"holds kernels for {', '.join(torch.cuda.get_arch_list())} only: install a build that has them, `pip "
            f"install torch=={torch.__version__.split('+')[0]} --index-url https://download.pytorch.org/whl/cu126` "
            "(Pascal, Volta) or cu130 (Turing and newer)"
        )
    if (count := torch.cuda.device_count()) > 1 and processes() == 1:
        raise PipelineError(
            f"{count} GPUs are visible to one process: use all with `accelerate launch --config_file "
            f"launch/accelerate/ddp.yaml --num_processes {count} -m {command} ...` or `make ... GPUS={count}`, or one "
            "with CUDA_VISIBLE_DEVICES=0"
        )


def has_kernels(major: int, minor: int) -> bool:
    """Whether the installed torch has kernels for a GPU of this compute capability (AMD's names are not compared)."""
    import torch

    names = [re.match(r"(sm|compute)_(\d+)(\d)", name) for name in torch.cuda.get_arch_list()]
    builds = [(name[1], int(name[2]), int(name[3])) for name in names if name]
    # sm_ code runs on later minor versions of its own major one, intermediate code (compute_) on all later ones.
    return not builds or any(
        (sm == major and sub <= minor) if kind == "sm" else (sm, sub) <= (major, minor) for kind, sm, sub in builds
    )


def visible_gpus() -> list[str]:
    """The GPUs that this process sees, by number or identifier, as CUDA_VISIBLE_DEVICES may name them."""
    if (names := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in names.split(",") if name.strip() and name != "-1"]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def mixed_precision(requested: str) -> str:
    """`bf16`, `fp16` or `fp32`: as requested, and for `auto` the fastest that the device supports.

    Raises PipelineError where the device does not support it.
    """
    import torch

    place = device()
    # Emulated bf16 (T4, V100) is slower than fp32, so it does not count.
    has_bf16 = place == "cpu" or (place == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    if requested == "auto":
        return "fp32" if place != "cuda" else "bf16" if has_bf16 else "fp16"
    if (requested == "fp16" and place == "cpu") or (requested == "bf16" and not has_bf16):
        name = torch.cuda.get_device_name() if place == "cuda" else place
        raise PipelineError(f"precision={requested} is not supported by {name}: type precision=auto")
    return requested


def peak_memory() -> int | None:
    """Peak memory of this process in bytes: of the GPU, else resident; None on Windows."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def device_memory() -> tuple[str, int | None]:
    """The name of the device that holds the weights in training, and its memory in bytes (None on Windows)."""
    import torch

    if device() == "cuda":
        return torch.cuda.get_device_name(), torch.cuda.get_device_properties().total_memory
    if sys.platform == "win32":
        return "this machine", None
    return "this machine", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def eval_batch_size(run: Run) -> int | None:
    """How many rows to score at once; None: what the GPU's free memory holds. A CPU is slower with large batches."""
    return run.evaluation.batch_size or (None if device() == "cuda" else run.batch.micro_size)


def gigabytes(size: int | None) -> str:
    """Bytes as `14.5 GB` of 10^9."""
    return "?" if size is None else f"{size / 1e9:.1f} GB"


def versions() -> dict[str, str]:
    """The version of Python and of each installed library that training depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES if find_spec(name)}}


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout in `folder`, and whether it has changes; None without git or a checkout."""
    call = ["git", "-C", str(folder), "status", "--porcelain=2", "--branch"]
    try:
        lines = subprocess.run(
            call, capture_output=True, encoding="utf-8", errors="replace", check=True
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    commit = next(line.split()[-1] for line in lines if line.startswith("# branch.oid"))
    return {"commit": commit, "dirty": any(not line.startswith("#") for line in lines)}
