"""
Trains an adapter on a base in 4 bits on the processes of this launch; saves what test_qlora asks.

torchrun --nproc_per_node 2 tests/qlora_worker.py ENGINE MODEL_FOLDER OUTPUT_FOLDER
"""

from pathlib import Path

import torch
from trl.trainer.model_config import ModelConfig
from trl.trainer.utils import get_peft_config, get_quantization_config

from engine_worker import engine_arguments, use_cpu
from ogpsa_trl import OGPSAConfig
from runs import capability_groups, make_trainer, weights

ADAMW = {
    "optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.5,
    "max_steps": 4, "model_init_kwargs": {"dtype": "float32"},
}  # fmt: skip

# On any number of processes: a share of the tokens buys samples for each.
SAME_SAMPLES = OGPSAConfig(samples_per_refresh=2, basis_dtype="float32")


def make_qlora_trainer(
    stage, model_path, output_dir, config, *, plain=False, callbacks=(), bits=4, **options
):
    """A trainer by the keys of TRL's `ModelConfig`; without a `config` there is no OGPSA in it."""
    keys = ModelConfig(
        use_peft=True, lora_r=4, lora_dropout=0.0, lora_target_modules=["all-linear"],
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, use_bnb_nested_quant=True,
    )  # fmt: skip
    more = {
        "quantization_config": get_quantization_config(keys),
        "peft_config": get_peft_config(keys),
        "callbacks": list(callbacks),
    }
    groups = None if config is None else capability_groups()
    return make_trainer(
        stage, model_path, output_dir, plain=plain, capability=groups, config=config, more=more,
        **ADAMW | options,
    )  # fmt: skip


def adapter_of(trainer):
    return {name: tensor for name, tensor in weights(trainer).items() if "lora_" in name}


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(engine, model_path, folder):
    use_cpu(engine)
    trainer = make_qlora_trainer(
        "sft", model_path, folder, SAME_SAMPLES, per_device_train_batch_size=2,
        **engine_arguments(engine, bf16=False),
    )  # fmt: skip
    trainer.train()
    if trainer.is_world_process_zero():
        result = {"losses": losses_of(trainer), "basis_bytes": trainer.subspace.basis_bytes}
        torch.save(result, Path(folder) / "result.pt")
