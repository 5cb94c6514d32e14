"""Writes eval.json and the two tables of each policy, and for a name results.json and generation_samples.json."""

import functools
import hashlib
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from dpo_pipeline import estimates
from dpo_pipeline.content_hash import content_hash
from dpo_pipeline.evaluation.judging import JudgingPlan, run_judges
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
from dpo_pipeline.judges.judge import Judge
from dpo_pipeline.locks import file_lock
from dpo_pipeline.record import read_json, write_json

REFUSALS = ("refusal_unsafe", "over_refusal_safe")
LINE = ["policy", "prompt_set", "temperature", "draw", "row"]  # names a line of the completions
EVAL_FILES = ("base/eval.json", "sft/*/eval.json", "dpo/*/eval.json", "dpo/*/*/eval.json")  # `**` follows no link


def judge_and_write(
    home: Path, comparisons: dict[str, Comparison], judges: dict[str, Judge], plan: JudgingPlan
) -> dict[str, Any]:
    """Judge what was measured, and write the results of each file; those of a judge that failed stay as they were."""
    stale = stale_judges(judges, read_json(home / "results.json"))
    for file, comparison in comparisons.items():
        run_judges(comparison, judges, plan)
        results, more = summarize_comparison(comparison, plan)
        write_results(comparison, results, file, stale)
        if file == "eval.json":
            folders = None if comparison.base else [policy.folder for policy in comparison.shown_policies]
            extra = more
    return write_name_results(home, folders, extra, stale)


def stale_judges(judges: dict[str, Judge], earlier: dict[str, Any] | None) -> set[str]:
    """The judges whose earlier numbers are those of another one: asked again in another version, or in none.

    A judge without a version gives the same numbers each time, unless people or a trained policy stand behind it.
    """
    versions = {name: counts["version"] for name, counts in (earlier or {}).get("judges", {}).items()}
    return {
        name
        for name, judge in judges.items()
        if versions.get(name) != judge.version or (judge.version is None and judge.post_training_only)
    }


@functools.cache
def results_version() -> str:
    """A hash of the libraries' versions and of the code that an estimate rests on: an upgrade mixes no numbers."""
    code = [content_hash(Path(__file__).parent, (".py",)), content_hash(Path(estimates.__file__))]
    return hashlib.sha256(str([*code, sorted(measuring_versions().items())]).encode()).hexdigest()[:16]


def summarize_comparison(comparison: Comparison, plan: JudgingPlan) -> tuple[dict[str, Any], dict[str, Any]]:
    """The eval.json of each shown policy, by name, and what results.json holds beside them."""
    table, results = comparison.completions, {}
    comparisons, ratings = compare_all(comparison)
    extra = {"comparisons": comparisons, "judges": comparison.judge_counts, "notable": notable_changes(comparison)}
    for name, function in (("safety", safety), ("bias", bias)):
        lines = table[table["prompt_set"] == name]
        if len(lines):
            lines = lines.dropna(axis="columns", how="all")  # of what is measured on other prompts
            policies = lines["policy"].unique()[::-1]  # the base first
            extra[name] = {policy: function(lines[lines["policy"] == policy]) for policy in policies}
    for policy in comparison.shown_policies:
        references = comparison.references_of(policy)
        weights = {name: comparison.weights[name] for name in (policy.name, *references.values())}
        settings = {"beta": policy.beta, "version": results_version(), "weights": weights}
        own = own_estimates(policy, comparison) | judged_estimates(policy.name, comparison)
        if plan.temperatures:  # else only some policies of the name meet: what evaluate says of all of them stays
            own |= ratings.get(policy.name, {})
        refusals = extra.get("safety", {}).get(policy.name, {})
        results[policy.name] = {
            "policy": policy.name,
            "reference": policy.reference,
            "sft": policy.sft,
            "dataset": comparison.eval_set.dataset,
            "settings": comparison.eval_set.settings() | settings,
            "against": {kind: estimates_against(policy, kind, name, comparison) for kind, name in references.items()},
            "own": own | {key: refusals[key] for key in REFUSALS if key in refusals},
        }
    if best := best_of_n(comparison, plan):
        extra["best_of"] = best | {"own": judged_estimates(best["name"], comparison) | ratings.get(best["name"], {})}
    return results, extra


def write_results(comparison: Comparison, results: dict[str, Any], file: str, stale: set[str]) -> None:
    """Write the `file` of each policy and its tables; what others measured with the same settings stays."""
    for policy in comparison.shown_policies:
        result, earlier = results[policy.name], read_json(policy.folder / file)
        if earlier and earlier["settings"] == result["settings"]:
            old = {key: value for key, value in earlier["own"].items() if (*key.split("."), "")[1] not in stale}
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
        merged = lines.merge(earlier[same + columns], on=same, how="left")
        group = key[:-1]  # all lines of a prompt set at a temperature are measured together
        is_new = pd.MultiIndex.from_frame(earlier[group]).isin(pd.MultiIndex.from_frame(lines[group]))
        lines = pd.concat([merged, earlier[~is_new]])
    write_table(pa.Table.from_pandas(lines, preserve_index=False), file)


def write_name_results(
    home: Path, folders: list[Path] | None, extra: dict[str, Any], stale: set[str]
) -> dict[str, Any]:
    """Write results.json and generation_samples.json in `home`, from all policies of the name or those of `folders`.

    `extra` is stored beside the policies. What earlier evaluations left there stays while no policy's settings change.
    """
    with file_lock(home / "results.json"):
        if folders is None:
            folders = [file.parent for pattern in EVAL_FILES for file in sorted(home.glob(pattern))]
        policies, answers = {}, {}
        # An older version of this package wrote no tables, and other numbers.
        for folder in [folder for folder in folders if (folder / "completions.parquet").is_file()]:
            result = read_json(folder / "eval.json")
            policies[result["policy"]] = result
            samples = {"policy": result["policy"], "prompt_set": result["settings"]["prompts_file"] or "test"}
            samples |= {"temperature": 1.0, "draw": 0}
            filters = [(column, "==", value) for column, value in samples.items()]
            lines = pd.read_parquet(folder / "completions.parquet", columns=["prompt", "text"], filters=filters)
            for prompt, text in zip(lines["prompt"], lines["text"], strict=True):
                answers.setdefault(prompt, {})[result["policy"]] = text
        results, earlier = {"policies": policies, **extra}, read_json(home / "results.json") or {"policies": {}}
        known = [name for name in earlier["policies"] if name in policies]
        if known and all(earlier["policies"][name]["settings"] == policies[name]["settings"] for name in known):
            results = merge_results(earlier, results, stale)
        write_json(home / "results.json", results)
        rows = [{"prompt": prompt, "answers": by_policy} for prompt, by_policy in answers.items()]
        write_json(home / "generation_samples.json", rows)
    return results


def merge_results(earlier: dict[str, Any], results: dict[str, Any], stale: set[str]) -> dict[str, Any]:
    """The results, with what earlier ones say of other judges, policies and prompts."""
    merged = {**earlier, **results, "notable": earlier["notable"] | results["notable"]}
    for key in ("comparisons", "judges"):
        merged[key] = {name: value for name, value in earlier[key].items() if name not in stale} | results[key]
    for judge, rows in results["comparisons"].items():
        if judge not in stale:
            pairs = {frozenset((row["one"], row["other"])) for row in rows}
            old = earlier["comparisons"].get(judge, [])
            merged["comparisons"][judge] = rows + [row for row in old if {row["one"], row["other"]} not in pairs]
            adjust(merged["comparisons"][judge])
    return merged
