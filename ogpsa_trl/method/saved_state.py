"""
The subspace as files of a training checkpoint: safetensors, with the settings it has.

Where every process holds all of a gradient, the main process writes `ogpsa_subspace.safetensors`.
Where gradients are sharded, each process writes its shards, `ogpsa_subspace-00001-of-00008...`.
A file says which range of every flattened parameter it holds, so files of one number of processes
can be read by another, and those of one engine by another: torch.distributed.checkpoint would ask
for a DTensor, which ZeRO's ranges are not, and keep its index in a pickle.

The starting point, the same on every process, is `ogpsa_start.safetensors`.
"""

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ogpsa_trl.config import OGPSAConfig
from ogpsa_trl.data.files import put_in_place
from ogpsa_trl.data.groups import CapabilityGroup, Sample
from ogpsa_trl.engines.backend import GradientBackend, Shard
from ogpsa_trl.method.starting_point import StartingPoint, all_samples, is_sound
from ogpsa_trl.method.subspace import CapabilitySubspace

logger = logging.getLogger(__name__)

FILE_NAME = "ogpsa_subspace.safetensors"
START_FILE_NAME = "ogpsa_start.safetensors"

_FORMAT = "3"
# Settings that decide the shape or the meaning of what is saved.
_SETTINGS = ("scope", "target", "capability_loss", "basis_dtype")
_START_SETTINGS = ("capability_loss", "kl_tokens")
_ADVICE = "Resume from another checkpoint, or delete this file: it is then made anew."


def file_names(num_files: int) -> list[str]:
    """The files of a checkpoint: one for replicated gradients, else one for each process."""
    if num_files == 1:
        return [FILE_NAME]
    stem, _, suffix = FILE_NAME.partition(".")
    return [f"{stem}-{i:05d}-of-{num_files:05d}.{suffix}" for i in range(1, num_files + 1)]


def save_subspace(subspace: CapabilitySubspace, folder: str) -> None:
    """
    Write what this process holds of the subspace into a checkpoint folder.

    Every process calls it where gradients are sharded; one is enough where they are not.
    """
    backend = subspace.backend
    tensors = {name: tensor.cpu() for name, tensor in subspace.state_dict().items()}
    metadata = {
        "format": _FORMAT,
        "settings": json.dumps(_settings(subspace.config, _SETTINGS)),
        "shards": json.dumps(_shards(backend)),
    }
    names = _names(backend)
    Path(folder).mkdir(parents=True, exist_ok=True)
    if backend.process_index == 0:  # what another number of processes has left in this folder
        for path in _all_files(Path(folder)):
            if path.name not in names:
                path.unlink()
    _write(tensors, Path(folder) / names[_file_index(backend)], metadata)


def load_subspace(subspace: CapabilitySubspace, folder: str) -> None:
    """
    Read the subspace of a checkpoint folder, if it holds one made with the same settings.

    Otherwise, on any process, a warning is logged and the subspace is due for a refresh. A
    collective call: every process makes it.

    Raises:
        ValueError: a file is damaged or belongs to other parameters.
    """
    if not subspace.backend.is_on_all(_load(subspace, Path(folder))):
        subspace.is_due = True  # all refresh together, or none
    elif not subspace.backend.is_on_all(subspace.is_sound()):
        path = Path(folder) / FILE_NAME.replace(".", "*.")
        raise ValueError(
            f"The capability subspace in {path} is damaged: it is not finite, or the basis is not "
            f"the one that was saved. {_ADVICE}"
        )


def save_start(
    start: StartingPoint, config: OGPSAConfig, folder: str, same: Path | None = None
) -> Path:
    """
    Write the starting point into a checkpoint folder. One process is enough.

    Args:
        start: The starting point.
        config: The settings.
        folder: The folder.
        same: A file that it was written to before. It never changes, so that another name for the
            same bytes does, where the file system has such links.

    Returns:
        The file.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder) / START_FILE_NAME
    if same is not None and _link(same, path):
        return path
    settings = json.dumps(_settings(config, _START_SETTINGS))
    metadata = {"format": _FORMAT, "settings": settings, "shards": "{}"}
    tensors = {name: tensor.contiguous() for name, tensor in start.state_dict().items()}
    _write(tensors, path, metadata)
    return path


def _link(file: Path, path: Path) -> bool:
    """Give a file another name, if that can be done."""
    unfinished = _unfinished(path)
    try:
        if path.exists() and path.samefile(file):  # of a step that is saved once more
            return True
        unfinished.unlink(missing_ok=True)
        unfinished.hardlink_to(file)
    except OSError:  # its checkpoint was deleted, or is on another file system
        return False
    put_in_place(unfinished, path)
    return True


def load_start(
    backend: GradientBackend,
    groups: Sequence[CapabilityGroup],
    config: OGPSAConfig,
    folder: str,
) -> StartingPoint | None:
    """
    Read the starting point of a checkpoint folder, if it is of these groups and settings.

    The samples in it have the tokens that it was measured on; a warning says where those of this
    run are others.

    Otherwise, on any process, a warning is logged. A collective call: every process makes it.

    Raises:
        ValueError: the file is damaged.
    """
    path, samples = Path(folder) / START_FILE_NAME, all_samples(groups)
    start, reason = None, "there is none"
    if path.exists():
        with _open(path) as file:
            if file.settings != _settings(config, _START_SETTINGS):
                reason = f"it was measured with the settings {file.settings}"
            else:
                state = {name: file.tensors.get_tensor(name) for name in file.names}
                try:
                    if "epsilon" not in state and _was_rounded(backend, config):
                        raise ValueError("It was measured in bfloat16, by an older version.")
                    start = StartingPoint.from_state(samples, state)
                    _warn_of_other_tokens(samples, start.samples, folder)
                except ValueError as error:
                    reason = str(error)
                if not is_sound(state):
                    raise ValueError(f"The OGPSA state in {path} is not finite. {_ADVICE}")
    if backend.is_on_all(start is not None):
        return start
    logger.warning(
        "The starting point of %s cannot be used (%s): drift%s counts from the weights of this "
        "checkpoint, not from those that training started with.",
        folder, reason, ", and so the divergence," if config.capability_loss == "kl" else "",
    )  # fmt: skip
    return None


def _was_rounded(backend: GradientBackend, config: OGPSAConfig) -> bool:
    """Whether older versions measured in bfloat16 what is measured more finely now."""
    is_bf16 = backend.accelerator.mixed_precision == "bf16"
    is_finer = backend.epsilon < torch.finfo(torch.bfloat16).eps
    return config.capability_loss == "kl" and is_bf16 and is_finer


def _warn_of_other_tokens(ours: list[Sample], saved: list[Sample], folder: str) -> None:
    others = [a.name for a, b in zip(ours, saved, strict=True) if a.features != b.features]
    if others:
        logger.warning(
            "%d capability samples have other tokens now than in %s (the first is %s), by other "
            "data or a chat template that writes the date. Training goes on with those of the "
            "checkpoint. To protect other data, begin a new run.",
            len(others), folder, others[0],
        )  # fmt: skip


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Under another name first: a file with its name is whole."""
    unfinished = _unfinished(path)
    save_file(tensors, unfinished, metadata)
    put_in_place(unfinished, path)


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.unfinished")


def _load(subspace: CapabilitySubspace, folder: Path) -> bool:
    backend = subspace.backend
    paths = _files_for(backend, folder)
    if not paths:
        logger.warning(
            "Checkpoint %s holds no whole capability subspace (%s): it is estimated anew before "
            "the next step, so training goes on, but not bit for bit as if it had never stopped.",
            folder, ", ".join(path.name for path in _all_files(folder)) or f"no {FILE_NAME}",
        )  # fmt: skip
        return False
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_open(path)) for path in paths]
        saved, ours = files[0].settings, _settings(subspace.config, _SETTINGS)
        if saved != ours:
            logger.warning(
                "The capability subspace in %s was made with the settings %s, but this run has "
                "%s: it is estimated anew before the next step.",
                paths[0], saved, ours,
            )  # fmt: skip
            return False
        if files[0].shards != _shards(backend):
            logger.info(
                "The capability subspace in %s is sharded over %d files: it is sharded anew for "
                "%d processes.",
                folder, len(files), backend.num_processes,
            )  # fmt: skip
        try:
            subspace.load_state_dict(_state_for(backend, files))
        except ValueError as error:
            raise ValueError(
                f"The capability subspace in {paths[0]} does not fit this model. {error} Resume "
                "with the model and adapter of the checkpoint, or delete this file."
            ) from error
    return True


@dataclass
class _File:
    """An open file: what it says of itself, and access to its tensors."""

    settings: dict[str, Any]
    shards: dict[str, Shard]
    tensors: Any
    names: set[str]


@contextlib.contextmanager
def _open(path: Path) -> Iterator[_File]:
    try:
        tensors = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"The OGPSA state in {path} cannot be read ({error}). {_ADVICE}"
        ) from error
    with tensors:
        metadata = tensors.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"The OGPSA state in {path} has format {metadata.get('format')!r}, but this "
                f"version reads {_FORMAT!r}. {_ADVICE}"
            )
        shards = {name: Shard(*range_) for name, range_ in json.loads(metadata["shards"]).items()}
        yield _File(json.loads(metadata["settings"]), shards, tensors, set(tensors.keys()))


def _files_for(backend: GradientBackend, folder: Path) -> list[Path]:
    """
    The files to read: this process's own, if it holds just what this process does; otherwise all.
    """
    own = folder / _names(backend)[_file_index(backend)]
    if own.exists():
        with _open(own) as file:
            if file.shards == _shards(backend):
                return [own]
    for path in _all_files(folder):
        num_files = int(path.stem.rpartition("-of-")[2]) if "-of-" in path.stem else 1
        paths = [folder / name for name in file_names(num_files)]
        if all(path.exists() for path in paths):
            return paths
    return []


def _state_for(backend: GradientBackend, files: Sequence[_File]) -> dict[str, Tensor]:
    """
    The state of this process, put together from the files.

    Raises:
        ValueError: the files are of other parameters.
    """
    saved = {name: shard.total for name, shard in files[0].shards.items()}
    sizes = {name: shard.total for name, shard in _shards(backend).items()}
    if saved != sizes:
        different = sorted(set(saved.items()) ^ set(sizes.items()))
        raise ValueError(
            "The saved subspace belongs to other parameters: name and size of the first that "
            f"differ: {different[:3]}."
        )
    state = {
        name: files[0].tensors.get_tensor(name)
        for name in files[0].names
        if not name.startswith("basis.")
    }
    for name, shard in _shards(backend).items():
        rows_KN = _rows_of(name, shard, files)
        if rows_KN is not None:
            state[f"basis.{name}"] = rows_KN
    return state


def _rows_of(name: str, wanted: Shard, files: Sequence[_File]) -> Tensor | None:
    """
    The basis rows of one parameter on this process; None where all are zero.

    Raises:
        ValueError: no file holds some of its entries.
    """
    holding = [file for file in files if f"basis.{name}" in file.names]
    if not holding:
        return None
    pieces, position, end = [], wanted.start, wanted.start + wanted.size
    for file in sorted(holding, key=lambda file: file.shards[name].start):
        have = file.shards[name]
        last = min(have.start + have.size, end)
        if have.start <= position < last or wanted == have:  # replicas hold the same: taken once
            rows_KN = file.tensors.get_slice(f"basis.{name}")
            pieces.append(rows_KN[:, position - have.start : last - have.start])
            position = last
    if position < end:
        raise ValueError(f"No shard holds the entries of {name!r} from {position} on.")
    return torch.cat(pieces, dim=1) if pieces else None


def _all_files(folder: Path) -> list[Path]:
    stem, _, suffix = FILE_NAME.partition(".")
    return sorted(folder.glob(f"{stem}*.{suffix}"))


def _names(backend: GradientBackend) -> list[str]:
    """The files that the processes of this run write."""
    return file_names(backend.num_processes if backend.is_sharded else 1)


def _file_index(backend: GradientBackend) -> int:
    return backend.process_index if backend.is_sharded else 0


def _shards(backend: GradientBackend) -> dict[str, Shard]:
    return {name: s for (name, _), s in zip(backend.parameters, backend.shards, strict=True)}


def _settings(config: OGPSAConfig, names: Sequence[str]) -> dict[str, Any]:
    settings = asdict(config)
    return {name: settings[name] for name in names}
