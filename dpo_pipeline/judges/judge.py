"""What a judge is: something that scores a completion, or chooses between two."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Completion:
    """A completion to be judged: the prompt as its row has it (text or messages), the text, and the ids of both."""

    prompt: Any
    text: str
    ended: bool  # it closed with an end token
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]  # the end token included


# Index and result, in any order, each as soon as it is there; None where the judge has given none that could be read.
Scores = Iterator[tuple[int, float | None]]
Choices = Iterator[tuple[int, float | None]]  # 1: the first is better, 0.5: a tie, 0: the second


@dataclass(frozen=True)
class Judge:
    """How completions are scored, how the better of two is chosen, or both; a judge that only scores chooses by that.

    `version` tells its results from those of any other model, wording or setting: they are kept on disk under it;
    None where they are had again for nothing. `late`: it asks somebody, or needs a policy that is done: it is left to
    `evaluate`.
    """

    score: Callable[[list[Completion]], Scores] | None = None
    choose: Callable[[list[tuple[Completion, Completion]]], Choices] | None = None
    version: str | None = None
    post_training_only: bool = False


def drop_unparsed(results: list[float | None]) -> list[float]:
    """Those that a judge has given."""
    return [result for result in results if result is not None]
