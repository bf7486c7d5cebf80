"""The keys of a training run, parsed and checked, also against each other."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Annotated, Any, Literal

from annotated_types import Ge
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_pt_utils import AcceleratorConfig
from trl.scripts.utils import DatasetConfig, ScriptArguments
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.model_config import ModelConfig
from trl.trainer.sft_config import SFTConfig

from ogpsa_trl.cli.command_line import Given, given_keys
from ogpsa_trl.cli.key_values import JSON
from ogpsa_trl.cli.keys import KeyParser
from ogpsa_trl.cli.train_arguments import RunArguments, TrainArguments
from ogpsa_trl.config import GateConfig, OGPSAConfig, preset_settings
from ogpsa_trl.data.entries import (
    ConvertibleDatasetConfig,
    ConvertibleMixtureConfig,
    GroupedDatasetConfig,
    describe,
)
from ogpsa_trl.training.setup import check_gate_saving

STAGE_CONFIGS: dict[str, type[SFTConfig] | type[DPOConfig]] = {"sft": SFTConfig, "dpo": DPOConfig}

_Tracker = Literal[("none", "all", *INTEGRATION_TO_CALLBACK)]
_Setting = Literal[tuple(setting.name for setting in fields(AcceleratorConfig))]
# Of keys that TRL annotates in another way than it reads them, and of numbers with an exception.
_TYPES = {
    "datasets": list[ConvertibleDatasetConfig],
    "fsdp": str | bool | None,
    "resume_from_checkpoint": str | bool | None,
    "report_to": _Tracker | list[_Tracker] | None,
    "accelerator_config": dict[_Setting, Any] | JSON,
    "debug": str | list[str] | None,
    "pad_to_multiple_of": str | None | Annotated[int, Ge(1)],
    "max_steps": Annotated[int, Ge(1)] | Literal[-1],  # as many as `num_train_epochs` makes
}


def parse_run(args: Sequence[str] | None = None) -> RunArguments:
    """
    Parse the command line and the YAML file that `--config` names; the command line wins.

    Raises:
        ValueError: a key is unknown, a value is not allowed, or keys do not go together.
    """
    given = given_keys(args)
    run = RunArguments(*run_parser(given).parse(given))
    if not run.model.model_name_or_path:
        raise ValueError(
            "A run needs a model, but `model_name_or_path` is not set. Set it to a name on the Hub "
            "or a folder."
        )
    if not run.training.output_dir:
        raise ValueError(
            "`output_dir` must name a folder, but is empty. Name one, such as `runs/sft`."
        )
    for key in ("load_in_4bit", "load_in_8bit"):
        if getattr(run.model, key) and not run.model.use_peft:
            raise ValueError(
                f"`{key}: true` quantises the weights, and quantised weights cannot be trained. Set"
                " `use_peft: true` to train an adapter on them, or leave it out."
            )
    _check_ogpsa(run)
    _check_gate(run)
    _check_training_data(run)
    return run


def training_parser(stage: str, **options: Any) -> KeyParser:
    """
    The parser of the keys of a stage.

    Args:
        stage: `sft` or `dpo`.
        options: `prog` and `epilog` of argparse: the name of the program, and a last word.
    """
    dataclass_types: Any = (
        TrainArguments, ScriptArguments, STAGE_CONFIGS[stage], ModelConfig,
        ConvertibleMixtureConfig, OGPSAConfig, GateConfig,
    )  # fmt: skip
    own = {entry.name for kind in dataclass_types for entry in fields(kind)}
    elsewhere = {
        entry.name: f"is a key of the stage '{other}', but this run has the stage '{stage}'. Remove"
        f" it, or set `stage: {other}`."
        for other, kind in STAGE_CONFIGS.items()
        for entry in fields(kind)
        if entry.name not in own
    }
    return KeyParser(
        dataclass_types,
        "Safety training with TRL that keeps capabilities.",
        types=_TYPES,
        elsewhere=elsewhere,
        **options,
    )


def run_parser(given: Given, **options: Any) -> KeyParser:
    """
    The parser of a run of this stage, with the defaults of this preset.

    Args:
        given: What the run was given.
        options: See `training_parser`.

    Raises:
        ValueError: there is no such stage or preset, or the file has `parallelism_config`.
    """
    # What decides the other keys and their defaults.
    first = {key: given.values[key] for key in ("stage", "preset") if key in given.values}
    early = KeyParser(TrainArguments, add_help=False)
    chosen = early.check_values(Given(given.words, first, given.path))
    parser = training_parser(chosen.stage, **options)
    preset = preset_settings(chosen.preset or "preserve", chosen.stage)
    parser.set_defaults_with_config(**preset)
    if given.values.get("parallelism_config") is not None:
        raise ValueError(
            "`parallelism_config` cannot be set in a file of keys. Set it in the file that "
            "`accelerate launch --config_file` names, as configs/accelerate/hsdp.yaml does."
        )
    return parser


def training_options() -> set[str]:
    """All that may begin with `--` on the command line of a run, in any stage."""
    return set().union(*(training_parser(stage).option_names() for stage in STAGE_CONFIGS))


def _check_ogpsa(run: RunArguments) -> None:
    train = run.train
    for key in ("capability_datasets", "gate_datasets"):
        _check_groups(key, getattr(train, key))
    defaults = OGPSAConfig(**preset_settings(train.preset or "preserve", train.stage))
    changed = _changed(run.ogpsa, defaults) if train.preset is None else {"preset": train.preset}
    if train.ogpsa and not train.capability_datasets and changed:
        name, value = next(iter(changed.items()))
        raise ValueError(
            f"`{name}` ({value!r}) is a setting of OGPSA, but there is no capability data to use it"
            " on. Add `capability_datasets`, or set `ogpsa: false` to train plain TRL."
        )


def _changed(settings: Any, defaults: Any) -> dict[str, Any]:
    """The settings that are not the defaults."""
    known = asdict(defaults)
    return {name: value for name, value in asdict(settings).items() if value != known[name]}


def _check_groups(key: str, entries: Sequence[GroupedDatasetConfig]) -> None:
    """Refuse groups that are one: the same data, or names that are taken for each other."""
    names: dict[str, str] = {}
    sources: list[dict[str, Any]] = []
    for number, entry in enumerate(entries, start=1):
        where = f"entry {number} of `{key}`"
        if not entry.group or not entry.group.isprintable():
            raise ValueError(
                f"`group` in {where} must be a name on one line, but got {entry.group!r}. Correct "
                "it, or leave it out for the default."
            )
        known = names.setdefault("".join(entry.group.casefold().split()), entry.group)
        if known != entry.group:
            raise ValueError(
                f"`group` in {where} is {entry.group!r}, but there is a group {known!r} that "
                "differs in spaces or capitals only. Write both alike to mix them, or rename one."
            )
        source = _source(entry) | {"columns": entry.columns, "conversion": entry.conversion}
        if source in sources:
            raise ValueError(
                f"{where} is the same data as entry {sources.index(source) + 1} "
                f"({describe(entry)}), which would count twice. Remove one, or name another split."
            )
        sources.append(source)


def _check_gate(run: RunArguments) -> None:
    if run.train.gate_datasets:
        check_gate_saving(run.gate, run.training)
    else:
        for name, value in _changed(run.gate, GateConfig()).items():
            raise ValueError(
                f"`{name}` ({value!r}) is a setting of the capability gate, but there is no data to"
                " measure. Add `gate_datasets`, in the schema of `capability_datasets`, or leave it"
                " out."
            )
    used = {"capability_datasets": run.train.capability_datasets, "datasets": run.datasets.datasets}
    for number, entry in enumerate(run.train.gate_datasets, start=1):
        for key, others in used.items():
            if any(_source(entry) == _source(other) for other in others):
                raise ValueError(
                    f"entry {number} of `gate_datasets` must be held out, but the same data "
                    f"({describe(entry)}) is an entry of `{key}`. Name another split or file, such "
                    "as `split: train[90%:]` here and `split: train[:90%]` there."
                )


def _source(entry: DatasetConfig) -> dict[str, Any]:
    """What says which rows an entry reads."""
    names = ("path", "name", "data_dir", "data_files", "split")
    return {name: getattr(entry, name) for name in names}


def _check_training_data(run: RunArguments) -> None:
    script, datasets = run.script, run.datasets
    used, without_effect = "`dataset_name`", {}
    if not datasets.datasets and script.dataset_name is not None:
        without_effect = {"streaming": "dataset_streaming", "test_split_size": "dataset_test_split"}
    if datasets.datasets and script.dataset_name is None:
        used, without_effect = "`datasets`", {
            "dataset_config": "name` in an entry of `datasets",
            "dataset_streaming": "streaming",
        }  # fmt: skip
    values = vars(script) | vars(datasets)
    for name, instead in without_effect.items():
        if values[name]:
            raise ValueError(
                f"`{name}` ({values[name]!r}) has no effect on training data from {used}. Set "
                f"`{instead}` instead."
            )
    fraction = next((e.fraction for e in datasets.datasets if e.fraction is not None), None)
    for name, value in (("test_split_size", datasets.test_split_size), ("fraction", fraction)):
        if datasets.streaming and value is not None:
            raise ValueError(
                f"`{name}` ({value}) needs the length of the data in `datasets`, which a stream "
                "does not have. Set `streaming: false`, or leave it out."
            )
    if (datasets.streaming or script.dataset_streaming) and run.training.max_steps < 1:
        key = "streaming" if datasets.streaming else "dataset_streaming"
        raise ValueError(
            f"With `{key}: true` the training data has no length, so `max_steps` must say how long "
            f"to train, but it is {run.training.max_steps}. Set it, or `{key}: false`."
        )
