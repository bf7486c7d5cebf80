"""Training data held against the stage and the tokenizer, before a model is loaded."""

from collections.abc import Mapping
from typing import Any

import pyarrow
import pyarrow.compute
from datasets import Dataset
from jinja2 import TemplateError
from trl.data_utils import is_conversational_from_value, maybe_convert_to_chatml

from ogpsa_trl.data import check_group_format
from ogpsa_trl.mixture import AnyDataset, loading
from ogpsa_trl.values import shown

Row = Mapping[str, Any]

_DPO_COLUMNS = ("prompt", "chosen", "rejected")
_IMAGES = {"image", "images"}  # TRL says whether it can read them
_ROWS_AT_ONCE = 1000


def first_row(dataset: AnyDataset, where: str) -> Row:
    """
    The first row; of a stream it is read for this.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    with loading(_first(where)):
        row = next(iter(dataset), None)
    if row is None:
        raise ValueError(
            f"{_first(where)} must have at least one row, but is empty. Check its file and split."
        )
    return row


def check_stage_format(dataset: AnyDataset, where: str, stage: str, text_field: str) -> None:
    """
    Refuse safety data that the trainer of a stage cannot read.

    Args:
        dataset: The data, not tokenised.
        where: What the user knows it as.
        stage: `sft` or `dpo`.
        text_field: Column of plain text, in SFT.

    Raises:
        ValueError: the data is empty, its columns are those of another stage or of none, or a
            column holds something else than text or messages.
    """
    row = first_row(dataset, where)
    columns = set(row)
    if columns & _IMAGES:
        return
    if stage == "sft":
        used = _sft_columns(row, columns, where, text_field)
    else:
        used = _dpo_columns(columns, where)
    _check_first_row({column: row[column] for column in used}, where)
    if isinstance(dataset, Dataset):
        _check_that_all_have_values(dataset, used, where)


def check_group(dataset: AnyDataset, name: str, text_field: str) -> None:
    """
    Refuse capability data that cannot be read.

    Args:
        dataset: A group, not tokenised.
        name: Its name.
        text_field: Column of plain text.

    Raises:
        ValueError: it is empty, in no known format, or lacks values.
    """
    where = f"capability group {name!r}"
    row = first_row(dataset, where)
    check_group_format(name, row, text_field)
    if isinstance(dataset, Dataset):
        used = [c for c in ("messages", text_field, "prompt", "completion", "chosen") if c in row]
        _check_that_all_have_values(dataset, used, where)


def check_tokens(dataset: AnyDataset | None, max_length: int | None) -> None:
    """
    Refuse training data that TRL has tokenised, and of which nothing is left to learn from.

    Args:
        dataset: The trainer's data. Streams are not read.
        max_length: Tokens kept of a sample.

    Raises:
        ValueError: no sample has a token that is trained on.
    """
    if not isinstance(dataset, Dataset):
        return
    is_left = len(dataset) > 0
    if is_left and "labels" in dataset.column_names:  # it ends at the first sample that is trained
        rows: Any = dataset
        is_left = any(any(label != -100 for label in row["labels"]) for row in rows)
    if not is_left:
        raise ValueError(
            "The training data must have a token to learn from, but no sample has one within "
            f"`max_length` {max_length}. Raise `max_length`, or look for empty completions and for "
            "labels that are all -100."
        )


def _sft_columns(row: Row, columns: set[str], where: str, text_field: str) -> list[str]:
    """The columns with text that `SFTTrainer` reads."""
    if "input_ids" in columns or is_conversational_from_value(dict(row)):
        return []
    if {"chosen", "rejected"} <= columns:
        raise ValueError(
            f"{_first(where)} has the columns {sorted(columns)}, which are preferences, but the "
            "stage is 'sft'. Set `stage: dpo`, or rename `chosen` to `completion` and remove "
            "`rejected`."
        )
    if {"prompt", "completion"} <= columns:
        return ["prompt", "completion"]
    if "prompt" not in columns:
        for column in ("messages", text_field):
            if column in columns:
                return [column]
    raise ValueError(
        f"{_first(where)} must have a column `messages`, `{text_field}` (`dataset_text_field`) or "
        f"`input_ids`, or the columns `prompt` and `completion`, but has {sorted(columns)}. Rename "
        "them, choose with `columns`, or add a `conversion`."
    )


def _dpo_columns(columns: set[str], where: str) -> list[str]:
    """The columns with text that `DPOTrainer` reads."""
    if {"chosen", "rejected"} <= columns:
        return [column for column in _DPO_COLUMNS if column in columns]
    way_out = "Rename them, choose with `columns`, or add a `conversion`."
    if columns & {"completion", "messages", "text", "input_ids"}:
        way_out = f"Set `stage: sft`, if this is data for it. {way_out}"
    raise ValueError(
        f"{_first(where)} must have the columns `chosen` and `rejected`, because the stage is "
        f"'dpo', but has {sorted(columns)}. {way_out}"
    )


def _check_first_row(values: Row, where: str) -> None:
    """The others have the same types: they are those of the columns."""
    for column, value in values.items():
        is_text = isinstance(value, str) and column != "messages"
        if not is_text and not _is_conversation(value):
            raise ValueError(
                f"`{column}` in {where} must be {'' if column == 'messages' else 'text, or '}a list"
                f" of messages with `role` and `content`, but the first row has {shown(value)}. "
                "Correct the data, or choose others with `columns`."
            )
    texts = [column for column, value in values.items() if isinstance(value, str)]
    if 0 < len(texts) < len(values):
        others = [column for column in values if column not in texts]
        raise ValueError(
            f"The columns of {where} must all be text or all be conversations, but {texts} are "
            f"text and {others} are not. Leave one out with `columns`, such as a `prompt` that "
            "`chosen` and `rejected` hold already."
        )


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and isinstance(value[0], dict)
        and "role" in value[0]
    )


def check_chat_template(dataset: AnyDataset, where: str, processing_class: Any) -> None:
    """
    Refuse conversations for which there is no chat template, or one that refuses them.

    Args:
        dataset: Any data, not tokenised; its first row is rendered.
        where: What the user knows it as.
        processing_class: The tokenizer or processor that TRL will use.

    Raises:
        ValueError: it has no template, or the template raises.
    """
    row: dict[str, Any] = maybe_convert_to_chatml(dict(first_row(dataset, where)))
    prompt = row["prompt"] if _is_conversation(row.get("prompt")) else []
    conversations = [
        [*prompt, *row[column]]
        for column in ("messages", "completion", "chosen", "rejected")
        if _is_conversation(row.get(column))
    ]
    if not conversations or row.keys() & (_IMAGES | {"tools"}):
        return
    if processing_class.chat_template is None:
        raise ValueError(
            f"{_first(where)} holds conversations, but the tokenizer has no chat template to make "
            "text of them. Train a model that has one, set `chat_template_path` (SFT), or bring "
            "the data into the columns `prompt` and `completion` (DPO: `chosen` and `rejected`), "
            "as text."
        )
    for conversation in conversations:
        try:
            processing_class.apply_chat_template(
                conversation, tokenize=False, **(row.get("chat_template_kwargs") or {})
            )
        except TemplateError as error:
            raise ValueError(
                f"{_first(where)} does not go with the chat template of the tokenizer, which "
                f"refuses the first row: {error}. Change the roles of the messages, or set another "
                "template with `chat_template_path` (SFT)."
            ) from error


def _check_that_all_have_values(dataset: Dataset, columns: list[str], where: str) -> None:
    """Over the whole column, in the memory of Arrow: TRL would stop in the middle of a map."""
    compute: Any = pyarrow.compute  # its functions are made when it is imported
    start = 0
    tables: Any = dataset.select_columns(columns).with_format("arrow").iter(_ROWS_AT_ONCE)
    for table in tables:
        for column in columns:
            values = table[column]
            missing = compute.is_null(values)
            if pyarrow.types.is_list(values.type) or pyarrow.types.is_large_list(values.type):
                is_empty = compute.equal(compute.list_value_length(values), 0)
                missing = compute.or_kleene(missing, is_empty)
            index = compute.index(missing, True).as_py()
            if index >= 0:
                raise ValueError(
                    f"`{column}` in {where} must have a value in every row, but row "
                    f"{start + index} has {shown(values[index].as_py())}. Remove such rows, and "
                    "mix only data of the same columns."
                )
        start += len(table)


def _first(where: str) -> str:
    """At the beginning of a sentence."""
    return where[0].upper() + where[1:]
