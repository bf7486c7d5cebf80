"""The columns of data that are read, by what the data are for, in the order of TRL's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset, IterableDataset
from trl.data_utils import is_conversational_from_value

Row = Mapping[str, Any]
AnyDataset = Dataset | IterableDataset

# What rows are for: training data of a stage; a group whose likelihood is taken; requests, and
# pairs of answers, that are measured; rows of a capability set to be, each in a form of its own.
Use = Literal["sft", "dpo", "group", "prompts", "pairs", "set"]

TURNS = ("prompt", "completion", "chosen", "rejected")  # texts, or conversations
CONVERSATIONS = ("messages", "conversations")
TOKENS = ("input_ids", "labels", "completion_mask", "assistant_masks")
IMAGES = {"image", "images"}  # TRL says whether it can read them
BESIDE = ("tools", "chat_template_kwargs")  # read beside texts and conversations
_OF_TRL = ("sft", "dpo", "group")  # what TRL prepares


@dataclass(frozen=True)
class Source:
    """
    Some data, as a user knows them, and what they are for.

    Attributes:
        where: Their name in messages, such as "capability group 'facts'".
        use: What they are for.
        text_field: Column of plain text.
        assistant_only_loss: Whether the loss of a conversation is on the assistant's turns only.
        vocabulary_size: Tokens that the tokenizer knows; `None`: any may stand in the data.
    """

    where: str
    use: Use
    text_field: str = "text"
    assistant_only_loss: bool = False
    vocabulary_size: int | None = None

    @property
    def first(self) -> str:
        """The name at the beginning of a sentence."""
        return self.where[0].upper() + self.where[1:]


def used_columns(row: Row, source: Source) -> list[str]:
    """
    The columns of a row that are read.

    Args:
        row: The row, without the columns that hold nothing in any row.
        source: What it is from.

    Raises:
        ValueError: the columns are those of no known format.
    """
    used = _FORMS[source.use](row, source)
    if used[0] in TOKENS or source.use not in _OF_TRL:
        return used
    return [*used, *(column for column in BESIDE if column in row)]


def _sft_columns(row: Row, source: Source) -> list[str]:
    columns = set(row)
    if "input_ids" in columns:
        return [column for column in TOKENS if column in columns]
    if {"chosen", "rejected"} <= columns:
        raise ValueError(
            f"{source.first} has the columns {sorted(columns)}, which are preferences, but the "
            "stage is 'sft'. Set `stage: dpo`, or rename `chosen` to `completion` and remove "
            "`rejected`."
        )
    used = _language_columns(row, source)
    if used is None:
        raise ValueError(
            f"{source.first} must have a column `messages`, `{source.text_field}` "
            "(`dataset_text_field`) or `input_ids`, or the columns `prompt` and `completion`, but "
            f"has {sorted(columns)}. Rename them, choose with `columns`, or add a `conversion`."
        )
    return used


def _dpo_columns(row: Row, source: Source) -> list[str]:
    columns = set(row)
    pair = _pair_columns(row)
    if pair is not None:
        return pair
    way_out = "Rename them, choose with `columns`, or add a `conversion`."
    if columns & {"completion", "messages", "text", "input_ids"}:
        way_out = f"Set `stage: sft`, if this is data for it. {way_out}"
    raise ValueError(
        f"{source.first} must have the columns `chosen` and `rejected`, because the stage is "
        f"'dpo', but has {sorted(columns)}. {way_out}"
    )


def _group_columns(row: Row, source: Source) -> list[str]:
    columns = set(row)
    pair = _pair_columns(row)
    if pair is not None:
        return pair
    if "input_ids" in columns:
        return [column for column in TOKENS if column in columns]
    used = _language_columns(row, source)
    if used is not None:
        return used
    if "prompt" in columns and columns & {"messages", "conversations", source.text_field}:
        raise ValueError(
            f"{source.first} has a column `prompt` but no `completion`. Add one, or "
            "leave `prompt` out with `Dataset.remove_columns` (in YAML: `columns: [messages]`)."
        )
    raise ValueError(
        f"{source.first} must have a column `messages`, `{source.text_field}` or "
        "`input_ids`, or the columns `prompt` and `completion` (or `chosen` and `rejected`), "
        f"but has {sorted(columns)}. Rename its columns with `Dataset.rename_column` (in YAML: "
        "add a `conversion`)."
    )


def _set_columns(row: Row, source: Source) -> list[str]:
    columns = set(row)
    pair = _pair_columns(row)
    if pair is not None:
        return pair
    if "prompt" in columns:
        answers = [column for column in ("chosen", "completion") if column in columns]
        if answers or not columns & set(CONVERSATIONS):
            return ["prompt", *answers[:1]]
    used = _language_columns({c: row[c] for c in columns - {"prompt"}}, source)
    if used is None:
        raise ValueError(
            f"{source.first} must have a column `messages`, `prompt` or `text`, or the columns "
            f"`chosen` and `rejected`, but has {sorted(columns)}. Rename its columns in the file, "
            "or name a `conversion`."
        )
    return used


def _measured_columns(row: Row, source: Source) -> list[str]:
    columns = set(row)
    needed = ["prompt"] if source.use == "prompts" else ["chosen", "rejected"]
    if not set(needed) <= columns:
        raise ValueError(
            f"{source.first} must have the columns {', '.join(f'`{c}`' for c in needed)}, but has "
            f"{sorted(columns)}. Rename its columns in the file, or name a `conversion`."
        )
    return needed if source.use == "prompts" else _pair_columns(row) or needed


def _pair_columns(row: Row) -> list[str] | None:
    if not {"chosen", "rejected"} <= row.keys():
        return None
    return [column for column in ("prompt", "chosen", "rejected") if column in row]


def _language_columns(row: Row, source: Source) -> list[str] | None:
    """Those of language modeling or of completions, in the order in which TRL looks for them."""
    if "prompt" in row:
        return ["prompt", "completion"] if "completion" in row else None
    others = [column for column in ("messages", source.text_field) if column in row]
    said = row.get("conversations")
    message = said[0] if isinstance(said, list) and said else None
    if is_conversational_from_value({"conversations": [message]}):
        return ["conversations"]
    # Of messages with the keys of the other column TRL makes nothing.
    has_role = isinstance(message, dict) and "role" in message
    if "conversations" in row and not others and not has_role:
        return ["conversations"]
    return others[:1] or None


_FORMS: dict[Use, Callable[[Row, Source], list[str]]] = {
    "sft": _sft_columns,
    "dpo": _dpo_columns,
    "group": _group_columns,
    "prompts": _measured_columns,
    "pairs": _measured_columns,
    "set": _set_columns,
}


def known_columns(dataset: Dataset, source: Source) -> list[str]:
    """The columns that TRL looks at, wherever they stand."""
    known = {*TURNS, *CONVERSATIONS, *TOKENS, *BESIDE, *IMAGES, source.text_field}
    return [column for column in dataset.column_names if column in known]


def without_nulls(row: Row) -> dict[str, Any]:
    return {column: value for column, value in row.items() if value is not None}
