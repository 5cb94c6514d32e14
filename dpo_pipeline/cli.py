"""What every command shares: Hydra, signals, exit codes, and what a person is told."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra_plugins.dpo_pipeline.launcher import ProcessLauncher
from omegaconf import DictConfig

from dpo_pipeline.config import CONF, check_flags, explain_error, quote_home, validate
from dpo_pipeline.distributed import is_main_process, launch_fault
from dpo_pipeline.errors import OneRankError
from dpo_pipeline.formatting import mask_secrets, one_line
from dpo_pipeline.hardware import STOPS
from dpo_pipeline.quiet import quiet
from dpo_pipeline.schema import Run


def main(stage_function: Callable[[Run], Any]) -> None:
    """Run a command: compose its config, check it, and call `stage_function` with it.

    Ends with 1 for an error that a person can help, with 2 for any other, and with 75 where it was interrupted.
    """
    quiet()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # of what the terminal's encoding lacks
    logging.raiseExceptions = False  # else a closed output prints a traceback for each message
    Plugins.instance().register(ProcessLauncher)  # an editable install is not scanned for plugins
    # Hydra then raises instead of printing; the libraries' many small bars are off, the training's own is not.
    os.environ.update(HYDRA_FULL_ERROR="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false")
    root = Path("outputs")

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def task(cfg: DictConfig) -> None:
        nonlocal root
        try:
            run = validate(cfg, HydraConfig.get())
            root = Path(run.root)
            stage_function(run)
            sys.stdout.flush()  # a full or closed output is an error here, not one that Python prints at its end
        except Exception as error:  # here, since Hydra prints a line of its own for what leaves a task
            end_with_error(error, root)

    if fault := launch_fault():  # before anything asks which rank this is
        sys.exit(f"error: {fault}")
    try:
        check_flags(sys.argv[1:])
        sys.argv[1:] = map(quote_home, sys.argv[1:])
        for number in STOPS:
            signal.signal(number, interrupt)
        task()
    except KeyboardInterrupt:
        eval("0")  # else Python ends by SIGINT where the exception left the `exec` of a string, say of a dataclass
        sys.exit(75)
    except Exception as error:
        # The values of a sweep are several.
        end_with_error(error, root, [] if any(item.startswith("-") for item in sys.argv[1:]) else sys.argv[1:])
    finally:
        exit_on_signals()


def interrupt(signum: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt for a signal to stop; a moment later where Python would ignore it, in a `__del__`."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            threading.Timer(0.1, signal.raise_signal, (signum,)).start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def exit_on_signals() -> None:
    """Have a signal end the process at once: an exception while Python shuts down would print a traceback."""
    for number in STOPS:
        signal.signal(number, lambda *_: os._exit(75))


def end_with_error(error: Exception, root: Path, overrides: list[str] = ()) -> NoReturn:
    """End the process: with 1 and one sentence where a person can help it, else with 2 and a traceback under `root`.

    Ranks other than 0 repeat nothing: rank 0 has the same error, unless it is one that a rank may meet alone.
    """
    exit_on_signals()
    code, sentence = 1, explain_error(error, overrides)
    is_repeated = sentence is not None and not isinstance(error, OneRankError)
    if sentence is None:
        code, kind = 2, type(error).__name__
        sentence = f"unexpected error: {kind}: {one_line(str(error))} ({write_traceback(error, root)})"
    else:
        sentence = f"error: {one_line(sentence, limit=10_000)}"
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads it, or its disk is full: Python would print that once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sentence = mask_secrets(sentence)
    if not is_main_process():
        if is_repeated:
            time.sleep(10)  # where this rank ends first, the launcher ends rank 0 before it can print
            sys.exit(code)
        sentence = f"rank {os.environ['RANK']}: {sentence}"
    if code == 1:
        sys.exit(sentence)
    with contextlib.suppress(OSError):
        print(sentence, file=sys.stderr)
    sys.exit(code)


def write_traceback(error: Exception, root: Path) -> str:
    """Write the traceback of an error to a file of its own, and say where it lies."""
    file = root / ".cache" / "tracebacks" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="backslashreplace")
    except OSError:
        return f"no traceback: {file} cannot be written"
    return f"traceback in {file}"
