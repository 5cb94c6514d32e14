"""What needs a model, once for each policy: log-probs of pairs, completions, and log-probs of these."""

import contextlib
import functools
import gc
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dpo_pipeline.content_hash import weights_hash
from dpo_pipeline.distributed import map_over_ranks, on_main_process
from dpo_pipeline.evaluation.eval_set import EvalSet, PromptSet
from dpo_pipeline.hardware import device
from dpo_pipeline.judges.judge import Completion
from dpo_pipeline.locks import file_lock
from dpo_pipeline.logprobs import completion_logprobs
from dpo_pipeline.models import load_policy
from dpo_pipeline.record import read_json, write_json
from dpo_pipeline.sampling import sample

SAMPLES = "completions"  # the sampling request that KL is taken from


@dataclass(frozen=True)
class Policy:
    """A saved policy: its name in tables, its weights, the folder of its results, and what it is compared with.

    `reference` names its own reference, `sft` the SFT policy that it is to beat. One that is not shown only serves
    as a reference.
    """

    name: str
    path: str | Path
    folder: Path
    beta: float
    reference: str | None = None
    sft: str | None = None
    is_shown: bool = True


@dataclass(frozen=True)
class SamplingRequest:
    """Prompts that the named policies complete."""

    name: str
    prompt_set: PromptSet
    policies: tuple[str, ...]
    temperature: float = 1.0
    draws: int = 1
    seed: int = 0  # added to that of the eval set


@dataclass
class Measurements:
    """What is measured of policies on an eval set; log-probs are in nats, summed over the tokens of a completion.

    Each policy stands before what it is measured against. `base` names the policy that all are measured against, if
    there is one; `requests` say what the policies complete.
    """

    eval_set: EvalSet
    policies: list[Policy]
    base: str | None
    requests: list[SamplingRequest]
    weights: dict[str, str] = field(default_factory=dict)  # sha256 by policy
    pairs: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # by policy, of chosen and of rejected
    completions: dict[tuple[str, str], list[Completion]] = field(default_factory=dict)  # (policy, request)
    sample_logprobs: dict[tuple[str, str], list[float]] = field(default_factory=dict)  # (sampled from, scored by)

    @property
    def shown_policies(self) -> list[Policy]:
        """The policies that have results of their own."""
        return [policy for policy in self.policies if policy.is_shown]

    def references_of(self, policy: Policy) -> dict[str, str]:
        """The names of what a policy is measured against: `base` and its own `reference`, if there is one."""
        references = {"base": self.base, "reference": policy.reference}
        return {kind: name for kind, name in references.items() if name}


def measure_policies(*measurements: Measurements) -> None:
    """Fill in what is not cached yet in `records/` of each policy's folder, one policy after the other.

    Each policy is loaded at most once for all eval sets, alone, and by every process; the processes share the rows.
    What was measured stays cached if a later policy fails.
    """
    policies = {policy.name: policy for each in measurements for policy in each.policies}
    loading = measurements[0].eval_set.loading
    for policy in policies.values():
        load_model = functools.cache(partial(load_policy, policy.path, loading, device_name=device()))
        for each in measurements:
            if policy in each.policies:
                measure_policy(policy, each, load_model)
        load_model.cache_clear()
        gc.collect()  # frees the model before the next one is loaded


def measure_policy(policy: Policy, measurements: Measurements, load_model: Callable[[], Any]) -> None:
    """Add what the model of one policy says; it is loaded for the first number that is not cached."""
    eval_set, weights, completions = measurements.eval_set, measurements.weights, measurements.completions
    weights[policy.name] = on_main_process(lambda: weights_hash(policy.path, eval_set.loading.model.revision))
    key = [weights[policy.name], eval_set.compute_settings()]
    score = partial(sum_logprobs, load_model, eval_set, policy.name)

    def score_pairs() -> dict[str, list[float]]:
        return {side: score(eval_set.prompts, ids) for side, ids in eval_set.sides.items()}

    pairs_key = [*key, eval_set.prompts, *eval_set.sides.values()]
    measurements.pairs[policy.name] = cached(policy, "pairs", pairs_key, score_pairs)
    for request in measurements.requests:
        if policy.name in request.policies:
            prompt_set, seed = request.prompt_set, eval_set.seed + request.seed
            settings = [prompt_set.ids, request.temperature, request.draws, eval_set.max_new_tokens, eval_set.eos_ids]
            make_completions = partial(sample_completions, load_model, eval_set, policy.name, request)
            ids = cached(policy, request.name, [*key, *settings, seed], make_completions)
            completions[policy.name, request.name] = eval_set.completions(prompt_set, ids, request.draws)
    for other in measurements.policies:
        is_scored = policy.name in (other.name, *measurements.references_of(other).values())
        if is_scored and (other.name, SAMPLES) in completions:
            samples = completions[other.name, SAMPLES]
            prompts, ids = [list(each.prompt_ids) for each in samples], [list(each.ids) for each in samples]
            sums_key = [weights[other.name], *key, prompts, ids]
            measurements.sample_logprobs[other.name, policy.name] = cached(
                other, "sums", sums_key, partial(score, prompts, ids)
            )


def sum_logprobs(
    load_model: Callable[[], Any], eval_set: EvalSet, name: str, prompts: list[list[int]], completions: list[list[int]]
) -> list[float]:
    """The summed log-prob of each completion under a policy, in nats."""

    def score_rows(rows: list[int]) -> list[float]:
        ids = [prompts[i] for i in rows], [completions[i] for i in rows]
        logprobs = completion_logprobs(load_model(), *ids, eval_set.batch_size, f"measuring {name}")
        return [float(row.sum()) for row in logprobs]

    return map_over_ranks(score_rows, len(prompts))


def sample_completions(
    load_model: Callable[[], Any], eval_set: EvalSet, name: str, request: SamplingRequest
) -> list[list[int]]:
    """The completions of a policy, as token ids: `request.draws` for each prompt, one prompt after the other."""
    prompts, draws = request.prompt_set.ids, request.draws

    def sample_rows(rows: list[int]) -> list[list[list[int]]]:
        completions = sample(
            load_model(),
            [prompts[i] for i in rows],
            eval_set.eos_ids,
            eval_set.tokenizer.pad_token_id,
            eval_set.max_new_tokens,
            4 * eval_set.batch_size,
            eval_set.seed + request.seed,
            request.temperature,
            draws,
            f"sampling {name}, {request.name}",
        )
        return [completions[start : start + draws] for start in range(0, len(completions), draws)]

    return [ids for completions in map_over_ranks(sample_rows, len(prompts)) for ids in completions]


def cached(policy: Policy, kind: str, key: list[Any], compute: Callable[[], Any]) -> Any:
    """What an earlier run cached under this key, else what `compute` gives, cached for the next run."""
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    file = policy.folder / "records" / f"{kind}-{digest}.json"
    with contextlib.ExitStack() as locks:
        on_main_process(lambda: locks.enter_context(file_lock(file)))
        content = on_main_process(lambda: read_json(file))
        if content is None:
            content = compute()
            on_main_process(lambda: write_json(file, content, indent=None))
    return content
