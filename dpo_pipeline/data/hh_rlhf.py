"""Anthropic's HH-RLHF (arXiv:2204.05862): two dialogues that differ in the last reply, as plain text."""

from pathlib import Path
from typing import Any

from dpo_pipeline.data.normalize import normalize_row
from dpo_pipeline.data.sources import read_source, require_text
from dpo_pipeline.errors import PipelineError


def load(path: str, subsets: list[str] | None, chat: bool, source: str) -> dict[str, list[dict[str, Any]]]:
    """Pairs of each split; the prompt is the dialogue up to and with its last `Assistant:`; a subset is a source."""
    if isinstance(subsets, str):
        raise PipelineError(f"dataset.subsets={subsets} is no list: type 'dataset.subsets=[{subsets}]'")
    if subsets and Path(path).is_file():
        raise PipelineError(
            f"dataset.path={path} is one file, without the folders {', '.join(subsets)}: set dataset.subsets=null"
        )
    splits: dict[str, list[dict[str, Any]]] = {}
    for subset in subsets or [None]:
        for split, rows in read_source(path, data_dir=subset).items():
            splits.setdefault(split, []).extend(
                normalize_row(
                    origin,
                    f"{source}/{subset}" if subset else source,
                    chat,
                    None,
                    require_text(row, ("chosen", "rejected"), origin),
                )
                for origin, row in rows
            )
    return splits
