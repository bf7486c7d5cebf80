"""
Flat keys from one YAML file and the command line, every one of them known by name.

An unknown key is an error that names its successor, or the nearest known one, because a misspelt
setting that is silently ignored costs a run.
"""

import difflib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from inspect import get_annotations
from typing import Any, NoReturn, get_type_hints

from trl.scripts.utils import DatasetConfig, TrlParser

from ogpsa_trl.cli.renamed_keys import answer_to
from ogpsa_trl.cli.values import (
    Range,
    check_choice,
    check_ranges,
    check_type,
    expanded_words,
    type_hints,
)
from ogpsa_trl.cli.yaml_file import load_mapping
from ogpsa_trl.data.files import find_config
from ogpsa_trl.data.row_values import shown


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

    def parse(self, args: Sequence[str]) -> tuple[Any, ...]:
        """
        The dataclasses, from a file and a command line, which wins.

        `parse_args_and_config` of TRL would read the file in another way, and words from a file
        `<script>.args` that lies beside the script.

        Args:
            args: The command line, as `split_config` gives it.
        """
        values = config_values(args)
        for name, value in (values.get("env") or {}).items():
            os.environ[name] = str(value)
        self.set_defaults_with_config(**{k: v for k, v in values.items() if k != "env"})
        return self.parse_args_into_dataclasses(_keys_of(args), look_for_args_file=False)

    def check_values(
        self,
        args: Sequence[str],
        values: Mapping[str, Any],
        ranges: Mapping[str, Range],
        *,
        types: Mapping[str, Any] | None = None,
        left_out: Collection[str] = (),
    ) -> None:
        """
        Raise where a value has another type than its key, is none of its choices or out of range.

        Args:
            args: The command line, as `split_config` gives it.
            values: The file, as `config_values` gives it.
            ranges: Ranges of keys that are numbers.
            types: Of keys whose annotation says another.
            left_out: Keys that are checked elsewhere.

        Raises:
            ValueError: one has.
        """
        hints = type_hints(self.dataclass_types) | dict(types or {})
        hints = {key: hint for key, hint in hints.items() if key not in left_out}
        for action in self._actions:
            if action.dest in values and action.dest in hints:
                value = values[action.dest]
                check_type(f"`{action.dest}`", value, hints[action.dest])
                if action.choices is not None and value is not None:
                    check_choice(f"`{action.dest}`", value, action.choices)
        self.set_defaults_with_config(**values)
        namespace, _ = self.parse_known_args(_keys_of(args))
        given = {name: value for name, value in vars(namespace).items() if name in hints}
        check_ranges(given, ranges)


def _source(dataclass_type: type, key: str) -> str:
    """The class that a key and its default come from; its own parents count as the class itself."""
    owner = next(c for c in dataclass_type.__mro__ if key in get_annotations(c))
    package, here = (c.__module__.partition(".")[0] for c in (owner, dataclass_type))
    name = dataclass_type.__name__ if package == here else owner.__name__
    return f"{package}.{name}"


def split_config(args: Sequence[str]) -> list[str]:
    """
    The command line in the only form that TRL knows: `--config=file` as two words, and a path where
    `--config` has the name of a file that comes with the project. `~` is the home folder.
    """
    words = [
        part
        for word in expanded_words(args)
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
    if "--config" in args[index:]:
        raise ValueError(
            "`--config` must be given once, but is given again. Put all keys into one file, or some"
            " of them on the command line."
        )
    return args[index]


def config_values(args: Sequence[str]) -> dict[str, Any]:
    """The mapping in the YAML file, empty where none is named."""
    path = config_path(args)
    return {} if path is None else load_mapping(path)


def _keys_of(args: Sequence[str]) -> list[str]:
    """The command line without `--config` and its file."""
    index = list(args).index("--config") if "--config" in args else len(args)
    return [*args[:index], *args[index + 2 :]]


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
        if key != "env" and key not in parser.key_names():
            raise ValueError(explain(str(key), path or ""))
    _check_environment(values.get("env"))
    _check_entries(values, entry_types)
    _, unknown = parser.parse_known_args(_keys_of(args))
    for word in unknown:
        if not word.startswith("--"):
            raise ValueError(
                f"{shown(word)} in the command line belongs to no key. Keys begin with `--`."
            )
        key = word.removeprefix("--").partition("=")[0].replace("-", "_")
        raise ValueError(explain(key, "the command line"))


def unknown_key(key: str, where: str, known: Sequence[str]) -> str:
    """What is wrong, and what the key is called now, or the nearest known key."""
    name = key if len(key) <= _LONGEST and key.isprintable() else shown(key)
    answer = answer_to(key, known)
    if answer is None:
        nearest = difflib.get_close_matches(key[:_LONGEST], known, n=1, cutoff=0.0)[0]
        answer = f"The nearest known key is `{nearest}`."
    return f"Unknown key `{name}` in {where}. {answer}"


# Characters of a key that is shown as it is.
_LONGEST = 100


def _check_environment(variables: Any) -> None:
    if not isinstance(variables, dict | None):
        raise ValueError(
            f"`env` must be a mapping of variables (`NAME: value`), but got {shown(variables)}."
        )
    for name, value in (variables or {}).items():
        if not isinstance(name, str) or not name or "=" in name or "\0" in name + str(value):
            raise ValueError(
                f"`env` must hold names of environment variables, but got {shown(name)}. Remove it."
            )
        if not isinstance(value, str | int | float):
            raise ValueError(
                f"`{name}` in `env` must be text or a number, but got {shown(value)}. Write what "
                "the variable is to hold in quotes."
            )


def _check_entries(
    values: Mapping[str, Any], entry_types: Mapping[str, type[DatasetConfig]]
) -> None:
    for key, entry_type in entry_types.items():
        hints = get_type_hints(entry_type)
        entries = values.get(key) or []
        if not isinstance(entries, list):
            raise ValueError(
                f"`{key}` must be a list (every entry begins with `-`), but got {shown(entries)}."
            )
        for number, entry in enumerate(entries, start=1):
            where = f"entry {number} of `{key}`"
            if not isinstance(entry, dict) or not entry.get("path"):
                raise ValueError(
                    f"{where} must have a `path` (a name on the Hub, a file, or a builder such as "
                    f"`json` with `data_files`), but is {shown(entry)}."
                )
            for name, value in entry.items():
                if name not in hints:
                    raise ValueError(unknown_key(str(name), where, list(hints)))
                check_type(f"`{name}` in {where}", value, hints[name], is_converted=False)
