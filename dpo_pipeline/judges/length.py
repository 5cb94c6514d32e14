"""The judge of length alone: a control, since longer completions please many judges."""

from dpo_pipeline.judges.judge import Completion, Judge, Scores


def length() -> Judge:
    """Scores by the number of completion tokens, the end token not counted."""

    def score(completions: list[Completion]) -> Scores:
        yield from ((i, float(len(completion.ids) - completion.ended)) for i, completion in enumerate(completions))

    return Judge(score)
