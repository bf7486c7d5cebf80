"""The starting point as a file of a training checkpoint, the same on every process."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from ogpsa_trl.config import OGPSAConfig
from ogpsa_trl.data.files import put_in_place, unfinished_name
from ogpsa_trl.data.groups import CapabilityGroup, Sample
from ogpsa_trl.engines.backend import GradientBackend
from ogpsa_trl.method.starting_point import StartingPoint, all_samples, is_sound
from ogpsa_trl.method.state_file import ADVICE, opened, settings_of, write

logger = logging.getLogger(__name__)

START_FILE_NAME = "ogpsa_start.safetensors"

_SETTINGS = ("capability_loss", "kl_tokens")


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
    tensors = {name: tensor.contiguous() for name, tensor in start.state_dict().items()}
    write(path, tensors, settings_of(config, _SETTINGS), {})
    return path


def _link(file: Path, path: Path) -> bool:
    """Give a file another name, if that can be done."""
    unfinished = unfinished_name(path)
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
        with opened(path) as file:
            if file.settings != settings_of(config, _SETTINGS):
                reason = f"it was measured with the settings {file.settings}"
            else:
                state = {name: file.tensors.get_tensor(name) for name in file.names}
                try:
                    if "epsilon" not in state and _was_rounded(backend, config):
                        raise ValueError("It was measured in bfloat16, by an older version.")
                    start = StartingPoint.from_state(samples, state)
                    if any(len(g.samples) < g.num_parts for g in start.groups_of(groups)):
                        raise ValueError("It has fewer samples than `gradients_per_group`.")
                    _warn_of_other_tokens(samples, start.samples, folder)
                except ValueError as error:
                    start, reason = None, str(error)
                if not is_sound(state):
                    raise ValueError(f"The OGPSA state in {path} is not finite. {ADVICE}")
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
    features = {sample.name: sample.features for sample in ours}
    others = [sample.name for sample in saved if features[sample.name] != sample.features]
    if others:
        logger.warning(
            "%d capability samples have other tokens now than in %s (the first is %s), by other "
            "data or a chat template that writes the date. Training goes on with those of the "
            "checkpoint. To protect other data, begin a new run.",
            len(others), folder, others[0],
        )  # fmt: skip
