"""What happens beside the training steps: metrics.jsonl and one bar, exact perplexity, a checkpoint on a signal."""

import json
import logging
import math
import signal
import time
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from dpo_pipeline.distributed import processes
from dpo_pipeline.estimates import perplexity
from dpo_pipeline.logprobs import completion_logprobs
from dpo_pipeline.record import RunRecord

log = logging.getLogger(__name__)

BAR_KEYS = ("loss", "rewards/accuracies", "eval_perplexity", "eval_kl", "eval_reward")
SIGNAL_STEPS = 4  # steps between two all-reduces of the stop flag


class Metrics(TrainerCallback):
    """One line of metrics.jsonl for each log event, and one progress bar with the loss."""

    def __init__(self, record: RunRecord):
        self.record, self.file = record, record.folder / "metrics.jsonl"

    def on_train_begin(self, args, state, control, **kwargs):
        is_hidden = not state.is_world_process_zero
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", disable=is_hidden)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        self.record.save_status(step=state.global_step)
        self.bar.set_postfix({key: f"{logs[key]:.3f}" for key in BAR_KEYS if key in logs})

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class ValidationPerplexity(TrainerCallback):
    """Perplexity of the validation rows over all tokens that are learned, logged; it chooses the best checkpoint.

    TRL's own `eval_loss` is a mean of batch means: it moves with the batch size.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.prompts, self.completions, self.masks = [], [], []
        for ids, labels in zip(trainer.eval_dataset["input_ids"], trainer.eval_dataset["labels"], strict=True):
            start = next(i for i, label in enumerate(labels) if label != -100)
            self.prompts.append(ids[:start])
            self.completions.append(ids[start:])
            self.masks.append(torch.tensor(labels[start:]) != -100)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        with self.trainer.compute_loss_context_manager():
            logprobs = completion_logprobs(
                self.trainer.model, self.prompts, self.completions, args.per_device_eval_batch_size
            )
        learned = [row[mask] for row, mask in zip(logprobs, self.masks, strict=True)]
        value = perplexity([float(row.sum()) for row in learned], [len(row) for row in learned])["value"]
        metrics["eval_perplexity"] = value
        self.trainer.log({"eval_perplexity": value, "eval_nats_per_token": math.log(value)})


class KeepRandomState(TrainerCallback):
    """Puts torch's random state back after each evaluation, so that training does not depend on how many there are."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.random_state = torch.get_rng_state()

    on_step_end = on_train_begin

    def on_evaluate(self, args, state, control, **kwargs):
        torch.set_rng_state(self.random_state)


class CheckpointOnInterrupt(TrainerCallback):
    """Ends training with a checkpoint after a signal to stop; a second Ctrl-C stops at once.

    A single process stops after its step. Several stop at the same step, the next multiple of SIGNAL_STEPS, or after
    an evaluation: one that stopped alone would leave the others waiting. (TRL's `enable_jit_checkpoint` deadlocks
    there, and returns as if training were done.)
    """

    interrupted = False  # the same on all ranks
    has_signal = False
    first_signal = math.inf

    def note(self, signum, frame):
        """The signal handler."""
        # A terminal sends Ctrl-C to a rank and to its launcher, which sends it on: that is not a second one.
        if signum == signal.SIGINT and time.monotonic() > self.first_signal + 2:
            raise KeyboardInterrupt
        if not self.has_signal:
            when = "this step" if processes() == 1 else f"the next step that {SIGNAL_STEPS} divides"
            log.warning("%s: stops with a checkpoint after %s or evaluation", signal.Signals(signum).name, when)
        self.has_signal, self.first_signal = True, min(self.first_signal, time.monotonic())

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size == 1 or state.global_step % SIGNAL_STEPS == 0:
            self.on_evaluate(args, state, control)

    def on_evaluate(self, args, state, control, **kwargs):
        self.reduce_signal(args)
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.reduce_signal(args)  # for one that came after the last steps

    def reduce_signal(self, args: Any) -> None:
        """Set `interrupted` where any rank has a signal."""
        self.interrupted = self.has_signal
        if args.world_size > 1:
            flag = torch.tensor(float(self.has_signal), device=args.device)
            torch.distributed.all_reduce(flag)
            self.interrupted = bool(flag)
