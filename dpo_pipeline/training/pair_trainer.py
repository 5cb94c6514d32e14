"""TRL's DPOTrainer on rows of token ids."""

import contextlib
from functools import partial
from typing import Any

import numpy as np
from trl import DPOTrainer
from trl.trainer import dpo_trainer

from dpo_pipeline.estimates import accuracy
from dpo_pipeline.training.pair_weights import collate_weights, weigh_outputs
from dpo_pipeline.training.shared_prefix import prompts_shared
from dpo_pipeline.training.similar_lengths import row_lengths

# TRL hashes every weight on every rank for the key of its reference log-probs, which reference.py replaces.
dpo_trainer.hash_module = lambda module: None

# What TRL gathers of each pair, in its order.
PAIR_METRICS = "rewards/chosen rewards/rejected rewards/accuracies rewards/margins logps/chosen logps/rejected".split()


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


def pair_metrics(gathered: Any) -> dict[str, float]:
    """The means of PAIR_METRICS over all validation pairs, whatever their batches; a tie counts half in accuracy."""
    values = dict(zip(PAIR_METRICS, gathered.predictions, strict=True))
    means = {name: float(np.mean(value, dtype=float)) for name, value in values.items()}
    return means | {"rewards/accuracies": accuracy(values["rewards/margins"].tolist())["value"]}
