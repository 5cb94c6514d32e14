"""The processes of one run: which of them this is, and how they share results and errors."""

import atexit
import os
import pickle
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from dpo_pipeline.errors import PipelineError

NOTICE_SECONDS = 30  # after which a rank says that it waits for the others


def processes() -> int:
    """Number of processes that a launcher started for this run; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main_process() -> bool:
    """Whether this process writes and prints: rank 0, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


def launch_fault() -> str | None:
    """What is wrong with the variables of a launcher, if anything: no process may be asked for its rank then."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        value = os.environ.get(name, "1")
        if not value.isdecimal() or (name == "WORLD_SIZE" and int(value) < 1):
            return f"{name}={value} is set but names no process: type `unset {name}`"
    if processes() > 1 and not {"MASTER_ADDR", "MASTER_PORT", "RANK"} <= os.environ.keys():
        return (
            "WORLD_SIZE is set without RANK, MASTER_ADDR or MASTER_PORT: `unset WORLD_SIZE`, or use accelerate launch"
        )
    if (precision := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":  # before TRL's arguments set it
        return f"the launch file says mixed_precision: {precision}: take that out, precision= says it"
    return None


def on_main_process(function: Callable[[], Any]) -> Any:
    """Call `function` on rank 0 alone, and give its result, or raise its exception, on every rank.

    An exception that cannot be pickled is raised elsewhere as PipelineError with its text. Used for what must be
    decided once: ranks that each look at a folder may see different states of it.
    """
    if processes() == 1:
        return function()
    from accelerate.utils import broadcast_object_list

    connect_processes()
    outcome: list[Any] = [None, None]
    if is_main_process():
        try:
            outcome[0] = function()
        except BaseException as error:
            broadcast_object_list([None, picklable(error)])
            raise
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def connect_processes() -> None:
    """Connect the ranks, before TRL does with a timeout of ten minutes: rank 0 may tokenize or merge for longer."""
    import torch
    from accelerate import PartialState

    if not torch.distributed.is_initialized():
        text = f"waiting for {processes() - 1} other process(es): `unset WORLD_SIZE` where this is the only one"
        notice = threading.Timer(NOTICE_SECONDS, print, [text], {"flush": True})
        notice.start()
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
        notice.cancel()
        atexit.register(state.destroy_process_group)  # else its threads may abort an interpreter that ends


def picklable(error: BaseException) -> BaseException:
    """The exception, or a PipelineError with its text where it does not survive pickling."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an exception class decides for itself what its pickling raises
        return PipelineError(f"{type(error).__name__}: {error}")
    return error


def map_over_ranks(function: Callable[[list[int]], list[Any]], count: int) -> list[Any]:
    """Give each rank its share of the row numbers below `count`, and return the results of all rows in order.

    `function` maps row numbers to results. It must not wait for other ranks: the shares differ in length.
    """
    if processes() == 1:
        return function(list(range(count)))
    from accelerate.utils import gather_object

    connect_processes()
    rows = list(range(int(os.environ["RANK"]), count, processes()))
    return [result for _, result in sorted(gather_object(list(zip(rows, function(rows), strict=True))))]
