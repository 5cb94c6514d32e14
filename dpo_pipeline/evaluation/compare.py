"""From what was recorded of each policy to estimates: eval.json, results.json, and the rows behind them."""

import math
import statistics
from pathlib import Path
from typing import Any

from dpo_pipeline import estimates
from dpo_pipeline.distributed import on_main_process
from dpo_pipeline.evaluation.eval_set import EvalSet
from dpo_pipeline.evaluation.measure import (
    SAMPLES,
    Measurements,
    Policy,
    SamplingRequest,
    measure_policies,
    references_of,
)
from dpo_pipeline.judges.judge import Judge, drop_unparsed
from dpo_pipeline.judges.verdicts import scores
from dpo_pipeline.run_folder import read_json, write_json

Verdicts = list[float | None]
BINS = 4  # of pairs, with as many in each


def measure_and_write(
    policies: list[Policy], base: str | None, eval_set: EvalSet, file: str, judges: dict[str, Judge], cache: Path
) -> None:
    """Record what is not recorded yet of policies, and write the `file` of each; called by every process.

    `judges` score the sampled completions; their verdicts are kept in `cache`.
    """
    shown = [policy for policy in policies if policy.shown]
    measurements = measure_policies(
        policies,
        base,
        eval_set,
        [SamplingRequest(SAMPLES, eval_set.prompt_set, to=tuple(policy.name for policy in shown))],
    )

    def write() -> None:
        by_judge = {}
        for policy in shown:
            completions = eval_set.completions(eval_set.prompt_set, measurements.completions[policy.name, SAMPLES])
            by_judge[policy.name] = {
                name: scores(judge, completions, cache, f"scores by {name}") for name, judge in judges.items()
            }
        own = {
            policy: {f"score.{name}": estimates.mean(drop_unparsed(values)) for name, values in found.items()}
            for policy, found in by_judge.items()
        }
        write_results(shown, base, eval_set, measurements, own, by_judge, file, complete=False)

    on_main_process(write)


def write_results(
    policies: list[Policy],
    base: str | None,
    eval_set: EvalSet,
    measurements: Measurements,
    judge_estimates: dict[str, dict[str, Any]],
    scored: dict[str, dict[str, Verdicts]],
    file: str,
    complete: bool = True,
) -> None:
    """Write the `file` of each policy, and beside an eval.json its pairs and its samples, with every number of each.

    `judged` are further estimates of each policy's own completions, `scored` each completion's score by judge. Where
    these are not the `whole`, what the file says already stays, if it was made of the same weights and data.
    """
    for policy in policies:
        completions, name = measurements.completions[policy.name, SAMPLES], policy.name
        blocks = references_of(policy, base)
        weights = {each: measurements.weights[each] for each in dict.fromkeys((name, *blocks.values()))}
        settings, before = eval_set.settings(weights, policy.beta), read_json(policy.folder / file)
        against = {block: estimates_against(policy, other, eval_set, measurements) for block, other in blocks.items()}
        own = {
            **own_estimates(eval_set, measurements.pairs[name]["chosen"], completions),
            **judge_estimates.get(name, {}),
        }
        if not complete and before and {**before["settings"], "beta": policy.beta} == settings:
            own = {**before["own"], **own}
        result = {"policy": name, "dataset": eval_set.dataset, "settings": settings, "against": against, "own": own}
        if file == "eval.json":
            write_rows(policy, blocks, eval_set, measurements, scored.get(name, {}))
        write_json(policy.folder / file, result)


def estimates_against(policy: Policy, opponent: str, eval_set: EvalSet, measurements: Measurements) -> dict[str, Any]:
    """Estimates of one policy against another, in nats but for the rewards and the margin, which have its beta."""
    sides = {
        side: [
            a - b
            for a, b in zip(measurements.pairs[policy.name][side], measurements.pairs[opponent][side], strict=True)
        ]
        for side in ("chosen", "rejected")
    }
    tokens = {"chosen": list(map(len, eval_set.chosen)), "rejected": list(map(len, eval_set.rejected))}
    margins = [c - r for c, r in zip(sides["chosen"], sides["rejected"], strict=True)]
    per_token = {side: [v / n for v, n in zip(sides[side], tokens[side], strict=True)] for side in sides}
    gaps = kl_gaps(policy, opponent, measurements)
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
    found["kl_per_token"] = estimates.ratio(gaps, [len(ids) for ids in measurements.completions[policy.name, SAMPLES]])
    longer = [float(c - r) for c, r in zip(tokens["chosen"], tokens["rejected"], strict=True)]
    leaning = [c - r for c, r in zip(*measurements.pairs[opponent].values(), strict=True)]
    return {
        **found,
        "accuracy_by_source": by_source([row["source"] for row in eval_set.rows], margins),
        "accuracy_by_length_difference": by_bin(longer, margins, policy.beta),
        "accuracy_by_reference_margin": by_bin(leaning, margins, policy.beta),
    }


def kl_gaps(policy: Policy, opponent: str, measurements: Measurements) -> list[float]:
    """log pi - log pi_ref of each completion sampled from the policy, in nats: their mean is the KL."""
    return [
        a - b
        for a, b in zip(
            measurements.sums[policy.name, policy.name], measurements.sums[policy.name, opponent], strict=True
        )
    ]


def by_source(sources: list[str], margins: list[float]) -> dict[str, Any]:
    """Accuracy on the pairs of each source."""
    return {
        source: estimates.accuracy([m for s, m in zip(sources, margins, strict=True) if s == source])
        for source in sorted(set(sources))
    }


def by_bin(values: list[float], margins: list[float], beta: float) -> list[dict[str, Any]]:
    """Accuracy on the pairs in quarters of another quantity, with the accuracy that the policy's own rewards predict.

    Predicted: the mean of sigmoid(beta * |margin|), the probability that the Bradley-Terry model gives to the
    completion that it prefers; beside it the accuracy says how well calibrated the implicit reward is. Pairs of equal
    `by` share a bin.
    """
    rows = sorted(zip(values, margins, strict=True))
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


def own_estimates(eval_set: EvalSet, chosen: list[float], completions: list[list[int]]) -> dict[str, Any]:
    """Estimates of a policy that need no other: of the chosen completions' log-probs, and of its own completions."""
    bare = [ids[:-1] if ids[-1] in eval_set.eos_ids else ids for ids in completions]
    found = {
        "perplexity_chosen": estimates.perplexity(chosen, list(map(len, eval_set.chosen))),
        "stop_rate": estimates.proportion([float(ids[-1] in eval_set.eos_ids) for ids in completions]),
        "completion_tokens": estimates.mean([float(len(ids)) for ids in completions]),
        "repetition": estimates.mean([estimates.repetition(ids) for ids in bare]),
    }
    for n in (1, 2):
        if any(len(ids) >= n for ids in bare):
            found[f"distinct_{n}"] = estimates.distinct(bare, n)
    return found


def write_rows(
    policy: Policy, blocks: dict[str, str], eval_set: EvalSet, measurements: Measurements, scored: dict[str, Verdicts]
) -> None:
    """Write pairs.json and samples.json of a policy: each test pair and each sampled completion with its numbers."""
    pairs = []
    for i, row in enumerate(eval_set.rows):
        logps = {
            name: {side: measurements.pairs[of][side][i] for side in ("chosen", "rejected")}
            for name, of in {"policy": policy.name, **blocks}.items()
        }
        lengths = {"chosen_tokens": len(eval_set.chosen[i]), "rejected_tokens": len(eval_set.rejected[i])}
        pairs.append({"origin": row["origin"], "source": row["source"], **lengths, "logprobs": logps})
    write_json(policy.folder / "pairs.json", pairs)
    given = eval_set.completions(eval_set.prompt_set, measurements.completions[policy.name, SAMPLES])
    prompts = eval_set.tokenizer.batch_decode(eval_set.prompt_set.ids, skip_special_tokens=True)
    sums = {"policy": policy.name, **blocks}
    samples = [
        {
            "prompt": prompt,
            "answer": completion.text,
            "ended": completion.ended,
            "tokens": len(completion.ids),
            "logprobs": {name: measurements.sums[policy.name, of][i] for name, of in sums.items()},
            "scores": {judge: values[i] for judge, values in scored.items()},
        }
        for i, (prompt, completion) in enumerate(zip(prompts, given, strict=True))
    ]
    write_json(policy.folder / "samples.json", samples)


def write_name_results(home: Path, folders: list[Path] | None = None, **more: Any) -> dict[str, Any]:
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
    samples = [{"prompt": prompt, "answers": completions} for prompt, completions in by_prompt.items()]
    write_json(home / "generation_samples.json", samples)
    return results


def settings_in(policies: dict[str, Any]) -> dict[str, Any]:
    """What each policy's numbers were made of."""
    return {name: result["settings"] for name, result in policies.items()}
