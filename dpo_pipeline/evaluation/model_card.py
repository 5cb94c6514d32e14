"""The model card of an export: what it is, its results with intervals, data, recipe and versions."""

from pathlib import Path
from typing import Any

from dpo_pipeline.evaluation.policies import Policy
from dpo_pipeline.formatting import format_estimate, markdown_table
from dpo_pipeline.record import read_json


def write_model_card(file: Path, policy: Policy, manifest: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write README.md of an exported policy; `facts` are those of its export.json."""
    from huggingface_hub import ModelCardData

    stage = manifest.get("stage", "base")
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["dpo-pipeline", stage])
    results = read_json(policy.folder / "eval.json")
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {policy.name}",
        f"{facts['parameters']:,} parameters in {facts['saved_dtype']}, merged from `{policy.name}`: "
        f"{facts['kl_per_token']:.2g} nats a token from the policy as it was trained.",
    ]
    if manifest:
        rows = ", ".join(f"{count} {split}" for split, count in manifest["rows"].items())
        identity = manifest["identity"]
        loss = f", beta {identity['beta']:g}" if stage == "dpo" else ""
        parts += [
            f"Trained by {stage.upper()}{loss} from `{manifest['starting_policy']}`, in {manifest['precision']}, on "
            f"{rows} rows."
        ]
    if results:
        parts += ["## Results", f"On {results['dataset']}, means with 95% intervals.", results_table(results)]
    if manifest:
        settings = [["key", "value"], *([key, str(value)] for key, value in manifest["identity"].items())]
        versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
        command = " ".join(manifest["command"])
        parts += ["## Recipe", f"```\n{command}\n```", markdown_table(settings), "## Versions", versions]
    file.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def results_table(results: dict[str, Any]) -> str:
    """The estimates of an eval.json as a Markdown table: of the policy alone, and against base and reference."""
    lines = [["measure", "against", "value", "n"]]
    groups = {"": results["own"], **results["against"]}
    for opponent, estimates in groups.items():
        for name, estimate in estimates.items():
            if isinstance(estimate, dict) and {"value", "low", "high", "n"} <= estimate.keys():
                lines.append([name, opponent, format_estimate(estimate), str(estimate["n"])])
    return markdown_table(lines)
