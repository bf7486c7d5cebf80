"""
Kills training at random moments, resumes it, and compares the end with a run that was left alone.

python tests/kill_driver.py MODEL_FOLDER OUTPUT_FOLDER '[{"stage": "sft", ...}, ...]'

The imports take seconds and training takes less than one, so all runs are forks of this process,
which itself trains nothing. Writes a line of JSON for every case.
"""

import contextlib
import gc
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ogpsa_trl import OGPSAConfig
from ogpsa_trl.training import whole_checkpoints
from processes import places
from runs import capability_groups, make_trainer, paper, weights

NUM_STEPS = 4
MOST_KILLS = 4
TARGETS = {
    # With a refresh every second step, and with averaging, restoration and drawn samples.
    "gradient": lambda: paper(refresh_interval=2, capability_ema=0.3),
    "update": lambda: OGPSAConfig(samples_per_refresh=2),
}


def train(case, model, folder, place):
    """Train to the end, from the last whole checkpoint if there is one; write the weights."""
    os.environ |= place
    os.chdir(folder)
    trainer = make_trainer(
        case["stage"], model, folder / "run", capability=capability_groups(),
        config=TARGETS[case["target"]](), max_steps=NUM_STEPS, optim="adamw_torch",
        learning_rate=1e-3, save_strategy="steps", save_steps=1, save_total_limit=2,
    )  # fmt: skip
    resume = None
    checkpoints = list((folder / "run").glob("checkpoint-*"))
    if any(whole_checkpoints.what_is_missing(path) is None for path in checkpoints):
        resume = True
    kill_inside(trainer, case.get("inside"), folder)
    trainer.train(resume_from_checkpoint=resume)
    if trainer.args.process_index == 0:
        save_file(weights(trainer), folder / "end.unfinished")
        (folder / "end.unfinished").rename(folder / "end.safetensors")


def kill_inside(trainer, what, folder):
    """Die once, in the middle of the second refresh, or in the third save, before a certain act."""
    told = folder / "killed"
    if what is None or told.exists():
        return
    calls = {"count": 0}
    owner, name, number = {
        "refresh": (trainer.capability_loss, "sum", 2 + 1),
        "model file": (trainer, "_save_optimizer_and_scheduler", 3),
        "subspace file": (trainer, "_save_rng_state", 3),
        "mark": (sys.modules["ogpsa_trl.training.whole_checkpoints"], "mark", 3),
        "deletion": (sys.modules["ogpsa_trl.training.whole_checkpoints"], "rotate_checkpoints", 3),
    }[what]
    method = getattr(owner, name)

    def dying(*args, **kwargs):
        calls["count"] += 1
        if calls["count"] == number:
            told.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*args, **kwargs)

    setattr(owner, name, dying)


def fork(case, model, folder, place):
    pid = os.fork()
    if pid > 0:
        return pid
    name = folder / f"log-{place.get('RANK', 0)}.txt"
    log = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        train(case, model, folder, place)
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # without the exit handlers of the program that it was forked from


def launch(case, model, folder, kills):
    """
    Run all processes of a case; `kills` are delays in seconds after which to kill which of them.

    Like torchrun, a process that ends with an error takes the others with it.
    """
    num_processes = case["processes"]
    alone = [{}]
    pids = [
        fork(case, model, folder, place)
        for place in (places(num_processes) if num_processes > 1 else alone)
    ]
    timers = [threading.Timer(delay, kill, [pids[rank]]) for delay, rank in kills]
    for timer in timers:
        timer.start()
    is_failed = False
    running = set(pids)
    while running:
        pid, status = os.wait()
        running.discard(pid)
        is_failed = is_failed or status != 0
        if is_failed:
            for other in running:
                kill(other)
    for timer in timers:
        timer.cancel()
        timer.join()
    return not is_failed


def kill(pid):
    with contextlib.suppress(ProcessLookupError):  # it has ended
        os.kill(pid, signal.SIGKILL)


def run_case(case, model, output, rng):
    """Train with kills until the end is reached; how many there were, and what the end is like."""
    key = f"{case['stage']}-{case['target']}-{case['processes']}"
    straight = output / f"straight-{key}"
    if not straight.exists():
        straight.mkdir()
        start = time.perf_counter()
        assert launch(case | {"inside": None}, model, straight, []), f"see {straight}"
        (straight / "seconds").write_text(str(time.perf_counter() - start))
    seconds = float((straight / "seconds").read_text())
    folder = output / "killed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    num_kills = 0
    ranks = range(case["processes"])
    for attempt in range(MOST_KILLS + 1):
        victims = ranks if case.get("both") else [rng.choice(ranks)]
        kills = [(rng.uniform(0.1, 1.0) * seconds, rank) for rank in victims]
        # The last attempt is left alone; a run that dies by itself is not killed too.
        is_left_alone = attempt == MOST_KILLS or "inside" in case
        if launch(case, model, folder, [] if is_left_alone else kills):
            break
        num_kills += 1
    logs = "\n".join(path.read_text() for path in sorted(folder.glob("log-*.txt")))
    end = folder / "end.safetensors"
    if not end.exists():
        return {"kills": num_kills, "same": False, "logs": logs[-3000:]}
    found, expected = load_file(end), load_file(straight / "end.safetensors")
    same = found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in found
    )
    return {"kills": num_kills, "same": same, "skipped": logs.count("Not resuming from")}


def main():
    model, output, cases = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    output.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    gc.collect()
    gc.freeze()  # the forks share the memory of what the libraries hold
    for case in cases:
        result = run_case(case, model, output, rng)
        sys.stdout.write(json.dumps(case | result) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
