"""The judge of the embedded task: its true reward."""

from dpo_pipeline.data import reviews
from dpo_pipeline.judges.judge import Judge, score_each


def truth() -> Judge:
    """Scores by the true reward, in [-1, 1]."""
    return Judge(score_each(lambda completion: reviews.reward(completion.text, completion.ended)))
