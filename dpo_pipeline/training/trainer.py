"""TRL's trainers on rows of token ids: built and trained."""

import logging
import os
import signal
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import PrinterCallback, TrainerCallback

from dpo_pipeline.checkpoints import newest_checkpoint
from dpo_pipeline.data.prepare import Prepared
from dpo_pipeline.data.token_table import table_fingerprint
from dpo_pipeline.distributed import processes
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.hardware import STOPS
from dpo_pipeline.training.callbacks import CheckpointOnInterrupt, KeepRandomState
from dpo_pipeline.training.lm_head import use_plain_head
from dpo_pipeline.training.similar_lengths import use_similar_lengths
from dpo_pipeline.training.starting_policy import StartingPolicy

log = logging.getLogger(__name__)

use_plain_head()


def label_completions(table: Any, all_turns: bool) -> Any:
    """The rows of `prompt_ids` and `completion_ids` as SFTTrainer reads them: `input_ids`, and `labels` of -100 on
    the prompt; with `all_turns`, but for what `prompt_mask` marks.
    """

    def label_row(row: dict) -> dict:
        prompt, completion = row["prompt_ids"], row["completion_ids"]
        marks = row["prompt_mask"] if all_turns else [False] * len(prompt)
        labels = [token if is_learned else -100 for token, is_learned in zip(prompt, marks, strict=True)]
        return {"input_ids": prompt + completion, "labels": labels + completion}

    return table.map(label_row, remove_columns=table.column_names, keep_in_memory=True)


def make_trainer(trainer_class: Any, **arguments: Any) -> Any:
    """A trainer of TRL's whose adapter weights are in float32, by TRL's own arguments.

    TRL casts the adapter of a quantized base to bfloat16: fp16's gradient scaler fails on that, and a continued
    adapter would not start as it was saved. Raises PipelineError where TRL refuses the combination, or leaves FSDP
    out.
    """
    policy = arguments["model"]
    parameters = policy.named_parameters() if is_peft_model(policy) else ()
    saved_weights = {name: weight.detach().clone() for name, weight in parameters if weight.requires_grad}
    try:
        trainer = trainer_class(**arguments)
    except (ValueError, NotImplementedError) as error:
        raise PipelineError(f"TRL refuses this combination: {' '.join(str(error).split())}") from error
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not trainer.is_fsdp_enabled:
        raise PipelineError(
            "FSDP needs GPUs: on a CPU Accelerate leaves it out, and each process would hold all weights: start it "
            "with launch/accelerate/ddp.yaml"
        )
    use_similar_lengths(trainer)
    if sharding(trainer):
        trainer.model.to(trainer.args.device)  # whole until it trains: preflight and the reference pass read it
    if is_peft_model(trainer.model):
        for name, weight in trainer.model.named_parameters():
            if weight.requires_grad and weight.dtype != torch.float32:
                weight.data = (
                    saved_weights[name].to(weight.device).float() if name in saved_weights else weight.data.float()
                )
    return trainer


def sharding(trainer: Any) -> str | None:
    """What shards the policy's weights, as far as a checkpoint depends on it; None where each process has all."""
    deepspeed = f"deepspeed on {processes()} processes" if trainer.is_deepspeed_enabled else None
    return "fsdp" if trainer.is_fsdp_enabled else deepspeed


def train(trainer: Any, folder: Path, callbacks: list[TrainerCallback]) -> None:
    """Train, from the newest complete checkpoint of `folder` where there is one.

    Raises KeyboardInterrupt after a signal to stop, with a checkpoint written.
    """
    interrupt = CheckpointOnInterrupt()
    trainer.remove_callback(PrinterCallback)
    for callback in (*callbacks, KeepRandomState(), interrupt):
        trainer.add_callback(callback)
    checkpoint = newest_checkpoint(folder)
    if checkpoint:
        log.info("resuming from %s", checkpoint)
    handlers = {number: signal.signal(number, interrupt.note) for number in STOPS}
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:  # on_train_end does not come where a step raises
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if interrupt.interrupted:
        raise KeyboardInterrupt


def manifest_facts(trainer: Any, data: Prepared, start: StartingPolicy) -> dict[str, Any]:
    """What the manifest says of a run: rows, data report, starting policy, parameters, precision and load options."""
    sizes = [(p.numel(), p.requires_grad) for p in trainer.model.parameters()]
    tables, options = {split: data.tables[split] for split in ("train", "validation")}, data.load_options
    return {
        "rows": {split: len(table) for split, table in tables.items()},
        **data.report,
        "data_fingerprint": {split: table_fingerprint(table) for split, table in tables.items()},
        "starting_policy": str(start.source),
        "parameters": sum(size for size, _ in sizes),
        "trainable_parameters": sum(size for size, is_trained in sizes if is_trained),
        "precision": "bf16" if trainer.args.bf16 else "fp16" if trainer.args.fp16 else "fp32",
        "device": str(trainer.args.device),
        "sharded": sharding(trainer),
        "loading": {"dtype": str(options.dtype).removeprefix("torch."), "quantization": options.quantization},
    }
