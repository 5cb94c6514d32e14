"""How far a DPO run has gone from its reference, and what that has brought: from step 0, at each evaluation.

On answers that the policy in training gives to a fixed set of validation prompts; TRL measures nothing of the kind.
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
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.judges.judge import Judge
from dpo_pipeline.logprobs import answer_logprobs
from dpo_pipeline.machine import device, spread, together
from dpo_pipeline.policies import is_adapter, load_policy
from dpo_pipeline.runs import POINTS, read_json, write_json
from dpo_pipeline.sampling import sample
from dpo_pipeline.training.preflight import random_state_kept
from dpo_pipeline.training.trainer import sharded

log = logging.getLogger(__name__)

FAR = 1e9  # below any reward


class Tracker(TrainerCallback):
    """Adds a point to `reward_kl_tracker.json`, and its numbers to the log; where `on` has no questions, nothing.

    `on` says what is asked and how answers are drawn (`evaluation.material`), `weights` where the reference lies; the
    reward is the score of the first of `judges` that is not late. Stands behind Metrics among the callbacks. Raises
    PipelineError where the run is to choose or to stop by a number that cannot be had.
    """

    def __init__(self, trainer: Any, run: Run, folder: Path, on: Any, judges: dict[str, Judge], weights: str | Path):
        self.trainer, self.run, self.file, self.on, self.weights = trainer, run, folder / POINTS, on, weights
        self.points: list[dict[str, Any]] = []
        self.warned = False
        self.judge = next((judge for judge in judges.values() if judge.score and not judge.late), None)
        self.inside = is_peft_model(trainer.model) and run.reference.path is None
        # TRL's frozen copy of a continued adapter is let go once its log-probs are cached.
        self.gone = self.inside and "ref" not in trainer.model.peft_config and is_adapter(weights)
        at_hand = trainer.ref_model is not None or (self.inside and not self.gone)
        self.has_kl = at_hand or not sharded(trainer)
        if run.dpo_best == "reward" and self.judge is None:
            raise PipelineError(
                f"dpo_best=reward: none of judge=[{','.join(judges)}] scores answers while a run trains: add one that "
                "does, such as length, or choose by another number, such as rewards/accuracies"
            )
        if on.questions.ids and not self.has_kl:
            why = "there is no KL: beside weights in parts no reference is loaded at each evaluation"
            if run.dpo_best in ("reward", "kl") or run.guard.action == "stop":
                raise PipelineError(f"{why}, and dpo_best or guard.action=stop needs it: type reference=frozen")
            log.warning("%s: type reference=frozen for it", why)

    def on_train_begin(self, args, state, control, **kwargs):
        self.points[:] = together(lambda: read_json(self.file) or [])
        if state.global_step == 0 and self.on.questions.ids:
            if sharded(self.trainer):
                # FSDP makes where it gathers weights at the first forward: in inference mode it could not train there.
                with torch.no_grad():
                    self.trainer.model(torch.tensor(self.on.questions.ids[:1], device=args.device))
            self.tell(0)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.on.questions.ids:
            metrics.update(self.tell(state.global_step))

    def on_train_end(self, args, state, control, **kwargs):
        if self.run.dpo_best == "reward" and (state.best_metric or 0) < -FAR:
            budget, told = self.run.evaluation.kl_budget, "the one of the smallest KL counts as the best"
            log.warning("no checkpoint has a reward within evaluation.kl_budget=%g nats: %s", budget, told)

    def tell(self, step: int) -> dict[str, float]:
        """Log the point of a step, measured unless it is there; the metrics that a checkpoint may be chosen by."""
        if not self.points or self.points[-1]["step"] != step:
            everything = list(range(len(self.on.questions.ids)))
            with random_state_kept():  # a judge may draw, and so does an adapter before its weights are loaded
                found = self.gaps(everything) if sharded(self.trainer) else spread(self.gaps, len(everything))
                self.points.append(together(lambda: self.point(step, found)))
        point = self.points[-1]
        known = [key for key in ("kl", "reward", "stop_rate", "answer_tokens") if point[key] is not None]
        metrics = {f"eval_{key}": point[key] for key in known}
        self.trainer.log(dict(metrics))
        return metrics | {"eval_reward_within_kl": within(point, self.run.evaluation.kl_budget)}

    def gaps(self, which: list[int]) -> list[tuple[list[int], float | None]]:
        """An answer to each of these questions, and log pi - log pi_ref of it in nats, None without a reference."""
        # The unwrapped policy: none of its forwards waits for another process, unless all do the same in parts.
        policy, on = self.trainer.accelerator.unwrap_model(self.trainer.model), self.on
        prompts, pad = [on.questions.ids[i] for i in which], on.tokenizer.pad_token_id
        rows = 2 * on.batch_size  # as many as a step reads at once
        with self.trainer.accelerator.autocast():  # which `generate` of an adapter goes past
            answers = sample(
                policy, prompts, on.ends, pad, on.max_new_tokens, rows, on.seed, synced=bool(sharded(self.trainer))
            )
        own = self.nats(policy, prompts, answers)
        theirs = self.under_reference(policy, prompts, answers) if self.has_kl else None
        return [(ids, own[i] - theirs[i] if theirs else None) for i, ids in enumerate(answers)]

    def nats(self, model: Any, prompts: list[list[int]], answers: list[list[int]]) -> list[float]:
        """The log-prob of each answer, in the precision that trains."""
        with self.trainer.accelerator.autocast():
            return [float(row.sum()) for row in answer_logprobs(model, prompts, answers, self.on.batch_size)]

    def under_reference(self, policy: Any, prompts: list[list[int]], answers: list[list[int]]) -> list[float]:
        """`nats` under the reference: the trainer's own, else the policy without what is trained, else one loaded."""
        if self.trainer.ref_model is not None:
            return self.nats(self.trainer.ref_model, prompts, answers)
        if self.inside:
            if self.gone:
                policy.load_adapter(str(self.weights), "ref", torch_device=device())
            with use_adapter(policy, "ref" if "ref" in policy.peft_config else None):
                found = self.nats(policy, prompts, answers)
            if self.gone:
                policy.delete_adapter("ref")
            return found
        # For this moment: the gradients of a step, as large where every weight is trained, are freed now.
        reference = load_policy(self.weights, self.on.loading, on=device())
        found = self.nats(reference, prompts, answers)
        del reference
        gc.collect()
        return found

    def point(self, step: int, found: list[tuple[list[int], float | None]]) -> dict[str, Any]:
        """What is known at a step, saved; None is a KL or a reward that cannot be had, and a bound where n is 1."""
        answers, gaps = zip(*found, strict=True)
        n, ended = len(answers), [float(ids[-1] in self.on.ends) for ids in answers]
        point = {
            **{"step": step, "beta": self.run.beta},
            **bounds("kl", estimates.mean(gaps) if self.has_kl else None),
            "kl_se": statistics.stdev(gaps) / math.sqrt(n) if self.has_kl and n > 1 else None,
            **bounds("reward", self.reward(step, list(answers))),
            **bounds("stop_rate", estimates.share(ended)),
            **{"answer_tokens": sum(map(len, answers)) / n, "n": n},
        }
        write_json(self.file, [*self.points, point])
        return point

    def reward(self, step: int, answers: list[list[int]]) -> estimates.Estimate | None:
        """The judge's mean score; None without a judge, or, with one warning, where it has not scored every answer."""
        if self.judge is None:
            return None
        try:
            given = self.judge.score(self.on.answers(self.on.questions, answers))
            scores = [score for _, score in given if score is not None and math.isfinite(score)]
            if len(scores) < len(answers):
                raise PipelineError(f"{len(answers) - len(scores)} of {len(answers)} answers have got no score")
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


def within(point: dict[str, Any], budget: float) -> float:
    """What dpo_best=reward chooses by: the reward within the budget of KL, else below any, the lower the more KL."""
    kl = math.inf if point["kl"] is None else point["kl"]
    return point["reward"] if point["reward"] is not None and kl <= budget else -FAR - kl
