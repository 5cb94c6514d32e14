"""TRL's trainers on rows of token ids: built and trained."""

import contextlib
import logging
import os
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
from dpo_pipeline.data.prepare import Prepared
from dpo_pipeline.data.token_table import table_fingerprint
from dpo_pipeline.distributed import processes
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.hardware import STOPS
from dpo_pipeline.training.callbacks import CheckpointOnInterrupt, KeepRandomState
from dpo_pipeline.training.lm_head import use_plain_head
from dpo_pipeline.training.pair_metrics import PAIR_METRICS, pair_metrics
from dpo_pipeline.training.pair_weights import collate_weights, weigh_outputs
from dpo_pipeline.training.shared_prefix import prompts_shared
from dpo_pipeline.training.similar_lengths import BATCH_LOSSES, SimilarLengths, longest_first, row_lengths
from dpo_pipeline.training.starting_policy import StartingPolicy

log = logging.getLogger(__name__)

# TRL hashes every weight on every rank for the key of its reference log-probs, which reference.py replaces.
dpo_trainer.hash_module = lambda module: None
use_plain_head()


class PairTrainer(DPOTrainer):
    """DPOTrainer on rows of `prompt_ids`, `chosen_ids` and `rejected_ids`; reference.py adds the reference log-probs.

    TRL would tokenize and cut the rows again, and compute the log-probs inside `__init__`, before any check. Rows may
    have a `weight`, which pair_weights.py explains; with `shares_prompts` a prompt is read once for its pair, see
    shared_prefix.py.
    """

    shares_prompts = False

    def __init__(self, model: Any, **arguments: Any):
        # TRL switches nn.Dropout off. OPT and others keep a rate and drop by function, which a reference never does.
        for module in model.modules():
            for name in [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]:
                setattr(module, name, 0.0)
        super().__init__(model=model, compute_metrics=pair_metrics, **arguments)
        self.data_collator = partial(collate_weights, self.data_collator)
        self.args.remove_unused_columns = False  # the collator takes what it needs, and weights

    def get_batch_samples(self, *args):
        batches, count = super().get_batch_samples(*args)
        if batches and "weight" in batches[0]:
            total = sum(batch["weight"].sum() for batch in batches).to(self.args.device)
            mean = self.accelerator.reduce(total, "mean") / len(batches)  # of a micro batch, on all processes
            for batch in batches:
                batch["weight_sum"] = mean
        return batches, count

    def compute_ref_log_probs(self, model, inputs):
        inputs = {name: value for name, value in inputs.items() if not name.startswith("weight")}
        with self.prompts_shared(inputs):
            return super().compute_ref_log_probs(model, inputs)

    def prompts_shared(self, inputs):
        models = [self.accelerator.unwrap_model(model) for model in {self.model, self.ref_model} - {None}]
        return prompts_shared(models, inputs) if self.shares_prompts else contextlib.nullcontext()

    def _compute_loss(self, model, inputs, return_outputs):
        with self.prompts_shared(inputs):
            return self.compute_weighted_loss(model, inputs, return_outputs)

    def compute_weighted_loss(self, model, inputs, return_outputs):
        """TRL's loss, weighted where rows have a weight."""
        inputs = dict(inputs)
        if (weights := inputs.pop("weight", None)) is None:
            return super()._compute_loss(model, inputs, return_outputs)
        total = inputs.pop("weight_sum", weights.sum())
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "use_weighting", self.use_weighting)
            self.use_weighting = True
            weighted_model = partial(weigh_outputs, model, weights * len(weights) / total, stack)
            return super()._compute_loss(weighted_model, inputs, return_outputs)

    def _prepare_dataset(self, dataset, processing_class, args, name):
        is_grouped = args.train_sampling_strategy == "group_by_length"
        return dataset.add_column("length", row_lengths(dataset)) if is_grouped else dataset

    def _precompute_ref_logps(self, dataset, *args):
        return dataset

    def prediction_step(self, model, inputs, *args, **kwargs):
        """TRL's loss, and for `pair_metrics` what TRL gathers of each pair: its own metrics are means of batch means.

        The Trainer drops the pairs that fill the last batch of several processes.
        """
        gathered, gather = [], self.accelerator.gather
        self.accelerator.gather = lambda tensor: gathered.append(tensor) or gather(tensor)
        try:
            loss, *_ = super().prediction_step(model, inputs, prediction_loss_only=True)
        finally:
            self.accelerator.gather = gather
        values = tuple(tensor for tensor in gathered if tensor.dim() == 1)
        return loss, values, values[0]  # no labels, no metrics

    def log(self, logs, start_time=None):
        """Log `margins_nats` beside TRL's margins: without beta, so that runs of several betas compare.

        Of validation pairs the exact means stand in `logs` already.
        """
        for mode, metrics in self._metrics.items():
            for name in PAIR_METRICS if mode == "eval" else ():
                metrics.pop(name, None)
            if "rewards/margins" in metrics:
                metrics["margins_nats"] = [margin / self.beta for margin in metrics["rewards/margins"]]
        if "eval_rewards/margins" in logs:
            logs["eval_margins_nats"] = logs["eval_rewards/margins"] / self.beta
        super().log(logs, start_time)


def use_similar_lengths(trainer: Any) -> None:
    """Order rows as similar_lengths.py explains, in training and in the validation of pairs, where no loss changes by
    the rows beside a pair.
    """
    args = trainer.args
    is_of_pairs = isinstance(trainer, DPOTrainer)
    if is_of_pairs and BATCH_LOSSES & {*trainer.loss_types}:
        return
    if args.train_sampling_strategy == "random":
        step_rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes()
        lengths = row_lengths(trainer.train_dataset)
        trainer._get_train_sampler = lambda table: SimilarLengths(lengths, step_rows, args.data_seed)
    if is_of_pairs and "weight" not in trainer.eval_dataset.column_names:
        trainer._get_eval_sampler = lambda table: longest_first(row_lengths(table)).tolist()


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
