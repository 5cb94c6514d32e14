"""Anthropic's HH-RLHF (arXiv:2204.05862): two dialogues that differ in the last reply, as plain text."""

from collections import defaultdict
from pathlib import Path

from pydantic import validate_call

from dpo_pipeline.data.columns import get_text
from dpo_pipeline.data.normalize import normalize_row
from dpo_pipeline.data.sources import Row, read_source
from dpo_pipeline.errors import PipelineError


@validate_call
def load(path: str, subsets: list[str] | None, chat: bool, source: str) -> dict[str, list[Row]]:
    """Pairs of each split; the prompt is the dialogue up to and with its last `Assistant:`; a subset is a source."""
    if subsets and Path(path).is_file():
        raise PipelineError(f"dataset.path={path} is one file, without folders: set dataset.subsets=null")
    splits = defaultdict(list)
    for subset in subsets or [None]:
        row_source = f"{source}/{subset}" if subset else source
        for split, rows in read_source(path, data_dir=subset).items():
            for origin, row in rows:
                completions = {name: get_text(row, name, origin) for name in ("chosen", "rejected")}
                splits[split].append(normalize_row(origin, row_source, chat, None, completions))
    return splits
