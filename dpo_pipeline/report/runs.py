"""What the run folders of a name hold: policies with their estimates, and DPO variants by setting, beta and seed."""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from dpo_pipeline.errors import PipelineError
from dpo_pipeline.estimates import Estimate, mean
from dpo_pipeline.record import read_json
from dpo_pipeline.report.page import format_cell
from dpo_pipeline.run_folder import run_state

DATA_KEYS = ("data", "pairs", "prompts", "prompts_file", "max_new_tokens")  # of the settings in an eval.json
BETA_SEED = re.compile(r"-(beta[0-9.]+(e-?\d+)?|seed\d+)(?=-|$)")
COLUMNS = "name setting beta seed reference problem test validation".split()
POST_TRAINING = ("implicit_reward", "human")  # judges that the tracker of a run leaves out


@dataclass(frozen=True)
class Runs:
    """What there is to report of a name.

    `policies` are the eval.json by policy, `results` is the rest of results.json. `variants` has a line for each DPO:
    `test` and `validation` hold its estimates, on test against one `reference` for all, or `problem` says why it has
    none. `target` is the key by which betas are chosen, `subject` the policy that the report is about.
    """

    home: Path
    policies: dict[str, Any]
    results: dict[str, Any]
    variants: pd.DataFrame
    target: str
    subject: str
    kl_budget: float
    overlays: dict[str, list[dict[str, Any]]]

    @property
    def measured(self) -> pd.DataFrame:
        """The variants that have estimates."""
        return self.variants[self.variants["problem"] == ""]

    @property
    def against(self) -> str:
        """What all policies are measured against: the `base`, or a `reference` where there is none."""
        return "base" if "base" in self.policies else "reference"

    @property
    def cells(self) -> dict[str, dict[str, Any]]:
        """All estimates of each policy, and of Best-of-N."""
        cells = {name: policy["against"][self.against] | policy["own"] for name, policy in self.policies.items()}
        best = self.results.get("best_of")
        return cells | ({best["name"]: best["own"]} if best else {})


def load_runs(
    home: Path, kl_budget: float, subject: str | None, overlays: dict[str, Any], failed: dict[str, str]
) -> Runs:
    """Read what the runs of a name have written; `failed` are variants whose last run failed, with the reason.

    Without a `subject` the report is about the recommended variant, else the first DPO or SFT. Raises PipelineError
    where nothing is there, or a file is not what this version writes.
    """
    results = read_json(home / "results.json", "policies", "notable") or {"policies": {}, "notable": {}}
    policies = results.pop("policies") | {
        f"dpo/{file.parent.name}": read_json(file, "own", "against") for file in sorted(home.glob("dpo/*/eval.json"))
    }
    if any("sft" not in policy for policy in policies.values()):
        raise PipelineError(f"{home} was evaluated by an older version: run `python -m dpo_pipeline.evaluate` first")
    variants = load_variants(home, policies, failed)
    if not policies and variants.empty and not any(home.glob("sft/*/manifest.json")):
        raise PipelineError(
            f"there is no run in {home} to report: give its model=, dataset= or name=, or run `make sft`"
        )
    target = find_target(home, variants)
    best = recommend(variants, target, kl_budget)[1]
    first = sorted(policies, key=lambda name: (name == "base", not name.startswith("dpo/")))
    candidates = [subject, best and f"dpo/{best}", *first, ""]
    subject = next(name for name in candidates if name in policies or name == "")
    return Runs(home, policies, results, variants, target, subject, kl_budget, overlays)


def load_variants(home: Path, policies: dict[str, Any], failed: dict[str, str]) -> pd.DataFrame:
    """A line for each DPO; the first name of a setting, without beta and seed, is its label.

    All are measured against the policy they started from if that is one, else against the base.
    """
    names = sorted({file.parent.name for file in (home / "dpo").glob("*/status.json")} | {*failed})
    results = {name: policies[f"dpo/{name}"] for name in names if name not in failed and f"dpo/{name}" in policies}
    data = {name: tuple(result["settings"][key] for key in DATA_KEYS) for name, result in results.items()}
    common = Counter(data.values()).most_common(1)
    starts = {result["settings"]["weights"][result["reference"] or "base"] for result in results.values()}
    against = "reference" if len(starts) == 1 else "base"
    lines, labels = [], {}
    for name in names:
        folder, test = home / "dpo" / name, results.get(name)
        identity = (read_json(folder / "manifest.json") or {"identity": {"beta": None, "seed": None}})["identity"]
        problem = failed.get(name) or unfinished(folder) or ("" if test else "not measured: repeat its command")
        if not problem and data[name] != common[0][0]:
            _, pairs, prompts, *_ = data[name]
            problem = f"measured on {pairs} pairs and {prompts} prompts, or others: run evaluate"
        setting = json.dumps({key: value for key, value in identity.items() if key not in ("beta", "seed")})
        label = labels.setdefault(setting, BETA_SEED.sub("", name))
        sources = ((test, against), (read_json(folder / "validation.json"), "reference"))
        estimates = [{**r["against"][key], **r["own"]} if r and not problem else {} for r, key in sources]
        reference = (test["reference"] if test and against == "reference" else None) or "base"
        lines.append([name, label, identity["beta"], identity["seed"], reference, problem, *estimates])
    return pd.DataFrame(lines, columns=COLUMNS).sort_values(COLUMNS[1:4], ignore_index=True)


def unfinished(folder: Path) -> str:
    """The state, step and error of a run that is not done; else nothing."""
    if (state := run_state(folder)) == "done":
        return ""
    status = read_json(folder / "status.json") or {"step": 0, "error": None}
    return f"{state} at step {status['step']}" + (f": {status['error']}" if status["error"] else "")


def tracked_score(folder: Path, estimates: dict[str, Any]) -> str:
    """The key of the score that the tracker of a run calls reward; `margin_nats` where no judge scored."""
    file = folder / "config.yaml"
    judges = OmegaConf.load(file).judge if file.is_file() else {}
    keys = [f"score.{name}" for name in judges if name not in POST_TRAINING]
    keys += [key for key in estimates if key.startswith("score.")]
    return next((key for key in keys if key in estimates), "margin_nats")


def find_target(home: Path, variants: pd.DataFrame) -> str:
    """The first score that all measured variants have on test and validation; else `margin_nats`."""
    variants = variants[variants["problem"] == ""]
    estimates = [cells for split in ("test", "validation") for cells in variants[split] if cells]
    tracked = [tracked_score(home / "dpo" / line.name, line.test) for line in variants.itertuples(index=False)]
    keys = [*tracked, *(key for cells in estimates for key in cells if key.startswith("score."))]
    return next((key for key in keys if all(key in cells for cells in estimates)), "margin_nats")


def over_seeds(measured: list[dict[str, Estimate]], key: str) -> Estimate:
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


def recommend(variants: pd.DataFrame, target: str, kl_budget: float) -> tuple[str, str | None]:
    """The beta of the largest target on validation within the KL budget and those within noise; its first variant.

    The target is a reward, else margin_nats; never the margin with beta, which grows with beta alone.
    """
    groups = dict(iter(grouped(variants, "validation")))
    kls = {key: over_seeds(list(group["validation"]), "kl")["value"] for key, group in groups.items()}
    allowed = {k: over_seeds(list(groups[k]["validation"]), target) for k, kl in kls.items() if kl <= kl_budget}
    if not allowed:
        reason = f"no beta has a KL of at most {kl_budget:g} nats on validation. Take larger betas."
        return f"Recommended: none; {reason if groups else 'nothing is measured.'}", None
    best = max(allowed, key=lambda key: allowed[key]["value"])
    # Without an interval (one row) no beta is worse beyond noise.
    low = -math.inf if allowed[best]["low"] is None else allowed[best]["low"]
    near = [key for key, e in allowed.items() if key != best and (e["high"] is None or e["high"] >= low)]
    has_settings = len({setting for setting, _ in allowed}) > 1
    names = {key: f"beta {key[1]:g}" + (f" ({key[0]})" if has_settings else "") for key in allowed}
    name = "margin_nats" if target == "margin_nats" else "reward"
    text = (
        f"Recommended: {names[best]}, {name} {format_cell(allowed[best])} (largest {name} on validation with a KL of "
        f"at most {kl_budget:g} nats)."
    )
    if near:
        listed = ", ".join(names[key] for key in near)
        text += f" Within noise of it: {listed}; more seeds or evaluation.prompts may separate them."
    return text, groups[best]["name"].iloc[0]


def grouped(variants: pd.DataFrame, split: str) -> Any:
    """The seeds of each setting and beta that are measured on a split."""
    return variants[variants[split].map(bool).astype(bool)].groupby(["setting", "beta"])
