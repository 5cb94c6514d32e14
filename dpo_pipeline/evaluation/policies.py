"""Which policies a comparison is of: those of a name, from its run folders, or one folder against another."""

import itertools
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dpo_pipeline.config import CONF
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.models import adapter_base, is_adapter, with_base_of
from dpo_pipeline.naming import clean_name, policy_name
from dpo_pipeline.record import read_json
from dpo_pipeline.run_folder import identity, run_state
from dpo_pipeline.schema import Run

log = logging.getLogger(__name__)

# Of policies that were trained without one: that of this run would make base's margin hang on the job that ran last.
DEFAULT_BETA = float(OmegaConf.load(CONF / "config.yaml").beta)


@dataclass(frozen=True)
class Policy:
    """A saved policy: its name in tables, its weights, the folder of its results, and what it is compared with.

    `reference` names its own reference, `sft` the SFT policy to beat. One that is not shown only serves as reference.
    """

    name: str
    path: str | Path
    folder: Path
    beta: float = DEFAULT_BETA
    reference: str | None = None
    sft: str | None = None
    is_shown: bool = True


def policies_to_measure(run: Run) -> tuple[Run, list[Policy]]:
    """The policies of a name, or `evaluation.policy` and what it is compared with, and the run with their base."""
    if run.evaluation.policy is None:
        return run, policies_of_name(run)
    policies = external_policies(run, run.evaluation.policy, run.evaluation.reference)
    return with_base_of(run, policies[0].path), list(policies)


def policies_of_name(run: Run) -> list[Policy]:
    """All finished policies of a name, each before what it is measured against: DPOs, SFTs, references, the base.

    Warns of runs that are left out; raises PipelineError if no run is finished.
    """
    sft_folders, dpo_folders = (finished_folders(run.home / stage) for stage in ("sft", "dpo"))
    if not (sft_folders or dpo_folders):
        raise PipelineError(
            f"there is no finished run in {run.home}: run `make sft dpo` with the same arguments, or type name=NAME "
            "or evaluation.policy=FOLDER of another"
        )
    warn_of_other_data(run, dpo_folders)
    own_first = sorted(sft_folders, key=lambda folder: folder.name != run.sft_folder.name)
    opponent = f"sft/{own_first[0].name}" if own_first else None
    sfts = [Policy(f"sft/{folder.name}", folder / "final", folder) for folder in sft_folders]
    sfts = [replace(policy, sft=None if policy.name == opponent else opponent) for policy in sfts]
    used_names: dict[str, str] = {}
    groups = [dpo_with_references(folder, run, opponent, used_names) for folder in dpo_folders]
    groups.sort(key=lambda group: -sum(policy.name.startswith("dpo/") for policy in group))  # the last round first
    starts = [policy for group in groups for policy in group[1:] if policy.name != "base"]
    return unique_by_name([*(group[0] for group in groups), *sfts, *starts, base_policy(run, opponent)])


def finished_folders(stage_folder: Path) -> list[Path]:
    """The folders of the finished runs of a stage; warns of the others."""
    reasons = {file.parent: reason_to_skip(file.parent) for file in sorted(stage_folder.glob("*/status.json"))}
    for folder, reason in reasons.items():
        if reason:
            log.warning("left out: %s %s", folder, reason)
    return [folder for folder, reason in reasons.items() if not reason]


def warn_of_other_data(run: Run, dpo_folders: list[Path]) -> None:
    """Warn of DPO runs that were trained on other data, or from another base, than this run names."""
    fields = {key: value for key, value in identity(run, "dpo").items() if key.startswith(("dataset.", "model."))}
    for folder in dpo_folders:
        trained = read_json(folder / "manifest.json")["identity"]
        differing = {key: trained.get(key) for key, value in fields.items() if value != trained.get(key)}
        if differing:
            text = "; ".join(f"{key} was {value}, is {fields[key]} here" for key, value in differing.items())
            log.warning("%s was trained with other data or another base, maybe on these test pairs: %s", folder, text)


def reason_to_skip(folder: Path) -> str | None:
    """Why a run cannot be measured: it is not done, has lost its weights, or its SFT was trained anew; else None."""
    if (state := run_state(folder)) != "done":
        return f"is {state}: type its command again to go on"
    if not any((folder / "final").glob("*.safetensors")):
        return "holds no weights in final/: put them back, or train it anew with overwrite=true"
    fields = read_json(folder / "manifest.json")["identity"]
    if folder.parent.name == "dpo" and fields.get("policy") == "sft":
        start = folder.parent.parent / "sft" / OmegaConf.load(folder / "config.yaml").sft_variant
        if (reason := reason_to_skip(start)) is not None:
            return f"started from {start}, which {reason}"
        if read_json(start / "manifest.json")["final"]["sha256"] != fields["starting_policy"]:
            return f"started from another {start} than lies there now, which was trained anew: type its command again"
    return None


def dpo_with_references(
    folder: Path, run: Run, sft_opponent: str | None = None, used_names: dict[str, str] | None = None
) -> list[Policy]:
    """A DPO policy, what it started from, and its reference if that is another, from the config in its folder.

    A start that is another DPO of this name brings its own. `sft_opponent` names the SFT policy to beat if it did not
    start from one; by default, what it started from. A second folder of a name in `used_names` gets a suffix.
    """
    used_names, chain = {} if used_names is None else used_names, []
    config: Any = OmegaConf.load(folder / "config.yaml")
    if config.policy == "base":
        start = base_policy(run, sft_opponent)
    elif config.policy == "sft":
        sft_folder, sft_opponent = run.home / "sft" / config.sft_variant, f"sft/{config.sft_variant}"
        start = Policy(sft_opponent, sft_folder / "final", sft_folder)
    elif (earlier := run.home / "dpo" / policy_name(config.policy)).resolve() == Path(config.policy).parent:
        chain = dpo_with_references(earlier, run, sft_opponent, used_names)  # a round before this one
        start, sft_opponent = chain[0], chain[0].sft
    else:
        name = display_name("policy", config.policy, used_names)
        start = Policy(name, config.policy, folder / "starting_policy", sft=sft_opponent)
    reference = start
    if (path := config.reference.path) is not None:
        name = display_name("reference", path, used_names)
        reference = Policy(name, path, folder / "reference", is_shown=False)
    sft = sft_opponent or start.name
    dpo = Policy(f"dpo/{folder.name}", folder / "final", folder, config.beta, reference.name, sft)
    return unique_by_name([dpo, start, *chain, reference])


def display_name(kind: str, path: str, used_names: dict[str, str]) -> str:
    """The name of an external policy, with a suffix if another folder has it."""
    name = f"{kind}/{policy_name(path)}"
    candidates = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
    return next(each for each in candidates if used_names.setdefault(each, path) == path)


def base_policy(run: Run, sft_opponent: str | None) -> Policy:
    """The base model."""
    return Policy("base", str(run.model.path), run.home / "base", sft=sft_opponent)


def external_policies(run: Run, folder: str, reference: str | None) -> tuple[Policy, Policy]:
    """The policy in a folder and its reference; if that is None, what the policy was trained from.

    That is what its run's manifest says, else an adapter's base, else the base model. Raises PipelineError if it is
    the policy itself.
    """
    path = final_folder(folder)
    manifest = read_json(Path(path).parent / "manifest.json") if Path(path).name == "final" else None
    trained_from = adapter_base(path) if is_adapter(path) else str(run.model.path)
    if manifest:
        trained_from = manifest["starting_policy"]
    reference_path = final_folder(reference or trained_from)
    if reference_path == path:
        raise PipelineError(f"{path} would be measured against itself: type evaluation.reference=FOLDER of another")
    beta = manifest["identity"]["beta"] if manifest and manifest["stage"] == "dpo" else DEFAULT_BETA
    name, reference = (f"policy/{clean_name(policy_name(each))}" for each in (path, reference_path))
    if reference == name:
        reference = f"reference/{clean_name(policy_name(reference_path))}"
    folders = [run.home / "evaluated" / each.replace("/", "-") for each in (name, reference)]
    against = {"reference": reference, "sft": reference}
    return Policy(name, path, folders[0], beta, **against), Policy(reference, reference_path, folders[1], **against)


def target_policies(run: Run) -> tuple[Policy, Policy | None]:
    """The policy that `target` names, and its reference: what it was trained from, or None of the base.

    Raises PipelineError where its run is missing or not finished.
    """
    if run.target == "base":
        return base_policy(run, None), None
    if run.target not in ("sft", "dpo"):
        return external_policies(run, run.target, None)
    folder = run.sft_folder if run.target == "sft" else run.dpo_folder
    if run_state(folder) == "none":
        raise PipelineError(f"there is no run in {folder}: run `make {run.target}` first, or type target=FOLDER")
    if (reason := reason_to_skip(folder)) is not None:
        raise PipelineError(f"target={run.target}: {folder} {reason}")
    if run.target == "sft":
        return Policy(f"sft/{folder.name}", folder / "final", folder, reference="base"), base_policy(run, None)
    policy, *others = dpo_with_references(folder, run)
    return policy, next(each for each in others if each.name == policy.reference)


def final_folder(path: str) -> str:
    """`final/` of a run's folder, or `path` itself."""
    return str(Path(path) / "final") if (Path(path) / "final").is_dir() else path


def unique_by_name(policies: list[Policy]) -> list[Policy]:
    """The first of each name."""
    return list({policy.name: policy for policy in reversed(policies)}.values())[::-1]
