"""What a person is told: one exception for what they gave, and one sentence for each error of the config libraries."""

import difflib
import errno
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException

# Old commands and experiment files: what to type now.
RENAMED = {"length.answer": "length.completion", "precision.mixed": "precision", "reference=auto": "reference=cached"}


ListKeys = Callable[[], list[str]]


class PipelineError(Exception):
    """What a person gave cannot be: the message says what it was, why not, and what to type instead."""


class OneRankError(PipelineError):
    """An error that one process of several may meet alone: that process reports it."""


def nearest(name: Any, names: Iterable[Any]) -> str:
    """`: did you mean a or b?`, or nothing where no name is near; a name's last dotted part counts too."""
    names = list(dict.fromkeys(map(str, names)))
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.6)
    near += [known for known in names if known not in near and known.split(".")[-1] == str(name).split(".")[-1]]
    return f": did you mean {' or '.join(near[:3])}?" if near else ""


def chain_of(error: BaseException) -> list[BaseException]:
    """An error and what it came from, the outermost first."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    return chain


# What the system says of a full disk, safetensors after it, and torch: these write by themselves, with other errors.
DISK_FULL = r"No space left on device|Disk quota exceeded|PytorchStreamWriter failed|inline_container.*unexpected pos"
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
WRONG_KIND = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


def explain_disk(error: BaseException) -> str | None:
    """One sentence where the disk is full, a right is missing, or a file is in a folder's place; None for the rest.

    The last two count only where they are the error itself or its stated cause: a library that tries one place and
    fails later, for a reason of its own, has them in its past.
    """
    if isinstance(error, BrokenPipeError):
        return "the output was closed before its end: type the same command again, which goes on"
    for inner in chain_of(error):
        if re.search(DISK_FULL, str(inner)):
            where = f" while {inner.filename} was written" if isinstance(inner, OSError) and inner.filename else ""
            again = "free some space and type the same command, which goes on from the newest checkpoint"
            return f"the disk is full{where}: {again}, or name another disk (root=..., HF_HOME=... for downloads)"
    while error.__cause__ is not None and not isinstance(error, OSError):
        error = error.__cause__
    if not isinstance(error, OSError) or error.errno not in (*REFUSED, *WRONG_KIND):
        return None
    from huggingface_hub.constants import HF_HOME

    path, why = error.filename or "a file of this run", error.strerror
    if Path(HF_HOME) in Path(path).parents or str(path) == HF_HOME:
        return f"{path} cannot be made ({why}): downloads lie in HF_HOME={HF_HOME}, type export HF_HOME=FOLDER"
    if error.errno in REFUSED:
        return f"{path} cannot be read or written ({why}): change its permissions, or name another place by root=..."
    return f"{path} cannot be made or opened ({why}), it is a file and not a folder, or the reverse: move it away"


def explain_fault(fault: dict[str, Any], list_keys: ListKeys) -> tuple[str, str]:
    """The dotted key of a fault that pydantic found, and a sentence on it; `list_keys` gives the keys that exist."""
    path = [str(part) for part in fault["loc"] if part not in ("int", "float")]  # pydantic's names for a union's parts
    key, value, kind = ".".join(path), fault["input"], fault["type"]
    if kind == "value_error":
        return key, str(fault["ctx"]["error"])
    if kind == "extra_forbidden":
        return key, unknown_key(key, list_keys())
    if kind == "missing" and path[0].endswith("dataset"):
        return key, f"{key} has no value: begin the file of the data set with `defaults: [common/rows@_here_]`"
    if value is None or kind in ("missing", "string_too_short"):
        return key, f"{key} has no value: type {key}=..."
    if kind == "dict_type" and ".sets." in key:
        return key, f"{key}={value} is no data set: type +dataset@{key}=OPTION"
    options = re.findall(r"'(.*?)'", fault["msg"]) if kind == "literal_error" else []
    return key, f"{key}={value}: {re.sub('^(Input|String) ', '', fault['msg'])}{nearest(value, options)}"


def unknown_key(key: str, keys: list[str], groups: Iterable[str] = ()) -> str:
    """The sentence on a key that does not exist: with its new name, the nearest, or what makes it exist."""
    if key in RENAMED:
        return f"{key} is now called {RENAMED[key]}: type {RENAMED[key]}=..."
    if key in keys:
        return f"{key} is a key and no group: write `{key}: ...` outside of the defaults list"
    group, _, name = key.partition(".")
    if name and group in groups:
        near = nearest(key, [known for known in keys if "." in known])
        return f"{key} is no key of the config{near or f': it needs another option of {group}='}"
    return f"{key} is no key of the config{nearest(key, [*keys, *groups]) or ': --cfg job lists all keys'}"


def missing_option(group: str, option: str, options: list[str]) -> str:
    """The sentence on an option of a group that has no file."""
    if not group:
        return f"there is no config named {option}: leave --config-name out"
    if f"{group}={option}" in RENAMED:
        return f"{group}={option} is now called {RENAMED[f'{group}={option}']}: type that"
    if option in ("submitit_slurm", "submitit_local"):
        return f"{group}={option} needs a plugin: `pip install -e '.[slurm]'`"
    return f"{group}={option} is no option{nearest(option, options) or ': there are ' + ', '.join(sorted(options))}"


def refused_key(error: BaseException) -> str | None:
    """The key of an override that Hydra refused because the config has no such key."""
    refusal = re.search(r"Could not override '([^'@]*)", str(error))
    return refusal and refusal[1]


def explain_config_error(error: BaseException, list_keys: ListKeys, groups: dict[str, list[str]]) -> str | None:
    """One sentence for an error of the disk, or the innermost of ours, Hydra or OmegaConf; None for any other.

    `list_keys` gives the config's dotted keys, `groups` are the options of each group, to find the nearest names in.
    """
    from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException

    if sentence := explain_disk(error):
        return sentence
    if isinstance(error, InstantiationException):
        return None  # Hydra's wrapping of whatever a loader of ours raised: its traceback is needed
    if type(error).__module__.startswith("submitit.") or "on a slurm cluster" in str(error):
        why = " ".join(str(error).split())
        return f"the sweep could not be submitted ({why}): run it on the cluster, or take hydra/launcher= out"
    if isinstance(error, OverrideParseException):
        why = error.message.splitlines()[0]
        return f"{error.override} cannot be read ({why}): type KEY=VALUE, and quote a value that holds = or spaces"
    if isinstance(error, HydraException) and (key := refused_key(error)):
        return unknown_key(key, list_keys(), groups)
    for inner in reversed(chain_of(error)):
        text = " ".join(str(inner).split("\n    ")[0].split())  # without OmegaConf's list of types
        if isinstance(inner, PipelineError):
            return text
        if isinstance(inner, MissingConfigException):
            group, _, option = inner.missing_cfg_file.rpartition("/")
            return missing_option(group, option, inner.options or groups.get(group, []))
        if isinstance(inner, OmegaConfBaseException):
            outer = (each for each in chain_of(error) if isinstance(each, OmegaConfBaseException))
            key = next((each.full_key for each in outer if each.full_key), None)  # an inner error may lack it
            return f"{key}: {text}" if key else text
        if isinstance(inner, ValueError) and "override must be a string or a list" in text:
            return "a config group cannot be null or a number: type one of its options, such as lora=none"
        if isinstance(inner, HydraException):
            return text
    return None
