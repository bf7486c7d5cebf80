"""What may stand in a row: the one place that knows the types of its values."""

import json
import math
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError

from ogpsa_trl.data.columns import CONVERSATIONS, TOKENS, TURNS, Row, Source

_IGNORED = -100  # label of a token that is not trained on
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
    """A value as it stands in a message, cut where it is long."""
    return _short.repr(value)


class RowError(ValueError):
    """A row that cannot be read; the message names its data set, its number and the way out."""


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
        values = {column: row.get(column) for column in self.used}
        self._leave_out_prompt(values)
        for column, value in values.items():
            self._check(column, value, number)
        self._check_lengths(values, number)
        turns = {column: values[column] for column in TURNS if column in values}
        texts = [column for column, value in turns.items() if isinstance(value, str)]
        if 0 < len(texts) < len(turns) and self.source.use != "set":
            others = [column for column in turns if column not in texts]
            raise RowError(
                f"The columns of {self.source.where} must all be text or all be conversations, but "
                f"in row {number} {texts} are text and {others} are not. Leave one out with "
                "`columns`, such as a `prompt` that `chosen` and `rejected` hold already."
            )
        messages = [
            message
            for column in (*TURNS, *CONVERSATIONS)
            if isinstance(values.get(column), list) and column != "rejected"
            for message in values[column] or ()
        ]
        self._check_form(bool(messages), number)
        if messages and self.source.assistant_only_loss:
            self._check_assistant(messages, number)

    def _leave_out_prompt(self, values: dict[str, Any]) -> None:
        """A text prompt beside conversations that contain it is taken from them."""
        if self.source.use == "dpo" or not {"prompt", "rejected"} <= values.keys():
            return
        if isinstance(values["prompt"], list) != isinstance(values["chosen"], list):
            del values["prompt"]

    def _check(self, column: str, value: Any, number: int) -> None:
        place, words = f"row {number}", "text"
        if column in TOKENS:
            end = self.source.vocabulary_size or math.inf
            words = f"a list of numbers of tokens, from 0 to {end - 1}"
            if column == "labels":
                words += f", or {_IGNORED} where nothing is to be learned"
            is_right = isinstance(value, list) and all(
                isinstance(v, int) and (0 <= v < end or (v == _IGNORED and column == "labels"))
                for v in value
            )
        elif column == "tools":
            words = "a list of tools, or JSON text of one"
            is_right = value is None or _is_tools(value)
        elif column == "chat_template_kwargs":
            words = "a mapping"
            is_right = isinstance(value, dict)
        elif column in TURNS or column in CONVERSATIONS:
            words = f"text, or {_MESSAGES}" if column in TURNS else _MESSAGES
            if column == "conversations":
                words = "a list of messages with `from` and `value`"
            is_right = isinstance(value, str) and column in TURNS
            if not is_right:
                index = _first_wrong_message(value)
                is_right = index is None
                if index is not None and index >= 0:
                    place, value = f"message {index} of {place}", value[index]
        else:
            is_right = isinstance(value, str)
        if not is_right:
            raise RowError(
                f"`{column}` in {self.source.where} must be {words}, but {place} has "
                f"{short(value)}. {_way_out(value)}"
            )

    def _check_lengths(self, values: Row, number: int) -> None:
        """TRL pads tokens and labels apart."""
        lengths = {column: len(values[column]) for column in TOKENS if column in values}
        if len(set(lengths.values())) > 1:
            raise RowError(
                f"The columns {list(lengths)} of {self.source.where} must be of one length, but "
                f"in row {number} theirs are {list(lengths.values())}. Correct the data."
            )

    def _check_form(self, is_conversation: bool, number: int) -> None:
        first, form = self.form = self.form or (number, is_conversation)
        if form != is_conversation and self.source.use != "set":
            words = {False: "text", True: "a conversation"}
            raise RowError(
                f"The rows of {self.source.where} must all be text or all be conversations, but "
                f"row {first} is {words[form]} and row {number} {words[is_conversation]}. Bring "
                "them into one form, or put them into data sets of their own."
            )

    def _check_assistant(self, messages: list[Any], number: int) -> None:
        if all((m.get("role") or m.get("from")) in _ASKING for m in messages):
            raise RowError(
                f"Every conversation of {self.source.where} must have a turn of the assistant, "
                f"because `assistant_only_loss` is true, but row {number} has none: "
                f"{short(messages)}. Remove such rows, or set `assistant_only_loss: "
                "false`."
            )


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


def reason_of(error: Exception) -> str:
    reason = _on_one_line(str(error)).rstrip(".!")
    reason = reason if len(reason) < _LONGEST else f"{reason[:_LONGEST]} ..."
    is_said = isinstance(error, ValueError | TemplateError)
    return reason if is_said else f"{type(error).__name__}: {reason}"


def short(value: Any) -> str:
    text = _on_one_line(shown(value))
    return text if len(text) < _LONGEST else f"{text[:_LONGEST]} ..."


def _on_one_line(text: str) -> str:
    return " ".join(text.split())


def _first_wrong_message(value: Any) -> int | None:
    """The place of the first message that is none; -1 where there are no messages at all."""
    if not isinstance(value, list) or not value:
        return -1
    return next((i for i, message in enumerate(value) if not _is_message(message)), None)


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
    return isinstance(value, list) and all(isinstance(tool, dict) for tool in value)


def _way_out(value: Any) -> str:
    if value is None or value == []:
        return "Remove such rows, and mix only data of the same columns."
    if isinstance(value, int | float):
        return (
            "Write numbers that are text in quotes, in JSON lines or Parquet: in CSV they are read "
            "as numbers all the same. Or choose other columns (in YAML: `columns`)."
        )
    if isinstance(value, str):
        return (
            "If it is JSON, make lists of it with `json.loads`; otherwise correct the data, or "
            "choose other columns (in YAML: `columns`)."
        )
    return "Correct the data, or choose other columns (in YAML: `columns`)."
