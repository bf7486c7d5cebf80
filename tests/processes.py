"""
Processes of a launch, forked from one that has imported everything.

That takes ten seconds of every process that torchrun starts, more than what it then trains.
"""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import socket
import sys
import warnings
from multiprocessing import connection

_TIMEOUT = "Timeout ("  # what faulthandler writes
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["speed", "engine_worker"])
# The longest launch takes three minutes on a busy machine.
_SECONDS = 400


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

    Where they wait for each other for ever they are started once more, and a warning shows where
    each of them stood: seen once.

    Args:
        num_processes: How many.
        main: The function, at the top level of a module of the tests.
        arguments: Its arguments.
        folder: Where their output is written.
        on_gpu: Let them see the GPUs. All launches of a session do, or none.

    Raises:
        AssertionError: a process has failed; with the end of its output.
    """
    for is_last in (False, True):
        processes = start(places(num_processes), main, *arguments, folder=folder, on_gpu=on_gpu)
        failed = wait(processes)
        if failed is None:
            return
        files = [folder / f"output-{rank}.txt" for rank in range(num_processes)]
        texts = [file.read_text()[-6000:] for file in files]
        assert _TIMEOUT in texts[-1] and not is_last, texts[failed]
        warnings.warn("\n\n".join(texts), stacklevel=2)
        for file in files:
            file.unlink()


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
    running = {process.sentinel: process for process in processes}
    while running and not any(process.exitcode for process in processes):
        for sentinel in connection.wait(running):
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
    # A thread of pyarrow's allocator would hold locks that no process forked from it can open.
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
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
    # Processes that wait for each other for ever show where, and the last that was started ends.
    is_last = int(place.get("RANK", 0)) + 1 == int(place.get("WORLD_SIZE", 1))
    faulthandler.dump_traceback_later(_SECONDS, exit=is_last)
    gc.freeze()  # collecting garbage would look through the libraries
    main(*arguments)
