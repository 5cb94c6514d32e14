"""Which policies a comparison is of: those of a name, from its run folders, or a folder against another."""

import logging
from pathlib import Path
from typing import Any

from dpo_pipeline import runs
from dpo_pipeline.config import Run
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.evaluation.records import Policy
from dpo_pipeline.naming import clean, policy_name
from dpo_pipeline.policies import base_of, is_adapter

log = logging.getLogger(__name__)


def of_name(run: Run) -> list[Policy]:
    """All finished policies of a name, each before what it is measured against: DPOs, SFTs, references, the base.

    Tells which runs are left out, and why; raises PipelineError where there is none.
    """
    done: dict[str, list[Path]] = {}
    for stage in ("sft", "dpo"):
        folders = sorted(file.parent for file in (run.home / stage).glob("*/status.json"))
        done[stage] = [folder for folder in folders if runs.state(folder) == "done"]
        for folder in (folder for folder in folders if folder not in done[stage]):
            log.warning("left out: %s is %s: type its command again to go on", folder, runs.state(folder))
    if not any(done.values()):
        raise PipelineError(
            f"there is no finished run in {run.home}: run `make sft dpo` with the same arguments first, or give the "
            "model=, dataset= or name= of another, or one folder by evaluation.policy=FOLDER"
        )
    sfts = [Policy(f"sft/{folder.name}", folder / "final", folder, run.beta) for folder in done["sft"]]
    tuned = next((sft.name for sft in sfts if sft.folder == run.sft_folder), sfts[0].name if sfts else None)
    lines = [of_dpo(folder, run, tuned) for folder in done["dpo"]]
    befores = [policy for line in lines for policy in line[1:] if policy.name != "base"]
    sfts = [sft if sft.name == tuned else Policy(**{**vars(sft), "sft": tuned}) for sft in sfts]
    return unique([*(line[0] for line in lines), *sfts, *befores, base_policy(run, tuned)])


def of_dpo(folder: Path, run: Run, tuned: str | None = None) -> list[Policy]:
    """A DPO, what it started from, and its reference where that is another, from its folder's config.

    `tuned` is the SFT policy that it is to beat where it did not start from one; without that, what it started from.
    """
    from omegaconf import OmegaConf

    config: Any = OmegaConf.load(folder / "config.yaml")
    if config.policy == "base":
        start = base_policy(run, tuned)
    elif config.policy == "sft":
        tuned, place = f"sft/{config.sft_variant}", run.home / "sft" / config.sft_variant
        start = Policy(tuned, place / "final", place, run.beta)
    else:
        start = Policy(
            f"policy/{policy_name(config.policy)}", config.policy, folder / "starting_policy", run.beta, sft=tuned
        )
    reference = start
    if config.reference.path is not None:
        path = config.reference.path
        reference = Policy(f"reference/{policy_name(path)}", path, folder / "reference", run.beta, shown=False)
    own = Policy(f"dpo/{folder.name}", folder / "final", folder, config.beta, reference.name, tuned or start.name)
    return unique([own, start, reference])


def base_policy(run: Run, tuned: str | None) -> Policy:
    """The base model."""
    return Policy("base", str(run.model.path), run.home / "base", run.beta, sft=tuned)


def of_folder(run: Run) -> list[Policy]:
    """`evaluation.policy` and `evaluation.reference`; where that is null an adapter's base, else the base model."""
    path = str(run.evaluation.policy)
    against = run.evaluation.reference or (base_of(path) if is_adapter(path) else str(run.model.path))
    name, other = (f"policy/{clean(policy_name(each))}" for each in (path, against))
    if other == name:
        other = f"reference/{clean(policy_name(against))}"
    places = (run.home / "evaluated" / each.replace("/", "-") for each in (name, other))
    return [
        Policy(each, weights, folder, run.beta, reference=other, sft=other)
        for each, weights, folder in zip((name, other), (path, against), places, strict=True)
    ]


def unique(policies: list[Policy]) -> list[Policy]:
    """The first of each name."""
    return list({policy.name: policy for policy in reversed(policies)}.values())[::-1]
