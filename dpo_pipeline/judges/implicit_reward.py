"""The implicit reward of a policy as a judge: a control, or one policy's opinion of another's completions."""

from dpo_pipeline.errors import PipelineError
from dpo_pipeline.hardware import device
from dpo_pipeline.judges.judge import Completion, Judge, Results
from dpo_pipeline.logprobs import completion_logprobs
from dpo_pipeline.models import LoadOptions, adapter_base, is_adapter, load_policy, load_tokenizer


def implicit_reward(
    policy: str | None, reference: str | None, beta: float, load_options: LoadOptions, batch_size: int = 8
) -> Judge:
    """Scores by `beta * (log pi(y|x) - log pi_ref(y|x))`, summed over completion tokens (arXiv:2305.18290, section 4).

    Reads the sampled ids, and loads the two models one after the other. Raises PipelineError if either is not named,
    has another vocabulary than the base of the run, or cannot be loaded.
    """
    for key, path in (("policy", policy), ("reference", reference)):
        if path is None:
            raise PipelineError(f"judge=implicit_reward has no {key}: type judge.implicit_reward.{key}=FOLDER")

    def score(completions: list[Completion]) -> Results:
        policy_sums = sum_logprobs_of(str(policy), completions, load_options, batch_size)
        reference_sums = sum_logprobs_of(str(reference), completions, load_options, batch_size)
        for index, (log_pi, log_pi_ref) in enumerate(zip(policy_sums, reference_sums, strict=True)):
            yield index, beta * (log_pi - log_pi_ref)

    return Judge(score, post_training_only=True)


def sum_logprobs_of(
    path: str, completions: list[Completion], load_options: LoadOptions, batch_size: int
) -> list[float]:
    """The summed log-prob of each completion under the policy at `path`, in nats."""
    source = adapter_base(path) if is_adapter(path) else path
    if load_tokenizer(load_options.model, source).get_vocab() != load_tokenizer(load_options.model).get_vocab():
        raise PipelineError(
            f"{path} has another vocabulary than {load_options.model.path}, so the same ids are other words to it: "
            "give a policy of that base by judge.implicit_reward.policy= and .reference="
        )
    model = load_policy(path, load_options, device_name=device())
    prompts = [list(completion.prompt_ids) for completion in completions]
    ids = [list(completion.ids) for completion in completions]
    return [float(row.sum()) for row in completion_logprobs(model, prompts, ids, batch_size)]
