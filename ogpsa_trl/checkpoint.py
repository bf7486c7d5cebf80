"""The subspace as a file of a training checkpoint: safetensors, with the settings it has."""

import json
import logging
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ogpsa_trl.subspace import CapabilitySubspace

logger = logging.getLogger(__name__)

FILE_NAME = "ogpsa_subspace.safetensors"

_FORMAT = "1"
# Settings that decide the shape or the meaning of what is saved.
_SETTINGS = ("scope", "target", "basis_dtype")


def save_subspace(subspace: CapabilitySubspace, folder: str) -> None:
    """Write the subspace into a checkpoint folder."""
    tensors = {name: tensor.cpu() for name, tensor in subspace.state_dict().items()}
    metadata = {"format": _FORMAT, "settings": json.dumps(_settings(subspace))}
    save_file(tensors, Path(folder) / FILE_NAME, metadata)


def load_subspace(subspace: CapabilitySubspace, folder: str) -> None:
    """
    Read the subspace of a checkpoint folder, if it holds one made with the same settings.

    Otherwise a warning is logged and the subspace stays as it is, due for a refresh.

    Raises:
        ValueError: the file is damaged or belongs to other parameters.
    """
    path = Path(folder) / FILE_NAME
    if not path.exists():
        logger.warning(
            "Checkpoint %s holds no capability subspace (%s): it is estimated anew before the next "
            "step, so training goes on, but not bit for bit as if it had never stopped.",
            folder, FILE_NAME,
        )  # fmt: skip
        return
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"The capability subspace in {path} cannot be read ({error}). Resume from another "
            "checkpoint, or delete this file: the subspace is then estimated anew."
        ) from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"The capability subspace in {path} has format {metadata.get('format')!r}, but this "
            f"version reads {_FORMAT!r}. Delete this file: the subspace is then estimated anew."
        )
    saved = json.loads(metadata["settings"])
    if saved != _settings(subspace):
        logger.warning(
            "The capability subspace in %s was made with the settings %s, but this run has %s: it "
            "is estimated anew before the next step.",
            path, saved, _settings(subspace),
        )  # fmt: skip
        return
    try:
        subspace.load_state_dict(tensors)
    except ValueError as error:
        raise ValueError(
            f"The capability subspace in {path} does not fit this model. {error} Resume with the "
            "model and adapter of the checkpoint, or delete this file."
        ) from error


def _settings(subspace: CapabilitySubspace) -> dict[str, str]:
    settings = asdict(subspace.config)
    return {name: settings[name] for name in _SETTINGS}
