"""The form of OGPSA's files in a checkpoint: tensors, with the settings that they belong to."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ogpsa_trl.config import OGPSAConfig
from ogpsa_trl.data.files import put_in_place, unfinished_name
from ogpsa_trl.engines.backend import Shard

FORMAT = "3"
ADVICE = "Resume from another checkpoint, or delete this file: it is then made anew."


@dataclass
class StateFile:
    """An open file: what it says of itself, and access to its tensors."""

    settings: dict[str, Any]
    shards: dict[str, Shard]
    tensors: Any
    names: set[str]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[StateFile]:
    """
    Open a file that `write` has written.

    Raises:
        ValueError: it cannot be read, or has another format.
    """
    try:
        tensors = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"The OGPSA state in {path} cannot be read ({error}). {ADVICE}") from error
    with tensors:
        metadata = tensors.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"The OGPSA state in {path} has format {metadata.get('format')!r}, but this "
                f"version reads {FORMAT!r}. {ADVICE}"
            )
        shards = {name: Shard(*range_) for name, range_ in json.loads(metadata["shards"]).items()}
        yield StateFile(json.loads(metadata["settings"]), shards, tensors, set(tensors.keys()))


def write(
    path: Path, tensors: dict[str, Tensor], settings: dict[str, Any], shards: Mapping[str, Shard]
) -> None:
    """Write a file under another name first: one with its name is whole."""
    metadata = {
        "format": FORMAT,
        "settings": json.dumps(settings),
        "shards": json.dumps(shards),
    }
    unfinished = unfinished_name(path)
    save_file(tensors, unfinished, metadata)
    put_in_place(unfinished, path)


def settings_of(config: OGPSAConfig, names: Sequence[str]) -> dict[str, Any]:
    """Some of the settings."""
    settings = asdict(config)
    return {name: settings[name] for name in names}
