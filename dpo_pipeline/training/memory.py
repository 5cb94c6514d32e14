"""Whether the longest batch fits the device, and what to type where it does not."""

import contextlib
import logging
import random
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from dpo_pipeline.distributed import processes
from dpo_pipeline.errors import OneRankError
from dpo_pipeline.hardware import device, device_memory, gigabytes, peak_memory
from dpo_pipeline.schema import Run
from dpo_pipeline.training.similar_lengths import row_lengths, token_counts
from dpo_pipeline.training.trainer import sharding

log = logging.getLogger(__name__)

OUT_OF_MEMORY = r"out of memory|can't allocate memory|ALLOC_FAILED"


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave Python's, NumPy's and torch's random states as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


@contextlib.contextmanager
def trial_step(trainer: Any) -> Iterator[None]:
    """Compute as in a training step; mode, gradients, TRL's metrics and random states stay as they were."""
    was_training = trainer.model.training
    trainer.model.train()
    try:
        with random_state_kept():
            yield
    finally:
        trainer.model.zero_grad()
        trainer.model.train(was_training)
        trainer._metrics["train"].clear()  # else TRL logs them with the first step
        trainer._total_train_tokens = 0


def check_memory(trainer: Any, data: Any, may_checkpoint: bool = False) -> None:
    """Run forward and backward of the longest batch, and count the optimizer's state, which comes with step 1.

    Where a device does not hold them, switch activation checkpointing on if that is left to us. Raises MemoryError, or
    torch's, where they do not fit. A sharded policy is left out.
    """
    if sharding(trainer):
        log.info("preflight: the memory of a sharded policy is not rehearsed: watch the first two steps")
        return
    table, is_full = data.tables["train"], False
    shares_prompts = "chosen_ids" in table.column_names and trainer.shares_prompts
    lengths = sum(token_counts(table).values()) if shares_prompts else row_lengths(table)
    try:
        rehearse(trainer, lengths)
    except (MemoryError, RuntimeError) as error:
        if not may_checkpoint or not is_out_of_memory(error):
            raise
        is_full = True
    if may_checkpoint and trainer.accelerator.gather(torch.tensor([is_full], device=trainer.args.device)).any():
        log.info(
            "preflight: the longest batch does not fit: activation checkpointing is on (same result, a fifth slower)"
        )
        trainer.args.activation_checkpointing = True
        rehearse(trainer, lengths)


def rehearse(trainer: Any, lengths: np.ndarray) -> None:
    """Run the longest batch; log its peak, or raise MemoryError where no room is left for the optimizer's state."""
    name, size = device_memory()
    if device() == "cuda":
        torch.cuda.empty_cache()
        size = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()  # without what other processes hold
        torch.cuda.reset_peak_memory_stats()
    run_longest_batch(trainer, trainer.train_dataset[int(lengths.argmax())])
    peak, state = peak_memory(), state_bytes(trainer)
    if device() == "cuda":
        torch.cuda.empty_cache()
        if peak + state > size:
            raise MemoryError
    log.info(
        "preflight: the longest batch, %d tokens a row: peak %s of %s (%s), and %s of optimizer state",
        *(lengths.max(), gigabytes(peak), gigabytes(size), name, gigabytes(state)),
    )


def run_longest_batch(trainer: Any, row: dict[str, Any]) -> None:
    """Forward and backward of copies of a row, a micro batch of them; on a GPU twice where gradients are accumulated,
    since the second forward finds those of the first.
    """
    args, model = trainer.args, trainer.model
    batch = trainer.data_collator([row] * args.per_device_train_batch_size)
    if "chosen_ids" in row:  # the reference pass comes later
        zeros = torch.zeros(args.per_device_train_batch_size)
        batch |= {"ref_chosen_logps": zeros, "ref_rejected_logps": zeros}
    batch = trainer._prepare_inputs(batch)
    if args.activation_checkpointing:  # as the trainer does when training begins
        options = dict(args.activation_checkpointing_kwargs or {})
        layers = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
        model.activation_checkpointing_enable(options or None, **layers)
    with trial_step(trainer):
        for _ in range(min(2, args.gradient_accumulation_steps) if device() == "cuda" else 1):
            with trainer.maybe_activation_offload_context:
                with trainer.accelerator.autocast():
                    loss = trainer.compute_loss(model, batch)
                loss.backward()
    if args.activation_checkpointing:
        model.activation_checkpointing_disable()
        model.disable_input_require_grads()


def state_bytes(trainer: Any) -> int:
    """Bytes that the optimizer adds: AdamW's two numbers for each trainable one, and DDP's copy of the gradients."""
    name, total = trainer.args.optim.value, 0
    bits = re.search(r"(\d)bit", name)
    for weight in (p for p in trainer.model.parameters() if p.requires_grad):
        if "adamw" in name and "paged" not in name:
            total += 2 * weight.numel() * (int(bits[1]) if bits else 8 * weight.element_size()) // 8
        total += weight.numel() * weight.element_size() if processes() > 1 else 0
    return total


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or re.search(OUT_OF_MEMORY, str(error)) is not None


@contextlib.contextmanager
def explain_oom(run: Run, stage: str, data: Any) -> Iterator[None]:
    """Raise OneRankError with cheaper settings to type where the device's memory does not suffice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        name, size = device_memory()
        settings = cheaper_settings(run, stage, int(row_lengths(data.tables["train"]).max()))
        raise OneRankError(
            f"out of memory: {run.batch.micro_size} rows at once, weights and optimizer need more than the "
            f"{gigabytes(size)} of {name}. Add one of these, the first costs least: {'; '.join(settings)}"
        ) from error


def cheaper_settings(run: Run, stage: str, longest: int) -> list[str]:
    """Settings that need less memory than the present ones, the cheapest in speed first; `longest` row in tokens."""
    micro, fields, settings = run.batch.micro_size, getattr(run, stage), []
    if stage == "dpo" and run.reference.mode == "frozen":
        settings.append("reference=cached (no second model; no slower)")
    smaller = (n for n in range(micro // 2, 0, -1) if run.batch.global_size % (n * processes()) == 0)
    settings += [f"batch.micro_size={n} (a little slower)" for n in smaller][:1]
    if fields["activation_checkpointing"] is False:  # auto has been tried
        settings.append(f"{stage}.activation_checkpointing=true (same result, a fifth slower)")
    same_sft = f" sft_variant={run.sft_variant}" if stage == "dpo" and run.policy == "sft" else ""
    if run.lora is None:
        if device() == "cuda" and "8bit" not in fields["optim"]:
            settings.append(f"{stage}.optim=paged_adamw_8bit (a quarter of the optimizer's memory)")
        settings.append(f"lora=r16{same_sft} (trains an adapter)")
    elif run.quantization is None:
        settings.append(f"quantization=nf4{same_sft} (the base in 4 bits)")
    return [*settings, f"length.max={longest // 2} (drops what is longer)"]
