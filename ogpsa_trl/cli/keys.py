"""
Flat keys from one YAML file and the command line, every one of them known by name.

An unknown key is an error that names its successor, or the nearest known one, because a misspelt
setting that is silently ignored costs a run.
"""

import difflib
import os
from argparse import Namespace
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import fields
from inspect import get_annotations
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from trl.scripts.utils import DatasetConfig, TrlParser

from ogpsa_trl.cli.command_line import Given
from ogpsa_trl.cli.key_values import ENVIRONMENT, MAPPING, RANGES, check_value
from ogpsa_trl.cli.renamed_keys import REMOVED, RENAMED
from ogpsa_trl.data.entries import entry_types
from ogpsa_trl.data.row_values import shown


class KeyParser(TrlParser):
    """
    TRL's parser, without abbreviations, that raises where argparse would exit.

    Args:
        dataclass_types: Their fields are the keys. A list of data sets has entries of its type.
        description: What the command does.
        types: Of keys that are read in another way than they are annotated.
        elsewhere: Keys that are known elsewhere, and what to say of them.
        options: Of argparse.
    """

    def __init__(
        self,
        dataclass_types: Any,
        description: str = "",
        *,
        types: Mapping[str, Any] | None = None,
        elsewhere: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            dataclass_types,
            usage="%(prog)s --config FILE [--key value ...]",
            description=f"{description} Keys go into the YAML file that --config names, or on the "
            "command line, which wins.",
            allow_abbrev=False,
            **options,
        )
        self.types = dict(types or {})
        self.hints = dict(ChainMap(self.types, *map(get_type_hints, self.dataclass_types)))
        self.entry_types = entry_types(self.hints)
        self.elsewhere = elsewhere or {}
        self.own_defaults = {action.dest: action.default for action in self._actions}

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

    def parse(self, given: Given) -> tuple[Any, ...]:
        """
        The dataclasses; the variables of `env` are set.

        `parse_args_and_config` of TRL would read the file in another way, and words from a file
        `<script>.args` that lies beside the script.

        Raises:
            ValueError: see `check`; or a dataclass refuses its values.
        """
        values = vars(self.check(given))
        os.environ.update({k: str(v) for k, v in (given.values.get("env") or {}).items()})
        return tuple(
            kind(**{entry.name: values[entry.name] for entry in fields(kind) if entry.init})
            for kind in self.dataclass_types
        )

    def check(self, given: Given) -> Namespace:
        """
        All values by their keys; those of the command line win.

        The names of keys are looked at before any value: one may be why a value is not allowed.

        Raises:
            ValueError: a key is unknown, in the file, in an entry or in the command line, or a
                value is not of its type, none of its choices or out of range.
        """
        for key in given.values:
            if key != "env" and key not in self.key_names():
                raise ValueError(self._unknown(str(key), given.path))
        for key, entry_type in self.entry_types.items():
            check_entries(key, given.values.get(key), entry_type)
        for word in self.parse_known_args(given.words)[1]:
            if not word.startswith("--"):
                raise ValueError(
                    f"{shown(word)} in the command line belongs to no key. Keys begin with `--`."
                )
            key = word.removeprefix("--").partition("=")[0].replace("-", "_")
            raise ValueError(self._unknown(key, "the command line"))
        check_value("`env`", given.values.get("env"), ENVIRONMENT)
        return self.check_values(given)

    def check_values(self, given: Given) -> Namespace:
        """What `check` does, after all names are known; others are passed over."""
        self.set_defaults_with_config(**given.values)
        namespace, _ = self.parse_known_args(given.words)
        for action in self._actions:
            key, value = action.dest, getattr(namespace, action.dest, None)
            hint = self.hints.get(key)
            # What is not given may be of another type than its annotation.
            if hint is None or key in self.entry_types or value is self.own_defaults[key]:
                continue
            parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
            if key in self.types:
                pass
            elif action.choices is not None:
                hint = Literal[(*action.choices, *([None] if type(None) in parts else []))]
            elif dict in {get_origin(part) or part for part in parts}:
                hint = MAPPING
            elif list[str] in parts:
                hint |= str  # TRL takes one text for a list of one
            elif key in RANGES:
                hint = Annotated[hint, RANGES[key]]
            check_value(f"`{key}`", value, hint)
        return namespace

    def _unknown(self, key: str, where: str) -> str:
        if key in self.elsewhere:
            return f"`{key}` in {where} {self.elsewhere[key]}"
        return unknown_key(key, where, self.key_names())


def unknown_key(key: str, where: str, known: Sequence[str]) -> str:
    """What is wrong, and what the key is called now, or the nearest known key."""
    successor = RENAMED.get(key, "")
    if successor.partition(":")[0] in known:
        answer = f"It is not called that any more: write `{successor}`."
    elif key in REMOVED:
        answer = f"There is no such key any more. {REMOVED[key]}."
    else:
        nearest = difflib.get_close_matches(key[:100], known, n=1, cutoff=0.0)[0]
        answer = f"The nearest known key is `{nearest}`."
    return f"Unknown key `{shown(key)[1:-1]}` in {where}. {answer}"


def _source(dataclass_type: type, key: str) -> str:
    """The class that a key and its default come from; its own parents count as the class itself."""
    owner = next(c for c in dataclass_type.__mro__ if key in get_annotations(c))
    package, here = (c.__module__.partition(".")[0] for c in (owner, dataclass_type))
    name = dataclass_type.__name__ if package == here else owner.__name__
    return f"{package}.{name}"


def check_entries(key: str, entries: Any, entry_type: type[DatasetConfig]) -> None:
    """Look at a list of data sets in the file: argparse and dataclasses take them as they are."""
    check_value(f"`{key}`", entries, list[dict] | None)
    hints = get_type_hints(entry_type)
    for number, entry in enumerate(entries or [], start=1):
        where = f"entry {number} of `{key}`"
        for name, value in entry.items():
            if name not in hints:
                raise ValueError(unknown_key(str(name), where, list(hints)))
            check_value(f"`{name}` in {where}", value, hints[name])
        if not entry.get("path"):
            raise ValueError(
                f"{where} must have a `path` (a name on the Hub, a file, or a builder such as "
                f"`json` with `data_files`), but is {shown(entry)}."
            )
