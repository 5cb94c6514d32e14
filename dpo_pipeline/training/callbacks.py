"""What happens beside the training steps: one bar, metrics.jsonl, exact perplexity, a checkpoint when told to end."""

import json
import math
import signal
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from dpo_pipeline.estimates import perplexity
from dpo_pipeline.logprobs import completion_logprobs
from dpo_pipeline.run_folder import RunRecord


class Metrics(TrainerCallback):
    """One line of metrics.jsonl for each log event, all of TRL's numbers, and one progress bar with the loss."""

    def __init__(self, record: RunRecord, beta: float | None = None):
        self.record, self.beta, self.file = record, beta, record.folder / "metrics.jsonl"

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = None
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", disable=False)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is None:
            return
        row = {"step": state.global_step, **logs}
        for prefix in ("", "eval_"):
            if self.beta and f"{prefix}rewards/margins" in row:
                row[f"{prefix}margins_nats"] = row[f"{prefix}rewards/margins"] / self.beta
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.record.save_status(step=state.global_step)
        shown = {"loss": "loss", "rewards/accuracies": "accuracy", "eval_perplexity": "perplexity"}
        shown |= {"eval_kl": "KL", "eval_reward": "reward"}
        self.bar.set_postfix({name: f"{row[key]:.3f}" for key, name in shown.items() if key in row})

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


class ValidationPerplexity(TrainerCallback):
    """Perplexity of the validation completions as the table defines it, logged and used to choose the best checkpoint.

    TRL's own `eval_loss` is a mean of batch means: it moves with the batch size.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        rows = trainer.eval_dataset
        starts = [next(i for i, label in enumerate(row) if label != -100) for row in rows["labels"]]
        self.prompts = [ids[:at] for ids, at in zip(rows["input_ids"], starts, strict=True)]
        self.completions = [ids[at:] for ids, at in zip(rows["input_ids"], starts, strict=True)]

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        with self.trainer.compute_loss_context_manager():
            logprobs = completion_logprobs(
                self.trainer.model, self.prompts, self.completions, args.per_device_eval_batch_size
            )
        value = perplexity([float(row.sum()) for row in logprobs], [len(row) for row in logprobs])["value"]
        metrics["eval_perplexity"] = value
        self.trainer.log({"eval_perplexity": value, "eval_nats_per_token": math.log(value)})


class KeepRandomState(TrainerCallback):
    """Evaluating draws from the global random state; training must not notice how often that happens."""

    def on_train_begin(self, args, state, control, **kwargs):
        import torch

        self.state = torch.get_rng_state()

    on_step_end = on_train_begin

    def on_evaluate(self, args, state, control, **kwargs):
        import torch

        torch.set_rng_state(self.state)


class CheckpointOnInterrupt(TrainerCallback):
    """A signal to stop ends the step at hand, writes a checkpoint and stops; a second Ctrl-C stops at once.

    The processes of a run agree after each step: one that stopped alone would leave the others waiting for it. (Of
    TRL's `enable_jit_checkpoint` they do not, and it ends as if it were done.)
    """

    interrupted = False
    since = math.inf

    def note(self, signum, frame):
        # Not one that follows at once: a terminal sends Ctrl-C to a rank and to its launcher, which sends it on.
        if signum == signal.SIGINT and time.monotonic() > self.since + 2:
            raise KeyboardInterrupt
        self.interrupted, self.since = True, min(self.since, time.monotonic())

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:
            import torch

            flag = torch.tensor(float(self.interrupted), device=args.device)
            torch.distributed.all_reduce(flag)
            self.interrupted = bool(flag)
        if self.interrupted:
            control.should_save = control.should_training_stop = True
