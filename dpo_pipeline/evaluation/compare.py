"""Measures policies against each other on the same test pairs and prompts: eval.json, results.json, samples."""

import gc
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_pipeline import estimates
from dpo_pipeline.logprobs import answer_logprobs
from dpo_pipeline.machine import device
from dpo_pipeline.policies import Loading, load_policy
from dpo_pipeline.runs import read_json, weights_of, write_json
from dpo_pipeline.sampling import sample

log = logging.getLogger(__name__)

Judge = Callable[[list[str], list[str], list[bool]], list[float]]


@dataclass
class Policy:
    """A saved policy to measure: its name in tables, its weights, where its eval.json goes, DPO's own reference."""

    name: str
    path: str | Path
    folder: Path
    reference: str | None = None


@dataclass
class Material:
    """What every policy of a comparison is measured on, as token ids, and how."""

    dataset: str
    prompts: list[list[int]]
    chosen: list[list[int]]
    rejected: list[list[int]]
    questions: list[list[int]]  # prompts to answer
    tokenizer: Any
    ends: list[int]
    max_new_tokens: int
    beta: float
    seed: int
    loading: Loading
    batch_size: int
    judges: dict[str, Judge] = field(default_factory=dict)

    def settings(self, weights: dict[str, str]) -> dict[str, Any]:
        """All that a policy's numbers depend on: `weights` of itself and of what it is measured against, and these."""
        data = json.dumps([self.prompts, self.chosen, self.rejected, self.questions])
        return {
            "pairs": len(self.prompts),
            "prompts": len(self.questions),
            "max_new_tokens": self.max_new_tokens,
            "temperature": 1.0,
            "beta": self.beta,
            "seed": self.seed,
            "dtype": str(self.loading.dtype).removeprefix("torch."),
            "quantization": self.loading.quantization,
            "judges": sorted(self.judges),
            "data": hashlib.sha256(data.encode()).hexdigest(),
            "weights": weights,
        }


def material(rows: Any, pairs: int, prompts: int, context: int, max_new_tokens: int, **rest: Any) -> Material:
    """The first `pairs` rows and the first `prompts` different prompts of tokenized test rows.

    A prompt that leaves less than `max_new_tokens` of the model's context is cut from its left, but for its first
    token, before it is answered.
    """
    rows = rows.select(range(min(pairs, len(rows))))
    room = context - max_new_tokens
    cut = (ids if len(ids) <= room else ids[:1] + ids[1 - room :] for ids in rows["prompt_ids"])
    questions = list(dict.fromkeys(tuple(ids) for ids in cut))[:prompts]
    return Material(
        prompts=list(rows["prompt_ids"]), chosen=list(rows["chosen_ids"]), rejected=list(rows["rejected_ids"]),
        questions=[list(ids) for ids in questions], max_new_tokens=max_new_tokens, **rest,
    )  # fmt: skip


def measure(policies: list[Policy], base: str | None, on: Material, file: str = "eval.json") -> None:
    """Write the `file` of each policy whose present one was not made with these settings, and its samples.json.

    Every policy is measured against the one named `base`, if any, and against its own reference. `policies` come in an
    order in which each stands before what it is measured against; each is then loaded once, one at a time.
    """
    hashes = {p.name: weights_of(p.path, on.loading.model.revision) for p in policies}
    needed = {p.name: (p.name, *others(p, base).values()) for p in policies}
    settings = {name: on.settings({each: hashes[each] for each in names}) for name, names in needed.items()}
    todo = [p for p in policies if not measured(p.folder / file, settings[p.name])]
    wanted = {name for p in todo for name in needed[p.name]}
    pair_logprobs: dict[str, Any] = {}
    answers: dict[str, list[list[int]]] = {}
    answer_sums: dict[tuple[str, str], list[float]] = {}  # (sampled from, scored by)
    for policy in (p for p in policies if p.name in wanted):
        model = load_policy(policy.path, on.loading, on=device())
        label = f"measuring {policy.name}"
        pair_logprobs[policy.name] = [
            [float(row.sum()) for row in answer_logprobs(model, on.prompts, side, on.batch_size, label)]
            for side in (on.chosen, on.rejected)
        ]
        if policy in todo:
            answers[policy.name] = sample(
                model, on.questions, on.ends, on.tokenizer.pad_token_id, on.max_new_tokens, 4 * on.batch_size, on.seed,
                label=f"sampling {policy.name}",
            )  # fmt: skip
        for other in todo:
            if other.name in answers and policy.name in needed[other.name]:
                rows = answer_logprobs(model, on.questions, answers[other.name], on.batch_size, label)
                answer_sums[other.name, policy.name] = [float(row.sum()) for row in rows]
        del model
        gc.collect()
    for policy in todo:
        tokens = [len(answer) for answer in answers[policy.name]]
        own_sums = answer_sums[policy.name, policy.name]

        def against(name: str, policy=policy, tokens=tokens, own_sums=own_sums) -> dict[str, Any]:
            gaps = [a - b for a, b in zip(own_sums, answer_sums[policy.name, name], strict=True)]
            return compared(pair_logprobs[policy.name], pair_logprobs[name], gaps, tokens, on.beta)

        texts, ended = texts_of(answers[policy.name], on)
        questions = on.tokenizer.batch_decode(on.questions, skip_special_tokens=True)
        own = {
            "perplexity_chosen": estimates.perplexity(pair_logprobs[policy.name][0], [len(a) for a in on.chosen]),
            "stop_rate": estimates.share([float(end) for end in ended]),
            "answer_tokens": estimates.mean([float(n) for n in tokens]),
            **{f"score.{name}": estimates.mean(judge(questions, texts, ended)) for name, judge in on.judges.items()},
        }
        samples = [{"prompt": q, "answer": t, "ended": e} for q, t, e in zip(questions, texts, ended, strict=True)]
        if file == "eval.json":
            write_json(policy.folder / "samples.json", samples)
        result = {"policy": policy.name, "dataset": on.dataset, "settings": settings[policy.name]}
        result["against"] = {block: against(name) for block, name in others(policy, base).items()}
        write_json(policy.folder / file, {**result, "own": own})


def compared(policy: Any, reference: Any, gaps: list[float], tokens: list[int], beta: float) -> dict[str, Any]:
    """Estimates of one policy against one reference.

    `policy` and `reference` are (chosen, rejected) lists of summed log-probs of the test answers, in nats; `gaps` are
    log pi - log pi_ref of answers sampled from the policy, `tokens` their lengths.
    """
    chosen, rejected = ([a - b for a, b in zip(*side, strict=True)] for side in zip(policy, reference, strict=True))
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    margin_nats = estimates.mean(margins)
    return {
        "preference_accuracy": estimates.accuracy(margins),
        "margin": estimates.scaled(margin_nats, beta),
        "margin_nats": margin_nats,
        "reward_chosen": estimates.scaled(estimates.mean(chosen), beta),
        "reward_rejected": estimates.scaled(estimates.mean(rejected), beta),
        "kl": estimates.mean(gaps),
        "kl_per_token": estimates.ratio(gaps, tokens),
    }


def others(policy: Policy, base: str | None) -> dict[str, str]:
    """What a policy is measured against: `base`, and its own `reference`, each where there is one."""
    return {block: name for block, name in (("base", base), ("reference", policy.reference)) if name}


def measured(file: Path, settings: dict[str, Any]) -> bool:
    """Whether an eval.json was made with these settings; one that differs in beta alone is scaled to it."""
    found = read_json(file)
    if found is None or {**found["settings"], "beta": settings["beta"]} != settings:
        return False
    factor = settings["beta"] / found["settings"]["beta"]
    if factor != 1:
        for block in found["against"].values():
            for key in ("margin", "reward_chosen", "reward_rejected"):
                block[key] = estimates.scaled(block[key], factor)
        write_json(file, {**found, "settings": settings})
    return True


def texts_of(answers: list[list[int]], on: Material) -> tuple[list[str], list[bool]]:
    """Sampled answers as text, and whether each closed with an end token."""
    ended = [bool(answer) and answer[-1] in on.ends for answer in answers]
    return on.tokenizer.batch_decode(answers, skip_special_tokens=True), ended


def gather(home: Path) -> dict[str, Any]:
    """results.json and generation_samples.json of a name, made anew from the files of its policies."""
    files = [
        home / "base" / "eval.json",
        *sorted(home.glob("sft/*/eval.json")),
        *sorted(home.glob("dpo/**/eval.json")),
    ]
    found = [(file.parent, read_json(file)) for file in files if file.is_file()]
    results = {"policies": {result["policy"]: result for _, result in found}}
    by_prompt: dict[str, dict[str, str]] = {}
    for folder, result in found:
        for row in read_json(folder / "samples.json") or []:
            by_prompt.setdefault(row["prompt"], {})[result["policy"]] = row["answer"]
    write_json(home / "results.json", results)
    samples = [{"prompt": prompt, "answers": answers} for prompt, answers in by_prompt.items()]
    write_json(home / "generation_samples.json", samples)
    return results
