"""The judge of the embedded task: its own reward."""

from dpo_pipeline.data import reviews
from dpo_pipeline.judges.judge import Answer, Judge, Scores


def truth() -> Judge:
    """Scores by the true reward, in [-1, 1]."""

    def score(answers: list[Answer]) -> Scores:
        yield from ((i, reviews.reward(answer.text, answer.ended)) for i, answer in enumerate(answers))

    return Judge(score)
