"""Estimates from the tables: of a policy, against another, by kind of pair, by judges; and of Best-of-N."""

import math
from typing import Any

import numpy as np
import pandas as pd

from dpo_pipeline import estimates
from dpo_pipeline.evaluation.judging import NOISE_FLOOR, JudgingPlan
from dpo_pipeline.evaluation.measure import Comparison
from dpo_pipeline.evaluation.policies import Policy
from dpo_pipeline.evaluation.statistics import (
    elo,
    expected_best,
    holm,
    kl_bound,
    length_controlled,
    paired_test,
    win_rate,
)

BINS = 4  # of pairs, with as many in each
SIDES = ("chosen", "rejected")


def estimates_against(policy: Policy, kind: str, opponent: str, comparison: Comparison) -> dict[str, Any]:
    """Estimates against the `base` or the `reference`, in nats; rewards and the margin include the policy's beta."""
    ours, theirs = (pairs_of(comparison, name) for name in (policy.name, opponent))
    changes, margins = changes_against(comparison, policy.name, opponent)
    tokens, margin_nats = {side: ours[f"tokens_{side}"] for side in SIDES}, estimates.mean(margins)
    per_token = changes["chosen"] / tokens["chosen"] - changes["rejected"] / tokens["rejected"]
    results: dict[str, Any] = {
        "preference_accuracy": estimates.accuracy(margins),
        "length_normalised_accuracy": estimates.accuracy(per_token),
        "margin": estimates.scaled(margin_nats, policy.beta),
        "margin_nats": margin_nats,
    }
    for side in SIDES:
        results[f"reward_{side}"] = estimates.scaled(estimates.mean(changes[side]), policy.beta)
        results[f"logprob_change_{side}_per_token"] = estimates.ratio(changes[side], tokens[side])
    samples = comparison.samples(policy.name)
    gaps = samples["logprob"] - samples[f"logprob_{kind}"]
    results["kl"] = estimates.mean(gaps)
    results["kl_standard_error"] = gaps.sem() if len(gaps) > 1 else None
    results["kl_per_token"] = estimates.ratio(gaps, samples["tokens"])
    groups = margins.groupby(ours["source"])
    results["accuracy_by_source"] = {source: estimates.accuracy(group) for source, group in groups}
    length_differences = tokens["chosen"] - tokens["rejected"]
    reference_margins = theirs["logprob_chosen"] - theirs["logprob_rejected"]
    results["accuracy_by_length_difference"] = accuracy_by_bin(length_differences, margins, policy.beta)
    results["accuracy_by_reference_margin"] = accuracy_by_bin(reference_margins, margins, policy.beta)
    return results


def pairs_of(comparison: Comparison, policy: str) -> pd.DataFrame:
    """The lines of a policy's pairs, by row."""
    return comparison.pairs[comparison.pairs["policy"] == policy].set_index("row")


def changes_against(comparison: Comparison, policy: str, opponent: str) -> tuple[dict[str, pd.Series], pd.Series]:
    """The log-prob change of each side of the pairs against the opponent, and the margins, in nats, by row."""
    ours, theirs = (pairs_of(comparison, name) for name in (policy, opponent))
    changes = {side: ours[f"logprob_{side}"] - theirs[f"logprob_{side}"] for side in SIDES}
    return changes, changes["chosen"] - changes["rejected"]


def accuracy_by_bin(values: Any, margins: Any, beta: float) -> list[dict[str, Any]]:
    """The accuracy on the pairs in quarters of another quantity, and the one that the policy's rewards predict.

    Predicted is the mean of sigmoid(beta * |margin|), which shows how well calibrated the implicit reward is. Pairs
    with equal values share a bin.
    """
    pairs = pd.DataFrame({"value": np.asarray(values), "margin": np.asarray(margins)})
    edges = np.unique(np.sort(values)[[len(pairs) * i // BINS for i in range(BINS)]])
    pairs["predicted"] = 1 / (1 + np.exp(-beta * pairs["margin"].abs()))
    return [
        {
            "from": float(group["value"].min()),
            "to": float(group["value"].max()),
            "accuracy": estimates.accuracy(group["margin"]),
            "predicted": estimates.mean(group["predicted"], minimum=0.0),
        }
        for _, group in pairs.groupby(np.searchsorted(edges, pairs["value"], side="right"))
    ]


def own_estimates(policy: Policy, comparison: Comparison) -> dict[str, Any]:
    """Estimates that need no other policy: of the chosen completions' log-probs, and of the policy's own samples."""
    pairs, samples = pairs_of(comparison, policy.name), comparison.samples(policy.name)
    bodies = [ids[:-1] if ended else ids for ids, ended in zip(samples["ids"], samples["ended"], strict=True)]
    results = {
        "perplexity_chosen": estimates.perplexity(pairs["logprob_chosen"].tolist(), pairs["tokens_chosen"].tolist()),
        "stop_rate": estimates.proportion(samples["ended"].astype(float).tolist()),
        "completion_tokens": estimates.mean(samples["tokens"].tolist(), minimum=0.0),
        "repetition": estimates.mean([estimates.repetition(ids) for ids in bodies], minimum=0.0),
    }
    for n in (1, 2):
        if any(len(ids) >= n for ids in bodies):
            results[f"distinct_{n}"] = estimates.distinct(bodies, n)
    return results


def mean_of(column: str, values: Any) -> estimates.Estimate:
    """The mean of a column of the completions: of a length, with no interval below 0."""
    return estimates.mean(list(values), minimum=0.0 if column in ("tokens", "score.length") else -math.inf)


def judged_estimates(name: str, comparison: Comparison) -> dict[str, Any]:
    """The mean scores and the win rates of a policy; what no judge could read is left out."""
    samples, verdicts = comparison.samples(name), comparison.verdicts
    columns = [column for column in samples if column.startswith("score.") and samples[column].notna().any()]
    results = {column: mean_of(column, samples[column].dropna()) for column in columns}
    met = verdicts[(verdicts["label"] != "pair") & (verdicts["policy"] == name) & verdicts["verdict"].notna()]
    for (judge, temperature, label), lines in met.groupby(["judge", "temperature", "label"], sort=False):
        verdict, length_difference, distinct = (
            lines[x].tolist() for x in ("verdict", "length_difference", "distinct")
        )
        if label == NOISE_FLOOR:
            results[f"noise_floor.{judge}"] = win_rate(verdict, distinct)
            continue
        key = f"win_rate.{judge}.{label}" + ("" if temperature == 1 else f".t{temperature:g}")
        results[key] = win_rate(verdict, distinct)
        if controlled := length_controlled(verdict, length_difference, distinct):
            results[f"length_controlled_{key}"] = controlled
    return results


def compare_all(comparison: Comparison) -> tuple[dict[str, Any], dict[str, Any]]:
    """Whether any two policies differ, by judge, and their Elo ratings by policy and key.

    They differ by their scores where the judge scores, else by its verdicts.
    """
    comparisons: dict[str, Any] = {}
    ratings: dict[str, Any] = {}
    shown = {policy.name: policy.sft for policy in comparison.shown_policies}
    anchor = next(name for name in [*shown.values(), comparison.policies[0].name] if name in shown)
    games = comparison.verdicts[comparison.verdicts["label"] == "pair"]
    for judge, of_judge in games.groupby("judge", sort=False):
        comparisons[judge], by_pair = [], {}
        for (one, other), lines in of_judge.groupby(["policy", "opponent"], sort=False):
            by_pair[one, other] = lines["verdict"].tolist()
            lines = lines.dropna(subset="verdict")
            values = pd.DataFrame({"one": lines["verdict"], "other": 0.5})
            if f"score.{judge}" in comparison.completions:
                scores = [comparison.samples(name).set_index("row")[f"score.{judge}"] for name in (one, other)]
                values = pd.DataFrame({"one": scores[0], "other": scores[1]}).dropna()
            if len(lines) and len(values):
                rate = win_rate(lines["verdict"].tolist(), lines["distinct"].tolist())
                test = paired_test(values["one"].tolist(), values["other"].tolist())
                comparisons[judge].append({"one": one, "other": other, "win_rate": rate, **test})
        adjust(comparisons[judge])
        for policy, rating in elo(by_pair, anchor).items():
            ratings.setdefault(policy, {})[f"elo.{judge}"] = rating
    return comparisons, ratings


def adjust(rows: list[dict[str, Any]]) -> None:
    """Set `p_adjusted` of each comparison, by Holm's method over all of them."""
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_adjusted"] = p


def best_of_n(comparison: Comparison, plan: JudgingPlan) -> dict[str, Any] | None:
    """How the scores of the picked completions grow with N, unbiased, for each power of two up to N.

    `kl_bound` is in nats, from the policy that the completions were drawn from. None where nothing could be picked.
    """
    pool = comparison.completions[comparison.completions["draw"] > 0]
    columns = [column for column in pool if column.startswith("score.") and pool[column].notna().all()]
    if not plan.best_of or not len(pool) or f"score.{plan.picking_judge}" not in columns:
        return None
    points, n = [], plan.best_of
    prompts = [group for _, group in pool.groupby("row")]
    for k in [*(2**i for i in range(n.bit_length()) if 2**i < n), n]:
        point = {"n": k, "kl_bound": kl_bound(k)}
        for column in columns:
            picks = [(group[f"score.{plan.picking_judge}"].tolist(), group[column].tolist()) for group in prompts]
            point[column] = mean_of(column, [expected_best(*pick, k) for pick in picks])
        points.append(point)
    names = {"name": plan.best_of_name, "policy": plan.best_of_source, "judge": plan.picking_judge}
    return {**names, "n": n, "points": points}
