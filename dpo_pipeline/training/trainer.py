"""TRL's trainers, given our rows: SFT as it is, DPO with the two things it lacks."""

import logging
import os
import shutil
import signal
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from transformers import PrinterCallback, TrainerCallback
from trl import DPOTrainer, SFTTrainer

from dpo_pipeline import run_folder
from dpo_pipeline.distributed import on_main_process, processes
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.hardware import STOPS, device
from dpo_pipeline.logprobs import completion_logprobs
from dpo_pipeline.models import LoadOptions, load_policy
from dpo_pipeline.training.callbacks import CheckpointOnInterrupt, KeepRandomState

log = logging.getLogger(__name__)


class PairTrainer(DPOTrainer):
    """DPOTrainer on rows that are tokenized already, and whose reference log-probs we compute after it is built.

    TRL would tokenize and cut the rows anew, and compute the log-probs inside `__init__`, before any check.
    """

    def _prepare_dataset(self, dataset, *args):
        return dataset

    def _precompute_ref_logps(self, dataset, *args):
        return dataset


def build_sft(policy: Any, lora: Any, tokenizer: Any, args: Any, rows: dict[str, Any]) -> SFTTrainer:
    """An SFTTrainer on rows of `prompt_ids` and `completion_ids`; loss on the completion alone."""

    def labelled(row: dict) -> dict:
        prompt, completion = row["prompt_ids"], row["completion_ids"]
        return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}

    train, validation = (
        rows[split].map(labelled, remove_columns=rows[split].column_names, keep_in_memory=True)
        for split in ("train", "validation")
    )
    return make_trainer(
        SFTTrainer, policy,
        args=args, train_dataset=train, eval_dataset=validation, processing_class=tokenizer, peft_config=lora,
    )  # fmt: skip


def build_dpo(policy: Any, reference: Any, lora: Any, tokenizer: Any, args: Any, rows: dict[str, Any]) -> PairTrainer:
    """A DPO trainer on rows of `prompt_ids`, `chosen_ids` and `rejected_ids`; `reference.cache` before it trains.

    `reference` is a second model, or None for the starting policy itself: its cached log-probs, or its frozen adapter.
    """
    # TRL switches nn.Dropout off; OPT and others keep a number and drop by function, which the reference does not.
    for module in policy.modules():
        for name in [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]:
            setattr(module, name, 0.0)
    return make_trainer(
        PairTrainer, policy,
        ref_model=reference, args=args, train_dataset=rows["train"], eval_dataset=rows["validation"],
        processing_class=tokenizer, peft_config=lora,
    )  # fmt: skip


def make_trainer(trainer: Any, policy: Any, **arguments: Any) -> Any:
    """The trainer of these arguments, adapter weights in float32; one sentence where TRL refuses them.

    On a quantized base TRL casts them to bfloat16: fp16's gradient scaler fails on that, and a continued adapter would
    not start as it was saved.
    """
    import torch

    weights = policy.named_parameters() if is_peft_model(policy) else ()
    saved = {name: weight.detach().clone() for name, weight in weights if weight.requires_grad}
    try:
        made = trainer(model=policy, **arguments)
    except (ValueError, NotImplementedError) as error:
        raise PipelineError(f"TRL refuses this combination: {' '.join(str(error).split())}") from error
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not made.is_fsdp_enabled:
        raise PipelineError(
            "FSDP was asked for and needs GPUs: Accelerate leaves it out on a CPU, where each process would hold all "
            "weights: start it with launch/accelerate/ddp.yaml"
        )
    if sharding(made):
        made.model.to(made.args.device)  # whole until it trains: preflight and the reference pass need it there
    if is_peft_model(made.model):
        for name, weight in made.model.named_parameters():
            if weight.requires_grad and weight.dtype != torch.float32:
                weight.data = saved[name].to(weight.device).float() if name in saved else weight.data.float()
    return made


def sharding(trainer: Any) -> str | None:
    """What holds the policy's weights in parts, as far as a checkpoint depends on it; None where all have all."""
    deepspeed = f"deepspeed on {processes()} processes" if trainer.is_deepspeed_enabled else None
    return "fsdp" if trainer.is_fsdp_enabled else deepspeed


def train(trainer: Any, folder: Path, callbacks: list[TrainerCallback]) -> None:
    """Train, from the newest complete checkpoint of `folder` where there is one.

    Raises KeyboardInterrupt, with a checkpoint written, when a signal to stop came in between.
    """
    interrupt = CheckpointOnInterrupt()
    trainer.remove_callback(PrinterCallback)
    for callback in (*callbacks, KeepRandomState(), interrupt):
        trainer.add_callback(callback)
    checkpoint = run_folder.newest_checkpoint(folder)
    if checkpoint:
        log.info("resuming from %s", checkpoint)
    before = {each: signal.signal(each, interrupt.note) for each in STOPS}
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:  # on_train_end does not come where a step raises
        for each, handler in before.items():
            signal.signal(each, handler)
    if interrupt.interrupted:
        raise KeyboardInterrupt


def save_final(
    trainer: Any, tokenizer: Any, folder: Path, loading: LoadOptions, probe: dict[str, Any]
) -> dict[str, Any]:
    """Save what `from_pretrained` loads into `folder/final`, reload it once, and tell its facts for the manifest.

    Written by rank 0. Raises PipelineError where the reloaded policy does not give the log-probs that training ended
    with, on the rows of `probe`.
    """
    # Without Accelerate's autocast, as anybody loads it.
    policy = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    # A sharded policy is whole only where all processes take part.
    whole = {"state_dict": trainer.accelerator.get_state_dict(trainer.model_wrapped)} if sharding(trainer) else {}
    trained = completion_logprobs(policy, probe["prompts"], probe["answers"], len(probe["prompts"]))

    def save() -> dict[str, Any]:
        final = folder / "final"
        write_final(trainer, policy, whole, tokenizer, final)
        # Room on the device for the reloaded policy: the trained one has done its part.
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.accelerator.free_memory()
        if loading.quantization is None and not whole:
            policy.to("cpu")
        return {
            **verify_saved_policy(trainer, final, loading, probe, trained),
            "sha256": run_folder.content_hash(final, run_folder.WEIGHTS),
        }

    return on_main_process(save)


def write_final(trainer: Any, policy: Any, save_options: dict[str, Any], tokenizer: Any, final: Path) -> None:
    """Write the policy, its tokenizer and its model card to `final`, whole or not at all."""
    partial = final.with_name("final.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(final, ignore_errors=True)
    # Of an adapter's folder, without the frozen copy that served as its reference.
    adapter = {"selected_adapters": ["default"]} if is_peft_model(policy) else {}
    policy.save_pretrained(partial, **save_options, **adapter)
    policy.generation_config.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    trainer.create_model_card(model_name=final.parent.name)
    shutil.move(Path(trainer.args.output_dir) / "README.md", partial / "README.md")
    for file in partial.glob("*.safetensors"):  # written for the owner alone, else
        file.chmod((partial / "generation_config.json").stat().st_mode)
    partial.rename(final)


def verify_saved_policy(
    trainer: Any, final: Path, loading: LoadOptions, probe: dict[str, Any], trained: Any
) -> dict[str, Any]:
    """The step that `final` is of, and how far it is, loaded back, from what was `trained`."""
    rows = probe["prompts"], probe["answers"]
    saved = completion_logprobs(load_policy(final, loading, device_name=device()), *rows, len(rows[0]))
    worst = max(float((a - b).abs().max()) for a, b in zip(trained, saved, strict=True))
    rounded = loading.dtype.itemsize < 4 or (sharding(trainer) and (trainer.args.bf16 or trainer.args.fp16))
    if worst > (0.1 if rounded else 1e-3):
        raise PipelineError(f"{final} does not load back as it was trained: log-probs differ by {worst:.3g} nats")
    best = trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint
    step = int(best.rsplit("-", 1)[1]) if best else trainer.state.global_step
    if best:
        way = "highest" if trainer.args.greater_is_better else "lowest"
        metric = trainer.args.metric_for_best_model.removeprefix("eval_").replace("_", " ")
        log.info("final/ is step %d: %s validation %s, %.4g", step, way, metric, trainer.state.best_metric)
    return {
        "step": step,
        "reload_difference_nats": worst,
        "probe": {**probe, "after": [float(row.sum()) for row in saved]},
    }
