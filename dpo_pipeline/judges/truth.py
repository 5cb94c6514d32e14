"""The judge of the embedded task: its own reward."""

from dpo_pipeline.data import reviews
from dpo_pipeline.judges.judge import Completion, Judge, Scores


def truth() -> Judge:
    """Scores by the true reward, in [-1, 1]."""

    def score(completions: list[Completion]) -> Scores:
        yield from ((i, reviews.reward(completion.text, completion.ended)) for i, completion in enumerate(completions))

    return Judge(score)
