"""
Trains on the processes of this launch, of which the last one fails, or has something of its own.

torchrun --nproc_per_node 2 tests/failing_worker.py ENGINE PLACE MODEL_FOLDER OUTPUT_FOLDER
"""

import os
import signal
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.elastic.multiprocessing.errors import record

from engine_worker import engine_arguments, use_cpu
from ogpsa_trl.method.saved_state import file_names
from runs import capability_groups, make_trainer, paper

REASON = "Row 5 of the data of this process cannot be read."
NUM_STEPS = 3


def unreadable():
    raise OSError(REASON)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def at_second_call(owner, name, act):
    """Do something in place of the second call of a method."""
    method, calls = getattr(owner, name), []

    def acting(*args, **kwargs):
        calls.append(name)
        return act() if len(calls) == 2 else method(*args, **kwargs)

    setattr(owner, name, acting)


def damage(path):
    """Change one entry of a basis, and leave the size of the file as it is."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name][0, 0] += 1
    save_file(tensors, path, metadata)


# The reason of a failing process has to reach the launcher: as scripts/train.py does it.
@record
def main(engine, place, model_path, output_dir):
    torch.set_num_threads(1)
    use_cpu(engine)
    num_processes = int(os.environ["WORLD_SIZE"])
    is_last = int(os.environ["RANK"]) == num_processes - 1
    capability, settings = capability_groups(), {}
    if is_last and place == "start":
        capability["skills"] = capability["skills"].select([])
    if is_last and place == "samples":
        capability["skills"] = capability["skills"].select(range(3))
    if is_last and place == "group":
        capability["more"] = capability["skills"]
    if is_last and place == "setting":
        settings["refresh_interval"] = 2

    def make(**options):
        return make_trainer(
            "sft", model_path, output_dir, capability=capability,
            config=paper(**{"refresh_interval": 1, "capability_batch_size": 1, **settings}),
            **{
                "max_steps": NUM_STEPS, "optim": "adamw_torch", "learning_rate": 1e-3,
                **engine_arguments(engine, bf16=False), **options,
            },
        )  # fmt: skip

    trainer, checkpoint = make(), None
    if is_last and place == "refresh":
        at_second_call(trainer.capability_loss, "sum", unreadable)
    if is_last and place == "step":
        at_second_call(trainer, "compute_loss", unreadable)
    if is_last and place == "killed":
        at_second_call(trainer, "compute_loss", die)
    if place == "basis":
        make(save_strategy="steps", save_steps=1, max_steps=1).train()
        checkpoint = Path(output_dir) / "checkpoint-1"
        if is_last:
            damage(checkpoint / file_names(num_processes)[-1])
        torch.distributed.barrier()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


if __name__ == "__main__":
    main(*sys.argv[1:])
