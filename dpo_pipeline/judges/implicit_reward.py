"""The implicit reward of a policy as a judge: a control, or one policy's opinion of another's completions."""

from dpo_pipeline.errors import PipelineError
from dpo_pipeline.hardware import device
from dpo_pipeline.judges.judge import Completion, Judge, Scores
from dpo_pipeline.logprobs import completion_logprobs
from dpo_pipeline.models import LoadOptions, adapter_base, is_adapter, load_policy, load_tokenizer


def implicit_reward(
    policy: str | None, reference: str | None, beta: float, loading: LoadOptions, batch_size: int = 8
) -> Judge:
    """Scores by `beta * (log pi(y|x) - log pi_ref(y|x))`, summed over completion tokens (arXiv:2305.18290, section 4).

    A completion's ids are read as they are, and the two models loaded one after the other. Raises PipelineError where
    either is not named, has another vocabulary than the base of the run, or cannot be loaded.
    """
    for key, path in (("policy", policy), ("reference", reference)):
        if path is None:
            raise PipelineError(
                f"judge=implicit_reward compares a policy with its reference, and has no {key}: type "
                f"judge.implicit_reward.{key}=FOLDER"
            )

    def score(completions: list[Completion]) -> Scores:
        ours, theirs = (sum_logprobs_of(str(path), completions, loading, batch_size) for path in (policy, reference))
        yield from ((i, beta * (a - b)) for i, (a, b) in enumerate(zip(ours, theirs, strict=True)))

    return Judge(score, post_training_only=True)


def sum_logprobs_of(path: str, completions: list[Completion], loading: LoadOptions, batch_size: int) -> list[float]:
    """The summed log-prob of each completion under the policy at `path`, in nats."""
    source = adapter_base(path) if is_adapter(path) else path
    if load_tokenizer(loading.model, source).get_vocab() != load_tokenizer(loading.model).get_vocab():
        raise PipelineError(
            f"{path} has another vocabulary than {loading.model.path}, so that the ids of a completion are other "
            "words to it: give a policy of that base by judge.implicit_reward.policy= and .reference="
        )
    model = load_policy(path, loading, device_name=device())
    given = (
        [list(completion.prompt_ids) for completion in completions],
        [list(completion.ids) for completion in completions],
    )
    return [float(row.sum()) for row in completion_logprobs(model, *given, batch_size)]
