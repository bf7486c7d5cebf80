"""
Processes of a launch, forked from one that has imported everything.

That takes ten seconds of every process that torchrun starts, more than what it then trains.
"""

import contextlib
import gc
import multiprocessing
import os
import socket
import sys
import time
from multiprocessing import connection

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["speed", "engine_worker"])
_SECONDS = 1000


def places(num_processes):
    """The environment of each process, by which they find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes),
            "LOCAL_WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for rank in range(num_processes)
    ]  # fmt: skip


def launch(num_processes, main, *arguments, folder, on_gpu=False):
    """
    Run a function on processes that can talk to each other, until all are done or one has failed.

    Args:
        num_processes: How many.
        main: The function, at the top level of a module of the tests.
        arguments: Its arguments.
        folder: Where their output is written.
        on_gpu: Let them see the GPUs. All launches of a session do, or none.

    Raises:
        AssertionError: a process has failed; with the end of its output.
    """
    processes = start(places(num_processes), main, *arguments, folder=folder, on_gpu=on_gpu)
    failed = wait(processes)
    assert failed is None, (folder / f"output-{failed}.txt").read_text()[-6000:]


def start(environments, main, *arguments, folder, on_gpu=False):
    """Processes that run a function, each with its environment."""
    processes = [
        _FORKS.Process(target=_run, args=(place, folder / f"output-{rank}.txt", main, arguments))
        for rank, place in enumerate(environments)
    ]
    with _environment(on_gpu):  # the process that they are forked from has what it starts with
        for process in processes:
            process.start()
    return processes


def wait(processes):
    """
    Until all are done or one has failed: the others, which wait for it, are killed then.

    Returns:
        The number of the first that failed, or `None`.
    """
    end = time.monotonic() + _SECONDS
    running = {process.sentinel: process for process in processes}
    while running and not any(process.exitcode for process in processes):
        done = connection.wait(running, timeout=max(0, end - time.monotonic()))
        assert done, f"The launch has not ended in {_SECONDS} s."
        for sentinel in done:
            running.pop(sentinel).join()
    failed = [rank for rank, process in enumerate(processes) if process.exitcode]
    for process in running.values():
        process.kill()
        process.join()
    return next(iter(failed), None)


@contextlib.contextmanager
def _environment(on_gpu):
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # Python 3.11 does not hand it on
    if not on_gpu:
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(place, file, main, arguments):
    with file.open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ |= place
    gc.freeze()  # collecting garbage would look through the libraries
    main(*arguments)
