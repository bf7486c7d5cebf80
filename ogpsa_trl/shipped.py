"""The scripts and configurations of the project: in the repository, and in an installed wheel."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_IN_A_WHEEL = _PACKAGE / "_files"  # pyproject.toml puts the folders there


def shipped_root() -> Path:
    """The folder that holds `scripts/` and `configs/`."""
    return _IN_A_WHEEL if _IN_A_WHEEL.is_dir() else _PACKAGE.parent


def shipped_configs(folder: str = "configs") -> dict[str, Path]:
    """The YAML files of a folder, relative to `shipped_root`, by their names without `.yaml`."""
    return {file.stem: file for file in sorted((shipped_root() / folder).glob("*.yaml"))}


def find_config(name: str, folder: str = "configs") -> Path:
    """The file at a path, or where there is none, the YAML file of a folder that has this name."""
    path = Path(name)
    return path if path.is_file() else shipped_configs(folder).get(name, path)
