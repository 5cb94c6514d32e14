"""What measuring needs a model for, once for each policy: log-probs of pairs and of answers, and the answers."""

import contextlib
import gc
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dpo_pipeline.evaluation.material import Material, Questions
from dpo_pipeline.locks import alone
from dpo_pipeline.logprobs import answer_logprobs
from dpo_pipeline.machine import device, is_main_process, spread, together
from dpo_pipeline.policies import load_policy
from dpo_pipeline.runs import read_json, weights_of, write_json
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
class Ask:
    """Questions to put to policies: to all of them, or to those named in `to`."""

    name: str
    questions: Questions
    temperature: float = 1.0
    draws: int = 1
    seed: int = 0  # added to that of the Material
    to: tuple[str, ...] | None = None


SAMPLES = "answers"  # the Ask whose answers KL is taken from


@dataclass
class Records:
    """By policy: its weights, its sums of log-probs of each pair's answers, its answers, and log-probs of these."""

    weights: dict[str, str] = field(default_factory=dict)
    pairs: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    answers: dict[tuple[str, str], list[list[int]]] = field(default_factory=dict)  # (policy, name of the Ask)
    sums: dict[tuple[str, str], list[float]] = field(default_factory=dict)  # (sampled from, scored by)


def record(policies: list[Policy], base: str | None, on: Material, asks: list[Ask]) -> Records:
    """Measure what is not on disk yet in `records/` of each policy's folder, one policy after the other.

    `policies` come in an order in which each stands before what it is measured against. Each is loaded at most once,
    alone, and by every process, which share the rows. What was made is kept where a later one fails.
    """
    found = Records({p.name: together(lambda p=p: weights_of(p.path, on.loading.model.revision)) for p in policies})
    tokens = hashlib.sha256(json.dumps([on.prompts, on.chosen, on.rejected]).encode()).hexdigest()
    questions = next(ask.questions for ask in asks if ask.name == SAMPLES)
    for policy in policies:
        own = [found.weights[policy.name], on.how()]
        with when_needed(policy, on) as model:
            score = partial(sums, model, on, policy.name)
            found.pairs[policy.name] = kept(policy, "pairs", [*own, tokens], partial(pair_sums, score, on))
            for ask in asks:
                if ask.to is None or policy.name in ask.to:
                    asked = [
                        ask.questions.ids,
                        ask.temperature,
                        ask.draws,
                        on.max_new_tokens,
                        on.ends,
                        on.seed + ask.seed,
                    ]
                    make = partial(answered, model, on, policy.name, ask)
                    found.answers[policy.name, ask.name] = kept(policy, ask.name, [*own, *asked], make)
            for other in policies:
                answers = found.answers.get((other.name, SAMPLES))
                if answers and policy.name in (other.name, *others(other, base).values()):
                    key = [found.weights[other.name], *own, questions.ids, answers]
                    found.sums[other.name, policy.name] = kept(
                        other, "sums", key, partial(score, questions.ids, answers)
                    )
    return found


def pair_sums(score: Callable[..., list[float]], on: Material) -> dict[str, list[float]]:
    """The sums of both sides of the test pairs."""
    return {"chosen": score(on.prompts, on.chosen), "rejected": score(on.prompts, on.rejected)}


def sums(
    model: Callable[[], Any], on: Material, name: str, prompts: list[list[int]], answers: list[list[int]]
) -> list[float]:
    """The summed log-prob of each answer under a policy, in nats."""

    def share(rows: list[int]) -> list[float]:
        given = [prompts[i] for i in rows], [answers[i] for i in rows]
        return [float(row.sum()) for row in answer_logprobs(model(), *given, on.batch_size, bar(f"measuring {name}"))]

    return spread(share, len(prompts))


def answered(model: Callable[[], Any], on: Material, name: str, ask: Ask) -> list[list[int]]:
    """The answers of a policy to the questions of an Ask, `ask.draws` for each."""
    ids, pad = ask.questions.ids, on.tokenizer.pad_token_id

    def share(rows: list[int]) -> list[list[list[int]]]:
        flat = sample(
            model(), [ids[i] for i in rows], on.ends, pad, on.max_new_tokens, 4 * on.batch_size, on.seed + ask.seed,
            ask.temperature, ask.draws, bar(f"sampling {name}, {ask.name}"),
        )  # fmt: skip
        return [flat[at : at + ask.draws] for at in range(0, len(flat), ask.draws)]

    return [answer for of in spread(share, len(ids)) for answer in of]


def others(policy: Policy, base: str | None) -> dict[str, str]:
    """What a policy is measured against: `base`, and its own `reference`, each where there is one."""
    return {block: name for block, name in (("base", base), ("reference", policy.reference)) if name}


@contextlib.contextmanager
def when_needed(policy: Policy, on: Material) -> Iterator[Callable[[], Any]]:
    """Gives the model of a policy on the device: loaded at the first call, freed at the end."""
    loaded: list[Any] = []

    def model() -> Any:
        if not loaded:
            loaded.append(load_policy(policy.path, on.loading, on=device()))
        return loaded[0]

    yield model
    if loaded:
        loaded.clear()
        gc.collect()


def kept(policy: Policy, kind: str, key: Any, make: Callable[[], Any]) -> Any:
    """What an earlier run of any process has made of this `key`, else what `make` gives, kept for the next one."""
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    file = policy.folder / "records" / f"{kind}-{digest}.json"
    with contextlib.ExitStack() as lock:
        together(lambda: lock.enter_context(alone(file)))
        found = together(lambda: read_json(file))
        if found is None:
            found = make()
            together(lambda: write_json(file, found, indent=None))
    return found


def bar(label: str) -> str | None:
    """The label of a progress bar: of rank 0 alone."""
    return label if is_main_process() else None
