"""
Processes of a launch, forked from one that has imported everything.

That takes ten seconds of every process that torchrun starts, more than what it then trains.
"""

import contextlib
import multiprocessing
import os
import socket
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
    files = [folder / f"output-{rank}.txt" for rank in range(num_processes)]
    processes = [
        _FORKS.Process(target=_run, args=(place, file, main, arguments))
        for place, file in zip(places(num_processes), files, strict=True)
    ]
    with _hidden_gpus(on_gpu):  # the process that they are forked from has what it starts with
        for process in processes:
            process.start()
    end = time.monotonic() + _SECONDS
    running = {process.sentinel: process for process in processes}
    while running and not any(process.exitcode for process in processes):
        if not (done := connection.wait(running, timeout=max(0, end - time.monotonic()))):
            break
        for sentinel in done:
            running.pop(sentinel).join()
    failed = [file for process, file in zip(processes, files, strict=True) if process.exitcode]
    for process in running.values():  # they wait for the one that has failed
        process.kill()
        process.join()
    assert not failed, failed[0].read_text()[-6000:]
    assert not running, f"The launch has not ended in {_SECONDS} s."


@contextlib.contextmanager
def _hidden_gpus(on_gpu):
    before = dict(os.environ)
    if not on_gpu:
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(place, file, main, arguments):
    with file.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ |= place
    main(*arguments)
