"""Estimates of a policy against another, and by itself."""

import math
import statistics
from typing import Any

import numpy as np

from dpo_pipeline import estimates
from dpo_pipeline.evaluation.measure import SAMPLES, Measurements, Policy

BINS = 4  # of pairs, with as many in each


def estimates_against(policy: Policy, opponent: str, measurements: Measurements) -> dict[str, Any]:
    """Estimates of one policy against another, in nats; rewards and the margin include the policy's beta."""
    eval_set, pairs, logprobs = measurements.eval_set, measurements.pairs, measurements.sample_logprobs
    tokens = {side: np.array([len(ids) for ids in completions]) for side, completions in eval_set.sides.items()}
    changes = {side: np.subtract(pairs[policy.name][side], pairs[opponent][side]) for side in tokens}
    per_token = {side: changes[side] / tokens[side] for side in tokens}
    margins = changes["chosen"] - changes["rejected"]
    margin_nats = estimates.mean(margins)
    results = {
        "preference_accuracy": estimates.accuracy(margins),
        "length_normalised_accuracy": estimates.accuracy(per_token["chosen"] - per_token["rejected"]),
        "margin": estimates.scaled(margin_nats, policy.beta),
        "margin_nats": margin_nats,
    }
    for side in tokens:
        results[f"reward_{side}"] = estimates.scaled(estimates.mean(changes[side]), policy.beta)
        results[f"logprob_change_{side}_per_token"] = estimates.ratio(changes[side], tokens[side])
    gaps = np.subtract(logprobs[policy.name, policy.name], logprobs[policy.name, opponent])
    sampled_tokens = [len(completion.ids) for completion in measurements.completions[policy.name, SAMPLES]]
    results["kl"] = estimates.mean(gaps)
    results["kl_standard_error"] = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
    results["kl_per_token"] = estimates.ratio(gaps, sampled_tokens)
    length_differences = tokens["chosen"] - tokens["rejected"]
    reference_margins = np.subtract(pairs[opponent]["chosen"], pairs[opponent]["rejected"])
    sources = [row["source"] for row in eval_set.rows]
    results["accuracy_by_source"] = accuracy_by_source(sources, margins)
    results["accuracy_by_length_difference"] = accuracy_by_bin(length_differences, margins, policy.beta)
    results["accuracy_by_reference_margin"] = accuracy_by_bin(reference_margins, margins, policy.beta)
    return results


def accuracy_by_source(sources: list[str], margins: np.ndarray) -> dict[str, Any]:
    """The accuracy on the pairs of each source."""
    return {source: estimates.accuracy(margins[np.equal(sources, source)]) for source in sorted(set(sources))}


def accuracy_by_bin(values: np.ndarray, margins: np.ndarray, beta: float) -> list[dict[str, Any]]:
    """The accuracy on the pairs in quarters of another quantity, and the accuracy that the policy's rewards predict.

    Predicted is the mean of sigmoid(beta * |margin|), the probability that the Bradley-Terry model gives to the
    completion that it prefers: beside the accuracy it shows how well calibrated the implicit reward is. Pairs with
    equal values share a bin.
    """
    edges = np.unique(np.sort(values)[[len(values) * i // BINS for i in range(BINS)]])
    numbers = np.searchsorted(edges, values, side="right") - 1
    bins = []
    for number in range(len(edges)):
        inside = numbers == number
        predicted = [1 / (1 + math.exp(-beta * abs(margin))) for margin in margins[inside]]
        bins.append(
            {
                "from": float(values[inside].min()),
                "to": float(values[inside].max()),
                "accuracy": estimates.accuracy(margins[inside]),
                "predicted": estimates.mean(predicted),
            }
        )
    return bins


def own_estimates(policy: Policy, measurements: Measurements) -> dict[str, Any]:
    """Estimates that need no other policy: of the chosen completions' log-probs, and of the policy's own samples."""
    eval_set, samples = measurements.eval_set, measurements.completions[policy.name, SAMPLES]
    bodies = [completion.ids[:-1] if completion.ended else completion.ids for completion in samples]
    chosen_tokens = [len(ids) for ids in eval_set.chosen]
    results = {
        "perplexity_chosen": estimates.perplexity(measurements.pairs[policy.name]["chosen"], chosen_tokens),
        "stop_rate": estimates.proportion([float(completion.ended) for completion in samples]),
        "completion_tokens": estimates.mean([float(len(completion.ids)) for completion in samples]),
        "repetition": estimates.mean([estimates.repetition(ids) for ids in bodies]),
    }
    for n in (1, 2):
        if any(len(ids) >= n for ids in bodies):
            results[f"distinct_{n}"] = estimates.distinct(bodies, n)
    return results
