"""The judge of length alone: a control, since longer answers please many judges."""

from dpo_pipeline.judges.judge import Answer, Judge, Scores


def length() -> Judge:
    """Scores by the number of answer tokens, the end token not counted."""

    def score(answers: list[Answer]) -> Scores:
        yield from ((i, float(len(answer.ids) - answer.ended)) for i, answer in enumerate(answers))

    return Judge(score)
