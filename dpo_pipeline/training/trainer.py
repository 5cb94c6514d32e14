"""TRL's trainers on rows of token ids: built, trained, and saved as a policy that is loaded back once."""

import contextlib
import logging
import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import PrinterCallback, TrainerCallback
from trl import DPOTrainer
from trl.trainer import dpo_trainer

from dpo_pipeline.checkpoints import newest_checkpoint
from dpo_pipeline.content_hash import WEIGHTS, content_hash
from dpo_pipeline.data.prepare import Prepared, table_fingerprint
from dpo_pipeline.distributed import on_main_process, processes
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.hardware import STOPS, device
from dpo_pipeline.logprobs import completion_logprobs
from dpo_pipeline.models import LoadOptions, load_policy
from dpo_pipeline.training.callbacks import CheckpointOnInterrupt, KeepRandomState
from dpo_pipeline.training.merge import add_older_keys
from dpo_pipeline.training.pair_weights import collate_weights, weigh_outputs
from dpo_pipeline.training.starting_policy import StartingPolicy

log = logging.getLogger(__name__)

# TRL hashes every weight on every rank for the key of its reference log-probs, which reference.py replaces.
dpo_trainer.hash_module = lambda module: None


class PairTrainer(DPOTrainer):
    """DPOTrainer on rows of `prompt_ids`, `chosen_ids` and `rejected_ids`; reference.py adds the reference log-probs.

    TRL would tokenize and cut the rows again, and compute the log-probs inside `__init__`, before any check. Rows may
    have a `weight`, which pair_weights.py explains.
    """

    def __init__(self, model: Any, **arguments: Any):
        # TRL switches nn.Dropout off. OPT and others keep a rate and drop by function, which a reference never does.
        for module in model.modules():
            for name in [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]:
                setattr(module, name, 0.0)
        super().__init__(model=model, **arguments)
        self.data_collator = partial(collate_weights, self.data_collator)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, "weight"]))

    def get_batch_samples(self, *args):
        batches, count = super().get_batch_samples(*args)
        if batches and "weight" in batches[0]:
            total = sum(batch["weight_sum"] for batch in batches).to(self.args.device)
            mean = self.accelerator.reduce(total, "mean") / len(batches)  # of a micro batch, on all processes
            for batch in batches:
                batch["weight_sum"] = mean
        return batches, count

    def compute_ref_log_probs(self, model, inputs):
        return super().compute_ref_log_probs(
            model, {name: inputs[name] for name in inputs.keys() - {"weight", "weight_sum"}}
        )

    def _compute_loss(self, model, inputs, return_outputs):
        inputs = dict(inputs)
        weights, total = inputs.pop("weight", None), inputs.pop("weight_sum", None)
        if weights is None:
            return super()._compute_loss(model, inputs, return_outputs)
        use_weighting, self.use_weighting = self.use_weighting, True
        try:
            with contextlib.ExitStack() as stack:
                weighted_model = partial(weigh_outputs, model, weights * len(weights) / total, stack)
                return super()._compute_loss(weighted_model, inputs, return_outputs)
        finally:
            self.use_weighting = use_weighting

    def _prepare_dataset(self, dataset, *args):
        return dataset

    def _precompute_ref_logps(self, dataset, *args):
        return dataset

    def log(self, logs, start_time=None):
        """Log `margins_nats` beside TRL's margins: without beta, so that runs of several betas compare."""
        for metrics in self._metrics.values():
            if "rewards/margins" in metrics:
                metrics["margins_nats"] = [margin / self.beta for margin in metrics["rewards/margins"]]
        super().log(logs, start_time)


def label_completions(table: Any, all_turns: bool = False) -> Any:
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


def save_final(
    trainer: Any, tokenizer: Any, folder: Path, load_options: LoadOptions, fingerprint: dict[str, Any]
) -> dict[str, Any]:
    """Save what `from_pretrained` loads into `folder/final`, load it back once, and return its facts for the manifest.

    Rank 0 writes. Raises PipelineError where the saved policy does not give the log-probs that training ended with, on
    the rows of `fingerprint`.
    """
    # Without Accelerate's autocast, as anybody loads it.
    policy = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    # A sharded policy is whole only where all processes take part.
    state = {"state_dict": trainer.accelerator.get_state_dict(trainer.model_wrapped)} if sharding(trainer) else {}
    prompts, completions = fingerprint["prompts"], fingerprint["answers"]
    trained_logprobs = completion_logprobs(policy, prompts, completions, len(prompts))

    def save_and_verify() -> dict[str, Any]:
        final = folder / "final"
        write_final(trainer, policy, tokenizer, final, state)
        # The trained policy makes room on the device for the one that is loaded back.
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.accelerator.free_memory()
        if load_options.quantization is None and not state:
            policy.to("cpu")
        saved_policy = load_policy(final, load_options, device_name=device())
        saved_logprobs = completion_logprobs(saved_policy, prompts, completions, len(prompts))
        return {
            "step": final_step(trainer),
            "reload_difference_nats": verify_saved_policy(
                trainer, final, load_options, trained_logprobs, saved_logprobs
            ),
            "probe": {**fingerprint, "after": [float(row.sum()) for row in saved_logprobs]},
            "sha256": content_hash(final, WEIGHTS),
        }

    return on_main_process(save_and_verify)


def write_final(trainer: Any, policy: Any, tokenizer: Any, final: Path, state: dict[str, Any]) -> None:
    """Write the policy, its tokenizer and its model card to `final`, whole or not at all."""
    partial = final.with_name("final.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(final, ignore_errors=True)
    # Without the frozen copy of the adapter that served as its reference.
    adapter = {"selected_adapters": ["default"]} if is_peft_model(policy) else {}
    policy.save_pretrained(partial, **state, **adapter)
    policy.generation_config.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    add_older_keys(partial)
    trainer.create_model_card(model_name=final.parent.name)
    card = Path(trainer.args.output_dir) / "README.md"
    # TRL names a base on the hub alone: of a folder its card says None.
    text = re.sub(r"\[None\]\(\S*\)", lambda _: f"`{policy.config._name_or_path}`", card.read_text("utf-8"))
    (partial / "README.md").write_text(text, "utf-8")
    card.unlink()
    for file in partial.glob("*.safetensors"):  # safetensors makes them readable to their owner alone
        file.chmod((partial / "generation_config.json").stat().st_mode)
    partial.rename(final)


def verify_saved_policy(
    trainer: Any, final: Path, load_options: LoadOptions, trained_logprobs: Any, saved_logprobs: Any
) -> float:
    """The largest difference in nats between the token log-probs in training and of the saved policy; raises
    PipelineError where it is more than rounding.
    """
    difference = max(float((a - b).abs().max()) for a, b in zip(trained_logprobs, saved_logprobs, strict=True))
    is_rounded = load_options.dtype.itemsize < 4 or (sharding(trainer) and (trainer.args.bf16 or trainer.args.fp16))
    if difference > (0.1 if is_rounded else 1e-3):
        raise PipelineError(f"{final} does not load back as it was trained: log-probs differ by {difference:.3g} nats")
    return difference


def final_step(trainer: Any) -> int:
    """The step whose weights the trainer holds: the last, or that of the best checkpoint, which is logged."""
    args, state = trainer.args, trainer.state
    if not (args.load_best_model_at_end and state.best_model_checkpoint):
        return state.global_step
    step = int(state.best_model_checkpoint.rsplit("-", 1)[1])
    extreme = "highest" if args.greater_is_better else "lowest"
    metric = args.metric_for_best_model.removeprefix("eval_").replace("_", " ")
    log.info("final/ is step %d: %s validation %s, %.4g", step, extreme, metric, state.best_metric)
    return step
