"""The data of an evaluation: loaded, chosen and checked once, before any model is loaded."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file
from trl.data_utils import maybe_extract_prompt

from ogpsa_trl.data.columns import Source
from ogpsa_trl.data.entries import load_groups
from ogpsa_trl.data.preparation import context_of
from ogpsa_trl.data.rendering import check_rendering
from ogpsa_trl.data.row_checks import check_data, first_row
from ogpsa_trl.data.row_values import row_named
from ogpsa_trl.data.rows import readable
from ogpsa_trl.evaluation.arguments import EvaluationArguments
from ogpsa_trl.evaluation.measures import Text, answer_to, prompt_tokens, tokenise

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
        ValueError: a column is missing, a row cannot be read or does not go with a chat template,
            a conversation has none, or no row of a group is short enough.
    """
    is_chat = all(tokenizer.chat_template for tokenizer in tokenizers)

    def prompts(where: str, dataset: Any) -> RowSet:
        def convert(row: Row) -> Row:
            return {"prompt": _prompt(row["prompt"], is_chat)}

        def length(tokenizer: PreTrainedTokenizerBase, row: Row) -> int:
            answered = len(prompt_tokens(tokenizer, row["prompt"])) + arguments.max_new_tokens
            refused = [
                len(tokenise(tokenizer, row["prompt"], answer_to(row["prompt"], refusal))[1])
                for refusal in arguments.refusals
            ]
            return max(answered, *refused)

        source = Source(where, "prompts")
        return _row_set(source, dataset, convert, length, arguments, tokenizers)

    def pairs(where: str, dataset: Any) -> RowSet:
        def convert(row: Row) -> Row:
            row = maybe_extract_prompt(row)
            return {key: row[key] for key in ("prompt", "chosen", "rejected")}

        def length(tokenizer: PreTrainedTokenizerBase, row: Row) -> int:
            return max(
                len(tokenise(tokenizer, row["prompt"], row[side])[1])
                for side in ("chosen", "rejected")
            )

        source = Source(where, "pairs")
        return _row_set(source, dataset, convert, length, arguments, tokenizers)

    def capability(where: str, dataset: Any) -> Any:
        for tokenizer in tokenizers:
            dataset = check_data(dataset, Source(where, "group"), tokenizer)
        return dataset

    def groups(key: str, prepare: Callable[[str, Any], Any]) -> dict[str, Any]:
        return {
            name: prepare(f"group {name!r} of `{key}`", rows)
            for name, rows in load_groups(getattr(arguments, key), f"`{key}`").items()
        }

    return EvaluationSets(
        groups("capability_datasets", capability),
        groups("harmful_datasets", prompts),
        groups("over_refusal_datasets", prompts),
        groups("preference_datasets", pairs),
    )


def length_for(
    max_length: int, models: Mapping[str, str | None], *, trust_remote_code: bool
) -> int:
    """
    `max_length`, or less where a model cannot read as much; known without its weights.

    Args:
        max_length: Tokens of a sample.
        models: Names and revisions; a PEFT adapter stands for its base model.
        trust_remote_code: Whether code that comes with a model is run.
    """
    for name, revision in models.items():
        adapter = find_adapter_config_file(name, revision=revision)
        if adapter is not None:
            base = json.loads(Path(adapter).read_text("utf-8"))["base_model_name_or_path"]
            name, revision = base, None
        config = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
        context = context_of(config)
        if context is not None and context < max_length:
            logger.warning(
                "`max_length` (%d) is above the %d tokens that %s can read: %d is used.",
                max_length, context, name, context,
            )  # fmt: skip
            max_length = context
    return max_length


def _prompt(prompt: Text, is_chat: bool) -> Text:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}] if is_chat else prompt
    return prompt


def _row_set(
    source: Source,
    loaded: Dataset,
    convert: Callable[[Row], Row],
    length: Callable[[PreTrainedTokenizerBase, Row], int],
    arguments: EvaluationArguments,
    tokenizers: Sequence[PreTrainedTokenizerBase],
) -> RowSet:
    first_row(loaded, source.where)
    dataset: Any = readable(loaded, source)
    generator = torch.Generator().manual_seed(arguments.seed)
    places = torch.randperm(len(dataset), generator=generator)[: arguments.max_samples].tolist()
    chosen = {}
    for place in places:
        with row_named(source.where, place):
            chosen[place] = convert(dict(dataset[place]))
    for tokenizer in tokenizers:
        is_rendered = any(not isinstance(row["prompt"], str) for row in chosen.values())
        if is_rendered and not tokenizer.chat_template:
            raise ValueError(
                f"{source.first} holds conversations, but the tokenizer of "
                f"{tokenizer.name_or_path!r} has no chat template. Set `tokenizer_name_or_path` to "
                "a model that has one, or take texts."
            )
        check_rendering(dataset.select(places), source, tokenizer, numbers=places)
    kept: dict[str, Row] = {}
    for place, row in chosen.items():
        with row_named(source.where, place):
            lengths = [length(tokenizer, row) for tokenizer in tokenizers]
        if max(lengths) <= arguments.max_length:
            kept[str(place)] = row
    num_left_out = len(chosen) - len(kept)
    if not kept:
        raise ValueError(
            f"{source.first} must have a row that fits into `max_length`, "
            f"{arguments.max_length} tokens, but none of its {len(chosen)} does. Raise "
            "`max_length`, or lower `max_new_tokens`."
        )
    if num_left_out:
        logger.warning(
            "%s: %d of %d rows are longer than `max_length` and left out",
            source.first, num_left_out, len(chosen),
        )  # fmt: skip
    return RowSet(tuple(kept), tuple(kept.values()), num_left_out)
