"""Signs in a DPO run that the policy fits the preference pairs at the cost of what they stand for."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger(__name__)

REPEAT_FACTOR = 1.5  # a warning comes again where its number is this many times as bad
MAX_ACCURACY = 0.95  # a few labels in a hundred are wrong in most data: beyond this those are learnt as well
MAX_STOP_RATE_FALL = 0.3  # or half of the stop rate at step 0, where that is less
# Log-prob of the chosen completions over that under the reference. Healthy runs lower it too: the card of
# Zephyr-7B-beta goes from -254 to -299 nats, a ratio of 1.18, in three epochs.
MAX_CHOSEN_RATIO = 1.5


@dataclass
class OverOptimizationWarnings:
    """Warns of each kind of sign once, and again where its number is much worse."""

    beta: float
    learning_rate: float
    kl_max: float
    train_accuracies: list[float] = field(default_factory=list)  # since the last evaluation
    validation_losses: dict[int, float] = field(default_factory=dict)  # by step
    warned_sizes: dict[str, float] = field(default_factory=dict)  # by kind

    def warn(self, step: int, metrics: dict[str, float], points: list[dict[str, Any]]) -> None:
        """Warn of the signs that the metrics of an evaluation and the tracker's points show."""
        self.validation_losses[step] = metrics["eval_loss"]
        earlier = "".join(f" (dpo.max_steps={before})" for before in list(self.validation_losses)[-2:-1])
        advice = (
            f"stop earlier{earlier}, raise beta above {self.beta:g} or lower dpo.learning_rate={self.learning_rate:g}"
        )
        for kind, size, sentence in self.find_problems(step, metrics, points):
            if size > REPEAT_FACTOR * self.warned_sizes.get(kind, 0.0):
                self.warned_sizes[kind] = size
                log.warning("%s: %s", sentence, advice)
        self.train_accuracies.clear()

    def find_problems(
        self, step: int, metrics: dict[str, float], points: list[dict[str, Any]]
    ) -> Iterator[tuple[str, float, str]]:
        """Each sign: its kind, size (above 0, more is worse), and a sentence."""
        accuracy = sum(self.train_accuracies) / max(1, len(self.train_accuracies))
        if accuracy > MAX_ACCURACY:
            yield "accuracy", accuracy, f"train accuracy is {accuracy:.3f} by step {step} (above {MAX_ACCURACY})"
        chosen = metrics["eval_logps/chosen"]
        reference = chosen - metrics["eval_rewards/chosen"] / self.beta
        if chosen < MAX_CHOSEN_RATIO * reference:
            sizes = f"from {reference:.1f} under the reference to {chosen:.1f} nats at step {step}"
            yield "chosen", chosen / reference, f"the log-prob of the chosen completions falls {sizes}"
        if len(points) < 2:
            return
        first, now, limit = points[0], points[-1], self.kl_max
        if now["kl"] is not None and now["kl"] > limit / 2:
            kind, bound = ("too far", limit) if now["kl"] > limit else ("high", limit / 2)
            yield kind, now["kl"], f"KL {format_point(now, 'kl')} nats at step {step} is {kind} (above {bound:g})"
        # Shares and scores have fallen where their intervals do not overlap.
        fall = first["stop_rate"] - now["stop_rate"]
        if fall > min(MAX_STOP_RATE_FALL, first["stop_rate"] / 2) and now["stop_rate_high"] < first["stop_rate_low"]:
            rates = f"{format_point(first, 'stop_rate')} at step {first['step']}, {format_point(now, 'stop_rate')}"
            yield "stop rate", fall, f"fewer completions come to an end: {rates} at step {step}"
        best = max((p for p in points if p["reward_low"] is not None), key=lambda p: p["reward"], default=now)
        before, loss = self.validation_losses.get(best["step"]), self.validation_losses[step]
        before = next(iter(self.validation_losses.values())) if before is None else before
        if now["reward_high"] is not None and now["reward_high"] < best["reward_low"] and loss < before:
            scores = f"{format_point(best, 'reward')} at step {best['step']} to {format_point(now, 'reward')}"
            sentence = f"the judge's score fell from {scores} at step {step} while the validation loss fell from"
            yield "reward", best["reward"] - now["reward"], f"{sentence} {before:.3f} to {loss:.3f}"


def format_point(point: dict[str, Any], name: str) -> str:
    """A number of a point with its interval, if it has one."""
    low, high = point[f"{name}_low"], point[f"{name}_high"]
    return f"{point[name]:.3g}" if low is None else f"{point[name]:.3g} [{low:.3g}, {high:.3g}]"
