"""
The subspace as files of a training checkpoint: safetensors, with the settings it has.

Where every process holds all of a gradient, the main process writes `ogpsa_subspace.safetensors`.
Where gradients are sharded, each process writes its shards, `ogpsa_subspace-00001-of-00008...`.
A file says which range of every flattened parameter it holds, so files of one number of processes
can be read by another, and those of one engine by another: torch.distributed.checkpoint would ask
for a DTensor, which ZeRO's ranges are not, and keep its index in a pickle.
"""

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ogpsa_trl.engines.backend import GradientBackend, Shard
from ogpsa_trl.method.state_file import ADVICE, StateFile, opened, settings_of, write
from ogpsa_trl.method.subspace import CapabilitySubspace

logger = logging.getLogger(__name__)

FILE_NAME = "ogpsa_subspace.safetensors"
# Settings that decide the shape or the meaning of what is saved.
_SETTINGS = ("scope", "target", "capability_loss", "basis_dtype")


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
    names = _names(backend)
    Path(folder).mkdir(parents=True, exist_ok=True)
    if backend.process_index == 0:  # what another number of processes has left in this folder
        for path in _all_files(Path(folder)):
            if path.name not in names:
                path.unlink()
    path = Path(folder) / names[_file_index(backend)]
    write(path, tensors, settings_of(subspace.config, _SETTINGS), _shards(backend))


def load_subspace(subspace: CapabilitySubspace, folder: str) -> None:
    """
    Read the subspace of a checkpoint folder, if it holds one made with the same settings.

    Otherwise, on any process, a warning is logged and the subspace is due for a refresh. A
    collective call: every process makes it.

    Raises:
        ValueError: a file is damaged or belongs to other parameters.
    """
    if not subspace.backend.is_on_all(_load(subspace, Path(folder))):
        subspace.__init__(subspace.backend, subspace.config)  # on all processes, or on none
    elif not subspace.backend.is_on_all(subspace.is_sound()):
        path = Path(folder) / FILE_NAME.replace(".", "*.")
        raise ValueError(
            f"The capability subspace in {path} is damaged: it is not finite, or the basis is not "
            f"the one that was saved. {ADVICE}"
        )


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
        files = [stack.enter_context(opened(path)) for path in paths]
        saved, ours = files[0].settings, settings_of(subspace.config, _SETTINGS)
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


def _files_for(backend: GradientBackend, folder: Path) -> list[Path]:
    """
    The files to read: this process's own, if it holds just what this process does; otherwise all.
    """
    own = folder / _names(backend)[_file_index(backend)]
    if own.exists():
        with opened(own) as file:
            if file.shards == _shards(backend):
                return [own]
    for path in _all_files(folder):
        num_files = int(path.stem.rpartition("-of-")[2]) if "-of-" in path.stem else 1
        paths = [folder / name for name in file_names(num_files)]
        if all(path.exists() for path in paths):
            return paths
    return []


def _state_for(backend: GradientBackend, files: Sequence[StateFile]) -> dict[str, Tensor]:
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


def _rows_of(name: str, wanted: Shard, files: Sequence[StateFile]) -> Tensor | None:
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
