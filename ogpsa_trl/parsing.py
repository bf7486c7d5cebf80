"""
Flat keys from one YAML file and the command line, every one of them known by name.

An unknown key is an error that names the nearest known one, because a misspelt setting that is
silently ignored costs a run.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from inspect import get_annotations
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl.scripts.utils import DatasetConfig, TrlParser

from ogpsa_trl.shipped import find_config


class FlatParser(TrlParser):
    """TRL's parser, without abbreviations, that raises where argparse would exit."""

    def __init__(self, dataclass_types: Any, description: str, **help_text: str) -> None:
        super().__init__(
            dataclass_types,
            usage="%(prog)s --config FILE [--key value ...]",
            description=description,
            allow_abbrev=False,
            **help_text,
        )

    def error(self, message: str) -> NoReturn:
        """Instead of an exit after pages of usage."""
        raise ValueError(message)

    def key_names(self) -> list[str]:
        """The names of all keys."""
        return [action.dest for action in self._actions if action.dest != "help"]

    def option_names(self) -> set[str]:
        """All that may begin with `--` on the command line."""
        return {"--config"}.union(*(action.option_strings for action in self._actions))

    def format_help(self) -> str:
        """Every key, under the class that it comes from."""
        sources = {
            entry.name: _source(dataclass_type, entry.name)
            for dataclass_type in self.dataclass_types
            for entry in fields(dataclass_type)
        }
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, [])
        formatter.add_text(self.description)
        for source in dict.fromkeys(sources.values()):
            formatter.start_section(source)
            formatter.add_arguments(a for a in self._actions if sources.get(a.dest) == source)
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()


def _source(dataclass_type: type, key: str) -> str:
    """The class that a key and its default come from; its own parents count as the class itself."""
    owner = next(c for c in dataclass_type.__mro__ if key in get_annotations(c))
    package, here = (c.__module__.partition(".")[0] for c in (owner, dataclass_type))
    name = dataclass_type.__name__ if package == here else owner.__name__
    return f"{package}.{name}"


def split_config(args: Sequence[str]) -> list[str]:
    """
    The command line in the only form that TRL knows: `--config=file` as two words, and a path where
    `--config` has the name of a file that comes with the project.
    """
    words = [
        part
        for word in args
        for part in (word.split("=", 1) if word.startswith("--config=") else [word])
    ]
    for index, word in enumerate(words[:-1]):
        if word == "--config":
            words[index + 1] = str(find_config(words[index + 1]))
    return words


def config_path(args: Sequence[str]) -> str | None:
    """The file that `--config` names."""
    if "--config" not in args:
        return None
    index = list(args).index("--config") + 1
    if index == len(args):
        raise ValueError("`--config` needs a file, but none follows it.")
    return args[index]


def config_values(args: Sequence[str]) -> dict[str, Any]:
    """The mapping in the YAML file, empty where none is named."""
    path = config_path(args)
    if path is None:
        return {}
    if not Path(path).is_file():
        raise ValueError(f"`--config` must name a YAML file, but there is none at {path!r}.")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"The file {path!r} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"The file {path!r} must hold keys with values (`key: value`), but holds {values!r}."
        )
    return values


def check_keys(
    parser: FlatParser,
    args: Sequence[str],
    values: Mapping[str, Any],
    entry_types: Mapping[str, type[DatasetConfig]],
    explain: Callable[[str, str], str],
) -> None:
    """
    Raise where a key is unknown. Before the values are looked at: it may be why one is not allowed.

    Args:
        parser: Knows the keys.
        args: The command line, as `split_config` gives it.
        values: The YAML file, as `config_values` gives it.
        entry_types: Keys that hold lists of data sets, and what an entry may hold.
        explain: Makes the message of an unknown key and the place where it stands.

    Raises:
        ValueError: a key is unknown, in the file, in an entry or in the command line.
    """
    path = config_path(args)
    for key in values:
        if key != "env" and key not in parser.key_names():  # TRL sets the variables in `env`
            raise ValueError(explain(str(key), path or ""))
    _check_entries(values, entry_types)
    index = list(args).index("--config") if path else len(args)
    _, unknown = parser.parse_known_args([*args[:index], *args[index + 2 :]])
    for word in unknown:
        if not word.startswith("--"):
            raise ValueError(
                f"{word!r} in the command line belongs to no key. Keys begin with `--`."
            )
        key = word.removeprefix("--").partition("=")[0].replace("-", "_")
        raise ValueError(explain(key, "the command line"))


def unknown_key(key: str, where: str, known: Sequence[str]) -> str:
    """What is wrong, and the nearest known key."""
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
    return f"Unknown key `{key}` in {where}. The nearest known key is `{nearest}`."


def _check_entries(
    values: Mapping[str, Any], entry_types: Mapping[str, type[DatasetConfig]]
) -> None:
    for key, entry_type in entry_types.items():
        known = [entry.name for entry in fields(entry_type)]
        entries = values.get(key) or []
        if not isinstance(entries, list):
            raise ValueError(
                f"`{key}` must be a list (every entry begins with `-`), but got {entries!r}."
            )
        for number, entry in enumerate(entries, start=1):
            where = f"entry {number} of `{key}`"
            if not isinstance(entry, dict) or not entry.get("path"):
                raise ValueError(
                    f"{where} must have a `path` (a name on the Hub, a file, or a builder such as "
                    f"`json` with `data_files`), but is {entry!r}."
                )
            for name in entry:
                if name not in known:
                    raise ValueError(unknown_key(name, where, known))
