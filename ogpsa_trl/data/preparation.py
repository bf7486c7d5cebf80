"""
Capability groups from data sets: chosen and tokenised once, by TRL's own data preparation.

A capability group is a named data set of general-capability samples in any format that
`SFTTrainer` accepts (language modeling or prompt-completion, standard or conversational, or
tokenised), or in a preference format, of which only the prompt and the chosen completion are used.
"""

import logging
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pyarrow
import torch
from datasets import Dataset, IterableDataset
from trl.data_utils import maybe_extract_prompt

from ogpsa_trl.data.columns import BESIDE, AnyDataset, Source
from ogpsa_trl.data.groups import CapabilityGroup, Part
from ogpsa_trl.data.rendering import check_rendering, prepared
from ogpsa_trl.data.rows import check_rows, readable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preparation:
    """
    How samples become tokens: what TRL's data preparation reads from its trainer and arguments.

    Attributes:
        processing_class: Tokenizer or processor of the run.
        tokenizer: The tokenizer, also where `processing_class` is a processor.
        max_length: Tokens kept per sample; `None` keeps all.
        truncation_mode: `keep_start` or `keep_end`.
        completion_only_loss: `None`: the loss is on the completion where there is one.
        assistant_only_loss: In conversations without a separate prompt, the loss is on the
            assistant's turns only.
        chat_template: Overrides the tokenizer's chat template.
        dataset_text_field: Column of plain text.
        dataset_num_proc: Worker processes.
        context: Tokens that the model has positions for; `None` where nothing limits them.
        vocabulary_size: Tokens that the model knows; `None`: those that the tokenizer does.
    """

    processing_class: Any
    tokenizer: Any
    max_length: int | None
    truncation_mode: str = "keep_start"
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    chat_template: str | None = None
    dataset_text_field: str = "text"
    dataset_num_proc: int | None = None
    context: int | None = None
    vocabulary_size: int | None = None

    @property
    def num_tokens_kept(self) -> int | None:
        """The most tokens of a sample; `None` keeps all."""
        limits = [limit for limit in (self.max_length, self.context) if limit is not None]
        return min(limits, default=None)


def context_of(config: Any) -> int | None:
    """
    How many tokens a model can read: as many as it has positions in a table.

    With rotary positions it can read on, for better or worse, and TRL lets it.

    Args:
        config: The model's configuration.
    """
    config = config.get_text_config()
    if getattr(config, "rope_parameters", None):
        return None
    return getattr(config, "max_position_embeddings", None)


def prepare_group(
    name: str,
    dataset: AnyDataset,
    preparation: Preparation,
    *,
    num_samples: int,
    num_parts: int,
    batch_size: int,
    seed: int,
    where: str | None = None,
) -> CapabilityGroup:
    """
    Choose, tokenise and batch the samples of a group.

    Args:
        name: The group.
        dataset: Its samples. Of a stream the first `num_samples` are taken, of a `Dataset` a
            random choice.
        preparation: How samples become tokens.
        num_samples: Samples taken; all if there are fewer.
        num_parts: Disjoint parts, each of which gives one gradient.
        batch_size: Largest number of sequences in a batch.
        seed: Of the random choice.
        where: What the user knows the group as. `None`: a capability group of this name.

    Raises:
        ValueError: no samples, no known format, a row that cannot be read or that the chat template
            refuses, or fewer samples with a trainable token than parts.
    """
    # Not above: a trainer that is not TRL's does without TRL's until here.
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    tokenizer = preparation.tokenizer
    source = Source(
        where or f"capability group {name!r}",
        "group",
        preparation.dataset_text_field,
        preparation.assistant_only_loss,
        preparation.vocabulary_size or len(tokenizer),
    )
    chosen, numbers = _choose(source, dataset, num_samples, seed)
    # Padding is masked, so any token does where TRL has set none (with a collator of the user's).
    has_pad = tokenizer.pad_token_id is not None
    collate = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id if has_pad else 0)
    whole = Part(name, [], batch_size, collate)
    tokenised: Any = _tokenise(source, chosen, numbers, preparation)
    samples = []
    for index, features in enumerate(tokenised):
        ids = features["input_ids"]
        used = {"input_ids": ids, "labels": features.get("labels", ids)}
        samples.append(whole.sample(f"{name}/{index}", used))
    samples = [sample for sample in samples if sample.num_tokens > 0]
    if len(samples) < num_parts:
        raise ValueError(
            f"{source.first} must have at least {num_parts} samples with a token to "
            f"learn from (`gradients_per_group`), but has {len(samples)}: the others of its "
            f"{len(chosen)} have none within `max_length` {preparation.num_tokens_kept}. Raise "
            "`max_length` or `num_samples`, lower `gradients_per_group`, or look for empty "
            "completions."
        )
    group = CapabilityGroup(name, samples, num_parts, batch_size, collate)
    logger.info(
        "%s: %d samples, %d tokens in the loss", source.first, len(samples), group.num_tokens
    )
    context = preparation.context
    if context is not None and preparation.max_length != preparation.num_tokens_kept:
        # TRL cuts training data at `max_length` only, and lets the model fail beyond its context.
        is_full = [len(sample.features["input_ids"]) >= context for sample in samples]
        if any(is_full):
            logger.warning(
                "%s: %d of its %d samples fill the %d tokens that the model can read, and are cut "
                "there if they are longer. Take shorter texts, or cut them where it makes sense.",
                source.first, sum(is_full), len(samples), context,
            )  # fmt: skip
    return group


def places_by_seed(num_rows: int, num_samples: int | None, seed: int) -> list[int]:
    """The places of the rows that a seed chooses, in random order; `None` chooses all."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_rows, generator=generator)[:num_samples].tolist()


def _choose(
    source: Source, dataset: AnyDataset, num_samples: int, seed: int
) -> tuple[Dataset, list[int]]:
    """The samples used, in random order (a stream: the first ones, in order), and their places."""
    if isinstance(dataset, IterableDataset):
        rows = list(dataset.take(num_samples))
        numbers = list(range(len(rows)))
        check_rows(rows, source)
        try:
            chosen = Dataset.from_list(rows)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:  # in a column of no use
            raise ValueError(
                f"{source.first} must have values of one type in each column, but Arrow makes no "
                f"table of its rows: {error}. Correct them, or leave the column out."
            ) from error
    else:
        numbers = places_by_seed(len(dataset), num_samples, seed)
        chosen = dataset.select(numbers)
        logger.info(
            "%s: seed %d chooses the rows %s%s of %d",
            source.first, seed, str(numbers[:10]).strip("[]"), ", ..." * (len(numbers) > 10),
            len(dataset),
        )  # fmt: skip
        logger.debug("%s: all rows chosen: %s", source.first, numbers)
    if not numbers:
        raise ValueError(
            f"{source.first} must have at least one sample, but it is empty. Check its "
            "file or split, or remove the group."
        )
    if len(numbers) < num_samples:
        logger.warning(
            "%s has %d samples, fewer than `num_samples` (%d). All are used.",
            source.first, len(numbers), num_samples,
        )  # fmt: skip
    return chosen, numbers


def _tokenise(
    source: Source, dataset: Dataset, numbers: list[int], preparation: Preparation
) -> Dataset:
    """Tokens and labels, exactly as `SFTTrainer` makes them."""
    from trl.trainer.sft_trainer import SFTTrainer

    rows = readable(dataset, source, numbers)
    template = preparation.chat_template
    check_rendering(rows, source, preparation.processing_class, template, numbers)

    def prepare(dataset: Dataset) -> Dataset:
        if {"chosen", "rejected"} <= set(dataset.column_names):
            # Also where a text prompt stands beside conversations that contain it.
            dataset = dataset.map(maybe_extract_prompt)
            used = ("prompt", "chosen", *BESIDE)
            others = [c for c in dataset.column_names if c not in used]
            dataset = dataset.remove_columns(others).rename_column("chosen", "completion")
        # `SFTTrainer._prepare_dataset` needs a few attributes of its trainer and its arguments, not
        # a trainer; DPO has none. `tests/test_data.py` holds the result against a real one.
        completion_only_loss = preparation.completion_only_loss
        if completion_only_loss is None:
            completion_only_loss = "completion" in dataset.column_names
        stand_in: Any = SimpleNamespace(
            _tokenizer=preparation.tokenizer,
            chat_template=template,
            completion_only_loss=completion_only_loss,
            assistant_only_loss=preparation.assistant_only_loss,
            max_length=preparation.num_tokens_kept,
            truncation_mode=preparation.truncation_mode,
            dataset_text_field=preparation.dataset_text_field,
            dataset_num_proc=preparation.dataset_num_proc,
            shuffle_dataset=False,
            use_liger_kernel=False,  # read by trl 1.9 to 1.14
        )
        prepare: Any = SFTTrainer._prepare_dataset
        return prepare(
            stand_in,
            dataset,
            preparation.processing_class,
            stand_in,
            packing=False,
            formatting_func=None,
            dataset_name=source.where,
        )

    return prepared(rows, prepare, source.where, numbers)
