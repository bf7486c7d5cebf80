"""
What a run was made with, as `run_settings.json` in its folder: for the report, and to do it again.

`training_args.bin`, which the trainer saves, is a pickle; this can be read without running it.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.trainer_pt_utils import get_model_param_count

from ogpsa_trl.evaluation.json_files import package_versions, write_json
from ogpsa_trl.run_report.log import RUN_SETTINGS
from ogpsa_trl.training.gate import CapabilityGate
from ogpsa_trl.training.mixin import OGPSAMixin


def save_run_settings(
    trainer: OGPSAMixin,
    gate: CapabilityGate | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """
    Write all settings into the trainer's `output_dir`, on the main process.

    To be called before `train`, so that they are there if the run is cut off.

    Args:
        trainer: The trainer, with OGPSA or without.
        gate: Its gate, if it has one.
        arguments: What else the run was started with (data sets, LoRA), by key.
    """
    if not trainer.is_world_process_zero():
        return
    args, groups = trainer.args, trainer.capability_groups
    content = {
        "trainer": type(trainer).__name__,
        "model": {
            "name_or_path": trainer.model.config.name_or_path,
            "num_parameters": get_model_param_count(trainer.model),
            "num_trained": get_model_param_count(trainer.model, trainable_only=True),
        },
        "num_processes": args.world_size,
        "ogpsa": asdict(trainer.ogpsa_config) if groups else None,
        "capability_groups": {
            group.name: {"samples": len(group.samples), "tokens": group.num_tokens}
            for group in groups
        },
        "gate": None if gate is None else asdict(gate.config),
        "gate_groups": {
            name: {"samples": len(part.samples), "tokens": part.num_tokens}
            for name, part in (gate.parts if gate else {}).items()
        },
        "arguments": dict(arguments or {}),
        "training": args.to_dict(),  # without tokens of the Hub
        "versions": package_versions(
            "accelerate", "peft", "datasets", "deepspeed", "bitsandbytes", "torchao"
        ),
    }
    write_json(Path(args.output_dir) / RUN_SETTINGS, content)
