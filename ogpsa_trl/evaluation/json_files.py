"""Results as JSON files, with the versions that they belong to."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ogpsa_trl.data.files import replace_text


def write_json(path: str | Path, content: Any) -> None:
    """
    Write a file that appears complete or not at all; its folder is made if need be.

    What JSON does not know, such as a type of torch, becomes its text.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(content, indent=1, default=str))


def read_json(path: str | Path) -> Any:
    """
    The content of a JSON file.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} must be JSON, but is not ({error}). If it was cut off while it was "
            "written, remove it."
        ) from error


def write_rows(path: str | Path, rows: Any) -> Path:
    """Write rows as JSON lines; the folder is made if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def package_versions(*more: str) -> dict[str, str]:
    """The versions of the packages that every result depends on, and of more if installed."""
    found = {}
    for package in ("ogpsa_trl", "trl", "transformers", "torch", *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def in_words(versions: dict[str, str]) -> str:
    """Versions as a sentence."""
    return ", ".join(f"{package} {number}" for package, number in versions.items()) + "."
