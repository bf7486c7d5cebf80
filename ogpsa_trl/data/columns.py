"""The columns of data that are read, by what the data are for, in the order of TRL's."""

from collections.abc import Mapping
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
IGNORED = -100  # label of a token that is not trained on
_OF_TRL = ("sft", "dpo", "group")  # what TRL prepares

_IN_THE_FILE = "Rename its columns in the file, or name a `conversion`."


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


# What each use asks for, and the way out.
_ASKED: dict[Use, tuple[str, str]] = {
    "sft": (
        "a column `messages`, `{}` (`dataset_text_field`) or `input_ids`, or the columns `prompt` "
        "and `completion`",
        "Rename them, choose with `columns`, or add a `conversion`.",
    ),
    "dpo": (
        "the columns `chosen` and `rejected`, because the stage is 'dpo'",
        "Set `stage: sft`, if this is data for it; or rename them, choose with `columns`, or add a "
        "`conversion`.",
    ),
    "group": (
        "a column `messages`, `{}` or `input_ids`, or the columns `prompt` and `completion` (or "
        "`chosen` and `rejected`)",
        "Rename its columns with `Dataset.rename_column` (in YAML: add a `conversion`).",
    ),
    "prompts": ("the columns `prompt`", _IN_THE_FILE),
    "pairs": ("the columns `chosen`, `rejected`", _IN_THE_FILE),
    "set": (
        "a column `messages`, `prompt` or `text`, or the columns `chosen` and `rejected`",
        _IN_THE_FILE,
    ),
}


def used_columns(row: Row, source: Source) -> list[str]:
    """
    The columns of a row that are read.

    Args:
        row: The row, without the columns that hold nothing in any row.
        source: What it is from.

    Raises:
        ValueError: the columns are those of no known format.
    """
    columns, use = row.keys(), source.use
    used: list[str] | None = None
    if use == "prompts":
        used = ["prompt"] if "prompt" in columns else None
    elif use != "sft" and {"chosen", "rejected"} <= columns:
        used = [column for column in ("prompt", "chosen", "rejected") if column in columns]
    elif use in ("sft", "group") and "input_ids" in columns:
        return [column for column in TOKENS if column in columns]
    elif use == "set" and _has_request(row):
        used = ["prompt", *[c for c in ("chosen", "completion") if c in columns][:1]]
    elif use == "set":
        used = _language_columns({c: row[c] for c in columns - {"prompt"}}, source)
    elif use == "sft" and {"chosen", "rejected"} <= columns:
        raise ValueError(
            f"{source.first} has the columns {sorted(columns)}, which are preferences, but the "
            "stage is 'sft'. Set `stage: dpo`, or rename `chosen` to `completion` and remove "
            "`rejected`."
        )
    elif use in ("sft", "group"):
        used = _language_columns(row, source)
    if used is None:
        asked, way_out = _ASKED[use]
        if use == "group" and "prompt" in columns and columns & {*CONVERSATIONS, source.text_field}:
            way_out = (
                "Add a `completion` to `prompt`, or leave `prompt` out with "
                "`Dataset.remove_columns` (in YAML: `columns: [messages]`)."
            )
        raise ValueError(
            f"{source.first} must have {asked.format(source.text_field)}, but has "
            f"{sorted(columns)}. {way_out}"
        )
    if use in _OF_TRL:
        used += [column for column in BESIDE if column in columns]
    return used


def _has_request(row: Row) -> bool:
    """Whether a row of a capability set is a prompt, answered or not, and no conversation."""
    is_answered = "chosen" in row or "completion" in row
    return "prompt" in row and (is_answered or not row.keys() & set(CONVERSATIONS))


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


def known_columns(dataset: Dataset, source: Source) -> list[str]:
    """The columns that TRL looks at, wherever they stand."""
    known = {*TURNS, *CONVERSATIONS, *TOKENS, *BESIDE, *IMAGES, source.text_field}
    return [column for column in dataset.column_names if column in known]


def without_nulls(row: Row) -> dict[str, Any]:
    return {column: value for column, value in row.items() if value is not None}
