"""The trainer's arguments of a run: TRL's SFTConfig or DPOConfig, made from the config and the machine."""

import dataclasses
import logging
import os
import re
from pathlib import Path
from typing import Any

from dpo_pipeline.distributed import processes
from dpo_pipeline.errors import PipelineError, nearest
from dpo_pipeline.hardware import check_device, device, mixed_precision
from dpo_pipeline.naming import TRACKED, loss_names
from dpo_pipeline.schema import Run

log = logging.getLogger(__name__)

# The keys that decide fields of sft: or dpo:, which nobody may set there.
OWNERS = {
    "seed=": ("seed", "data_seed"),
    "beta=": ("beta",),
    "report_to=": ("report_to",),
    "batch.micro_size=": ("per_device_train_batch_size", "per_device_eval_batch_size"),
    "batch.global_size= and batch.micro_size=": ("gradient_accumulation_steps",),
    "precision=": ("bf16", "fp16"),
    "length.max=": ("max_length",),
    "root=, name= and variant=": ("output_dir",),
    "reference=": ("precompute_ref_log_probs",),
    "{stage}_best=": ("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
}
# Fields that act in what is done here in TRL's place: it loads no model, prepares no rows and cuts nothing.
NO_EFFECT = {
    "model_init_kwargs", "trust_remote_code", "chat_template_path", "dataset_text_field", "dataset_num_proc",
    "eos_token", "pad_token", "truncation_mode", "shuffle_dataset", "packing", "packing_strategy", "eval_packing",
    "padding_free", "completion_only_loss", "assistant_only_loss", "disable_dropout", "precompute_ref_batch_size",
    "resume_from_checkpoint", "do_train", "do_eval", "do_predict",
}  # fmt: skip
# The validation metrics that dpo_best may name beside the judge's reward, and whether more of one is better.
BEST = {
    "loss": False, "rewards/accuracies": True, "rewards/margins": True, "rewards/chosen": True, "logps/chosen": True,
    "mean_token_accuracy": True, "kl": False, "stop_rate": True,
}  # fmt: skip


def training_arguments(run: Run, stage: str, folder: Path) -> Any:
    """A `trl.SFTConfig` or `trl.DPOConfig`; reads no weight and no row.

    With `check` the present device is not looked at: another one will train. Raises PipelineError for a device that
    cannot be used as the process was started, a field that TRL does not have, one that another key decides, a value
    that TRL refuses, or a global batch that the processes do not divide.
    """
    import trl

    if not run.check:
        check_device(f"dpo_pipeline.{stage}")
    launcher_flags = {os.environ.get(name) for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")}
    if run.quantization and "true" in launcher_flags:
        raise PipelineError("quantized weights cannot be sharded: start it with launch/accelerate/ddp.yaml")
    config_class = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig}[stage]
    pipeline_fields = {
        **batch_arguments(run),
        **fixed_arguments(run, folder / "checkpoints"),
        **(sft_arguments(run) if stage == "sft" else dpo_arguments(run)),
    }
    fields = dict(getattr(run, stage))
    if fields["activation_checkpointing"] == "auto":
        fields["activation_checkpointing"] = "true" in launcher_flags  # else memory.py decides
    if stage == "dpo" and loss_names(run) == ["cdpo"]:
        fields |= conservative_loss(fields["label_smoothing"])
    check_fields(stage, fields, pipeline_fields, config_class)
    try:
        arguments = config_class(**pipeline_fields, **fields)
    except (ValueError, TypeError, ImportError) as error:
        raise PipelineError(f"trl.{config_class.__name__} refuses what stands under {stage}: {error}") from error
    log.info(
        "%s on %s: batch of %d rows = %d at once x %d process(es) x %d accumulated",
        *("bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "fp32", arguments.device.type),
        *(run.batch.global_size, run.batch.micro_size, processes(), arguments.gradient_accumulation_steps),
    )
    return arguments


def batch_arguments(run: Run) -> dict[str, Any]:
    """Rows at once on each process, and the steps that accumulate to a global batch."""
    micro, size, rows = run.batch.micro_size, run.batch.global_size, run.batch.micro_size * processes()
    if size % rows:
        raise PipelineError(
            f"batch.global_size={size} is no multiple of batch.micro_size={micro} times {processes()} process(es): "
            f"set batch.global_size={max(1, round(size / rows)) * rows} or another batch.micro_size"
        )
    return {
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": size // rows,
    }


def fixed_arguments(run: Run, output_dir: Path) -> dict[str, Any]:
    """What both stages decide alike: seed, precision, device, and what our own code does in TRL's place."""
    precision = "fp32" if run.check else mixed_precision(run.precision)
    return {
        "seed": run.seed,
        "data_seed": run.seed,
        "output_dir": str(output_dir),
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "use_cpu": device() == "cpu",
        "dataloader_pin_memory": device() == "cuda",
        "max_length": None,  # rows come cut to length, with their end token
        "report_to": run.report_to,
        "disable_tqdm": True,  # callbacks.py shows one bar
        "ddp_find_unused_parameters": False,  # there are none, and looking for them costs a pass each step
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it shows an average in the place of a NaN loss
        "eval_strategy": "steps",
        "save_strategy": "steps",
    }


def sft_arguments(run: Run) -> dict[str, Any]:
    """What SFT decides: rows come as token ids with labels, and the best checkpoint has the lowest perplexity."""
    arguments = {
        "run_name": str(run.sft_variant),
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "load_best_model_at_end": run.sft_best != "last",
    }
    if run.sft_best == "perplexity":
        arguments |= {"metric_for_best_model": "eval_perplexity", "greater_is_better": False}
    return arguments


def dpo_arguments(run: Run) -> dict[str, Any]:
    """What DPO decides: beta, how reference log-probs are computed, and which checkpoint is the best."""
    check_best(run)
    name = run.dpo_best.removeprefix("eval_")
    metric = None if name == "last" else "eval_reward_within_kl" if name == "reward" else f"eval_{name}"
    return {
        "run_name": str(run.variant),
        "beta": run.beta,
        "precompute_ref_log_probs": run.reference.mode == "cached",
        "load_best_model_at_end": metric is not None,
        "metric_for_best_model": metric,
        "greater_is_better": BEST.get(name, True) if metric else None,
    }


def check_best(run: Run) -> None:
    """Raise PipelineError where the run will not have the number that `dpo_best` or the guard needs."""
    name, names, fields = run.dpo_best.removeprefix("eval_"), ("last", "reward", *BEST), run.dpo
    if name not in names:
        raise PipelineError(f"dpo_best={run.dpo_best}: must be one of {', '.join(names)}{nearest(name, names)}")
    needs = "guard.action=stop" if run.guard.action == "stop" else f"dpo_best={name}" if name in TRACKED else None
    if needs and not run.evaluation.tracker_prompts:
        raise PipelineError(f"{needs} needs the tracker, which evaluation.tracker_prompts=0 switches off: type 64")
    if name == "reward" and not run.judge:
        raise PipelineError("dpo_best=reward needs a judge that scores completions: add judge=[length] or another")
    if name != "last" and (fields["save_steps"] != fields["eval_steps"] or fields.get("eval_on_start")):
        raise PipelineError(
            f"dpo_best={name} takes one of the checkpoints, so each evaluation needs one: type dpo.save_steps="
            f"{fields['eval_steps']} as dpo.eval_steps, and no dpo.eval_on_start"
        )


def check_fields(stage: str, fields: dict[str, Any], pipeline_fields: dict[str, Any], config_class: Any) -> None:
    """Raise PipelineError for a field that TRL lacks, that another key decides, or that cannot act."""
    config_fields = {field.name: field for field in dataclasses.fields(config_class) if field.init}
    for name, value in fields.items():
        if name in pipeline_fields:
            owner = next((key for key, names in OWNERS.items() if name in names), "the pipeline itself")
            raise PipelineError(f"{stage}.{name} is decided by {owner.format(stage=stage)}: take it out")
        if name not in config_fields:
            raise PipelineError(
                f"{stage}.{name} is no field of trl.{config_class.__name__}{nearest(name, config_fields)}"
            )
        if name in NO_EFFECT:
            raise PipelineError(
                f"{stage}.{name} has no effect here, rows come as token ids of a given length: take it out"
            )
        if type(config_fields[name].default) in (int, float) and not isinstance(value, int | float):
            raise PipelineError(f"{stage}.{name}={value} is no number")
    if fields.get("train_sampling_strategy") == "batch_rebalance":
        raise PipelineError(
            f"{stage}.train_sampling_strategy=batch_rebalance makes micro batches of several sizes, which a step "
            "averages equally: take it out, similar lengths are together anyway"
        )
    if stage == "dpo":
        losses = re.findall(r"`'(\w+)'`", config_fields["loss_type"].metadata["help"])
        for loss in fields["loss_type"] if isinstance(fields["loss_type"], list) else [fields["loss_type"]]:
            if loss not in losses:
                raise PipelineError(f"dpo.loss_type={loss} is no loss of TRL{nearest(loss, losses)}")


def conservative_loss(share: float) -> dict[str, Any]:
    """Conservative DPO with a share e of wrong labels, as losses that TRL has.

    (1 - e) L(margin) + e L(-margin), L = -log sigmoid (Mitchell, "A note on DPO with noisy preferences", 2023,
    equation 7) is (1 + e) sigmoid - e robust(1/3), since robust(1/3) is 2 L(margin) - L(-margin). TRL's own
    `label_smoothing` does nothing to its sigmoid loss.
    """
    return {"loss_type": ["sigmoid", "robust"], "loss_weights": [1 + share, -share], "label_smoothing": 1 / 3}
