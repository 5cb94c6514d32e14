"""What a judge is: it scores a completion, or chooses between two."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

# Index and result, in any order, each as soon as it is known; None where the judge gave none that can be read.
# A result is a score, or a choice: 1 if the first completion is better, 0.5 for a tie, 0 if the second is better.
Results = Iterator[tuple[int, float | None]]


@dataclass(frozen=True)
class Completion:
    """A completion to judge: the prompt as its row has it (text or messages), the text, and the ids of both."""

    prompt: Any
    text: str
    ended: bool  # its last id is an end token
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]  # with the end token


@dataclass(frozen=True)
class Judge:
    """Scores completions, chooses the better of two, or both; a judge that only scores prefers the higher score.

    `version` is the cache key (model, wording, settings); None disables the cache. `post_training_only`: it asks an
    external service, or needs a trained policy, so it is not used during training.
    """

    score: Callable[[list[Completion]], Results] | None = None
    choose: Callable[[list[tuple[Completion, Completion]]], Results] | None = None
    version: str | None = None
    post_training_only: bool = False


def score_each(score_completion: Callable[[Completion], float | None]) -> Callable[[list[Completion]], Results]:
    """A `Judge.score` that scores each completion by itself."""
    return lambda completions: ((index, score_completion(each)) for index, each in enumerate(completions))
