"""
Train with SFT or DPO, from a YAML file, with or without OGPSA.

    accelerate launch scripts/train.py --config configs/sft.yaml [--key value ...]

`--help` lists every key; `--stage dpo --help` those of DPO. The exit status is 1 where the
capability gate (`gate_datasets`, `max_capability_loss_increase`) is not passed.
"""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import record
from trl.trainer.model_config import ModelConfig
from trl.trainer.utils import get_peft_config, get_quantization_config

from ogpsa_trl import CapabilityGate, OGPSADPOTrainer, OGPSASFTTrainer
from ogpsa_trl.arguments import RunArguments, parse_run
from ogpsa_trl.run_report import save_run_settings, write_report

logger = logging.getLogger("ogpsa_trl.train")

TRAINERS = {"sft": OGPSASFTTrainer, "dpo": OGPSADPOTrainer}


@record  # a launcher of several processes shows the error of the one that fails first
def main(run: RunArguments) -> int:
    """
    Load, train, save: model, tokenizer, model card and report end up in `output_dir`.

    Returns:
        The exit status, the same on every process: 0, or 1 if the capability gate is not passed.
    """
    args = run.training
    if args.process_index == 0:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("ogpsa_trl").setLevel(logging.INFO)
    args.model_init_kwargs = model_init_kwargs(run.model, args)
    datasets = run.safety_datasets()
    capability_groups, gate_groups = run.train.capability_groups(), run.train.gate_groups()
    eval_dataset = None
    if args.eval_strategy != "no":
        eval_dataset = split_of(datasets, "dataset_test_split", run.script.dataset_test_split)
    trainer = TRAINERS[run.train.stage](
        run.model.model_name_or_path,
        args=args,
        train_dataset=split_of(datasets, "dataset_train_split", run.script.dataset_train_split),
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(run.model),
        peft_config=get_peft_config(run.model),
        capability_dataset=capability_groups,
        ogpsa_config=None if capability_groups is None else run.ogpsa,
    )
    gate = None
    if gate_groups is not None:
        gate = CapabilityGate(trainer, gate_groups, run.gate)
        trainer.add_callback(gate)
    if run.script.ignore_bias_buffers:
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
        ]

    # The command line says True as "true": resume from the last checkpoint in `output_dir`.
    resume = args.resume_from_checkpoint
    save_run_settings(trainer, gate, run.keys())
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.save_state()
    trainer.save_model(args.output_dir)
    trainer.create_model_card(
        model_name=Path(args.output_dir).name, dataset_name=run.script.dataset_name
    )
    trainer.accelerator.print(f"Model, tokenizer and model card are in {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=run.script.dataset_name)
    if run.train.run_report and args.process_index == 0:
        report(args.output_dir)
    is_exceeded = gate is not None and gate.is_exceeded
    if gate is not None and gate.is_exceeded and args.process_index == 0:
        # Before any process ends: a launcher that sees one fail ends the others.
        print(gate.report(args.output_dir), file=sys.stderr, flush=True)
    # The others may still be saving: gloo aborts on a peer that has left.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return int(is_exceeded)


def report(folder: str) -> None:
    """Write the report of the run; a package that is missing for it is no reason to fail."""
    try:
        logger.info("The report of the run is in %s.", write_report(folder))
    except ModuleNotFoundError as error:
        logger.warning(
            "No report of the run: %r is not installed. Run `pip install 'ogpsa_trl[scripts]'`, "
            "then `python scripts/report.py %s`.",
            error.name, folder,
        )  # fmt: skip


def model_init_kwargs(model: ModelConfig, args: Any) -> dict[str, Any]:
    """How to load the model: `ModelConfig`, and on top of it the `model_init_kwargs` of TRL."""
    return {
        "revision": model.model_revision,
        "trust_remote_code": args.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }


def split_of(datasets: Mapping[str, Any], key: str, split: str) -> Any:
    """One split of the training data."""
    if split not in datasets:
        splits = ", ".join(map(repr, datasets))
        raise ValueError(f"`{key}` must be one of the splits {splits}, but got {split!r}.")
    return datasets[split]


if __name__ == "__main__":
    try:
        arguments = parse_run()
    except ValueError as error:
        sys.exit(f"error: {error}")
    sys.exit(main(arguments))
