"""Writes eval.json with the rows behind it, and for a name results.json and generation_samples.json."""

from pathlib import Path
from typing import Any

from dpo_pipeline.evaluation.judge_results import JudgeResults
from dpo_pipeline.evaluation.measure import SAMPLES, Measurements, Policy
from dpo_pipeline.evaluation.policy_estimates import estimates_against, own_estimates
from dpo_pipeline.locks import file_lock
from dpo_pipeline.record import read_json, write_json


def write_results(
    measurements: Measurements, judge_results: JudgeResults, file: str = "eval.json", complete: bool = True
) -> None:
    """Write the `file` of each policy, and beside an eval.json its pairs and samples, with every number of each.

    Results that are not `complete` are added to those in the file, if these have the same weights and data.
    """
    eval_set = measurements.eval_set
    for policy in measurements.shown_policies:
        references = measurements.references_of(policy)
        names = dict.fromkeys((policy.name, *references.values()))
        settings = eval_set.settings({name: measurements.weights[name] for name in names}, policy.beta)
        own = {**own_estimates(policy, measurements), **judge_results.own.get(policy.name, {})}
        earlier = read_json(policy.folder / file)
        if not complete and earlier and {**earlier["settings"], "beta": policy.beta} == settings:
            own = {**earlier["own"], **own}
        result = {
            "policy": policy.name,
            "dataset": eval_set.dataset,
            "settings": settings,
            "against": {kind: estimates_against(policy, name, measurements) for kind, name in references.items()},
            "own": own,
        }
        if file == "eval.json":
            write_json(policy.folder / "pairs.json", pair_rows(policy, measurements))
            scores = judge_results.scores.get(policy.name, {})
            write_json(policy.folder / "samples.json", sample_rows(policy, measurements, scores))
        write_json(policy.folder / file, result)


def pair_rows(policy: Policy, measurements: Measurements) -> list[dict[str, Any]]:
    """Each test pair with its log-probs under the policy and its references."""
    eval_set, names = measurements.eval_set, {"policy": policy.name, **measurements.references_of(policy)}
    rows = []
    for i, row in enumerate(eval_set.rows):
        logprobs = {}
        for kind, name in names.items():
            logprobs[kind] = {side: values[i] for side, values in measurements.pairs[name].items()}
        tokens = {f"{side}_tokens": len(completions[i]) for side, completions in eval_set.sides.items()}
        rows.append({"origin": row["origin"], "source": row["source"], **tokens, "logprobs": logprobs})
    return rows


def sample_rows(policy: Policy, measurements: Measurements, scores: dict[str, Any]) -> list[dict[str, Any]]:
    """Each sampled completion with its log-probs and its scores by judge."""
    eval_set, names = measurements.eval_set, {"policy": policy.name, **measurements.references_of(policy)}
    prompts = eval_set.tokenizer.batch_decode(eval_set.prompt_set.ids, skip_special_tokens=True)
    rows = []
    for i, completion in enumerate(measurements.completions[policy.name, SAMPLES]):
        row = {
            "prompt": prompts[i],
            "answer": completion.text,
            "ended": completion.ended,
            "tokens": len(completion.ids),
            "logprobs": {kind: measurements.sample_logprobs[policy.name, name][i] for kind, name in names.items()},
            "scores": {judge: values[i] for judge, values in scores.items()},
        }
        rows.append(row)
    return rows


def write_name_results(home: Path, folders: list[Path] | None = None, **extra: Any) -> dict[str, Any]:
    """Write results.json and generation_samples.json in `home`, from all policies of the name or those of `folders`.

    `extra` is stored beside the policies. Without it the earlier extras stay as long as every policy's settings do.
    """
    with file_lock(home / "results.json"):
        if folders is None:
            patterns = ("base/eval.json", "sft/*/eval.json", "dpo/**/eval.json")
            folders = [file.parent for pattern in patterns for file in sorted(home.glob(pattern))]
        policies, answers = {}, {}
        for folder in folders:
            result = read_json(folder / "eval.json")
            policies[result["policy"]] = result
            for row in read_json(folder / "samples.json") or []:
                answers.setdefault(row["prompt"], {})[result["policy"]] = row["answer"]
        earlier = read_json(home / "results.json")
        if not extra and earlier and settings_of(earlier["policies"]) == settings_of(policies):
            extra = {key: value for key, value in earlier.items() if key != "policies"}
        results = {"policies": policies, **extra}
        write_json(home / "results.json", results)
        samples = [{"prompt": prompt, "answers": by_policy} for prompt, by_policy in answers.items()]
        write_json(home / "generation_samples.json", samples)
    return results


def settings_of(policies: dict[str, Any]) -> dict[str, Any]:
    """What each policy's numbers depend on."""
    return {name: result["settings"] for name, result in policies.items()}
