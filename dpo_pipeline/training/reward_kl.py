"""KL and reward of a DPO run from step 0, at each evaluation, and warnings of over-optimization.

On completions that the policy in training gives to a fixed set of validation prompts; TRL measures no such thing.
"""

import logging
import math
from typing import Any

import torch
from transformers import TrainerCallback

from dpo_pipeline import estimates
from dpo_pipeline.checkpoints import TRACKER_FILE
from dpo_pipeline.distributed import map_over_ranks, on_main_process
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.logprobs import completion_logprobs
from dpo_pipeline.naming import TRACKED
from dpo_pipeline.record import RunRecord, read_json, write_json
from dpo_pipeline.sampling import sample
from dpo_pipeline.schema import Run
from dpo_pipeline.training.callbacks import CheckpointOnInterrupt
from dpo_pipeline.training.kept_reference import keep_reference
from dpo_pipeline.training.over_optimization import OverOptimizationWarnings
from dpo_pipeline.training.preflight import random_state_kept
from dpo_pipeline.training.trainer import sharding

log = logging.getLogger(__name__)

OVER_BUDGET = -1e9  # below any reward

Sampled = list[tuple[list[int], float | None]]  # completion ids, log pi - log pi_ref in nats


class RewardKLTracker(TrainerCallback):
    """Logs a point of `reward_kl_tracker.json` at step 0 and each evaluation; warns or stops as `guard.action` says.

    `eval_set` holds the prompts and how completions are sampled; without prompts only TRL's own metrics are watched.
    The reward is the score of the first of `judges` that scores while a run trains. Raises PipelineError where
    `dpo_best` or `guard.action=stop` needs a number that cannot be measured.
    """

    def __init__(self, trainer: Any, run: Run, record: RunRecord, eval_set: Any, judges: dict, reference_weights: Any):
        self.trainer, self.run, self.record, self.eval_set = trainer, run, record, eval_set
        self.points: list[dict[str, Any]] = []
        self.warnings = OverOptimizationWarnings(run.beta, run.dpo["learning_rate"], run.guard.kl_max)
        self.has_judge_failed = False
        self.interrupt = CheckpointOnInterrupt()  # from on_train_begin on that of the trainer
        self.judge = next((judge for judge in judges.values() if judge.score and not judge.post_training_only), None)
        if run.dpo_best == "reward" and self.judge is None:
            raise PipelineError(
                f"dpo_best=reward: none of judge=[{','.join(judges)}] scores completions while a run trains: add one "
                "that does, such as length, or choose by another number, such as rewards/accuracies"
            )
        self.prompts = eval_set.prompt_set.ids
        # Ranks that share the weights take the same batches.
        self.batch_size = eval_set.batch_size or (run.batch.micro_size if sharding(trainer) else None)
        self.reference = keep_reference(trainer, run, reference_weights, eval_set.loading) if self.prompts else None
        if self.prompts and self.reference is None:
            problem = "KL cannot be measured on sharded weights with cached reference log-probs"
            if run.dpo_best in ("reward", "kl") or run.guard.action == "stop":
                raise PipelineError(f"{problem}, and dpo_best or guard.action=stop needs it: type reference=frozen")
            log.warning("%s: type reference=frozen for it", problem)

    def on_train_begin(self, args, state, control, **kwargs):
        self.points[:] = on_main_process(lambda: read_json(self.record.folder / TRACKER_FILE) or [])
        callbacks = self.trainer.callback_handler.callbacks
        self.interrupt = next(each for each in callbacks if isinstance(each, CheckpointOnInterrupt))
        evaluated = {row["step"] for row in state.log_history if "eval_loss" in row}
        measured = {point["step"] for point in self.points}
        # A signal stopped the sampling of this step, or nothing was sampled yet.
        if self.prompts and state.global_step in ({0} | evaluated) - measured:
            if sharding(self.trainer):
                # FSDP sets up its gathering at the first forward: in inference mode it could not train after that.
                with torch.no_grad():
                    self.trainer.model(torch.tensor(self.prompts[:1], device=args.device))
            if not self.measure_and_log(state.global_step):
                raise KeyboardInterrupt

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "rewards/accuracies" in logs:
            self.warnings.train_accuracies.append(logs["rewards/accuracies"])

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        step, guard = state.global_step, self.run.guard
        if self.prompts:
            tracked = self.measure_and_log(step)
            metrics.update(tracked)
        if guard.action == "off" or (self.prompts and not tracked):
            return
        self.warnings.warn(step, metrics, self.points)
        kl = self.points[-1]["kl"] if self.points else None
        if guard.action == "stop" and kl is not None and kl > guard.kl_max and step < state.max_steps:
            log.warning("stopped at step %d of %d: guard.action=stop, and KL is %.3g", step, state.max_steps, kl)
            self.record.save_manifest(stopped={"step": step, "kl": kl, "kl_max": guard.kl_max})
            control.should_training_stop = control.should_save = True

    def on_train_end(self, args, state, control, **kwargs):
        if self.run.dpo_best == "reward" and (state.best_metric or 0) <= OVER_BUDGET:
            budget = self.run.evaluation.kl_budget
            log.warning("no checkpoint has a reward within evaluation.kl_budget=%g: the least KL is chosen", budget)

    def measure_and_log(self, step: int) -> dict[str, float]:
        """Log the point of a step, measured unless the run has it; the metrics that a checkpoint is chosen by.

        It is empty where a signal stops the sampling: the run that goes on measures it.
        """
        if not self.points or self.points[-1]["step"] != step:
            count = len(self.prompts)
            with self.record.timed("tracker"), random_state_kept():  # a judge may draw
                if sharding(self.trainer):
                    sampled = self.sample_and_compare(list(range(count)))
                else:
                    sampled = map_over_ranks(self.sample_and_compare, count)
                if not all(completion for completion, _ in sampled):
                    return {}
                self.points.append(on_main_process(lambda: self.save_point(step, sampled)))
        point = self.points[-1]
        names = ("kl", "reward", "stop_rate", "completion_tokens")
        metrics = {f"eval_{name}": point[name] for name in names if point[name] is not None}
        self.trainer.log(dict(metrics))
        return metrics | {"eval_reward_within_kl": reward_within_budget(point, self.run.evaluation.kl_budget)}

    def sample_and_compare(self, indices: list[int]) -> Sampled:
        """A completion for each of these prompts, with the gap to the reference's log-prob, None without one."""
        # The unwrapped policy: its forwards wait for no other process, unless all do the same on sharded weights.
        policy, eval_set = self.trainer.accelerator.unwrap_model(self.trainer.model), self.eval_set
        prompts = [self.prompts[i] for i in indices]
        with self.trainer.accelerator.autocast():  # which `generate` of an adapter goes past
            completions = sample(
                policy, prompts, eval_set.eos_ids, eval_set.tokenizer.pad_token_id, eval_set.max_new_tokens,
                self.batch_size and 2 * self.batch_size, eval_set.seed, synced=bool(sharding(self.trainer)),
                should_stop=self.should_stop,
            )  # fmt: skip
        gaps: list[float | None] = [None] * len(indices)
        if self.reference is not None and all(completions):
            policy_logprobs = self.sum_logprobs(policy, prompts, completions)
            with self.reference(policy) as reference:
                reference_logprobs = self.sum_logprobs(reference, prompts, completions)
            gaps = [ours - base for ours, base in zip(policy_logprobs, reference_logprobs, strict=True)]
        return list(zip(completions, gaps, strict=True))

    def should_stop(self) -> bool:
        """Whether a signal ends the sampling: not where ranks sample together, or a choice depends on this point."""
        is_needed = self.run.dpo_best in TRACKED or self.run.guard.action == "stop" or sharding(self.trainer)
        return self.interrupt.has_signal and not is_needed

    def sum_logprobs(self, model: Any, prompts: list[list[int]], completions: list[list[int]]) -> list[float]:
        """The log-prob of each completion in nats, in the precision that trains."""
        with self.trainer.accelerator.autocast():
            return [float(row.sum()) for row in completion_logprobs(model, prompts, completions, self.batch_size)]

    def save_point(self, step: int, sampled: Sampled) -> dict[str, Any]:
        """The point of a step, added to the file; None stands for an unknown KL or reward, and for unknown bounds."""
        completions, gaps = zip(*sampled, strict=True)
        measured = {
            "kl": estimates.mean(gaps) if self.reference else None,
            "reward": self.score(step, list(completions)),
            "stop_rate": estimates.proportion([float(ids[-1] in self.eval_set.eos_ids) for ids in completions]),
        }
        point: dict[str, Any] = {"step": step, "beta": self.run.beta}
        for name, estimate in measured.items():
            for suffix, key in (("", "value"), ("_low", "low"), ("_high", "high")):
                point[name + suffix] = estimate and estimate[key]
        point |= {"completion_tokens": sum(map(len, completions)) / len(completions), "n": len(completions)}
        write_json(self.record.folder / TRACKER_FILE, [*self.points, point])
        return point

    def score(self, step: int, completions: list[list[int]]) -> estimates.Estimate | None:
        """The judge's mean score; None without a judge, or where it has not scored all, of which it warns once."""
        if self.judge is None:
            return None
        try:
            results = self.judge.score(self.eval_set.completions(self.eval_set.prompt_set, completions))
            scores = [score for _, score in results if score is not None and math.isfinite(score)]
            if len(scores) < len(completions):
                missing = len(completions) - len(scores)
                raise PipelineError(f"{missing} of {len(completions)} completions have no score")
            return estimates.mean(scores)
        except PipelineError as error:
            if not self.has_judge_failed:
                log.warning("the judge failed at step %d, so the tracker has no reward: %s", step, error)
            self.has_judge_failed = True
            return None


def reward_within_budget(point: dict[str, Any], budget: float) -> float:
    """What dpo_best=reward chooses by: the reward within the KL budget, else below any, lower with more KL."""
    kl = math.inf if point["kl"] is None else point["kl"]
    return point["reward"] if point["reward"] is not None and kl <= budget else OVER_BUDGET - kl
