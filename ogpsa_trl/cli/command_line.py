"""What a command was given: the words of its line, and the keys of one YAML file."""

import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import yaml

from ogpsa_trl.data.files import find_config
from ogpsa_trl.data.row_values import shown


class Given(NamedTuple):
    """
    What a command was given.

    Attributes:
        words: The command line, without `--config` and its file.
        values: The keys of the file.
        path: The file, if any.
    """

    words: list[str]
    values: dict[str, Any]
    path: str


def given_keys(args: Sequence[str] | None) -> Given:
    """
    Read a command line, by default that of the process, and the file that its `--config` names.

    Raises:
        ValueError: `--config` stands twice, or without a file; see `load_mapping`.
    """
    words = split_config(sys.argv[1:] if args is None else args)
    if "--config" not in words:
        return Given(words, {}, "")
    index = words.index("--config")
    before, [path, *after] = words[:index], words[index + 1 :] or [""]
    if not path or "--config" in after:
        raise ValueError(
            f"`--config` needs one file, but got {' '.join(words[index:])!r}. Put all keys into one"
            " file, or some of them on the command line."
        )
    return Given(before + after, load_mapping(path), path)


def split_config(args: Sequence[str]) -> list[str]:
    """
    The command line with `--config` and its file as two words, of which the second is a path, also
    where it was the name of a file that comes with the project. `~` is the home folder.
    """
    words = [
        part
        for word in expanded_words(args)
        for part in (word.split("=", 1) if word.startswith("--config=") else [word])
    ]
    return [
        str(find_config(word)) if words[index - 1 : index] == ["--config"] else word
        for index, word in enumerate(words)
    ]


class _Loader(yaml.SafeLoader):
    """
    YAML as TRL reads it, but a key stands once, and 1e-6 is a number.

    YAML 1.2 has both, but reads `no` as a text, which is true within a mapping that is handed on.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """
        A mapping, before `<<` merges others into it, whose keys it may replace.

        Raises:
            YAMLError: a key stands twice.
        """
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if lines.setdefault(name, line) != line and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.YAMLError(
                    f"the key `{key.value}` stands in line {lines[name]} and again in line {line}, "
                    "but only one of the values can count. Remove the other."
                )
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_mapping(path: str) -> dict[str, Any]:
    """
    Read a YAML file of keys. `~` at the beginning of a text is the home folder.

    Raises:
        ValueError: there is no such file, it is no YAML, a key stands twice in it, or it holds no
            mapping.
    """
    try:
        with open(path, "rb") as file:
            values = _with_home(_Loader(file).get_single_data())
    except OSError as error:
        raise ValueError(
            f"`--config` must name a YAML file, but {path!r} cannot be read: {error.strerror}. "
            "Correct the path, or the permissions."
        ) from error
    except (yaml.YAMLError, RecursionError, *_WRONG_SCALARS) as error:
        raise ValueError(
            f"The file {path!r} of `--config` is not valid YAML: {error}. Text that looks like a "
            "date, a number or a tag (`!!`) must stand in quotes, and every bracket must be closed."
        ) from error
    if not isinstance(values, dict):
        raise ValueError(
            f"The file {path!r} of `--config` must hold keys with values (`key: value`), but holds "
            f"{shown(values)}."
        )
    return values


# What PyYAML raises where a value does not have the form that its tag promises.
_WRONG_SCALARS = (ValueError, KeyError, AttributeError, OverflowError)


def _with_home(value: Any) -> Any:
    """The value, with the home folder in place of `~` in every text."""
    if isinstance(value, str):
        return expanded(value)
    if isinstance(value, list):
        return [_with_home(entry) for entry in value]
    return {k: _with_home(v) for k, v in value.items()} if isinstance(value, dict) else value


def expanded(text: str) -> str:
    """
    A value, with the home folder in place of `~`.

    In every text that begins with `~/`, whatever its key: shells do so for words of their own, but
    not behind `--key=`, and YAML does not at all.
    """
    return os.path.expanduser(text) if _HOME.match(text) else text


def expanded_words(words: Iterable[str]) -> list[str]:
    """The words of a command line, where a value may stand behind `--key=`."""
    parts = (w.partition("=") if w.startswith("--") else ("", "", w) for w in words)
    return [option + equals + expanded(value) for option, equals, value in parts]


_HOME = re.compile(r"~[\w.-]*(/[^\0]*)?\Z")  # `~name/` is the home folder of another user
