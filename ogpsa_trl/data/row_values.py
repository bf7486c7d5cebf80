"""What may stand in a row: the one place that knows the types of its values."""

import json
import math
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError

from ogpsa_trl.data.columns import CONVERSATIONS, IGNORED, TOKENS, TURNS, Row, Source

_ASKING = {"system", "developer", "user", "human", "tool"}  # a template may know other answerers
_MESSAGES = "a list of messages with `role` and `content`"
_LONGEST = 300  # characters of a value or a reason in a message

# Values in messages: one screen, also of a list of a thousand entries or of one inside another.
_short = reprlib.Repr()
_short.maxdict = _short.maxlist = _short.maxtuple = _short.maxset = 4
_short.maxlevel = 3
_short.maxstring = _short.maxother = 200
_short.maxlong = 60


def shown(value: Any) -> str:
    """A value as it stands in a message: on one line, cut where it is long."""
    return _on_one_line(_short.repr(value))


def reason_of(error: Exception) -> str:
    """What an error says, as it stands in a message."""
    reason = _on_one_line(str(error).rstrip().rstrip(".!"))
    is_said = isinstance(error, ValueError | TemplateError)
    return reason if is_said else f"{type(error).__name__}: {reason}"


def _on_one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) < _LONGEST else f"{text[:_LONGEST]} ..."


class RowError(ValueError):
    """A row that cannot be read; the message names its data set, its number and the way out."""


@contextmanager
def row_named(where: str, number: int | str) -> Iterator[None]:
    """
    Name the row that cannot be made into tokens.

    Raises:
        RowError: it cannot.
    """
    try:
        yield
    except RowError:
        raise
    except Exception as error:  # of a template, a tokenizer or TRL
        raise RowError(
            f"Row {number} of {where} cannot be made into tokens: {reason_of(error)}. Correct the "
            "row, or remove it."
        ) from error


class RowCheck:
    """
    Refuses a row whose values cannot be read.

    Args:
        source: What the rows are from.
        used: The columns in use.
    """

    def __init__(self, source: Source, used: Sequence[str]) -> None:
        self.source = source
        self.used = used
        # Number of the first row, and whether it is a conversation: TRL treats all rows like it.
        self.form: tuple[int, bool] | None = None

    def __call__(self, row: Row, number: int) -> None:
        """
        Look at one row.

        Raises:
            RowError: it cannot be read.
        """
        where, use = self.source.where, self.source.use
        values: dict[str, Any] = {column: row.get(column) for column in self.used}
        is_pair = use != "dpo" and {"prompt", "rejected"} <= values.keys()
        if is_pair and isinstance(values["prompt"], list) != isinstance(values["chosen"], list):
            del values["prompt"]  # a text beside conversations, which contain it
        for column, value in values.items():
            self._check(column, value, number)
        lengths = {column: len(values[column]) for column in TOKENS if column in values}
        if len(set(lengths.values())) > 1:  # TRL pads tokens and labels apart
            raise RowError(
                f"The columns {list(lengths)} of {where} must be of one length, but in row "
                f"{number} theirs are {list(lengths.values())}. Correct the data."
            )
        turns = {column: values[column] for column in TURNS if column in values}
        texts = [column for column, value in turns.items() if isinstance(value, str)]
        if 0 < len(texts) < len(turns) and use != "set":
            others = [column for column in turns if column not in texts]
            raise RowError(
                f"The columns of {where} must all be text or all be conversations, but in row "
                f"{number} {texts} are text and {others} are not. Leave one out with `columns`, "
                "such as a `prompt` that `chosen` and `rejected` hold already."
            )
        messages = [
            message
            for column in (*TURNS, *CONVERSATIONS)
            if isinstance(values.get(column), list) and column != "rejected"
            for message in values[column]
        ]
        first, form = self.form = self.form or (number, bool(messages))
        if form != bool(messages) and use != "set":
            words = ("text", "a conversation")
            raise RowError(
                f"The rows of {where} must all be text or all be conversations, but row {first} is "
                f"{words[form]} and row {number} {words[not form]}. Bring them into one form, or "
                "put them into data sets of their own."
            )
        if not self.source.assistant_only_loss or not messages:
            return
        if all((message.get("role") or message.get("from")) in _ASKING for message in messages):
            raise RowError(
                f"Every conversation of {where} must have a turn of the assistant, because "
                f"`assistant_only_loss` is true, but row {number} has none: {shown(messages)}. "
                "Remove such rows, or set `assistant_only_loss: false`."
            )

    def _check(self, column: str, value: Any, number: int) -> None:
        place = f"row {number}"
        if column in TOKENS:
            end = self.source.vocabulary_size or math.inf
            words = f"a list of numbers of tokens, from 0 to {end - 1}"
            is_label = column == "labels"
            words += f", or {IGNORED} where nothing is to be learned" * is_label
            is_right = isinstance(value, list) and all(
                isinstance(v, int) and (0 <= v < end or (is_label and v == IGNORED)) for v in value
            )
        elif column == "tools":
            words, is_right = "a list of tools, or JSON text of one", _is_tools(value)
        elif column == "chat_template_kwargs":
            words, is_right = "a mapping", isinstance(value, dict)
        elif isinstance(value, str) and column not in CONVERSATIONS:
            return
        elif column in TURNS or column in CONVERSATIONS:
            words = f"text, or {_MESSAGES}" if column in TURNS else _MESSAGES
            if column == "conversations":
                words = "a list of messages with `from` and `value`"
            is_right = isinstance(value, list) and len(value) > 0
            for index, message in enumerate(value if is_right else ()):
                if not _is_message(message):
                    is_right, value, place = False, message, f"message {index} of {place}"
                    break
        else:
            words, is_right = "text", False
        if not is_right:
            raise RowError(
                f"`{column}` in {self.source.where} must be {words}, but {place} has "
                f"{shown(value)}. {_way_out(value)}"
            )


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict):
        return False
    role = message["from"] if "from" in message else message.get("role")
    content = message["value"] if "value" in message else message.get("content")
    if not isinstance(role, str) or not role:
        return False
    if content is None:  # an answer that calls tools may say nothing
        return bool(message.get("tool_calls"))
    if isinstance(content, list):
        return bool(content) and all(
            isinstance(part, dict) and isinstance(part.get("type"), str) for part in content
        )
    return isinstance(content, str)


def _is_tools(value: Any) -> bool:
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return False
    is_list = isinstance(value, list) and all(isinstance(tool, dict) for tool in value)
    return value is None or is_list


def _way_out(value: Any) -> str:
    if value is None or value == []:
        return "Remove such rows, and mix only data of the same columns."
    if isinstance(value, int | float):
        return (
            "Write numbers that are text in quotes, in JSON lines or Parquet: in CSV they are read "
            "as numbers all the same. Or choose other columns (in YAML: `columns`)."
        )
    json_text = "If it is JSON, make lists of it with `json.loads`. " * isinstance(value, str)
    return f"{json_text}Correct the data, or choose other columns (in YAML: `columns`)."
