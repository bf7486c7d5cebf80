"""
Train with SFT or DPO, from a YAML file, with or without OGPSA.

    accelerate launch scripts/train.py --config configs/sft.yaml [--key value ...]

`--help` lists every key; `--stage dpo --help` those of DPO. The exit status is 1 where the
capability gate (`gate_datasets`, `max_capability_loss_increase`) is not passed.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import AutoProcessor
from trl.trainer.utils import get_peft_config, get_quantization_config

from ogpsa_trl import CapabilityGate, OGPSADPOTrainer, OGPSASFTTrainer
from ogpsa_trl.cli.paths import check_model_path, check_output_folder, check_template_path
from ogpsa_trl.cli.train_arguments import RunArguments
from ogpsa_trl.cli.train_keys import parse_run
from ogpsa_trl.cli.user_errors import FirstStep, user_errors
from ogpsa_trl.data.columns import Source
from ogpsa_trl.data.row_checks import check_data, check_tokens
from ogpsa_trl.engines.supported import check_arguments
from ogpsa_trl.run_report import save_run_settings, write_report
from ogpsa_trl.training.model_kind import check_causal
from ogpsa_trl.training.whole_checkpoints import checkpoint_to_resume, saving

logger = logging.getLogger("ogpsa_trl.train")

TRAINERS = {"sft": OGPSASFTTrainer, "dpo": OGPSADPOTrainer}


class Data(NamedTuple):
    """All data of a run. `None` where there is none of a kind."""

    train: Any
    evaluation: Any
    capability: dict[str, Any] | None
    gate: dict[str, Any] | None


def main(argv: Sequence[str] | None = None) -> int:
    """A training from its command line, in a process that a launcher has started."""
    with user_errors():
        arguments = parse_run(argv)
    return run_training(arguments)


def run_training(run: RunArguments) -> int:
    """
    Load, train, save: model, tokenizer, model card and report end up in `output_dir`.

    Returns:
        The exit status, the same on every process: 0, or 1 if the capability gate is not passed.

    Raises:
        SystemExit: something that the user can mend is wrong.
    """
    if run.training.process_index == 0:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("ogpsa_trl").setLevel(logging.INFO)
    is_debug = run.training.log_level == "debug"
    first_step = FirstStep()
    with user_errors(with_traceback=is_debug, first_step=first_step):
        status = train_and_save(run, first_step)
    return status or 0  # what is recorded may, by its type, return nothing


@record  # a launcher of several processes shows the error of the one that fails first
def train_and_save(run: RunArguments, first_step: FirstStep) -> int:
    """What `run_training` does; errors as they are."""
    args = run.training
    resume = check_paths(run)
    trainer, gate = prepare(run)
    check_tokens(trainer.train_dataset, args.max_length)
    trainer.add_callback(first_step)
    save_run_settings(trainer, gate, run.keys())
    trainer.train(resume_from_checkpoint=resume)
    with saving(Path(args.output_dir), args.output_dir):
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


def check_paths(run: RunArguments) -> str | None:
    """
    Look at the folders that the run names.

    Returns:
        The checkpoint to resume from, if any.

    Raises:
        ValueError: one of them is not what it has to be.
    """
    args = run.training
    check_model_path(str(run.model.model_name_or_path))
    check_template_path(getattr(args, "chat_template_path", None))
    if args.should_save:
        check_output_folder(args.output_dir)
    # The command line says True as "true": resume from the last whole checkpoint in `output_dir`.
    resume = str(args.resume_from_checkpoint or False)
    if resume.lower() == "false":
        return None
    return checkpoint_to_resume(resume.lower() == "true" or resume, args.output_dir)


def prepare(
    run: RunArguments,
    *,
    trainer_class: Any = None,
    change_data: Callable[[Data, Any], Data] = lambda data, _: data,
) -> tuple[OGPSASFTTrainer | OGPSADPOTrainer, CapabilityGate | None]:
    """
    Load the tokenizer, then the data, and only then the model, into a trainer and its gate.

    Args:
        run: Says what to load.
        trainer_class: In place of that of the stage.
        change_data: Makes other data of what was loaded, given the tokenizer.

    Raises:
        ValueError: they do not go together.
    """
    args, model = run.training, run.model
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": args.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    if run.train.ogpsa and run.train.capability_datasets:
        check_arguments(args, run.ogpsa.target)
    processing_class = load_processing_class(run)
    data = change_data(load_data(run, processing_class), processing_class)
    check_model(run)
    trainer = (trainer_class or TRAINERS[run.train.stage])(
        model.model_name_or_path,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=processing_class,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
        capability_dataset=data.capability,
        ogpsa_config=None if data.capability is None else run.ogpsa,
    )
    if run.script.ignore_bias_buffers:
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
        ]
    if data.gate is None:
        return trainer, None
    gate = CapabilityGate(trainer, data.gate, run.gate)
    trainer.add_callback(gate)
    return trainer, gate


def load_processing_class(run: RunArguments) -> Any:
    """
    The tokenizer or processor that TRL would load, but before the weights.

    Raises:
        ValueError: it cannot be loaded.
    """
    name, args = run.model.model_name_or_path, run.training
    try:
        return AutoProcessor.from_pretrained(
            name,
            revision=args.model_init_kwargs["revision"],
            trust_remote_code=args.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The tokenizer of `model_name_or_path` {name!r} cannot be loaded. Is it a model, and "
            f"is its name right? {error}"
        ) from error


def load_data(run: RunArguments, processing_class: Any) -> Data:
    """
    Load the data, and look at all rows: what the trainers would find out with the model in memory.

    Returns:
        The data without what the trainers could not read; for evaluation only where there is one.

    Raises:
        ValueError: some cannot be loaded, are empty, in no format for the stage or for the chat
            template, or a row has a value that cannot be read.
    """
    args = run.training
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    of_source: dict[str, Any] = {"vocabulary_size": len(tokenizer)}
    if run.train.stage == "sft":
        of_source["text_field"] = args.dataset_text_field
        of_source["assistant_only_loss"] = args.assistant_only_loss
    # TRL sets the template of `chat_template_path`, a key of SFT, later.
    is_rendered = getattr(args, "chat_template_path", None) is None

    def check(dataset: Any, where: str, use: Any) -> Any:
        source = Source(where, use, **of_source)
        return check_data(dataset, source, processing_class, is_rendered=is_rendered)

    def split(key: str, kind: str) -> Any:
        name = getattr(run.script, key)
        if name not in datasets:
            raise ValueError(
                f"`{key}` must be one of the splits {', '.join(map(repr, datasets))}, but got "
                f"{name!r}. Name another, or set `test_split_size` to divide `datasets`."
            )
        return check(datasets[name], f"the {kind} data", run.train.stage)

    def groups(loaded: dict[str, Any] | None, kind: str) -> dict[str, Any] | None:
        return loaded and {
            name: check(dataset, f"{kind} group {name!r} (`{kind}_datasets`)", "group")
            for name, dataset in loaded.items()
        }

    datasets = run.safety_datasets()
    return Data(
        split("dataset_train_split", "training"),
        None if args.eval_strategy == "no" else split("dataset_test_split", "evaluation"),
        groups(run.train.capability_groups(), "capability"),
        groups(run.train.gate_groups(), "gate"),
    )


def check_model(run: RunArguments) -> None:
    """
    Refuse a model that capability losses cannot be measured on; plain training is up to TRL.

    Raises:
        ValueError: it is no causal language model.
    """
    ways = ["leave out `gate_datasets`"] if run.train.gate_datasets else []
    if run.train.ogpsa and run.train.capability_datasets:
        ways.insert(0, "set `ogpsa: false` to train plain TRL")
    if ways:
        check_causal(
            str(run.model.model_name_or_path),
            way_out=f", or {' and '.join(ways)}",
            as_saved=True,
            revision=run.training.model_init_kwargs["revision"],
            trust_remote_code=run.training.trust_remote_code,
        )


def report(folder: str) -> None:
    """Write the report of the run; a package that is missing for it is no reason to fail."""
    try:
        logger.info("The report of the run is in %s.", write_report(folder))
    except ModuleNotFoundError as error:
        logger.warning(
            "No report of the run: %r is not installed. Run `pip install 'ogpsa_trl[scripts]'`, "
            "then `ogpsa report %s`.",
            error.name, folder,
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
