"""Writes eval.json and the two tables of each policy, and for a name results.json and generation_samples.json."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

import dpo_pipeline
from dpo_pipeline.content_hash import content_hash
from dpo_pipeline.evaluation.judging import Judged, JudgingPlan
from dpo_pipeline.evaluation.measure import Comparison, measuring_versions, write_table
from dpo_pipeline.evaluation.subsets import bias, notable_changes, safety
from dpo_pipeline.evaluation.summary import (
    adjust,
    best_of_n,
    compare_all,
    estimates_against,
    judged_estimates,
    own_estimates,
)
from dpo_pipeline.locks import file_lock
from dpo_pipeline.record import read_json, write_json

REFUSALS = ("refusal_unsafe", "over_refusal_safe")
LINE = ["policy", "prompt_set", "temperature", "draw", "row"]  # names a line of the completions


@functools.cache
def code_version() -> str:
    """A hash of the libraries' versions and of all code that an estimate rests on: an upgrade mixes no numbers."""
    folder = Path(dpo_pipeline.__file__).parent
    return content_hash(folder / "evaluation", (".py",))[:16] + str(sorted(measuring_versions().items()))


def summarize(comparison: Comparison, judged: Judged, plan: JudgingPlan) -> tuple[dict[str, Any], dict[str, Any]]:
    """The eval.json of each shown policy, by name, and what results.json holds beside them."""
    version = hashlib.sha256(code_version().encode()).hexdigest()[:16]
    comparisons, ratings = compare_all(comparison, judged.verdicts)
    extra: dict[str, Any] = {"comparisons": comparisons, "judges": judged.counts}
    extra["notable"] = notable_changes(comparison)
    table, results = comparison.completions, {}
    for name, function in (("safety", safety), ("bias", bias)):
        lines = table[table["prompt_set"] == name].dropna(axis="columns", how="all")
        if len(lines):
            extra[name] = {
                policy: function(lines[lines["policy"] == policy]) for policy in lines["policy"].unique()[::-1]
            }
    for policy in comparison.shown_policies:
        references = comparison.references_of(policy)
        names = dict.fromkeys((policy.name, *references.values()))
        weights = {name: comparison.weights[name] for name in names}
        settings = comparison.eval_set.settings() | {"beta": policy.beta, "version": version, "weights": weights}
        own = own_estimates(policy, comparison) | judged_estimates(policy.name, comparison, judged.verdicts)
        if plan.temperatures:  # else only some policies of the name meet, and not in all
            own |= ratings.get(policy.name, {})
        of_safety = extra.get("safety", {}).get(policy.name, {})
        results[policy.name] = {
            "policy": policy.name,
            "dataset": comparison.eval_set.dataset,
            "settings": settings,
            "against": {kind: estimates_against(policy, kind, name, comparison) for kind, name in references.items()},
            "own": own | {key: of_safety[key] for key in REFUSALS if key in of_safety},
        }
    if best := best_of_n(comparison, plan):
        name = best["name"]
        extra["best_of"] = best | {"own": judged_estimates(name, comparison, judged.verdicts) | ratings.get(name, {})}
    return results, extra


def write_results(
    comparison: Comparison, results: dict[str, Any], file: str, is_replaced: Callable[[str], bool]
) -> None:
    """Write the `file` of each policy and its tables; what another evaluation measured with the same settings stays.

    `is_replaced` says of a judge's name whether its earlier numbers are those of another judge, and go.
    """
    for policy in comparison.shown_policies:
        result, earlier = results[policy.name], read_json(policy.folder / file)
        if earlier and earlier["settings"] == result["settings"]:
            old = {key: value for key, value in earlier["own"].items() if not is_replaced((*key.split("."), "")[1])}
            result["own"] = old | result["own"]
        write_json(policy.folder / file, result)
        weights = comparison.weights[policy.name]
        pairs = comparison.pairs[comparison.pairs["policy"] == policy.name].assign(weights=weights)
        merge_table(policy.folder / "pairs.parquet", pairs, ["policy", "split", "row"])
        lines = comparison.completions.drop(columns="completion")
        is_own = (lines["policy"] == policy.name) | lines["policy"].str.endswith(f" of {policy.name}")
        merge_table(policy.folder / "completions.parquet", lines[is_own].assign(weights=weights), LINE)


def merge_table(file: Path, lines: pd.DataFrame, key: list[str]) -> None:
    """Add lines to a table on disk, and to these the columns it has of the same ones, such as other judges' scores."""
    if file.is_file():
        earlier = pd.read_parquet(file)
        earlier = earlier[earlier["weights"].isin(lines["weights"])]
        same = [*key, *(["prompt", "text"] if "text" in lines else [])]
        columns = earlier.columns.difference(lines.columns).tolist()
        merged = lines.merge(earlier[same + columns].drop_duplicates(key), on=same, how="left")
        group = key[:-1]  # all lines of a prompt set at a temperature are measured together
        is_new = pd.MultiIndex.from_frame(earlier[group]).isin(pd.MultiIndex.from_frame(lines[group]))
        lines = pd.concat([merged, earlier[~is_new]])
    write_table(pa.Table.from_pandas(lines, preserve_index=False), file)


def write_name_results(
    home: Path, folders: list[Path] | None, extra: dict[str, Any], is_replaced: Callable[[str], bool]
) -> dict[str, Any]:
    """Write results.json and generation_samples.json in `home`, from all policies of the name or those of `folders`.

    `extra` is stored beside the policies. What earlier evaluations left there stays while no policy's settings change.
    """
    with file_lock(home / "results.json"):
        if folders is None:
            patterns = ("base/eval.json", "sft/*/eval.json", "dpo/**/eval.json")
            folders = [file.parent for pattern in patterns for file in sorted(home.glob(pattern))]
        policies, answers = {}, {}
        for folder in folders:
            result = read_json(folder / "eval.json")
            policies[result["policy"]] = result
            prompt_set = result["settings"]["prompts_file"] or "test"
            lines = pd.read_parquet(folder / "completions.parquet", columns=[*LINE, "prompt", "text"])
            lines = lines[(lines["policy"] == result["policy"]) & (lines["prompt_set"] == prompt_set)]
            lines = lines[(lines["temperature"] == 1) & (lines["draw"] == 0)]
            for prompt, text in zip(lines["prompt"], lines["text"], strict=True):
                answers.setdefault(prompt, {})[result["policy"]] = text
        results = {"policies": policies, **extra}
        earlier = read_json(home / "results.json")
        if earlier and all(
            old["settings"] == policies[name]["settings"]
            for name, old in earlier["policies"].items()
            if name in policies
        ):
            results = merge_extra(earlier, results, is_replaced)
        write_json(home / "results.json", results)
        samples = [{"prompt": prompt, "answers": by_policy} for prompt, by_policy in answers.items()]
        write_json(home / "generation_samples.json", samples)
    return results


def merge_extra(
    earlier: dict[str, Any], results: dict[str, Any], is_replaced: Callable[[str], bool]
) -> dict[str, Any]:
    """The results, with what earlier ones say beside the policies of other judges, policies and prompts."""
    merged = {**earlier, **results}
    for key in ("comparisons", "judges"):
        others = {judge: value for judge, value in earlier.get(key, {}).items() if not is_replaced(judge)}
        merged[key] = others | results[key]
    merged["notable"] = earlier.get("notable", {}) | results["notable"]
    for judge, rows in merged["comparisons"].items():
        pairs = {frozenset((row["one"], row["other"])) for row in results["comparisons"].get(judge, rows)}
        kept = [
            row for row in earlier.get("comparisons", {}).get(judge, []) if {row["one"], row["other"]} not in pairs
        ]
        if judge in results["comparisons"] and kept and not is_replaced(judge):
            merged["comparisons"][judge] = rows + kept
            adjust(merged["comparisons"][judge])
    return merged
