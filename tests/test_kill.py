"""Killed at any moment, a run that is resumed ends as the one that never stopped, bit for bit."""

import itertools
import os
import random
import signal
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import processes
from ogpsa_trl import OGPSAConfig
from ogpsa_trl.training import whole_checkpoints
from runs import SAVES, capability_groups, make_trainer, paper, weights

MOST_KILLS = 4
CONFIGS = {
    # With a refresh every second step, and with averaging, restoration and drawn samples.
    "gradient": paper(refresh_interval=2, capability_ema=0.3),
    "update": OGPSAConfig(samples_per_refresh=2),
}
# In the second refresh, or in the third save: what is called next, and for the how manieth time.
INSIDE = {
    "refresh": ("capability_loss.sum", 3),
    "model file": ("_save_optimizer_and_scheduler", 3),
    "subspace file": ("_save_rng_state", 3),
    "mark": ("mark", 3),
    "deletion": ("rotate_checkpoints", 3),
}


def train(case, model, folder):
    """Train to the end, from the last whole checkpoint if there is one; write the weights."""
    torch.set_num_threads(1)
    stage, target, _, place = case
    os.chdir(folder)
    trainer = make_trainer(
        stage, model, folder / "run", capability=capability_groups(), config=CONFIGS[target],
        optim="adamw_torch", learning_rate=1e-3, save_total_limit=2, **SAVES | {"max_steps": 4},
    )  # fmt: skip
    checkpoints = (folder / "run").glob("checkpoint-*")
    is_whole = [whole_checkpoints.what_is_missing(path) is None for path in checkpoints]
    if place is not None and not (folder / "killed").exists():
        kill_at(trainer, *INSIDE[place], folder / "killed")
    trainer.train(resume_from_checkpoint=any(is_whole) or None)
    if trainer.args.process_index == 0:
        save_file(weights(trainer), folder / "end.unfinished")
        (folder / "end.unfinished").rename(folder / "end.safetensors")


def kill_at(trainer, name, number, told):
    """Die before a certain call of a method, of the trainer or in saving."""
    owner = trainer.capability_loss if "." in name else trainer
    name = name.rpartition(".")[2]
    owner = owner if hasattr(owner, name) else whole_checkpoints
    method, calls = getattr(owner, name), itertools.count(1)

    def dying(*args, **kwargs):
        if next(calls) == number:
            told.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*args, **kwargs)

    setattr(owner, name, dying)


def launch(case, model, folder, kills=()):
    """Run the processes of a case to their end, or kill some after some seconds; if all ended."""
    num_processes = case[2]
    places = processes.places(num_processes) if num_processes > 1 else [{}]
    started = processes.start(places, train, case, model, folder, folder=folder)
    timers = [threading.Timer(seconds, started[rank].kill) for seconds, rank in kills]
    for timer in timers:
        timer.start()
    failed = processes.wait(started)
    for timer in timers:
        timer.cancel()
        timer.join()
    return failed is None


@pytest.fixture(scope="module")
def ends_as_straight(base_model_path, tmp_path_factory):
    """Kill and resume a case until it is at its end, and compare: kills, checkpoints left aside."""
    straight, rng = {}, random.Random(0)
    # The first process waits until what it is forked from has imported everything.
    processes.wait(processes.start([{}], print, folder=tmp_path_factory.mktemp("first")))

    def run(case, victims=None):
        *key, place = case
        if tuple(key) not in straight:
            folder, start = tmp_path_factory.mktemp("straight"), time.monotonic()
            assert launch((*key, None), base_model_path, folder), f"see {folder}"
            straight[tuple(key)] = folder, time.monotonic() - start
        expected, seconds = straight[tuple(key)]
        folder, num_kills = tmp_path_factory.mktemp("killed"), 0
        for attempt in range(MOST_KILLS + 1):
            # The last attempt is left alone; a run that dies by itself is not killed too.
            ranks = [] if place or attempt == MOST_KILLS else victims(rng, range(case[2]))
            kills = [(rng.uniform(0.1, 1.0) * seconds, rank) for rank in ranks]
            if launch(case, base_model_path, folder, kills):
                break
            num_kills += 1
        logs = "".join(path.read_text() for path in sorted(folder.glob("output-*.txt")))
        assert (folder / "end.safetensors").exists(), logs[-3000:]
        end, straight_end = (load_file(f / "end.safetensors") for f in (folder, expected))
        assert end.keys() == straight_end.keys()
        assert all(torch.equal(end[name], straight_end[name]) for name in end), (case, num_kills)
        return num_kills, logs.count("Not resuming from")

    return run


@pytest.mark.parametrize(("place", "num_skipped"), [("refresh", 0), ("mark", 1), ("deletion", 0)])
def test_a_kill_inside_a_refresh_or_a_save_loses_nothing(place, num_skipped, ends_as_straight):
    """What was being saved is named and left aside; after the list only deletion is left."""
    assert ends_as_straight(("sft", "update", 1, place)) == (1, num_skipped)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_processes", [1, 2])
def test_kills_at_random_moments_lose_nothing(num_processes, ends_as_straight):
    """Of two processes one is killed, or both, each at its own moment."""
    num_kills = 0
    for stage, target in itertools.product(("sft", "dpo"), CONFIGS):
        for repeat in range(5):
            victims = (lambda _, ranks: ranks) if repeat % 2 else lambda r, ranks: [r.choice(ranks)]
            num_kills += ends_as_straight((stage, target, num_processes, None), victims)[0]
    assert num_kills >= 10
    for stage, target in (("sft", "gradient"), ("dpo", "update")):
        for place in INSIDE:
            assert ends_as_straight((stage, target, num_processes, place))[0] == 1, place
