"""A watch on over-optimisation in a DPO run: warns, with the number and what to do about it, and stops if asked to."""

import logging
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback

from dpo_pipeline.config import Run
from dpo_pipeline.run_folder import RunRecord

log = logging.getLogger(__name__)

AGAIN = 1.5  # times as bad as when it was told: it is told once more
ACCURACY = 0.95  # a few labels in a hundred are wrong in most data: beyond this those are learnt as well
FALL = 0.3  # of the share of completions that end; half of it, where that is less
# Nats of the chosen completions, against those under the reference: a ratio, since a sum grows with length. Healthy
# runs lower that log-prob too; on the card of Zephyr-7B-beta it goes from -254 to -299, a ratio of 1.18, in three
# epochs.
CHOSEN = 1.5


class OveroptimizationMonitor(TrainerCallback):
    """Warns at an evaluation of what has gone too far: once of each kind, and again where it is much worse.

    Reads the validation metrics and the tracker's `points`, behind which it stands among the callbacks.
    """

    def __init__(self, run: Run, record: RunRecord, points: list[dict[str, Any]]):
        self.run, self.record, self.points = run, record, points
        self.told: dict[str, float] = {}
        self.accuracies: list[float] = []  # since the last evaluation
        self.losses: dict[int, float] = {}  # on validation, by step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "rewards/accuracies" in logs:
            self.accuracies.append(logs["rewards/accuracies"])

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        step, guard = state.global_step, self.run.guard
        if guard.action == "off":
            return
        self.losses[step] = metrics["eval_loss"]
        for kind, size, sentence in self.findings(step, metrics):
            if size > AGAIN * self.told.get(kind, 0.0):
                self.told[kind] = size
                log.warning("%s: %s", sentence, self.advice())
        self.accuracies.clear()
        kl = self.points[-1]["kl"] if self.points else None
        if guard.action == "stop" and kl is not None and kl > guard.kl_max and step < state.max_steps:
            log.warning("stopped at step %d of %d, as guard.action=stop has it", step, state.max_steps)
            self.record.save_manifest(stopped={"step": step, "kl": kl, "kl_max": guard.kl_max})
            control.should_training_stop = control.should_save = True

    def advice(self) -> str:
        """What helps against all of it."""
        earlier = "".join(f" (dpo.max_steps={step})" for step in list(self.losses)[-2:-1])
        rate = self.run.dpo["learning_rate"]
        return f"stop earlier{earlier}, raise beta above {self.run.beta:g} or lower dpo.learning_rate={rate:g}"

    def findings(self, step: int, metrics: dict[str, float]) -> Iterator[tuple[str, float, str]]:
        """What there is to doubt: its kind, how bad it is (above 0, more is worse) and a sentence."""
        accuracy = sum(self.accuracies) / max(1, len(self.accuracies))
        if accuracy > ACCURACY:
            yield "accuracy", accuracy, f"train accuracy is {accuracy:.3f} by step {step} (above {ACCURACY})"
        chosen = metrics["eval_logps/chosen"]
        reference = chosen - metrics["eval_rewards/chosen"] / self.run.beta
        if chosen < CHOSEN * reference:
            told = f"{reference:.1f} under the reference, {chosen:.1f} at step {step} (below {CHOSEN} times that)"
            yield "chosen", chosen / reference, f"the log-prob of the chosen completions collapses, in nats {told}"
        if len(self.points) < 2:
            return
        first, now, limit = self.points[0], self.points[-1], self.run.guard.kl_max
        if now["kl"] is not None and now["kl"] > limit / 2:
            kind, bound = ("too far", limit) if now["kl"] > limit else ("high", limit / 2)
            yield kind, now["kl"], f"KL {format_point(now, 'kl')} nats at step {step} is {kind} (above {bound:g})"
        # Shares and scores have fallen where their intervals do not overlap.
        fall = first["stop_rate"] - now["stop_rate"]
        if fall > min(FALL, first["stop_rate"] / 2) and now["stop_rate_high"] < first["stop_rate_low"]:
            told = (
                f"{format_point(first, 'stop_rate')} at step {first['step']}, {format_point(now, 'stop_rate')} at "
                f"step {step}"
            )
            yield "stop rate", fall, f"fewer completions come to an end: {told}"
        best = max((p for p in self.points if p["reward_low"] is not None), key=lambda p: p["reward"], default=now)
        before, loss = self.losses.get(best["step"], next(iter(self.losses.values()))), self.losses[step]
        if now["reward_high"] is not None and now["reward_high"] < best["reward_low"] and loss < before:
            told = (
                f"{format_point(best, 'reward')} at step {best['step']} to {format_point(now, 'reward')} at step "
                f"{step}"
            )
            told += f" while the validation loss fell from {before:.3f} to {loss:.3f}"
            yield "reward", best["reward"] - now["reward"], f"the judge's score fell from {told}"


def format_point(point: dict[str, Any], name: str) -> str:
    """A number of a point with its interval, if it has one."""
    low, high = point[f"{name}_low"], point[f"{name}_high"]
    return f"{point[name]:.3g}" if low is None else f"{point[name]:.3g} [{low:.3g}, {high:.3g}]"
