"""The judge of length alone: a control, since longer completions please many judges."""

from dpo_pipeline.judges.judge import Judge, score_each


def length() -> Judge:
    """Scores by the number of completion tokens, without the end token."""
    return Judge(score_each(lambda completion: float(len(completion.ids) - completion.ended)))
