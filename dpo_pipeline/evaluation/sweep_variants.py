"""The DPO variants of a name, as their run folders have them, and estimates over the seeds of a variant."""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_pipeline.estimates import Estimate, mean
from dpo_pipeline.record import read_json
from dpo_pipeline.run_folder import run_state

DATA_KEYS = ("data", "pairs", "prompts", "prompts_file", "max_new_tokens")  # of the settings in an eval.json
BETA_SEED = re.compile(r"-(beta[0-9.]+(e-?\d+)?|seed\d+)(?=-|$)")

Estimates = dict[str, Estimate]


@dataclass
class Variant:
    """One DPO: `setting` labels its identity without beta and seed, `problem` says why it has no estimates, if so."""

    name: str
    setting: str
    beta: float | None
    seed: int | None
    problem: str
    test: Estimates
    validation: Estimates


def reference_of(result: dict[str, Any]) -> tuple[str, str]:
    """Name and weights of a DPO's own reference, from its eval.json."""
    weights = result["settings"]["weights"]
    tuned = [(name, value) for name, value in weights.items() if name not in (result["policy"], "base")]
    return tuned[0] if tuned else ("base", weights["base"])


def load_variants(
    home: Path, names: list[str], results: dict[str, Any], failed: dict[str, str], against: str
) -> list[Variant]:
    """The variants by setting, beta and seed; the first name of a setting, without beta and seed, is its label."""
    data = {name: tuple(result["settings"][key] for key in DATA_KEYS) for name, result in results.items()}
    common = Counter(data.values()).most_common(1)
    variants, labels = [], {}
    for name in names:
        folder, test = home / "dpo" / name, results.get(name)
        identity = (read_json(folder / "manifest.json") or {"identity": {"beta": None, "seed": None}})["identity"]
        problem = failed.get(name) or unfinished(folder) or ("" if test else "not measured: repeat its command")
        if not problem and data[name] != common[0][0]:
            settings = test["settings"]
            problem = (
                f"measured on {settings['pairs']} pairs and {settings['prompts']} prompts, or others: run evaluate"
            )
        setting = json.dumps({key: value for key, value in identity.items() if key not in ("beta", "seed")})
        label = labels.setdefault(setting, BETA_SEED.sub("", name))
        blocks = ((test, against), (read_json(folder / "validation.json"), "reference"))
        estimates = [{**r["against"][key], **r["own"]} if r and not problem else {} for r, key in blocks]
        variants.append(Variant(name, label, identity["beta"], identity["seed"], problem, *estimates))
    return sorted(variants, key=lambda v: (v.setting, v.beta or math.inf, v.seed or 0, v.name))


def list_differences(home: Path, names: list[str]) -> str:
    """A line for each variant with the keys in which the variants differ, beta and seed apart: names may be hashes."""
    manifests = {name: read_json(home / "dpo" / name / "manifest.json") for name in names}
    identities = {name: manifest["identity"] for name, manifest in manifests.items() if manifest}
    keys = sorted({key for identity in identities.values() for key in identity} - {"beta", "seed"})
    keys = [key for key in keys if len({json.dumps(identity.get(key)) for identity in identities.values()}) > 1]
    lines = []
    for name, identity in identities.items():
        lines.append(f"- {name}: " + ", ".join(f"{key}={str(identity.get(key))[:40]}" for key in keys))
    return "\n".join(["Where they differ, beside beta and seed:", "", *lines]) if keys else ""


def unfinished(folder: Path) -> str:
    """The state, step and error of a run that is not done; else nothing."""
    if (state := run_state(folder)) == "done":
        return ""
    status = read_json(folder / "status.json")
    return f"{state} at step {status['step']}" + (f": {status['error']}" if status["error"] else "")


def group_seeds(variants: list[Variant]) -> dict[tuple[str, float], list[Variant]]:
    """The seeds of each setting and beta."""
    groups: dict[tuple[str, float], list[Variant]] = {}
    for v in variants:
        groups.setdefault((v.setting, v.beta), []).append(v)
    return groups


def over_seeds(measured: list[Estimates], key: str) -> Estimate:
    """The estimate of one seed, or the mean over several.

    Its interval adds in quadrature Student's t over the seeds and the mean interval over the rows: all seeds are
    measured on the same rows, whose noise more seeds do not reduce.
    """
    seeds = [estimates[key] for estimates in measured]
    if len(seeds) == 1:
        return seeds[0]
    average = mean([seed["value"] for seed in seeds])
    half_of_rows = sum(seed["high"] - seed["low"] for seed in seeds if seed["low"] is not None) / (2 * len(seeds))
    half = math.hypot(average["high"] - average["value"], half_of_rows)
    return {**average, "low": average["value"] - half, "high": average["value"] + half}
