"""
Capability groups: chosen, tokenised and batched once, by TRL's own data preparation.

A capability group is a named data set of general-capability samples in any format that
`SFTTrainer` accepts (language modeling or prompt-completion, standard or conversational, or
tokenised), or in a preference format, of which only the prompt and the chosen completion are used.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from types import SimpleNamespace
from typing import Any

import pyarrow
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import Tensor
from trl.data_utils import maybe_extract_prompt
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from ogpsa_trl.data.columns import Source
from ogpsa_trl.data.rendering import check_rendering, prepared
from ogpsa_trl.data.rows import check_rows, readable

logger = logging.getLogger(__name__)

_IGNORED = -100  # label of a token that is not trained on

Features = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """
    A tokenised sample.

    Attributes:
        name: Group and place in it: the same in every run with the same data and seed.
        features: `input_ids` and `labels`, as TRL's collator takes them.
        num_tokens: Tokens that count in the loss, at least 1.
    """

    name: str
    features: Features
    num_tokens: int


@dataclass(frozen=True)
class Batch:
    """
    Samples of one forward pass.

    Attributes:
        inputs: What the model is called with. Positions without a label to learn have label -100.
        samples: The samples in the order of the rows; none where nothing is to be learned, and the
            pass only keeps a process in step with the others.
    """

    inputs: dict[str, Tensor]
    samples: list[Sample]


def trained_labels(labels: Tensor) -> Tensor:
    """Where the next token is one to learn, bool, shape [rows, length - 1]."""
    return labels[:, 1:] != _IGNORED


@dataclass(frozen=True)
class Part:
    """
    Disjoint share of a group's samples that gives one capability gradient.

    Attributes:
        group: Name of the group.
        samples: Sorted by length, so that little padding is computed.
        batch_size: Largest number of samples in a batch.
        collate: Makes tensors of features.
    """

    group: str
    samples: list[Sample]
    batch_size: int
    collate: Callable[[list[Features]], dict[str, Tensor]]

    @property
    def num_tokens(self) -> int:
        """Tokens that count in the loss."""
        return sum(sample.num_tokens for sample in self.samples)

    def sample(self, name: str, features: Features) -> Sample:
        """A sample of these tokens."""
        labels = self.collate([features])["labels"]
        return Sample(name, features, int(trained_labels(labels).sum()))

    def num_batches_of(self, num_processes: int) -> int:
        """Batches of each process."""
        return math.ceil(len(self.samples) / (num_processes * self.batch_size))

    def batches_of(self, process_index: int, num_processes: int) -> list[Batch]:
        """
        The batches of one process, equally many on all of them and of nearly one size.

        Every process has to take part in every forward and backward pass of the engine, so a
        process that runs out of samples gets batches without trainable tokens.
        """
        num_batches = self.num_batches_of(num_processes) * num_processes
        size = math.ceil(len(self.samples) / num_batches)
        starts = range(process_index * size, num_batches * size, num_processes * size)
        return [self._batch(self.samples[start : start + size]) for start in starts]

    def _batch(self, samples: list[Sample]) -> Batch:
        inputs = self.collate([sample.features for sample in samples or self.samples[:1]])
        if not samples:
            inputs["labels"] = torch.full_like(inputs["labels"], _IGNORED)
        return Batch(inputs, samples)


@dataclass(frozen=True)
class CapabilityGroup:
    """A named group of capability samples, ready for the model."""

    name: str
    samples: list[Sample]
    num_parts: int
    batch_size: int
    collate: Callable[[list[Features]], dict[str, Tensor]]

    @property
    def num_tokens(self) -> int:
        """Tokens that count in the loss."""
        return sum(sample.num_tokens for sample in self.samples)

    def parts(self, num_samples: int | None = None, draw: str = "") -> list[Part]:
        """
        The samples of a refresh, in `num_parts` parts.

        Args:
            num_samples: Samples to draw; all if there are fewer. `None`: all, in no draw.
            draw: Names the draw: the same samples for the same name.
        """
        samples = self.samples
        if num_samples is not None:
            samples = Random(f"{draw} {self.name}").sample(samples, min(num_samples, len(samples)))
        return [self._part(samples[index :: self.num_parts]) for index in range(self.num_parts)]

    def whole(self) -> Part:
        """All samples as one part."""
        return self._part(self.samples)

    def _part(self, samples: list[Sample]) -> Part:
        by_length = sorted(samples, key=lambda sample: len(sample.features["input_ids"]))
        return Part(self.name, by_length, self.batch_size, self.collate)


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


def named_groups(
    data: Any, argument: str = "capability_dataset"
) -> dict[str, Dataset | IterableDataset]:
    """
    Bring the user's data into the form {group name: data set}.

    Args:
        data: A data set, or a dict of groups.
        argument: What the user knows it as.

    Raises:
        ValueError: it is neither a data set nor a dict of them, or it is empty.
    """
    if isinstance(data, (Dataset, IterableDataset)):
        return {"capability": data}
    if isinstance(data, (DatasetDict, IterableDatasetDict)):
        raise ValueError(
            f"`{argument}` must be a data set or a dict of groups, but got splits "
            f"({', '.join(map(str, data))}). Choose one: `{argument}[split]`."
        )
    if not isinstance(data, Mapping):
        raise ValueError(
            f"`{argument}` must be a `Dataset`, an `IterableDataset` or a dict of them, but "
            f"got {type(data).__name__}. Make one with `Dataset.from_list(rows)`."
        )
    if not data:
        raise ValueError(
            f"`{argument}` must hold at least one group, but got an empty dict. Add a "
            "group, or leave it out."
        )
    for name, dataset in data.items():
        if not isinstance(name, str) or not name or not name.isprintable():
            raise ValueError(
                f"A capability group's name must be a text on one line, but got {name!r}. It stands"
                " in logs and tables: choose another."
            )
        if not isinstance(dataset, (Dataset, IterableDataset)):
            raise ValueError(
                f"Capability group {name!r} must be a `Dataset` or an `IterableDataset`, but got "
                f"{type(dataset).__name__}. Make one with `Dataset.from_list(rows)`."
            )
    return dict(data)


def prepare_group(
    name: str,
    dataset: Dataset | IterableDataset,
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
    where = where or f"capability group {name!r}"
    source = Source(
        where,
        "group",
        preparation.dataset_text_field,
        preparation.assistant_only_loss,
        preparation.vocabulary_size or len(preparation.tokenizer),
    )
    chosen, numbers = _choose(source, dataset, num_samples, seed)
    tokenizer = preparation.tokenizer
    # Padding is masked, so any token does where TRL has set none (with a collator of the user's).
    has_pad = tokenizer.pad_token_id is not None
    collate = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id if has_pad else 0)
    samples = []
    features: Features
    tokenised: Any = _tokenise(source, chosen, numbers, preparation)
    for index, features in enumerate(tokenised):
        num_tokens = int(trained_labels(collate([features])["labels"]).sum())
        if num_tokens > 0:
            ids = features["input_ids"]
            used = {"input_ids": ids, "labels": features.get("labels", ids)}
            samples.append(Sample(f"{name}/{index}", used, num_tokens))
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
    _warn_of_cut_samples(source, samples, preparation)
    return group


def _warn_of_cut_samples(source: Source, samples: list[Sample], preparation: Preparation) -> None:
    """TRL cuts training data at `max_length` only, and lets the model fail beyond its context."""
    if preparation.context is None or preparation.max_length == preparation.num_tokens_kept:
        return
    is_full = [len(sample.features["input_ids"]) >= preparation.context for sample in samples]
    if any(is_full):
        logger.warning(
            "%s: %d of its %d samples fill the %d tokens that the model can read, and are cut there"
            " if they are longer. Take shorter texts, or cut them where it makes sense.",
            source.first, sum(is_full), len(samples), preparation.context,
        )  # fmt: skip


def _choose(
    source: Source, dataset: Dataset | IterableDataset, num_samples: int, seed: int
) -> tuple[Dataset, list[int]]:
    """The samples used, in random order (a stream: the first ones, in order), and their places."""
    if isinstance(dataset, IterableDataset):
        rows = list(dataset.take(num_samples))
        numbers = list(range(len(rows)))
        chosen = _of_stream(rows, source)
    else:
        numbers = places_by_seed(len(dataset), num_samples, seed)
        chosen = dataset.select(numbers)
        logger.info(
            "%s: seed %d chooses the rows %s%s of %d",
            source.first, seed, str(numbers[:10]).strip("[]"), ", ..." * (len(numbers) > 10),
            len(dataset),
        )  # fmt: skip
        logger.debug("%s: all rows chosen: %s", source.first, numbers)
    if len(chosen) == 0:
        raise ValueError(
            f"{source.first} must have at least one sample, but it is empty. Check its "
            "file or split, or remove the group."
        )
    if len(chosen) < num_samples:
        logger.warning(
            "%s has %d samples, fewer than `num_samples` (%d). All are used.",
            source.first, len(chosen), num_samples,
        )  # fmt: skip
    return chosen, numbers


def places_by_seed(num_rows: int, num_samples: int | None, seed: int) -> list[int]:
    """The places of the rows that a seed chooses, in random order; `None` chooses all."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_rows, generator=generator)[:num_samples].tolist()


def _of_stream(rows: list[Any], source: Source) -> Dataset:
    """A table of rows, whose values must be of one type in each column."""
    check_rows(rows, source)
    try:
        return Dataset.from_list(rows)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:  # in a column of no use
        raise ValueError(
            f"{source.first} must have values of one type in each column, but Arrow makes no table "
            f"of its rows: {error}. Correct them, or leave the column out."
        ) from error


def _tokenise(
    source: Source, dataset: Dataset, numbers: list[int], preparation: Preparation
) -> Dataset:
    """Tokens and labels, exactly as `SFTTrainer` makes them."""
    rows = readable(dataset, source, numbers)
    processing_class, template = preparation.processing_class, preparation.chat_template
    check_rendering(rows, source, processing_class, template, numbers)
    where = source.where
    return prepared(rows, lambda some: _prepare(some, preparation, where), where, numbers)


def _prepare(dataset: Dataset, preparation: Preparation, where: str) -> Dataset:
    if {"chosen", "rejected"} <= set(dataset.column_names):
        # Also where a text prompt stands beside conversations that contain it.
        dataset = dataset.map(maybe_extract_prompt)
        used = ("prompt", "chosen", "tools", "chat_template_kwargs")
        others = [c for c in dataset.column_names if c not in used]
        dataset = dataset.remove_columns(others).rename_column("chosen", "completion")
    columns = set(dataset.column_names)
    # `SFTTrainer._prepare_dataset` needs a few attributes of its trainer and its arguments, not a
    # trainer; DPO has none. `tests/test_data.py` holds the result against a real `SFTTrainer`.
    completion_only_loss = preparation.completion_only_loss
    if completion_only_loss is None:
        completion_only_loss = "completion" in columns
    stand_in: Any = SimpleNamespace(
        _tokenizer=preparation.tokenizer,
        chat_template=preparation.chat_template,
        completion_only_loss=completion_only_loss,
        assistant_only_loss=preparation.assistant_only_loss,
        max_length=preparation.num_tokens_kept,
        truncation_mode=preparation.truncation_mode,
        dataset_text_field=preparation.dataset_text_field,
        dataset_num_proc=preparation.dataset_num_proc,
        shuffle_dataset=False,
    )
    prepare: Any = SFTTrainer._prepare_dataset
    return prepare(
        stand_in,
        dataset,
        preparation.processing_class,
        stand_in,
        packing=False,
        formatting_func=None,
        dataset_name=where,
    )
