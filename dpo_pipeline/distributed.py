"""The processes of one run: which of them this is, and what they share."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from dpo_pipeline.errors import PipelineError


def processes() -> int:
    """How many processes a launcher started for this run; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main_process() -> bool:
    """Whether this process writes and prints: rank 0, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


def on_main_process(decision: Callable[[], Any]) -> Any:
    """What rank 0 makes of `decision`, given to every process; where it raises PipelineError, all do.

    For what must be decided or made once: ranks that look at a folder by themselves may each see another state of it.
    """
    if processes() == 1:
        return decision()
    import torch
    from accelerate import PartialState

    # Before TRL makes its own with ten minutes: rank 0 may tokenize, or merge, for longer than that.
    PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    box: list[Any] = [None, None]
    if is_main_process():
        try:
            box[0] = decision()
        except PipelineError as error:
            box[1] = error
    torch.distributed.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def map_over_ranks(work: Callable[[list[int]], list[Any]], count: int) -> list[Any]:
    """What `work` gives for the rows of these numbers, for all of `count` rows in order; each process does its share.

    `work` may not wait for the other processes: their shares differ.
    """
    mine = list(range(count))[int(os.environ.get("RANK", 0)) :: processes()]
    if processes() == 1:
        return work(mine)
    import torch

    shares: list[Any] = [None] * processes()
    torch.distributed.all_gather_object(shares, work(mine))
    done: list[Any] = [None] * count
    for rank, share in enumerate(shares):
        done[rank :: processes()] = share
    return done
