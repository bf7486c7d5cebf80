"""
The values of keys, held against the types, choices and ranges that they have.

argparse converts what stands on the command line; what comes from YAML it takes as it is, and
dataclasses do not look at types at all. A value of the wrong type would come out somewhere in the
middle of a run, or not at all.
"""

import difflib
import math
import os
import re
import types
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from enum import Enum
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from ogpsa_trl.data.row_values import shown

_NONE = type(None)
_WORDS = {
    bool: "true or false", int: "an integer", float: "a number", str: "text",
    dict: "a mapping (`name: value`)", list: "a list", _NONE: "unset",
}  # fmt: skip


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


class Range(NamedTuple):
    """Numbers that are allowed, and the words for it."""

    words: str
    holds: Callable[[float], bool]


def type_hints(dataclass_types: Iterable[Any]) -> dict[str, Any]:
    """The type of every key of some dataclasses."""
    return {name: hint for kind in dataclass_types for name, hint in get_type_hints(kind).items()}


def check_type(key: str, value: Any, hint: Any, *, is_converted: bool = True) -> None:
    """
    Raise where a value from YAML is not of the type of its key.

    Args:
        key: The key, in backquotes, and where it stands.
        value: What YAML made of it.
        hint: The type.
        is_converted: Whether argparse converts text on the way, and says itself what it cannot.

    Raises:
        ValueError: it is of another type.
    """
    if isinstance(value, str) and "\0" in value:
        raise ValueError(f"{key} must not hold the character zero, but got {shown(value)}.")
    if is_converted and isinstance(value, str):
        _check_text(key, value, hint)
    elif not _fits(value, hint):
        raise ValueError(
            f"{key} must be {_in_words(hint)}, but got {shown(value)}.{_way_out(value, hint)}"
        )


def check_choice(key: str, value: Any, choices: Iterable[Any]) -> None:
    """
    Raise where a value is none of those that its key may have.

    Raises:
        ValueError: it is not.
    """
    known = list(choices)
    if value in known:
        return
    texts = [choice for choice in known if isinstance(choice, str)]
    nearest = difflib.get_close_matches(str(value), texts, n=1)
    hint = f" The nearest is {nearest[0]!r}." if nearest else ""
    hint = hint if isinstance(value, str) else _way_out(value, str)
    raise ValueError(
        f"{key} must be one of {', '.join(map(repr, known))}, but got {shown(value)}.{hint}"
    )


def check_ranges(values: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    """
    Raise where a number is not finite or lies outside the range of its key.

    Args:
        values: Keys with their values. What is no number is left alone.
        ranges: Of keys; any finite number is allowed where there is none.

    Raises:
        ValueError: one does.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            raise ValueError(f"`{name}` must be a finite number, but got {value!r}. Correct it.")
        if name in ranges and not ranges[name].holds(value):
            raise ValueError(f"`{name}` must be {ranges[name].words}, but got {shown(value)}.")


def _check_text(key: str, value: str, hint: Any) -> None:
    """Text that argparse hands on as it is, although the type is another."""
    kinds = _kinds(hint)
    if list in kinds and not {str, Any} & set(kinds) and not _fits([value], hint):
        raise ValueError(
            f"{key} must be {_in_words(hint)}, but got {value!r}. Write it in brackets: [...]."
        )
    # transformers reads JSON, and the files that `deepspeed`, `fsdp_config` and such name.
    if dict in kinds and not value.startswith("{") and not value.endswith(".json"):
        raise ValueError(
            f"{key} must be a mapping (`name: value`), but got the text {shown(value)}."
        )


def _kinds(hint: Any) -> list[Any]:
    """The types in a hint, without what stands in their brackets."""
    if get_origin(hint) in (Union, types.UnionType):
        return [kind for part in get_args(hint) for kind in _kinds(part)]
    return [get_origin(hint) or hint]


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in args)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in args)
    if hint is Any:
        return True
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if (origin or hint) is list:
        return isinstance(value, list) and all(_fits(v, part) for v in value for part in args)
    if (origin or hint) is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return isinstance(value, str)
    return isinstance(value, origin or hint)


def _in_words(hint: Any) -> str:
    if get_origin(hint) is list and get_args(hint):
        of = get_args(hint)[0]
        return {str: "a list of texts", float: "a list of numbers"}.get(of, "a list")
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_in_words(part) for part in get_args(hint)]
        return " or ".join(sorted(dict.fromkeys(parts), key=lambda part: part == "unset"))
    return _WORDS.get(get_origin(hint) or hint, "text")


def _way_out(value: Any, hint: Any) -> str:
    """What YAML may have made of what was meant."""
    kinds = _kinds(hint)
    if value is None:
        return " Remove the key, and it has its default, or give it a value."
    if isinstance(value, bool) and str in kinds:
        words = "yes, true and on" if value else "no, false and off"
        return f" YAML reads {words} as {str(value).lower()}: write it in quotes if it is text."
    if isinstance(value, int | float | date) and str in kinds:
        return f" Write it in quotes: '{value}'."
    is_text = isinstance(value, str) or (isinstance(value, list) and str in map(type, value))
    if is_text and "number" in _in_words(hint):
        return " YAML takes 1e-6 for text: write 1.0e-6, and no quotes."
    return ""
