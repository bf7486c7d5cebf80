"""Files that come with the project, and files that are written whole or not at all."""

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def shipped_configs(folder: str = "") -> dict[str, Path]:
    """The YAML files of a folder of `configs/`, by their names without `.yaml`."""
    return {file.stem: file for file in sorted((configs_folder() / folder).glob("*.yaml"))}


def configs_folder() -> Path:
    """The folder `configs/`: in the installed package (see pyproject.toml), or beside it."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def find_config(name: str, folder: str = "") -> Path:
    """The file at a path, or where there is none, the YAML file of a folder that has this name."""
    path = Path(name)
    return path if path.is_file() else shipped_configs(folder).get(name, path)


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that it holds either what it did before or all of the text."""
    unfinished = unfinished_name(path)
    unfinished.write_text(text, encoding="utf-8")
    put_in_place(unfinished, path)


def unfinished_name(path: Path) -> Path:
    """What a file is called until it is whole."""
    return path.with_name(f"{path.name}.unfinished")


def put_in_place(unfinished: Path, path: Path) -> None:
    """Give a file that is written its name, once it has reached the disk."""
    sync(unfinished)
    unfinished.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
