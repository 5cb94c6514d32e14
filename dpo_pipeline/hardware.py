"""What this machine is and can do: its device, precision, memory and versions."""

import os
import platform
import re
import signal
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from dpo_pipeline.distributed import processes
from dpo_pipeline.errors import PipelineError

# Ctrl-C, what schedulers send before they kill, and Slurm's warning before the time limit (not on Windows).
STOPS = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGUSR1") if name in signal.Signals.__members__]


LIBRARIES = ("torch", "trl", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")


def device() -> str:
    """`cuda`, `mps` or `cpu`: where this machine trains, measures and samples."""
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(command: str) -> None:
    """Raise PipelineError where the GPUs cannot be used as the process was started; `command` is what was typed."""
    import torch

    if device() != "cuda":
        return
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    kinds = [re.match(r"(sm|compute)_(\d+)(\d)", kind) for kind in torch.cuda.get_arch_list()]
    built = [(kind[1], int(kind[2]), int(kind[3])) for kind in kinds if kind]
    # Kernels run on later minor versions of their own major one, intermediate code (compute_) on all later ones.
    if built and not any(
        (own == major and sub <= minor) if kind == "sm" else (own, sub) <= (major, minor) for kind, own, sub in built
    ):
        raise PipelineError(
            f"{name} has compute capability {major}.{minor}, and the installed torch {torch.__version__} holds "
            f"kernels for {', '.join(torch.cuda.get_arch_list())} alone: install a build that has them, `pip install "
            f"torch=={torch.__version__.split('+')[0]} --index-url https://download.pytorch.org/whl/cu126` (Pascal, "
            "Volta) or cu130 (Turing and newer)"
        )
    if (count := torch.cuda.device_count()) > 1 and processes() == 1:
        raise PipelineError(
            f"{count} GPUs are visible to one process: use all with `accelerate launch --config_file "
            f"launch/accelerate/ddp.yaml --num_processes {count} -m {command} ...` or `make ... GPUS={count}`, or one "
            "with CUDA_VISIBLE_DEVICES=0"
        )


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name: the GPUs that this process sees, by number or identifier."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name.strip() and name != "-1"]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def mixed_precision(requested: str) -> str:
    """`bf16`, `fp16` or `fp32`: what is asked for, and for `auto` the fastest that the device can do.

    Raises PipelineError where the device lacks it.
    """
    import torch

    where = device()
    # Emulated bf16 (T4, V100) is slower than fp32, and counts as none.
    has_bf16 = where == "cpu" or (where == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    if requested == "auto":
        return "fp32" if where != "cuda" else "bf16" if has_bf16 else "fp16"
    if requested == "fp16" and where == "cpu":
        raise PipelineError("precision=fp16 needs a GPU, and there is none: type precision=auto, fp32 or bf16")
    if requested == "bf16" and not has_bf16:
        card = torch.cuda.get_device_name() if where == "cuda" else where
        raise PipelineError(
            f"precision=bf16: {card} cannot compute in bfloat16: type precision=fp16 or precision=auto"
        )
    return requested


def peak_memory() -> int | None:
    """Peak memory of this process in bytes: the GPU's where there is one, else resident; None where unknown."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_memory() -> tuple[str, int | None]:
    """The name of what holds the weights in training, and its memory in bytes, as far as known."""
    import torch

    if device() == "cuda":
        return torch.cuda.get_device_name(), torch.cuda.get_device_properties().total_memory
    if sys.platform == "win32":
        return "this machine", None
    return "this machine", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def gigabytes(size: int | None) -> str:
    """Bytes as `14.5 GB`, of 10^9."""
    return "?" if size is None else f"{size / 1e9:.1f} GB"


def versions() -> dict[str, str]:
    """The version of Python and of each library that is installed."""
    there = {dist.metadata["Name"].lower(): dist.version for dist in distributions()}
    return {"python": platform.python_version(), **{name: there[name] for name in LIBRARIES if name in there}}


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and dirtiness of the checkout in `folder`, or None where it is none."""
    call = ["git", "-C", str(folder)]
    try:
        commit = subprocess.run([*call, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*call, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(changes.stdout.strip())}
