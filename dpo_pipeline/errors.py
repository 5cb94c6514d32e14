"""What a person is told: one exception for what they gave, and one sentence for each error of the config libraries."""

import difflib
import errno
import re
from typing import Any

from omegaconf.errors import OmegaConfBaseException


class PipelineError(Exception):
    """What a person gave cannot be: the message says what it was, why not, and what to type instead."""


class OneRankError(PipelineError):
    """One that a single process of several may meet: it tells it itself."""


def nearest(name: Any, names: Any) -> str:
    """`: did you mean a or b?`, or nothing where no name is near; a name's last dotted part counts too."""
    names = [str(n) for n in names]
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.6)
    near += [n for n in names if n not in near and n.split(".")[-1] == str(name).split(".")[-1]]
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
    """One sentence where room or a right on the disk is lacking, or a file is in a folder's place; None for the rest.

    The last two count only where they are the error itself or its stated cause: a library that tries one place and
    fails later, for a reason of its own, has them in its past.
    """
    for inner in chain_of(error):
        if re.search(DISK_FULL, str(inner)):
            where = f" while {inner.filename} was written" if isinstance(inner, OSError) and inner.filename else ""
            return (
                f"the disk is full{where}: free some space and type the same command, which goes on from the newest "
                "checkpoint, or name another disk (root=... for results, HF_HOME=... for what is fetched)"
            )
    while error.__cause__ is not None and not isinstance(error, OSError):
        error = error.__cause__
    if not isinstance(error, OSError) or error.errno not in (*REFUSED, *WRONG_KIND):
        return None
    where = error.filename or "a file of this run"
    if error.errno in REFUSED:
        return (
            f"{where} cannot be read or written ({error.strerror}): give yourself the right to it, or name another "
            "place (root=... for results)"
        )
    return (
        f"{where} cannot be made or opened ({error.strerror}): a file lies where a folder has to be, or a folder "
        "where a file has to be: move it away, or name another place (root=..., name=...)"
    )


def explain_config_error(error: BaseException, keys: list[str], groups: dict[str, list[str]]) -> str | None:
    """One sentence for an error of ours, of the disk, or the innermost of Hydra or OmegaConf; None for any other.

    `keys` are the config's dotted keys, `groups` the options of each group: what a misspelt name is held against.
    """
    from hydra.errors import (
        ConfigCompositionException,
        HydraException,
        InstantiationException,
        MissingConfigException,
        OverrideParseException,
    )

    if isinstance(error, PipelineError):
        return str(error)
    if sentence := explain_disk(error):
        return sentence
    if isinstance(error, InstantiationException):
        return None  # Hydra's wrapping of whatever a loader of ours raised: its traceback is needed
    if type(error).__module__.startswith("submitit.") or "on a slurm cluster" in str(error):
        return (
            f"the sweep could not be handed to its launcher ({' '.join(str(error).split())}): type it on a machine of "
            "the cluster, or leave hydra/launcher= out to run the jobs here"
        )
    chain = chain_of(error)
    for inner in chain:
        if isinstance(inner, OverrideParseException):
            why = str(inner.message).splitlines()[0]
            return f"{inner.override} cannot be read ({why}): type KEY=VALUE, and quote a value that holds = or spaces"
    for inner in reversed(chain):
        text = str(inner).strip().split("\n")[0]
        if "$" in text and inner is not error:
            continue  # OmegaConf's template of the message that the next one fills in
        if isinstance(inner, PipelineError):
            return str(inner)
        if isinstance(inner, MissingConfigException):
            option = (inner.missing_cfg_file or "").split("/")[-1]
            group = "/".join((inner.missing_cfg_file or "").split("/")[:-1])
            if not group:
                return f"there is no config named {option}"
            if option in ("submitit_slurm", "submitit_local"):
                return f"{group}={option} needs its plugin, which is not installed: `pip install -e '.[slurm]'`"
            options = sorted(inner.options or groups[group])
            return f"{group}={option} is no option{nearest(option, options) or ': there are ' + ', '.join(options)}"
        if isinstance(inner, OmegaConfBaseException):
            key = inner.full_key or inner.key
            if key is not None and re.search(r"not in|is not in struct", text):
                return f"{key} is no key of the config{nearest(key, keys) or ': --cfg job lists them all'}"
            return f"{key}: {text[:1].lower()}{text[1:]}" if key is not None else text
        if isinstance(inner, ValueError) and "override must be a string or a list" in text:
            return "a config group cannot be null: name one of its options, such as lora=none"
        if isinstance(inner, AssertionError) and "Unexpected type for root" in text:
            return "a key was set under a group that is none: choose one of its options first, such as lora=r16"
        if isinstance(inner, ConfigCompositionException | HydraException):
            override = re.search(r"Could not override '([^']*)'|In '.*': (.*)", text)
            key = override.group(1) if override and override.group(1) else None
            if key and key.split("@")[0] not in groups:
                return f"{key} is no key of the config{nearest(key, [*keys, *groups])}"
            return " ".join(str(inner).split())
    return None
