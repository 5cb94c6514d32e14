"""How far a DPO run has gone from its reference, and what that has brought: from step 0, at each evaluation.

On completions that the policy in training gives to a fixed set of validation prompts; TRL measures nothing of the
kind.
"""

import gc
import logging
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import TrainerCallback
from trl.trainer.utils import use_adapter

from dpo_pipeline import estimates
from dpo_pipeline.config import Run
from dpo_pipeline.distributed import map_over_ranks, on_main_process
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.hardware import device
from dpo_pipeline.judges.judge import Judge
from dpo_pipeline.logprobs import completion_logprobs
from dpo_pipeline.models import is_adapter, load_policy
from dpo_pipeline.run_folder import POINTS, read_json, write_json
from dpo_pipeline.sampling import sample
from dpo_pipeline.training.preflight import random_state_kept
from dpo_pipeline.training.trainer import sharding

log = logging.getLogger(__name__)

FAR = 1e9  # below any reward


class RewardKLTracker(TrainerCallback):
    """Adds a point to `reward_kl_tracker.json`, and its numbers to the log; where `on` has no questions, nothing.

    `on` says what is asked and how completions are drawn (`evaluation.material`), `weights` where the reference lies;
    the reward is the score of the first of `judges` that is not late. Stands behind Metrics among the callbacks.
    Raises PipelineError where the run is to choose or to stop by a number that cannot be had.
    """

    def __init__(
        self, trainer: Any, run: Run, folder: Path, eval_set: Any, judges: dict[str, Judge], weights: str | Path
    ):
        self.trainer, self.run, self.file, self.on, self.weights = trainer, run, folder / POINTS, eval_set, weights
        self.points: list[dict[str, Any]] = []
        self.warned = False
        self.judge = next((judge for judge in judges.values() if judge.score and not judge.post_training_only), None)
        self.inside = is_peft_model(trainer.model) and run.reference.path is None
        # TRL's frozen copy of a continued adapter is let go once its log-probs are cached.
        self.gone = self.inside and "ref" not in trainer.model.peft_config and is_adapter(weights)
        at_hand = trainer.ref_model is not None or (self.inside and not self.gone)
        self.has_kl = at_hand or not sharding(trainer)
        if run.dpo_best == "reward" and self.judge is None:
            raise PipelineError(
                f"dpo_best=reward: none of judge=[{','.join(judges)}] scores completions while a run trains: add one "
                "that does, such as length, or choose by another number, such as rewards/accuracies"
            )
        if eval_set.prompt_set.ids and not self.has_kl:
            why = "there is no KL: beside weights in parts no reference is loaded at each evaluation"
            if run.dpo_best in ("reward", "kl") or run.guard.action == "stop":
                raise PipelineError(f"{why}, and dpo_best or guard.action=stop needs it: type reference=frozen")
            log.warning("%s: type reference=frozen for it", why)

    def on_train_begin(self, args, state, control, **kwargs):
        self.points[:] = on_main_process(lambda: read_json(self.file) or [])
        if state.global_step == 0 and self.on.prompt_set.ids:
            if sharding(self.trainer):
                # FSDP makes where it gathers weights at the first forward: in inference mode it could not train there.
                with torch.no_grad():
                    self.trainer.model(torch.tensor(self.on.prompt_set.ids[:1], device=args.device))
            self.measure_and_log(0)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.on.prompt_set.ids:
            metrics.update(self.measure_and_log(state.global_step))

    def on_train_end(self, args, state, control, **kwargs):
        if self.run.dpo_best == "reward" and (state.best_metric or 0) < -FAR:
            budget, told = self.run.evaluation.kl_budget, "the one of the smallest KL counts as the best"
            log.warning("no checkpoint has a reward within evaluation.kl_budget=%g nats: %s", budget, told)

    def measure_and_log(self, step: int) -> dict[str, float]:
        """Log the point of a step, measured unless it is there; the metrics that a checkpoint may be chosen by."""
        if not self.points or self.points[-1]["step"] != step:
            everything = list(range(len(self.on.prompt_set.ids)))
            with random_state_kept():  # a judge may draw, and so does an adapter before its weights are loaded
                found = (
                    self.logprob_gaps(everything)
                    if sharding(self.trainer)
                    else map_over_ranks(self.logprob_gaps, len(everything))
                )
                self.points.append(on_main_process(lambda: self.point(step, found)))
        point = self.points[-1]
        known = [key for key in ("kl", "reward", "stop_rate", "completion_tokens") if point[key] is not None]
        metrics = {f"eval_{key}": point[key] for key in known}
        self.trainer.log(dict(metrics))
        return metrics | {"eval_reward_within_kl": reward_within_budget(point, self.run.evaluation.kl_budget)}

    def logprob_gaps(self, which: list[int]) -> list[tuple[list[int], float | None]]:
        """A completion to each of these questions, and log pi - log pi_ref of it in nats, None without a reference."""
        # The unwrapped policy: none of its forwards waits for another process, unless all do the same in parts.
        policy, on = self.trainer.accelerator.unwrap_model(self.trainer.model), self.on
        prompts, pad = [on.prompt_set.ids[i] for i in which], on.tokenizer.pad_token_id
        rows = 2 * on.batch_size  # as many as a step reads at once
        with self.trainer.accelerator.autocast():  # which `generate` of an adapter goes past
            completions = sample(
                policy, prompts, on.eos_ids, pad, on.max_new_tokens, rows, on.seed, synced=bool(sharding(self.trainer))
            )
        own = self.sum_logprobs(policy, prompts, completions)
        theirs = self.under_reference(policy, prompts, completions) if self.has_kl else None
        return [(ids, own[i] - theirs[i] if theirs else None) for i, ids in enumerate(completions)]

    def sum_logprobs(self, model: Any, prompts: list[list[int]], completions: list[list[int]]) -> list[float]:
        """The log-prob of each completion, in the precision that trains."""
        with self.trainer.accelerator.autocast():
            return [float(row.sum()) for row in completion_logprobs(model, prompts, completions, self.on.batch_size)]

    def under_reference(self, policy: Any, prompts: list[list[int]], completions: list[list[int]]) -> list[float]:
        """`nats` under the reference: the trainer's own, else the policy without what is trained, else one loaded."""
        if self.trainer.ref_model is not None:
            return self.sum_logprobs(self.trainer.ref_model, prompts, completions)
        if self.inside:
            if self.gone:
                policy.load_adapter(str(self.weights), "ref", torch_device=device())
            with use_adapter(policy, "ref" if "ref" in policy.peft_config else None):
                found = self.sum_logprobs(policy, prompts, completions)
            if self.gone:
                policy.delete_adapter("ref")
            return found
        # For this moment: the gradients of a step, as large where every weight is trained, are freed now.
        reference = load_policy(self.weights, self.on.loading, device_name=device())
        found = self.sum_logprobs(reference, prompts, completions)
        del reference
        gc.collect()
        return found

    def point(self, step: int, completions: list[tuple[list[int], float | None]]) -> dict[str, Any]:
        """What is known at a step, saved; None is a KL or a reward that cannot be had, and a bound where n is 1."""
        completions, gaps = zip(*completions, strict=True)
        n, ended = len(completions), [float(ids[-1] in self.on.eos_ids) for ids in completions]
        point = {
            **{"step": step, "beta": self.run.beta},
            **bounds("kl", estimates.mean(gaps) if self.has_kl else None),
            "kl_se": statistics.stdev(gaps) / math.sqrt(n) if self.has_kl and n > 1 else None,
            **bounds("reward", self.reward(step, list(completions))),
            **bounds("stop_rate", estimates.proportion(ended)),
            **{"completion_tokens": sum(map(len, completions)) / n, "n": n},
        }
        write_json(self.file, [*self.points, point])
        return point

    def reward(self, step: int, completions: list[list[int]]) -> estimates.Estimate | None:
        """The judge's mean score; None without a judge, or, with one warning, where it has not scored every
        completion.
        """
        if self.judge is None:
            return None
        try:
            given = self.judge.score(self.on.completions(self.on.prompt_set, completions))
            scores = [score for _, score in given if score is not None and math.isfinite(score)]
            if len(scores) < len(completions):
                raise PipelineError(
                    f"{len(completions) - len(scores)} of {len(completions)} completions have got no score"
                )
            return estimates.mean(scores)
        except PipelineError as error:
            if not self.warned:
                log.warning("the judge failed at step %d, so the tracker has no reward: %s", step, error)
            self.warned = True
            return None


def bounds(name: str, estimate: estimates.Estimate | None) -> dict[str, Any]:
    """An estimate as `name`, `name_low` and `name_high`."""
    tails = {"": "value", "_low": "low", "_high": "high"}
    return {f"{name}{tail}": estimate and estimate[key] for tail, key in tails.items()}


def reward_within_budget(point: dict[str, Any], budget: float) -> float:
    """What dpo_best=reward chooses by: the reward within the budget of KL, else below any, the lower the more KL."""
    kl = math.inf if point["kl"] is None else point["kl"]
    return point["reward"] if point["reward"] is not None and kl <= budget else -FAR - kl
