"""The implicit reward of a policy as a judge: a control, or one policy's opinion of another's completions."""

from dpo_pipeline.errors import PipelineError
from dpo_pipeline.hardware import device
from dpo_pipeline.judges.judge import Completion, Judge, Results
from dpo_pipeline.logprobs import completion_logprobs
from dpo_pipeline.models import LoadOptions, adapter_base, is_adapter, load_policy
from dpo_pipeline.tokenizer import load_tokenizer


def implicit_reward(policy: str, reference: str, beta: float, load_options: LoadOptions, batch_size: int = 8) -> Judge:
    """Scores by `beta * (log pi(y|x) - log pi_ref(y|x))`, summed over completion tokens (arXiv:2305.18290, section 4).

    Reads the sampled ids, and loads the two models one after the other. Raises PipelineError if either has another
    vocabulary than the base of the run, or cannot be loaded.
    """

    def sum_logprobs(path: str, completions: list[Completion]) -> list[float]:
        source = adapter_base(path) if is_adapter(path) else path
        if load_tokenizer(load_options.model, source).get_vocab() != load_tokenizer(load_options.model).get_vocab():
            raise PipelineError(
                f"{path} has another vocabulary than {load_options.model.path}, so the same ids are other words to "
                "it: give a policy of that base by judge.implicit_reward.policy= and .reference="
            )
        model = load_policy(path, load_options, device_name=device())
        prompts = [list(completion.prompt_ids) for completion in completions]
        ids = [list(completion.ids) for completion in completions]
        return [float(row.sum()) for row in completion_logprobs(model, prompts, ids, batch_size)]

    def score(completions: list[Completion]) -> Results:
        sums = [sum_logprobs(path, completions) for path in (policy, reference)]
        yield from enumerate(beta * (log_pi - log_pi_ref) for log_pi, log_pi_ref in zip(*sums, strict=True))

    return Judge(score, post_training_only=True)
