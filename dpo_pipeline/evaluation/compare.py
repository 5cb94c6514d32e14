"""From what was recorded of each policy to estimates: eval.json, results.json, and the rows behind them."""

import math
import statistics
from pathlib import Path
from typing import Any

from dpo_pipeline import estimates
from dpo_pipeline.evaluation.material import Material
from dpo_pipeline.evaluation.records import SAMPLES, Ask, Policy, Records, others, record
from dpo_pipeline.judges.judge import Judge, readable
from dpo_pipeline.judges.verdicts import scores
from dpo_pipeline.machine import together
from dpo_pipeline.runs import read_json, write_json

Verdicts = list[float | None]
BINS = 4  # of pairs, with as many in each


def measure(
    policies: list[Policy], base: str | None, on: Material, file: str, judges: dict[str, Judge], cache: Path
) -> None:
    """Record what is not recorded yet of policies, and write the `file` of each; called by every process.

    `judges` score the sampled answers; their verdicts are kept in `cache`.
    """
    shown = [policy for policy in policies if policy.shown]
    records = record(policies, base, on, [Ask(SAMPLES, on.questions, to=tuple(policy.name for policy in shown))])

    def write() -> None:
        by_judge = {}
        for policy in shown:
            answers = on.answers(on.questions, records.answers[policy.name, SAMPLES])
            by_judge[policy.name] = {
                name: scores(judge, answers, cache, f"scores by {name}") for name, judge in judges.items()
            }
        own = {
            policy: {f"score.{name}": estimates.mean(readable(values)) for name, values in found.items()}
            for policy, found in by_judge.items()
        }
        write_results(shown, base, on, records, own, by_judge, file, whole=False)

    together(write)


def write_results(
    policies: list[Policy],
    base: str | None,
    on: Material,
    records: Records,
    judged: dict[str, dict[str, Any]],
    scored: dict[str, dict[str, Verdicts]],
    file: str,
    whole: bool = True,
) -> None:
    """Write the `file` of each policy, and beside an eval.json its pairs and its samples, with every number of each.

    `judged` are further estimates of each policy's own answers, `scored` each answer's score by judge. Where these are
    not the `whole`, what the file says already stays, if it was made of the same weights and data.
    """
    for policy in policies:
        answers, name = records.answers[policy.name, SAMPLES], policy.name
        blocks = others(policy, base)
        weights = {each: records.weights[each] for each in dict.fromkeys((name, *blocks.values()))}
        settings, before = on.settings(weights, policy.beta), read_json(policy.folder / file)
        against = {block: compared(policy, other, on, records) for block, other in blocks.items()}
        own = {**own_estimates(on, records.pairs[name]["chosen"], answers), **judged.get(name, {})}
        if not whole and before and {**before["settings"], "beta": policy.beta} == settings:
            own = {**before["own"], **own}
        result = {"policy": name, "dataset": on.dataset, "settings": settings, "against": against, "own": own}
        if file == "eval.json":
            write_rows(policy, blocks, on, records, scored.get(name, {}))
        write_json(policy.folder / file, result)


def compared(policy: Policy, other: str, on: Material, records: Records) -> dict[str, Any]:
    """Estimates of one policy against another, in nats but for the rewards and the margin, which have its beta."""
    sides = {
        side: [a - b for a, b in zip(records.pairs[policy.name][side], records.pairs[other][side], strict=True)]
        for side in ("chosen", "rejected")
    }
    tokens = {"chosen": list(map(len, on.chosen)), "rejected": list(map(len, on.rejected))}
    margins = [c - r for c, r in zip(sides["chosen"], sides["rejected"], strict=True)]
    per_token = {side: [v / n for v, n in zip(sides[side], tokens[side], strict=True)] for side in sides}
    gaps = kl_gaps(policy, other, records)
    margin_nats = estimates.mean(margins)
    found = {
        "preference_accuracy": estimates.accuracy(margins),
        "length_normalised_accuracy": estimates.accuracy(
            [c - r for c, r in zip(per_token["chosen"], per_token["rejected"], strict=True)]
        ),
        "margin": estimates.scaled(margin_nats, policy.beta),
        "margin_nats": margin_nats,
    }
    for side in sides:
        found[f"reward_{side}"] = estimates.scaled(estimates.mean(sides[side]), policy.beta)
        found[f"logprob_change_{side}_per_token"] = estimates.ratio(sides[side], tokens[side])
    found["kl"] = estimates.mean(gaps)
    found["kl_standard_error"] = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
    found["kl_per_token"] = estimates.ratio(gaps, [len(ids) for ids in records.answers[policy.name, SAMPLES]])
    longer = [float(c - r) for c, r in zip(tokens["chosen"], tokens["rejected"], strict=True)]
    leaning = [c - r for c, r in zip(*records.pairs[other].values(), strict=True)]
    return {
        **found,
        "accuracy_by_source": by_source([row["source"] for row in on.rows], margins),
        "accuracy_by_length_difference": by_bin(longer, margins, policy.beta),
        "accuracy_by_reference_margin": by_bin(leaning, margins, policy.beta),
    }


def kl_gaps(policy: Policy, other: str, records: Records) -> list[float]:
    """log pi - log pi_ref of each answer sampled from the policy, in nats: their mean is the KL."""
    return [
        a - b for a, b in zip(records.sums[policy.name, policy.name], records.sums[policy.name, other], strict=True)
    ]


def by_source(sources: list[str], margins: list[float]) -> dict[str, Any]:
    """Accuracy on the pairs of each source."""
    return {
        source: estimates.accuracy([m for s, m in zip(sources, margins, strict=True) if s == source])
        for source in sorted(set(sources))
    }


def by_bin(by: list[float], margins: list[float], beta: float) -> list[dict[str, Any]]:
    """Accuracy on the pairs in quarters of another quantity, with the accuracy that the policy's own rewards predict.

    Predicted: the mean of sigmoid(beta * |margin|), the probability that the Bradley-Terry model gives to the answer
    that it prefers; beside it the accuracy says how well calibrated the implicit reward is. Pairs of equal `by` share
    a bin.
    """
    rows = sorted(zip(by, margins, strict=True))
    edges = sorted({rows[len(rows) * i // BINS][0] for i in range(BINS)})
    bins = []
    for low, high in zip(edges, [*edges[1:], math.inf], strict=True):
        inside = [row for row in rows if low <= row[0] < high]
        own = [m for _, m in inside]
        predicted = [1 / (1 + math.exp(-min(beta * abs(m), 700))) for m in own]
        bins.append(
            {
                "from": inside[0][0],
                "to": inside[-1][0],
                "accuracy": estimates.accuracy(own),
                "predicted": estimates.mean(predicted),
            }
        )
    return bins


def own_estimates(on: Material, chosen: list[float], answers: list[list[int]]) -> dict[str, Any]:
    """Estimates of a policy that need no other: of the chosen answers' log-probs, and of its own answers."""
    bare = [ids[:-1] if ids[-1] in on.ends else ids for ids in answers]
    found = {
        "perplexity_chosen": estimates.perplexity(chosen, list(map(len, on.chosen))),
        "stop_rate": estimates.share([float(ids[-1] in on.ends) for ids in answers]),
        "answer_tokens": estimates.mean([float(len(ids)) for ids in answers]),
        "repetition": estimates.mean([estimates.repetition(ids) for ids in bare]),
    }
    for n in (1, 2):
        if any(len(ids) >= n for ids in bare):
            found[f"distinct_{n}"] = estimates.distinct(bare, n)
    return found


def write_rows(
    policy: Policy, blocks: dict[str, str], on: Material, records: Records, scored: dict[str, Verdicts]
) -> None:
    """Write pairs.json and samples.json of a policy: each test pair and each sampled answer with its numbers."""
    pairs = []
    for i, row in enumerate(on.rows):
        logps = {
            name: {side: records.pairs[of][side][i] for side in ("chosen", "rejected")}
            for name, of in {"policy": policy.name, **blocks}.items()
        }
        lengths = {"chosen_tokens": len(on.chosen[i]), "rejected_tokens": len(on.rejected[i])}
        pairs.append({"origin": row["origin"], "source": row["source"], **lengths, "logprobs": logps})
    write_json(policy.folder / "pairs.json", pairs)
    given = on.answers(on.questions, records.answers[policy.name, SAMPLES])
    prompts = on.tokenizer.batch_decode(on.questions.ids, skip_special_tokens=True)
    sums = {"policy": policy.name, **blocks}
    samples = [
        {
            "prompt": prompt,
            "answer": answer.text,
            "ended": answer.ended,
            "tokens": len(answer.ids),
            "logprobs": {name: records.sums[policy.name, of][i] for name, of in sums.items()},
            "scores": {judge: values[i] for judge, values in scored.items()},
        }
        for i, (prompt, answer) in enumerate(zip(prompts, given, strict=True))
    ]
    write_json(policy.folder / "samples.json", samples)


def gather(home: Path, folders: list[Path] | None = None, **more: Any) -> dict[str, Any]:
    """results.json and generation_samples.json in `home`, made anew from the files of all policies of a name.

    Or from those of `folders`. `more` stands beside the policies; without it what stood there stays, where all that
    it was made of is the same.
    """
    places = ["base/eval.json", "sft/*/eval.json", "dpo/**/eval.json"]
    of_name = [file.parent for place in places for file in sorted(home.glob(place))]
    found = [(folder, read_json(folder / "eval.json")) for folder in folders or of_name]
    policies = {result["policy"]: result for _, result in found}
    before = read_json(home / "results.json")
    if not more and before and settings_in(before["policies"]) == settings_in(policies):
        more = {key: value for key, value in before.items() if key != "policies"}
    by_prompt: dict[str, dict[str, str]] = {}
    for folder, result in found:
        for row in read_json(folder / "samples.json") or []:
            by_prompt.setdefault(row["prompt"], {})[result["policy"]] = row["answer"]
    results = {"policies": policies, **more}
    write_json(home / "results.json", results)
    samples = [{"prompt": prompt, "answers": answers} for prompt, answers in by_prompt.items()]
    write_json(home / "generation_samples.json", samples)
    return results


def settings_in(policies: dict[str, Any]) -> dict[str, Any]:
    """What each policy's numbers were made of."""
    return {name: result["settings"] for name, result in policies.items()}
