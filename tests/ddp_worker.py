"""Trains every cell of the DDP table on the processes of this launch; saves weights and logs.

torchrun --nproc_per_node 2 tests/ddp_worker.py MODEL_FOLDER OUTPUT_FOLDER
"""

import itertools
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch
from peft import LoraConfig

from ogpsa_trl import OGPSAConfig
from runs import capability_groups, logged, make_trainer, weights

CELLS = list(
    itertools.product(
        ("sft", "dpo"), ("full", "lora"), ("parameter", "model"), ("sgd", "adamw_torch")
    )
)
GLOBAL_BATCH = 8


def name_of(cell):
    return "-".join(cell)


def run(cell, model_path, output_dir, num_processes, resume_from=None):
    """Three steps with accumulation 2 and a refresh in between; 3 capability batches a group."""
    stage, form, scope, optimizer = cell
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = make_trainer(
        stage, model_path, output_dir, capability=capability_groups(),
        config=OGPSAConfig(scope=scope, refresh_interval=2, capability_batch_size=2),
        more={"peft_config": lora} if form == "lora" else None,
        max_steps=3, per_device_train_batch_size=GLOBAL_BATCH // 2 // num_processes,
        gradient_accumulation_steps=2, optim=optimizer, max_grad_norm=0.5,
        learning_rate=0.1 if optimizer == "sgd" else 1e-3, adam_epsilon=1e-4,
        save_strategy="steps", save_steps=1, ddp_backend="gloo" if num_processes > 1 else None,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer


def main(model_path, output_dir):
    torch.set_num_threads(1)
    num_processes = int(os.environ["WORLD_SIZE"])
    for cell in CELLS:
        folder = Path(output_dir) / name_of(cell)
        trainer = run(cell, model_path, folder, num_processes)
        assert trainer.accelerator.num_processes == num_processes
        resumed = run(cell, model_path, folder, num_processes, str(folder / "checkpoint-1"))
        if trainer.accelerator.is_main_process:
            result = {
                "weights": weights(trainer),
                "resumed": weights(resumed),
                "log": logged(trainer),
            }
            torch.save(result, folder / "result.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
