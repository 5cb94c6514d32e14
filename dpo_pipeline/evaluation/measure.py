"""What needs a model, once for each policy: log-probs of pairs, completions, and log-probs of these."""

import contextlib
import gc
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dpo_pipeline.distributed import is_main_process, map_over_ranks, on_main_process
from dpo_pipeline.evaluation.eval_set import EvalSet, PromptSet
from dpo_pipeline.hardware import device
from dpo_pipeline.locks import file_lock
from dpo_pipeline.logprobs import completion_logprobs
from dpo_pipeline.models import load_policy
from dpo_pipeline.run_folder import read_json, weights_of, write_json
from dpo_pipeline.sampling import sample


@dataclass(frozen=True)
class Policy:
    """A saved policy: its name in tables, its weights, where its results go, what it is compared with.

    `reference` names its own reference, `sft` the SFT policy that it is to beat. One that is not `shown` is measured
    against only.
    """

    name: str
    path: str | Path
    folder: Path
    beta: float
    reference: str | None = None
    sft: str | None = None
    shown: bool = True


@dataclass(frozen=True)
class SamplingRequest:
    """Questions to put to policies: to all of them, or to those named in `to`."""

    name: str
    prompt_set: PromptSet
    temperature: float = 1.0
    draws: int = 1
    seed: int = 0  # added to that of the Material
    to: tuple[str, ...] | None = None


SAMPLES = "answers"  # the Ask whose completions KL is taken from


@dataclass
class Measurements:
    """By policy: its weights, its sums of log-probs of each pair's completions, its completions, and log-probs of
    these.
    """

    weights: dict[str, str] = field(default_factory=dict)
    pairs: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    completions: dict[tuple[str, str], list[list[int]]] = field(default_factory=dict)  # (policy, name of the Ask)
    sums: dict[tuple[str, str], list[float]] = field(default_factory=dict)  # (sampled from, scored by)


def measure_policies(
    policies: list[Policy], base: str | None, eval_set: EvalSet, requests: list[SamplingRequest]
) -> Measurements:
    """Measure what is not on disk yet in `records/` of each policy's folder, one policy after the other.

    `policies` come in an order in which each stands before what it is measured against. Each is loaded at most once,
    alone, and by every process, which share the rows. What was made is kept where a later one fails.
    """
    found = Measurements(
        {p.name: on_main_process(lambda p=p: weights_of(p.path, eval_set.loading.model.revision)) for p in policies}
    )
    tokens = hashlib.sha256(json.dumps([eval_set.prompts, eval_set.chosen, eval_set.rejected]).encode()).hexdigest()
    prompt_set = next(ask.prompt_set for ask in requests if ask.name == SAMPLES)
    for policy in policies:
        own = [found.weights[policy.name], eval_set.compute_settings()]
        with lazy_model(policy, eval_set) as model:
            score = partial(sum_logprobs, model, eval_set, policy.name)
            found.pairs[policy.name] = cached(policy, "pairs", [*own, tokens], partial(pair_sums, score, eval_set))
            for ask in requests:
                if ask.to is None or policy.name in ask.to:
                    asked = [
                        ask.prompt_set.ids,
                        ask.temperature,
                        ask.draws,
                        eval_set.max_new_tokens,
                        eval_set.eos_ids,
                        eval_set.seed + ask.seed,
                    ]
                    make = partial(sample_completions, model, eval_set, policy.name, ask)
                    found.completions[policy.name, ask.name] = cached(policy, ask.name, [*own, *asked], make)
            for other in policies:
                completions = found.completions.get((other.name, SAMPLES))
                if completions and policy.name in (other.name, *references_of(other, base).values()):
                    key = [found.weights[other.name], *own, prompt_set.ids, completions]
                    found.sums[other.name, policy.name] = cached(
                        other, "sums", key, partial(score, prompt_set.ids, completions)
                    )
    return found


def pair_sums(score: Callable[..., list[float]], eval_set: EvalSet) -> dict[str, list[float]]:
    """The sums of both sides of the test pairs."""
    return {"chosen": score(eval_set.prompts, eval_set.chosen), "rejected": score(eval_set.prompts, eval_set.rejected)}


def sum_logprobs(
    model: Callable[[], Any], eval_set: EvalSet, name: str, prompts: list[list[int]], completions: list[list[int]]
) -> list[float]:
    """The summed log-prob of each completion under a policy, in nats."""

    def share(rows: list[int]) -> list[float]:
        given = [prompts[i] for i in rows], [completions[i] for i in rows]
        return [
            float(row.sum())
            for row in completion_logprobs(model(), *given, eval_set.batch_size, bar(f"measuring {name}"))
        ]

    return map_over_ranks(share, len(prompts))


def sample_completions(
    model: Callable[[], Any], eval_set: EvalSet, name: str, ask: SamplingRequest
) -> list[list[int]]:
    """The completions of a policy to the questions of an Ask, `ask.draws` for each."""
    ids, pad = ask.prompt_set.ids, eval_set.tokenizer.pad_token_id

    def share(rows: list[int]) -> list[list[list[int]]]:
        flat = sample(
            model(),
            [ids[i] for i in rows],
            eval_set.eos_ids,
            pad,
            eval_set.max_new_tokens,
            4 * eval_set.batch_size,
            eval_set.seed + ask.seed,
            ask.temperature,
            ask.draws,
            bar(f"sampling {name}, {ask.name}"),
        )
        return [flat[at : at + ask.draws] for at in range(0, len(flat), ask.draws)]

    return [completion for of in map_over_ranks(share, len(ids)) for completion in of]


def references_of(policy: Policy, base: str | None) -> dict[str, str]:
    """What a policy is measured against: `base`, and its own `reference`, each where there is one."""
    return {block: name for block, name in (("base", base), ("reference", policy.reference)) if name}


@contextlib.contextmanager
def lazy_model(policy: Policy, eval_set: EvalSet) -> Iterator[Callable[[], Any]]:
    """Gives the model of a policy on the device: loaded at the first call, freed at the end."""
    loaded: list[Any] = []

    def model() -> Any:
        if not loaded:
            loaded.append(load_policy(policy.path, eval_set.loading, device_name=device()))
        return loaded[0]

    yield model
    if loaded:
        loaded.clear()
        gc.collect()


def cached(policy: Policy, kind: str, key: Any, make: Callable[[], Any]) -> Any:
    """What an earlier run of any process has made of this `key`, else what `make` gives, kept for the next one."""
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    file = policy.folder / "records" / f"{kind}-{digest}.json"
    with contextlib.ExitStack() as lock:
        on_main_process(lambda: lock.enter_context(file_lock(file)))
        found = on_main_process(lambda: read_json(file))
        if found is None:
            found = make()
            on_main_process(lambda: write_json(file, found, indent=None))
    return found


def bar(label: str) -> str | None:
    """The label of a progress bar: of rank 0 alone."""
    return label if is_main_process() else None
