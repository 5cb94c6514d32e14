"""Which policies a comparison is of: those of a name, from its run folders, or a folder against another."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dpo_pipeline import run_folder
from dpo_pipeline.config import Run
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.evaluation.measure import Policy
from dpo_pipeline.models import adapter_base, is_adapter
from dpo_pipeline.naming import clean_name, policy_name

log = logging.getLogger(__name__)


def policies_of_name(run: Run) -> list[Policy]:
    """All finished policies of a name, each before what it is measured against: DPOs, SFTs, references, the base.

    Tells which runs are left out, and why; raises PipelineError where there is none.
    """
    done: dict[str, list[Path]] = {}
    for stage in ("sft", "dpo"):
        folders = sorted(file.parent for file in (run.home / stage).glob("*/status.json"))
        found = {folder: reason_to_skip(folder) for folder in folders}
        done[stage] = [folder for folder, why in found.items() if why is None]
        for folder, why in found.items():
            if why is not None:
                log.warning("left out: %s %s", folder, why)
    if not any(done.values()):
        raise PipelineError(
            f"there is no finished run in {run.home}: run `make sft dpo` with the same arguments first, or give the "
            "model=, dataset= or name= of another, or one folder by evaluation.policy=FOLDER"
        )
    mine = run_folder.identity(run, "dpo")
    for folder in done["dpo"]:
        theirs = run_folder.read_json(folder / "manifest.json")["identity"]
        differing = [key for key in mine if key.startswith(("dataset.", "model.")) and mine[key] != theirs.get(key)]
        if differing:
            listed = "; ".join(f"{key} was {theirs.get(key)}, is {mine[key]} here" for key in differing)
            log.warning(
                "%s was trained with other data or another base, maybe on these test pairs: %s", folder, listed
            )
    sfts = [Policy(f"sft/{folder.name}", folder / "final", folder, run.beta) for folder in done["sft"]]
    tuned = next((sft.name for sft in sfts if sft.folder == run.sft_folder), sfts[0].name if sfts else None)
    sfts = [sft if sft.name == tuned else replace(sft, sft=tuned) for sft in sfts]
    places: dict[str, Any] = {}
    lines = [dpo_with_references(folder, run, tuned, places) for folder in done["dpo"]]
    befores = [policy for line in lines for policy in line[1:] if policy.name != "base"]
    return unique_by_name([*(line[0] for line in lines), *sfts, *befores, base_policy(run, tuned)])


def reason_to_skip(folder: Path) -> str | None:
    """Why a run cannot be measured, if so: it is not done, has lost its weights, or its SFT was trained anew."""
    if (state := run_folder.run_state(folder)) != "done":
        return f"is {state}: type its command again to go on"
    if not any((folder / "final").glob("*.safetensors")):
        return "holds no weights in final/: put them back, or train it anew with overwrite=true"
    identity = run_folder.read_json(folder / "manifest.json")["identity"]
    if folder.parent.name == "dpo" and identity.get("policy") == "sft":
        start = folder.parent.parent / "sft" / OmegaConf.load(folder / "config.yaml").sft_variant
        if (why := reason_to_skip(start)) is not None:
            return f"started from {start}, which {why}"
        if run_folder.read_json(start / "manifest.json")["final"]["sha256"] != identity["starting_policy"]:
            return f"started from another {start} than lies there now, which was trained anew: type its command again"
    return None


def dpo_with_references(
    folder: Path, run: Run, tuned: str | None = None, places: dict[str, Any] | None = None
) -> list[Policy]:
    """A DPO, what it started from, and its reference where that is another, from its folder's config.

    `tuned` is the SFT policy that it is to beat where it did not start from one; without that, what it started from.
    `places` are the folders that names stand for: another folder of the same name gets one of its own.
    """
    places = {} if places is None else places
    config: Any = OmegaConf.load(folder / "config.yaml")

    def named(kind: str, path: str) -> str:
        names = (f"{kind}/{policy_name(path)}{tail}" for tail in ("", *(f"-{n}" for n in range(2, 1000))))
        return next(name for name in names if places.setdefault(name, path) == path)

    if config.policy == "base":
        start = base_policy(run, tuned)
    elif config.policy == "sft":
        tuned, place = f"sft/{config.sft_variant}", run.home / "sft" / config.sft_variant
        start = Policy(tuned, place / "final", place, run.beta)
    else:
        name = named("policy", config.policy)
        start = Policy(name, config.policy, folder / "starting_policy", run.beta, sft=tuned)
    reference = start
    if (path := config.reference.path) is not None:
        reference = Policy(named("reference", path), path, folder / "reference", run.beta, shown=False)
    own = Policy(f"dpo/{folder.name}", folder / "final", folder, config.beta, reference.name, tuned or start.name)
    return unique_by_name([own, start, reference])


def base_policy(run: Run, tuned: str | None) -> Policy:
    """The base model."""
    return Policy("base", str(run.model.path), run.home / "base", run.beta, sft=tuned)


def external_policies(run: Run) -> list[Policy]:
    """`evaluation.policy` and `evaluation.reference`; where that is null, what the first was trained from.

    That is what its run's manifest says, else an adapter's base, else the base model. Raises PipelineError where it is
    the policy itself.
    """
    path = final_folder(str(run.evaluation.policy))
    manifest = run_folder.read_json(Path(path).parent / "manifest.json") if Path(path).name == "final" else None
    made = manifest["starting_policy"] if manifest else adapter_base(path) if is_adapter(path) else str(run.model.path)
    against = final_folder(run.evaluation.reference or made)
    if against == path:
        raise PipelineError(
            f"evaluation.policy={path} would be measured against itself: name another by evaluation.reference=FOLDER"
        )
    beta = manifest["identity"]["beta"] if manifest and manifest["stage"] == "dpo" else run.beta
    name, other = (f"policy/{clean_name(policy_name(each))}" for each in (path, against))
    if other == name:
        other = f"reference/{clean_name(policy_name(against))}"
    return [
        Policy(each, weights, run.home / "evaluated" / each.replace("/", "-"), of, reference=other, sft=other)
        for each, weights, of in ((name, path, beta), (other, against, run.beta))
    ]


def final_folder(path: str) -> str:
    """The policy in a run's folder, or `path` itself."""
    return str(Path(path) / "final") if (Path(path) / "final").is_dir() else path


def preferred_ft_names(policies: list[Policy]) -> list[str]:
    """Which SFT policies learned the chosen completions: Preferred-FT of the DPO paper (arXiv:2305.18290)."""
    configs = {p.name: OmegaConf.load(p.folder / "config.yaml") for p in policies if p.name.startswith("sft/")}
    return [name for name, config in configs.items() if config.sft_target == "chosen" and config.sft_dataset is None]


def unique_by_name(policies: list[Policy]) -> list[Policy]:
    """The first of each name."""
    return list({policy.name: policy for policy in reversed(policies)}.values())[::-1]
