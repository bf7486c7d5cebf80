"""
Capability groups: chosen, tokenised and batched once, by TRL's own data preparation.

A capability group is a named data set of general-capability samples in any format that
`SFTTrainer` accepts (language modeling or prompt-completion, standard or conversational, or
tokenised), or in a preference format, of which only the prompt and the chosen completion are used.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import Tensor
from trl.data_utils import is_conversational_from_value, maybe_extract_prompt
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]

_IGNORED = -100  # label of a token that is not trained on


@dataclass(frozen=True)
class Part:
    """Disjoint share of a group's samples that gives one capability gradient."""

    batches: list[Batch]
    num_tokens: int

    def batches_of(self, process_index: int, num_processes: int) -> list[Batch]:
        """
        The batches of one process, equally many on all of them.

        Every process has to take part in every forward and backward pass of the engine, so a
        process that runs out of batches gets one without trainable tokens.
        """
        batches = self.batches[process_index::num_processes]
        if len(batches) < -(-len(self.batches) // num_processes):
            first = self.batches[0]
            batches.append({**first, "labels": torch.full_like(first["labels"], _IGNORED)})
        return batches


@dataclass(frozen=True)
class CapabilityGroup:
    """A named group of capability samples, ready for the model."""

    name: str
    parts: list[Part]
    num_samples: int

    @property
    def num_tokens(self) -> int:
        """Tokens that count in the loss."""
        return sum(part.num_tokens for part in self.parts)


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


def named_groups(capability_dataset: Any) -> dict[str, Dataset | IterableDataset]:
    """
    Bring the user's `capability_dataset` into the form {group name: data set}.

    Raises:
        ValueError: it is neither a data set nor a dict of them, or it is empty.
    """
    if isinstance(capability_dataset, (Dataset, IterableDataset)):
        return {"capability": capability_dataset}
    if isinstance(capability_dataset, (DatasetDict, IterableDatasetDict)):
        raise ValueError(
            f"`capability_dataset` must be a data set or a dict of groups, but got splits "
            f"({', '.join(map(str, capability_dataset))}). Choose one: `capability_dataset[split]`."
        )
    if not isinstance(capability_dataset, Mapping):
        raise ValueError(
            "`capability_dataset` must be a `Dataset`, an `IterableDataset` or a dict of them, but "
            f"got {type(capability_dataset).__name__}. Make one with `Dataset.from_list(rows)`."
        )
    if not capability_dataset:
        raise ValueError(
            "`capability_dataset` must hold at least one group, but got an empty dict. Add a "
            "group, or leave it out to train without OGPSA."
        )
    for name, dataset in capability_dataset.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"A capability group's name must be a non-empty text, got {name!r}.")
        if not isinstance(dataset, (Dataset, IterableDataset)):
            raise ValueError(
                f"Capability group {name!r} must be a `Dataset` or an `IterableDataset`, but got "
                f"{type(dataset).__name__}. Make one with `Dataset.from_list(rows)`."
            )
    return dict(capability_dataset)


def prepare_group(
    name: str,
    dataset: Dataset | IterableDataset,
    preparation: Preparation,
    *,
    num_samples: int,
    num_parts: int,
    batch_size: int,
    seed: int,
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
        batch_size: Sequences per batch, of similar length, so that little padding is computed.
        seed: Of the random choice.

    Raises:
        ValueError: no samples, no known format, or a part without a trainable token.
    """
    chosen = _choose(name, dataset, num_samples, seed)
    samples: list[Any] = list(_tokenise(name, chosen, preparation))
    tokenizer = preparation.tokenizer
    # Padding is masked, so any token does where TRL has set none (with a collator of the user's).
    has_pad = tokenizer.pad_token_id is not None
    collate = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id if has_pad else 0)
    parts = []
    for index in range(num_parts):
        part = sorted(samples[index::num_parts], key=lambda sample: len(sample["input_ids"]))
        batches = [collate(part[i : i + batch_size]) for i in range(0, len(part), batch_size)]
        num_tokens = sum(int((batch["labels"][:, 1:] != _IGNORED).sum()) for batch in batches)
        if num_tokens == 0:
            raise ValueError(
                f"Part {index + 1} of {num_parts} of capability group {name!r} has no token to "
                f"learn from ({len(samples)} of {len(chosen)} samples are left after truncation to "
                f"`max_length` {preparation.max_length}). Raise `max_length` or `num_samples`, "
                "lower `gradients_per_group`, or look for empty completions."
            )
        parts.append(Part(batches, num_tokens))
    group = CapabilityGroup(name, parts, len(samples))
    logger.info(
        "Capability group %r: %d samples, %d tokens in the loss",
        name, len(samples), group.num_tokens,
    )  # fmt: skip
    return group


def _choose(name: str, dataset: Dataset | IterableDataset, num_samples: int, seed: int) -> Dataset:
    """The samples used, in random order (a stream: the first ones, in order)."""
    if isinstance(dataset, IterableDataset):
        chosen = Dataset.from_list(list(dataset.take(num_samples)))
    else:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(dataset), generator=generator)[:num_samples].tolist()
        chosen = dataset.select(rows)
        logger.info(
            "Capability group %r: seed %d chooses the rows %s%s of %d",
            name, seed, str(rows[:10]).strip("[]"), ", ..." if len(rows) > 10 else "", len(dataset),
        )  # fmt: skip
        logger.debug("Capability group %r: all rows chosen: %s", name, rows)
    if len(chosen) == 0:
        raise ValueError(
            f"Capability group {name!r} must have at least one sample, but it is empty. Check its "
            "file or split, or remove the group."
        )
    if len(chosen) < num_samples:
        logger.warning(
            "Capability group %r has %d samples, fewer than `num_samples` (%d). All are used.",
            name, len(chosen), num_samples,
        )  # fmt: skip
    return chosen


def _tokenise(name: str, dataset: Dataset, preparation: Preparation) -> Dataset:
    """Tokens and labels, exactly as `SFTTrainer` makes them."""
    if {"chosen", "rejected"} <= set(dataset.column_names):
        # Also where a text prompt stands beside conversations that contain it.
        dataset = dataset.map(maybe_extract_prompt)
        used = ("prompt", "chosen", "tools", "chat_template_kwargs")
        others = [c for c in dataset.column_names if c not in used]
        dataset = dataset.remove_columns(others).rename_column("chosen", "completion")
    columns = set(dataset.column_names)
    known = [{"input_ids"}, {"messages"}, {preparation.dataset_text_field}]
    if not (
        any(needed <= columns for needed in [*known, {"prompt", "completion"}])
        or is_conversational_from_value(dataset[0])
    ):
        raise ValueError(
            f"Capability group {name!r} must have a column `messages`, "
            f"`{preparation.dataset_text_field}` or `input_ids`, or the columns `prompt` and "
            f"`completion` (or `chosen` and `rejected`), but has {sorted(columns)}. Rename its "
            "columns with `Dataset.rename_column`."
        )
    if "prompt" in columns and not columns & {"completion", "input_ids"}:
        raise ValueError(
            f"Capability group {name!r} has a column `prompt` but no `completion`. Add one, or "
            "leave `prompt` out with `Dataset.remove_columns` (in YAML: `columns: [messages]`)."
        )
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
        max_length=preparation.max_length,
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
        dataset_name=f"capability group {name!r}",
    )
