"""Anthropic's HH-RLHF (arXiv:2204.05862): two dialogues that differ in the last reply, as plain text."""

from pathlib import Path

from dpo_pipeline.data.files import read, require
from dpo_pipeline.errors import PipelineError

REPLY = "\n\nAssistant:"


def load(path: str, subsets: list[str] | None) -> dict[str, list[dict]]:
    """Pairs of each split; the prompt is the dialogue up to and with its last `Assistant:`.

    A row whose two dialogues differ before that, or have none, carries the reason as `problem`.
    """
    if isinstance(subsets, str):
        raise PipelineError(f"dataset.subsets={subsets} is no list: type 'dataset.subsets=[{subsets}]'")
    if subsets and Path(path).is_file():
        raise PipelineError(
            f"dataset.path={path} is one file, without the folders {', '.join(subsets)}: set dataset.subsets=null"
        )
    splits: dict[str, list[dict]] = {}
    for subset in subsets or [None]:
        for split, rows in read(path, data_dir=subset).items():
            require(rows, ("chosen", "rejected"), path)
            splits.setdefault(split, []).extend(pair(row["chosen"], row["rejected"]) for row in rows)
    return splits


def pair(chosen: str, rejected: str) -> dict:
    """One row from two whole dialogues."""
    if REPLY not in chosen or REPLY not in rejected:
        return {"prompt": chosen, "chosen": chosen, "rejected": rejected, "problem": f"without {REPLY!r}"}
    at, other = chosen.rfind(REPLY) + len(REPLY), rejected.rfind(REPLY) + len(REPLY)
    row = {"prompt": chosen[:at], "chosen": chosen[at:], "rejected": rejected[other:]}
    return row if chosen[:at] == rejected[:other] else {**row, "problem": "prompts differ"}
