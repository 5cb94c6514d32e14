"""The judge of the embedded task: its own reward."""

from dpo_pipeline.data import reviews


def truth(prompts: list[str], answers: list[str], ended: list[bool]) -> list[float]:
    """The true reward of each answer, in [-1, 1]; `ended`: the answer closed with its end token."""
    return [reviews.reward(answer, end) for answer, end in zip(answers, ended, strict=True)]
