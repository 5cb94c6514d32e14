"""Commands in processes of their own, forked from one that has imported everything: none waits for its imports."""

import atexit
import contextlib
import inspect
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra

from dpo_pipeline.config import CONF

ROOT = CONF.parent
TWO_RANKS = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["dpo_pipeline.training.trainer", "tests.ranks"])


class ForkedPopen(subprocess.Popen):
    """Forks where a command starts `python -m MODULE`, as a sweep does for each job."""

    def _execute_child(self, args, *rest):
        if args[0] != sys.executable or "-m" not in args[1:3]:
            super()._execute_child(args, *rest)
            return
        names = list(inspect.signature(super()._execute_child).parameters)[1:]
        options = dict(zip(names, rest, strict=True))
        self.pid = os.fork()
        if self.pid:
            self._child_created = True
            return
        code = 1
        try:
            if options["start_new_session"]:
                os.setsid()
            run_module(args[args.index("-m") + 1 :], options["env"], options["c2pwrite"], options["errwrite"])
            code = 0
        except SystemExit as end:
            code = end.code or 0
            if isinstance(code, str):
                os.write(2, f"{code}\n".encode())
                code = 1
        finally:
            os._exit(code)


def run_module(call: list[str], environment: dict[str, str] | None, output: int, errors: int) -> None:
    """Be `python -m` with this call; the streams are file descriptors, or -1 for those of this process."""
    os.environ.update(environment or {})
    for name in [name for name in os.environ if name not in (environment or os.environ)]:
        del os.environ[name]
    for source, stream in ((output, 1), (errors, 2)):
        if source != -1:
            os.dup2(source, stream)
    subprocess.Popen = ForkedPopen
    GlobalHydra.instance().clear()
    sys.argv = list(call)
    sys.modules.pop(call[0], None)
    try:
        runpy.run_module(call[0], run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()


def run_forked(call: list[str], environment: dict[str, str], folder: Path, place: str) -> None:
    """What a process of `start` does in the working folder `place`: its streams are files in `folder`."""
    os.chdir(place)
    files = [os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for name in ("output", "errors")]
    run_module(call, environment, *files)


def start(*call: str, **variables: str) -> multiprocessing.Process:
    """Start `python -m` with this call and these variables, in the working folder of the test."""
    folder, place = Path(tempfile.mkdtemp()), os.getcwd()
    process = SERVER.Process(target=run_forked, args=(list(call), os.environ | variables, folder, place))
    with contextlib.chdir(ROOT):  # where the server finds the modules
        process.start()
    process.call, process.folder = call, folder
    return process


def wait(*processes: multiprocessing.Process, timeout: float = 400) -> subprocess.CompletedProcess:
    """Wait for the processes of one command as a launcher does, which ends the others where one fails."""
    deadline = time.monotonic() + timeout
    while all(process.is_alive() for process in processes) and time.monotonic() < deadline:
        processes[0].join(0.1)
    for process in processes:
        if any(process.exitcode for process in processes) or time.monotonic() > deadline:
            process.terminate()
        process.join(timeout)
    texts = {name: "".join((each.folder / name).read_text() for each in processes) for name in ("output", "errors")}
    sys.stderr.write(texts["errors"][-3000:])  # shown where the test fails
    code = next((process.exitcode for process in processes if process.exitcode), 0)
    return subprocess.CompletedProcess(processes[0].call, code, texts["output"], texts["errors"])


def run(*call: str, **variables: str) -> subprocess.CompletedProcess:
    """What `python -m` with this call prints and ends with."""
    return wait(start(*call, **variables))


def run_two_ranks(*call: str, **variables: str) -> subprocess.CompletedProcess:
    """The same in two ranks, without the launcher that starts them."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    launch = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return wait(*(start(*call, RANK=rank, LOCAL_RANK=rank, **launch, **variables) for rank in ("0", "1")))


def launch(*call: str, **variables: str) -> subprocess.CompletedProcess:
    """What a real launcher makes of a command, from the first import on."""
    options = {"cwd": ROOT, "env": os.environ | variables, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-m", *call], **options, text=True) as process:
        try:
            output, errors = process.communicate(timeout=400)
        finally:
            if process.poll() is None:
                process.terminate()  # which ends its ranks
    sys.stderr.write(errors[-3000:])
    return subprocess.CompletedProcess(call, process.returncode, output, errors)
