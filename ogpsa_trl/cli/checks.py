"""What keys have to do with each other, known before any data or model is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from trl.scripts.utils import DatasetConfig

from ogpsa_trl.cli.arguments import RunArguments
from ogpsa_trl.config import GateConfig
from ogpsa_trl.data.entries import GroupedDatasetConfig


def check_run(run: RunArguments) -> None:
    """
    Refuse a run whose keys do not go together.

    Raises:
        ValueError: there is no model; the gate has settings but no data, or data that is trained on
            or protected; groups have the same data, or nearly the same name; a stream has no number
            of steps; a key of the training data belongs to the other way to name it; quantised
            weights are to be trained.
    """
    if not run.model.model_name_or_path:
        raise ValueError(
            "A run needs a model, but `model_name_or_path` is not set. Set it to a name on the Hub "
            "or a folder."
        )
    if not run.training.output_dir:
        raise ValueError(
            "`output_dir` must name a folder, but is empty. Name one, such as `runs/sft`."
        )
    for key in ("capability_datasets", "gate_datasets"):
        check_groups(key, getattr(run.train, key))
    _check_gate(run)
    _check_training_data(run)
    _check_quantisation(run)


def check_groups(key: str, entries: Sequence[GroupedDatasetConfig]) -> None:
    """
    Refuse groups that are one: the same data, or names that are taken for each other.

    Args:
        key: The list.
        entries: Its entries.

    Raises:
        ValueError: there are such.
    """
    names: dict[str, str] = {}
    sources: list[tuple[int, Mapping[str, Any]]] = []
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
        for other, used in sources:
            if used == source:
                raise ValueError(
                    f"{where} is the same data as entry {other} "
                    f"({entry.data_files or entry.path!r}, split {entry.split!r}), which would "
                    "count twice. Remove one, or name another split."
                )
        sources.append((number, source))


def _check_gate(run: RunArguments) -> None:
    if not run.train.gate_datasets:
        defaults = asdict(GateConfig())
        for name, value in asdict(run.gate).items():
            if value != defaults[name]:
                raise ValueError(
                    f"`{name}` ({value!r}) is a setting of the capability gate, but there is no "
                    "data to measure. Add `gate_datasets`, in the schema of `capability_datasets`,"
                    f" or leave `{name}` out."
                )
        return
    run.gate.check_saving(run.training)
    used = {"capability_datasets": run.train.capability_datasets, "datasets": run.datasets.datasets}
    for number, entry in enumerate(run.train.gate_datasets, start=1):
        for key, others in used.items():
            if any(_source(entry) == _source(other) for other in others):
                raise ValueError(
                    f"entry {number} of `gate_datasets` must be held out, but the same data "
                    f"({entry.data_files or entry.path!r}, split {entry.split!r}) is an entry of "
                    f"`{key}`. Name another split or file, such as `split: train[90%:]` here and "
                    "`split: train[:90%]` there."
                )


def _source(entry: DatasetConfig) -> dict[str, Any]:
    """What says which rows an entry reads."""
    names = ("path", "name", "data_dir", "data_files", "split")
    return {name: getattr(entry, name) for name in names}


def _check_training_data(run: RunArguments) -> None:
    script, datasets = run.script, run.datasets
    if datasets.datasets and script.dataset_name is None:
        _check_without_effect("datasets", "dataset_name", {
            "dataset_config": (script.dataset_config, "`name` in an entry"),
            "dataset_streaming": (script.dataset_streaming, "`streaming`"),
        })  # fmt: skip
    elif script.dataset_name is not None and not datasets.datasets:
        _check_without_effect("dataset_name", "datasets", {
            "streaming": (datasets.streaming, "`dataset_streaming`"),
            "test_split_size": (datasets.test_split_size, "`dataset_test_split`"),
        })  # fmt: skip
    if datasets.streaming and datasets.test_split_size is not None:
        raise ValueError(
            f"`test_split_size` ({datasets.test_split_size}) needs the length of the data, "
            "which a stream does not have. Set `streaming: false`, or leave it out."
        )
    if datasets.streaming and any(entry.fraction is not None for entry in datasets.datasets):
        raise ValueError(
            "`fraction` in `datasets` needs the length of the data, which a stream does not have. "
            "Set `streaming: false`, or leave `fraction` out."
        )
    is_stream = datasets.streaming or script.dataset_streaming
    if is_stream and run.training.max_steps < 1:
        key = "streaming" if datasets.streaming else "dataset_streaming"
        raise ValueError(
            f"With `{key}: true` the training data has no length, so `max_steps` must say how long "
            f"to train, but it is {run.training.max_steps}. Set it, or `{key}: false`."
        )


def _check_quantisation(run: RunArguments) -> None:
    for key in ("load_in_4bit", "load_in_8bit"):
        if getattr(run.model, key) and not run.model.use_peft:
            raise ValueError(
                f"`{key}: true` quantises the weights, and quantised weights cannot be trained. Set"
                " `use_peft: true` to train an adapter on them, or leave it out."
            )


def _check_without_effect(used: str, other: str, values: Mapping[str, tuple[Any, str]]) -> None:
    for name, (value, instead) in values.items():
        if value:
            raise ValueError(
                f"`{name}` ({value!r}) is a setting of `{other}`, but the training data comes from "
                f"`{used}`, for which it has no effect. Set {instead} instead."
            )
