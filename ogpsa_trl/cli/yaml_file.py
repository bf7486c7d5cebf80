"""A YAML file as a mapping, with every key once."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ogpsa_trl.cli.values import expanded
from ogpsa_trl.data.row_values import shown


def load_mapping(path: str) -> dict[str, Any]:
    """
    Read a file that `--config` names. `~` at the beginning of a text is the home folder.

    Raises:
        ValueError: there is no such file, it cannot be read, it is no YAML, a key stands twice in
            it, or it holds no mapping.
    """
    if not os.path.isfile(path):
        raise ValueError(f"`--config` must name a YAML file, but there is none at {path!r}.")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`--config` must name a YAML file, but {path!r} is not text in UTF-8 ({error.reason} "
            f"at byte {error.start}). Name another file, or save this one as UTF-8."
        ) from error
    except OSError as error:
        raise ValueError(
            f"The file {path!r} of `--config` cannot be read: {error.strerror}. Change its "
            "permissions, or name another."
        ) from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            _check_that_keys_differ(root)
        values = _with_home(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ValueError(f"The file {path!r} is not valid YAML: {error}") from error
    except RecursionError as error:
        raise ValueError(
            f"The file {path!r} is not valid YAML: it is nested too deeply. Look for brackets that "
            "are not closed."
        ) from error
    except _WRONG_SCALARS as error:
        raise ValueError(
            f"The file {path!r} holds a date, a number or a tag (`!!`) that is none ({error}). "
            "Write it in quotes if it is meant as text."
        ) from error
    if not isinstance(values, dict):
        raise ValueError(
            f"The file {path!r} must hold keys with values (`key: value`), but holds "
            f"{shown(values)}."
        )
    return values


def _with_home(value: Any) -> Any:
    """The value, with the home folder in place of `~` in every text."""
    if isinstance(value, str):
        return expanded(value)
    if isinstance(value, list):
        return [_with_home(entry) for entry in value]
    return {k: _with_home(v) for k, v in value.items()} if isinstance(value, dict) else value


# What PyYAML raises where a value does not have the form that its tag promises.
_WRONG_SCALARS = (ValueError, KeyError, AttributeError, OverflowError)


def _check_that_keys_differ(root: yaml.Node) -> None:
    """
    YAML forbids a key that stands twice; PyYAML takes the last one, without a word.

    Raises:
        YAMLError: one does.
    """
    for mapping in _mappings(root):
        lines: dict[tuple[str, str], int] = {}
        for key, _ in mapping.value:
            # `<<` may stand twice: it merges other mappings, whose keys may be replaced.
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise yaml.YAMLError(
                    f"the key `{key.value}` stands in line {lines[name]} and again in line {line}, "
                    "but only one of the values can count. Remove the other."
                )
            lines[name] = line


def _mappings(root: yaml.Node) -> Iterator[yaml.MappingNode]:
    """All mappings, each once: an alias is the node that it names."""
    nodes, seen = [root], set()
    while nodes:
        node = nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            yield node
            nodes += [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
