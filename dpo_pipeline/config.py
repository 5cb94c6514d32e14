"""How a config is composed, checked and completed, and what makes objects of its nodes."""

import inspect
import os
import pkgutil
import re
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from pydantic import ValidationError

from dpo_pipeline.distributed import processes
from dpo_pipeline.errors import PipelineError, explain_config_error, explain_fault, nearest, refused_key
from dpo_pipeline.naming import name_folders
from dpo_pipeline.schema import Model, Reference, Run

CONF = Path(__file__).resolve().parent.parent / "conf"
# Of each data set, from conf/dataset/common/; its other keys are its loader's arguments.
ROW_KEYS = ("test_rows", "split_seed", "sft_target", "form", "on_bad_row", "on_contradiction")

OmegaConf.register_new_resolver("expanduser", os.path.expanduser, replace=True)  # for hydra.sweep.dir


def compose(overrides: list[str]) -> Run:
    """The checked config that a command line of these overrides makes; raises PipelineError with all its faults."""
    import hydra

    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = hydra.compose("config", [quote_home(item) for item in overrides], return_hydra_config=True)
        return validate(cfg, cfg.hydra)
    except Exception as error:
        if (sentence := explain_error(error, overrides)) is None:
            raise
        raise PipelineError(sentence) from error


def check_flags(arguments: list[str]) -> None:
    """Raise PipelineError for a config key that is typed as a flag."""
    for item in arguments:
        key, _, value = item.lstrip("-").partition("=")
        if item.startswith("--") and key in known_keys():
            raise PipelineError(f"{item} is no flag: type {key}={value or 'VALUE'}")


def quote_home(override: str) -> str:
    """An override whose values that begin with ~ are quoted: Hydra's grammar lacks that character."""
    return re.sub(r"(?<=[=,\[:])~[^,\]}']*", r"'\g<0>'", override)


def expand_home(node: Any) -> Any:
    """A config with every value that begins with ~/ expanded, of whatever key."""
    if isinstance(node, dict):
        return {key: expand_home(value) for key, value in node.items()}
    if isinstance(node, list):
        return [expand_home(value) for value in node]
    return os.path.expanduser(node) if isinstance(node, str) else node


def validate(cfg: DictConfig, hydra_cfg: DictConfig) -> Run:
    """The typed config, with every null that means a default filled in; raises PipelineError with all its faults.

    `hydra_cfg` is Hydra's own part: what was typed and the option of each group, from which names and folders follow.
    """
    cfg = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    keys: dict[str, Any] = expand_home(OmegaConf.to_container(cfg, resolve=True))
    overrides, choices = list(hydra_cfg.overrides.task), dict(hydra_cfg.runtime.choices)
    faults = {key: f"{key} has no value: type {key}=..." for key in sorted(OmegaConf.missing_keys(cfg))}
    for group in [key for key in keys if key not in Run.model_fields and (CONF / key).is_dir()]:
        override = f"- override /{group}: {keys[group]}"
        faults[group] = f"{group} is a group of options: write `{override}` in the defaults list, or type {group}="
    if (
        "truth" in keys.get("judge", {})
        and OmegaConf.select(cfg, "dataset._target_") != "dpo_pipeline.data.reviews.load"
    ):
        if any(item.startswith("judge") for item in overrides):
            faults["judge"] = "judge=truth knows the truth of dataset=reviews alone: leave it out"
        del keys["judge"]["truth"]  # came with dataset@sft_dataset=reviews
    try:
        run = Run.model_validate(keys)
    except ValidationError as error:
        for key, sentence in (explain_fault(fault, known_keys) for fault in error.errors()):
            faults.setdefault(key, sentence)
    for key in ("dataset", "sft_dataset"):
        faults |= {fault: fault for fault in argument_faults(key, keys.get(key))}
    if faults:
        raise PipelineError("; ".join(faults.values()))
    resolve_defaults(run, overrides, choices)
    return run


def resolve_defaults(run: Run, overrides: list[str], choices: dict[str, str]) -> None:
    """Replace in place each null that stands for a default: learning rates, the micro batch, names."""
    for stage, fields in (("sft", run.sft), ("dpo", run.dpo)):
        if fields["learning_rate"] is None:
            fields["learning_rate"] = getattr(run.model.learning_rate, stage if run.lora is None else f"{stage}_lora")
    if run.debug:
        run.batch.global_size = max(2, processes())  # 50 steps of its 100 rows
        run.batch.micro_size = None
    fitting = (n for n in range(run.model.micro_size, 0, -1) if run.batch.global_size % (n * processes()) == 0)
    run.batch.micro_size = run.batch.micro_size or next(fitting, 1)
    if run.debug:
        run.sft_best = "last"  # of few steps the first, at the warm-up's rate of 0, may be the best: the bare base
    run.sft_target = run.sft_target or (run.sft_dataset or run.dataset)["sft_target"]
    run.dpo_best = run.dpo_best.removeprefix("eval_")  # as TRL logs it
    name_folders(run, overrides, choices)
    if Path(run.policy).is_dir() and run.policy not in ("sft", "base"):
        run.policy = str(Path(run.policy).resolve())
    if run.model.builder:
        run.model.path = str((run.home / "base" / "model").resolve())
    elif Path(run.model.path).is_dir():
        run.model.path = str(Path(run.model.path).resolve())  # adapters name it, from wherever they are loaded


def argument_faults(key: str, node: Any) -> list[str]:
    """What the `_target_` of a node, or of a data set that it mixes, would refuse of its keys; imports that target."""
    if not isinstance(node, dict) or "_target_" not in node:
        return []  # the schema reports that
    parameters, faults = inspect.signature(pkgutil.resolve_name(node["_target_"])).parameters, []
    for name, value in node.items():
        if name.startswith("_") or name in ROW_KEYS:
            continue
        if name not in parameters:
            faults.append(f"{key}.{name} is no option of {node['_target_']}{nearest(name, parameters)}")
        elif is_number(parameters[name].annotation) and not isinstance(value, int | float):
            faults.append(f"{key}.{name}={value}: must be a number")
        elif name == "sets" and isinstance(value, dict):
            faults += [fault for part in value for fault in argument_faults(f"{key}.sets.{part}", value[part])]
    return faults


def is_number(annotation: Any) -> bool:
    """Whether a parameter takes a number, be it one with bounds (`Annotated`)."""
    return (get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation) in (int, float)


def instantiate_node(node: dict[str, Any], **extra: Any) -> Any:
    """What the `_target_` of a config node makes of its other keys and `extra`, with lists and dicts of Python.

    PEFT could not save OmegaConf's. Raises PipelineError where the target does not take a key, or raises one itself.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    if faults := argument_faults(node["_target_"].split(".")[-2], node):
        raise PipelineError("; ".join(faults))
    try:
        return instantiate(node, _convert_="all", **extra)
    except InstantiationException as error:
        if isinstance(error.__cause__, PipelineError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, ValidationError):  # of an option of a data set
            fault = error.__cause__.errors()[0]
            key = ("dataset", *(part for part in fault["loc"] if part != "[key]"))  # pydantic's mark of a wrong key
            raise PipelineError(explain_fault(fault | {"loc": key}, list)[1]) from error
        if isinstance(error.__cause__, ValueError | TypeError) and not node["_target_"].startswith("dpo_pipeline."):
            raise PipelineError(f"{node['_target_']} refuses its options: {error.__cause__}") from error
        raise


def explain_error(error: BaseException, overrides: list[str] = ()) -> str | None:
    """One sentence for an error that a person caused, with the faults of the other `overrides`; None for the rest."""
    if isinstance(error, PipelineError):
        return str(error)
    groups = {folder.name: [file.stem for file in folder.glob("*.yaml")] for folder in CONF.glob("*/")}
    sentence, refused = explain_config_error(error, known_keys, groups), refused_key(error)
    rest = [item for item in overrides if item.lstrip("+~").partition("=")[0] != refused]
    # Hydra stops at the first unknown key: what is behind it? Without a misspelt group, more keys are unknown.
    if rest and len(rest) < len(overrides) and not nearest(refused, groups):
        try:
            compose(rest)
        except PipelineError as other:
            return f"{sentence}; {other}"
    return sentence


def known_keys() -> list[str]:
    """Every key, and every dotted key of a group, that the schema or conf/config.yaml lists."""
    groups = {"model": Model.model_fields, "reference": Reference.model_fields}
    groups |= {key: node for key, node in OmegaConf.load(CONF / "config.yaml").items() if isinstance(node, DictConfig)}
    return [*Run.model_fields, *(f"{group}.{key}" for group in groups for key in groups[group])]
