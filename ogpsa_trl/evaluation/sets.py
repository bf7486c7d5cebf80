"""The data of an evaluation: loaded, chosen and checked once, before any model is loaded."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import maybe_extract_prompt

from ogpsa_trl.evaluation.arguments import EvaluationArguments
from ogpsa_trl.evaluation.measures import Text, answer_to, prompt_tokens, tokenise
from ogpsa_trl.mixture import load_groups

logger = logging.getLogger(__name__)

Row = dict[str, Any]


@dataclass(frozen=True)
class RowSet:
    """
    Rows of one group that are measured.

    Args:
        ids (`tuple[str, ...]`): Places of the rows in the group.
        rows (`tuple[dict, ...]`): The rows, in the same order.
        num_left_out (`int`): Rows that are too long for `max_length`.
    """

    ids: tuple[str, ...]
    rows: tuple[Row, ...]
    num_left_out: int

    def column(self, name: str) -> list[Any]:
        """The values of one column."""
        return [row[name] for row in self.rows]


@dataclass(frozen=True)
class EvaluationSets:
    """
    All data of an evaluation, by group.

    Args:
        capability (`Mapping[str, Dataset]`): Held-out capability data, as they were loaded.
        harmful (`Mapping[str, RowSet]`): Prompts that are to be refused.
        over_refusal (`Mapping[str, RowSet]`): Prompts that are to be answered.
        preference (`Mapping[str, RowSet]`): Pairs, with `prompt`, `chosen` and `rejected`.
    """

    capability: Mapping[str, Dataset]
    harmful: Mapping[str, RowSet]
    over_refusal: Mapping[str, RowSet]
    preference: Mapping[str, RowSet]


def load_sets(
    arguments: EvaluationArguments, tokenizers: Sequence[PreTrainedTokenizerBase]
) -> EvaluationSets:
    """
    Load what is measured.

    A text prompt becomes a user's message where every tokenizer has a chat template. What does not
    fit into `max_length` under one of the tokenizers is left out for all models.

    Args:
        arguments (`EvaluationArguments`): The keys.
        tokenizers (`Sequence[PreTrainedTokenizerBase]`): Those of all models.

    Raises:
        ValueError: a column is missing, a conversation has no chat template, or no row of a group
            is short enough.
    """
    is_chat = all(tokenizer.chat_template for tokenizer in tokenizers)

    def prompts(name: str, dataset: Any) -> RowSet:
        _check_columns(name, dataset, ("prompt",))

        def convert(row: Row) -> Row:
            return {"prompt": _prompt(row["prompt"], is_chat)}

        def length(tokenizer: PreTrainedTokenizerBase, row: Row) -> int:
            answered = len(prompt_tokens(tokenizer, row["prompt"])) + arguments.max_new_tokens
            refused = [
                len(tokenise(tokenizer, row["prompt"], answer_to(row["prompt"], refusal))[1])
                for refusal in arguments.refusals
            ]
            return max(answered, *refused)

        return _row_set(name, dataset, convert, length, arguments, tokenizers)

    def pairs(name: str, dataset: Any) -> RowSet:
        _check_columns(name, dataset, ("chosen", "rejected"))

        def convert(row: Row) -> Row:
            row = maybe_extract_prompt(row)
            return {key: row[key] for key in ("prompt", "chosen", "rejected")}

        def length(tokenizer: PreTrainedTokenizerBase, row: Row) -> int:
            return max(
                len(tokenise(tokenizer, row["prompt"], row[side])[1])
                for side in ("chosen", "rejected")
            )

        return _row_set(name, dataset, convert, length, arguments, tokenizers)

    capability: Any = load_groups(arguments.capability_datasets, "`capability_datasets`")
    return EvaluationSets(
        capability,
        *(
            {
                name: prepare(name, rows)
                for name, rows in load_groups(getattr(arguments, key), f"`{key}`").items()
            }
            for prepare, key in (
                (prompts, "harmful_datasets"),
                (prompts, "over_refusal_datasets"),
                (pairs, "preference_datasets"),
            )
        ),
    )


def _prompt(prompt: Text, is_chat: bool) -> Text:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}] if is_chat else prompt
    return prompt


def _check_columns(name: str, dataset: Any, needed: Sequence[str]) -> None:
    if not set(needed) <= set(dataset.column_names):
        raise ValueError(
            f"Group {name!r} must have the columns {', '.join(f'`{c}`' for c in needed)}, but has "
            f"{sorted(dataset.column_names)}. Rename its columns in the file, or name a "
            "`conversion`."
        )


def _row_set(
    name: str,
    dataset: Dataset,
    convert: Callable[[Row], Row],
    length: Callable[[PreTrainedTokenizerBase, Row], int],
    arguments: EvaluationArguments,
    tokenizers: Sequence[PreTrainedTokenizerBase],
) -> RowSet:
    generator = torch.Generator().manual_seed(arguments.seed)
    places = torch.randperm(len(dataset), generator=generator)[: arguments.max_samples].tolist()
    chosen = {place: convert(dict(dataset[place])) for place in places}
    for tokenizer in tokenizers:
        is_rendered = any(not isinstance(row["prompt"], str) for row in chosen.values())
        if is_rendered and not tokenizer.chat_template:
            raise ValueError(
                f"Group {name!r} holds conversations, but the tokenizer of "
                f"{tokenizer.name_or_path!r} has no chat template. Set `tokenizer_name_or_path` to "
                "a model that has one, or take texts."
            )
    kept = {
        str(place): row
        for place, row in chosen.items()
        if all(length(tokenizer, row) <= arguments.max_length for tokenizer in tokenizers)
    }
    num_left_out = len(chosen) - len(kept)
    if not kept:
        raise ValueError(
            f"Group {name!r} must have a row that fits into `max_length`, "
            f"{arguments.max_length} tokens, but none of its {len(chosen)} does. Raise "
            "`max_length`, or lower `max_new_tokens`."
        )
    if num_left_out:
        logger.warning(
            "Group %r: %d of %d rows are longer than `max_length` and left out",
            name, num_left_out, len(chosen),
        )  # fmt: skip
    return RowSet(tuple(kept), tuple(kept.values()), num_left_out)
