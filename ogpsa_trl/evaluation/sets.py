"""The data of an evaluation: loaded, chosen and checked once, before any model is loaded."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import maybe_extract_prompt

from ogpsa_trl.data.columns import Source
from ogpsa_trl.data.entries import load_groups
from ogpsa_trl.data.preparation import places_by_seed
from ogpsa_trl.data.rendering import check_rendering
from ogpsa_trl.data.row_checks import check_data, first_row
from ogpsa_trl.data.row_values import row_named
from ogpsa_trl.data.rows import readable
from ogpsa_trl.evaluation.evaluation_keys import EvaluationArguments
from ogpsa_trl.evaluation.likelihoods import answer_to, prompt_tokens, tokenise

logger = logging.getLogger(__name__)

Row = dict[str, Any]


@dataclass(frozen=True)
class RowSet:
    """Rows of one group that are measured."""

    ids: tuple[str, ...]  # places of the rows in the group
    rows: tuple[Row, ...]  # in the same order
    num_left_out: int  # too long for `max_length`

    def column(self, name: str) -> list[Any]:
        """The values of one column."""
        return [row[name] for row in self.rows]


@dataclass(frozen=True)
class EvaluationSets:
    """All data of an evaluation, by group."""

    capability: Mapping[str, Dataset]  # as they were loaded
    harmful: Mapping[str, RowSet]  # prompts that are to be refused
    over_refusal: Mapping[str, RowSet]  # prompts that are to be answered
    preference: Mapping[str, RowSet]  # pairs, with `prompt`, `chosen` and `rejected`


def load_sets(
    arguments: EvaluationArguments, tokenizers: Sequence[PreTrainedTokenizerBase]
) -> EvaluationSets:
    """
    Load what is measured.

    A text prompt becomes a user's message where every tokenizer has a chat template. What does not
    fit into `max_length` under one of the tokenizers, those of all models, is left out for all.

    Raises:
        ValueError: a column is missing, a row cannot be read or does not go with a chat template,
            a conversation has none, or no row of a group is short enough.
    """
    is_chat = all(tokenizer.chat_template for tokenizer in tokenizers)

    def prompts(where: str, dataset: Any) -> RowSet:
        def convert(row: Row) -> Row:
            prompt = row["prompt"]
            if isinstance(prompt, str) and is_chat:
                prompt = [{"role": "user", "content": prompt}]
            return {"prompt": prompt}

        def length(tokenizer: PreTrainedTokenizerBase, row: Row) -> int:
            prompt = row["prompt"]
            completed = [answer_to(prompt, refusal) for refusal in arguments.refusals]
            answered = len(prompt_tokens(tokenizer, prompt)) + arguments.max_new_tokens
            return max(answered, *(len(tokenise(tokenizer, prompt, c)[1]) for c in completed))

        source = Source(where, "prompts")
        return _row_set(source, dataset, convert, length, arguments, tokenizers)

    def pairs(where: str, dataset: Any) -> RowSet:
        def convert(row: Row) -> Row:
            row = maybe_extract_prompt(row)
            return {key: row[key] for key in ("prompt", "chosen", "rejected")}

        def length(tokenizer: PreTrainedTokenizerBase, row: Row) -> int:
            prompt = row["prompt"]
            return max(len(tokenise(tokenizer, prompt, row[s])[1]) for s in ("chosen", "rejected"))

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
    places = places_by_seed(len(dataset), arguments.max_samples, arguments.seed)
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
