"""The trainer's arguments of a run: TRL's SFTConfig or DPOConfig, made from the config and the machine."""

import dataclasses
import logging
import os
import re
from pathlib import Path
from typing import Any

from dpo_pipeline.config import Run
from dpo_pipeline.distributed import processes
from dpo_pipeline.errors import PipelineError, nearest
from dpo_pipeline.hardware import device, mixed_precision
from dpo_pipeline.naming import TRACKED, loss_names

log = logging.getLogger(__name__)


def weights_dtype(run: Run) -> Any:
    """The torch dtype that weights are loaded in: float32 where they are trained, the precision's under an adapter."""
    import torch

    if run.model.dtype != "auto":
        return getattr(torch, run.model.dtype)
    if run.lora is None:
        return torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[mixed_precision(run.precision.mixed)]


def training_arguments(run: Run, stage: str, folder: Path) -> Any:
    """A `trl.SFTConfig` or `trl.DPOConfig`; reads no weight and no row.

    With `check` the device is not asked for what it can do: that is for the one that will train. Raises PipelineError
    for a field that TRL does not know, one that another key decides, a value that it refuses, or
    a global batch that the processes do not divide.
    """
    import trl

    if run.quantization is not None and "true" in {os.environ.get(name) for name in SHARDED}:
        raise PipelineError(
            "quantized weights cannot be put in parts: start it with launch/accelerate/ddp.yaml, where each GPU holds "
            "all of them, or take quantization= out"
        )
    world, micro, size = processes(), run.batch.micro_size, run.batch.global_size
    if size % (micro * world):
        raise PipelineError(
            f"batch.global_size={size} is no multiple of batch.micro_size={micro} times {world} process(es): set "
            f"batch.global_size={max(1, round(size / (micro * world))) * micro * world} or another batch.micro_size"
        )
    steps = size // (micro * world)
    precision = "fp32" if run.check else mixed_precision(run.precision.mixed)
    decided = {
        "seed": run.seed,
        "data_seed": run.seed,
        "report_to": "none",  # tracking.py does
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": steps,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "output_dir": str(folder / "checkpoints"),
        "run_name": str(run.variant if stage == "dpo" else run.sft_variant),
        "max_length": None,  # rows come cut to length, with their end token
        "disable_tqdm": True,  # callbacks.py shows one bar
        "use_cpu": device() == "cpu",
        "dataloader_pin_memory": device() == "cuda",
        "ddp_find_unused_parameters": False,  # there are none, and looking for them costs a pass each step
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # which shows an average in the place of a loss that is no number
        "eval_strategy": "steps",
        "save_strategy": "steps",
    }
    if stage == "sft":
        decided |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "load_best_model_at_end": run.sft_best != "last"}
        if run.sft_best == "perplexity":
            decided |= {"metric_for_best_model": "eval_perplexity", "greater_is_better": False}
    else:
        decided |= {"beta": run.beta, "precompute_ref_log_probs": run.reference.mode == "cached", **best_of_dpo(run)}
    arguments, fields = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig}[stage], dict(getattr(run, stage))
    known = {field.name: field for field in dataclasses.fields(arguments) if field.init}
    for name in fields:
        if name in decided:
            owner = OWNERS.get(name, "the pipeline itself").format(stage=stage)
            raise PipelineError(f"{stage}.{name} is decided by {owner}: take it out")
        if name not in known:
            raise PipelineError(f"{stage}.{name} is no field of trl.{arguments.__name__}{nearest(name, known)}")
        if type(known[name].default) in (int, float) and not isinstance(fields[name], int | float):
            raise PipelineError(f"{stage}.{name}={fields[name]} is no number")
    if stage == "dpo":
        fields |= conservative(run)
        losses = re.findall(r"`'(\w+)'`", known["loss_type"].metadata["help"])
        for loss in fields["loss_type"] if isinstance(fields["loss_type"], list) else [fields["loss_type"]]:
            if loss not in losses:
                raise PipelineError(f"dpo.loss_type={loss} is no loss of TRL{nearest(loss, losses)}")
    try:
        made = arguments(**decided, **fields)
    except (ValueError, TypeError, ImportError) as error:
        raise PipelineError(f"trl.{arguments.__name__} refuses what stands under {stage}: {error}") from error
    if stage == "dpo" and run.dpo_best != "last" and (made.save_steps != made.eval_steps or made.eval_on_start):
        raise PipelineError(
            f"dpo_best={run.dpo_best} takes one of the checkpoints, so each evaluation needs one: type dpo.save_steps="
            f"{run.dpo['eval_steps']} as dpo.eval_steps, and no dpo.eval_on_start"
        )
    log.info(
        "%s on %s: batch of %d rows = %d at once x %d process(es) x %d accumulated",
        *(precision, made.device.type, size, micro, world, steps),
    )
    return made


# The numbers that dpo_best may name beside the judge's reward, and whether more of one is better.
BEST = {
    "loss": False, "rewards/accuracies": True, "rewards/margins": True, "rewards/chosen": True, "logps/chosen": True,
    "mean_token_accuracy": True, "kl": False, "stop_rate": True,
}  # fmt: skip


def best_of_dpo(run: Run) -> dict[str, Any]:
    """What the trainer chooses a checkpoint by; raises PipelineError where the run will not have that number."""
    name, known, stops = run.dpo_best.removeprefix("eval_"), ("last", "reward", *BEST), run.guard.action == "stop"
    if name not in known:
        raise PipelineError(f"dpo_best={run.dpo_best} is none of its values: {', '.join(known)}{nearest(name, known)}")
    if (name in TRACKED or stops) and not run.evaluation.tracker_prompts:
        asked = "guard.action=stop" if stops else f"dpo_best={name}"
        raise PipelineError(f"{asked} needs the tracker, which evaluation.tracker_prompts=0 switches off: type 64")
    if name == "reward" and not run.judge:
        raise PipelineError(
            "dpo_best=reward needs a judge that scores completions, and judge=[] names none: add judge=[length] or "
            "another of conf/judge, or choose by another number, such as dpo_best=rewards/accuracies"
        )
    if name == "last":
        return {"load_best_model_at_end": False, "metric_for_best_model": None, "greater_is_better": None}
    metric = "eval_reward_within_kl" if name == "reward" else f"eval_{name}"
    return {
        "load_best_model_at_end": True,
        "metric_for_best_model": metric,
        "greater_is_better": BEST.get(name, True),
    }


def conservative(run: Run) -> dict[str, Any]:
    """Conservative DPO with a share e of wrong labels, as losses that TRL has; nothing for another loss.

    (1 - e) L(margin) + e L(-margin), L = -log sigmoid (Mitchell, "A note on DPO with noisy preferences", 2023,
    equation 7) is (1 + e) sigmoid - e robust(1/3), since robust(1/3) is 2 L(margin) - L(-margin). TRL's own
    `label_smoothing` does nothing to its sigmoid loss.
    """
    if loss_names(run) != ["cdpo"]:
        return {}
    e = run.dpo["label_smoothing"]
    return {"loss_type": ["sigmoid", "robust"], "loss_weights": [1 + e, -e], "label_smoothing": 1 / 3}


SHARDED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")  # what a launch file of Accelerate's sets

OWNERS = {
    "seed": "seed=",
    "data_seed": "seed=",
    "beta": "beta=",
    "report_to": "report_to=",
    "per_device_train_batch_size": "batch.micro_size=",
    "per_device_eval_batch_size": "batch.micro_size=",
    "gradient_accumulation_steps": "batch.global_size= and batch.micro_size=",
    "bf16": "precision=",
    "fp16": "precision=",
    "max_length": "length.max=",
    "output_dir": "root=, name= and variant=",
    "precompute_ref_log_probs": "reference=",
    "load_best_model_at_end": "{stage}_best=",
    "metric_for_best_model": "{stage}_best=",
    "greater_is_better": "{stage}_best=",
}
