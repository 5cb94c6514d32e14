"""What every command shares: Hydra, signals, exit codes, and what a person is told."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra_plugins.dpo_pipeline.launcher import ProcessLauncher
from omegaconf import DictConfig

from dpo_pipeline.config import CONF, explain_error, quote_home, validate
from dpo_pipeline.distributed import is_main_process
from dpo_pipeline.errors import OneRankError
from dpo_pipeline.hardware import STOPS
from dpo_pipeline.quiet import quiet
from dpo_pipeline.schema import Run


def main(stage_function: Callable[[Run], Any]) -> None:
    """Run a command: compose its config from the command line, check it, and call `stage_function` with it.

    Ends the process with 1 and one sentence where the config or the input is wrong, with 75 where it was interrupted.
    """
    quiet()
    Plugins.instance().register(ProcessLauncher)  # an editable install is not scanned for plugins
    # Hydra then raises instead of printing; the libraries' many small bars are off, the training's own is not.
    os.environ.update(HYDRA_FULL_ERROR="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false")
    sys.argv[1:] = map(quote_home, sys.argv[1:])

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def task(cfg: DictConfig) -> None:
        try:
            stage_function(validate(cfg, HydraConfig.get()))
        except Exception as error:  # here, since Hydra prints a line of its own for what leaves a task
            if sentence := explain_error(error):
                exit_with_error(sentence, is_one_rank=isinstance(error, OneRankError))
            raise

    if (precision := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":  # before TRL's arguments set it
        exit_with_error(f"the launch file says mixed_precision: {precision}: take that out, precision= alone says it")
    for number in STOPS:
        signal.signal(number, interrupt)
    try:
        task()
    except KeyboardInterrupt:
        sys.exit(75)
    except Exception as error:
        is_sweep = any(item.startswith("-") for item in sys.argv[1:])  # its values are several
        if sentence := explain_error(error, [] if is_sweep else sys.argv[1:]):
            exit_with_error(sentence)
        raise


def interrupt(signum: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt for a signal to stop; a moment later where Python would ignore it, in a `__del__`."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            threading.Timer(0.1, signal.raise_signal, (signum,)).start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def exit_with_error(sentence: str, is_one_rank: bool = False) -> NoReturn:
    """End the process with 1 and one sentence: of rank 0, or of the one rank that met an error by itself."""
    message = " ".join(line.strip() for line in f"error: {sentence}".splitlines() if line.strip())
    if is_main_process():
        sys.exit(message)
    if not is_one_rank:
        time.sleep(10)  # rank 0 prints it; where this rank ends first, the launcher ends rank 0 before it can
    sys.exit(f"rank {os.environ['RANK']}: {message}" if is_one_rank else 1)
