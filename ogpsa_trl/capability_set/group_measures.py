"""
What the starting model makes of the groups: tokens, losses, and cosines between their gradients.

The mean capability gradient of a group is a sample of what it protects, so the cosine between two
groups is lowered by the noise of both. Two random halves of a group say by how much: of gradients
that differ by independent noise only, `c` between the halves means, by the formula of Spearman and
Brown, a cosine of `2 c / (1 + c)` between two draws of the size of the whole group.
"""

# G groups, H halves of all groups (2 G), N entries of a parameter

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ogpsa_trl.capability_set.set_keys import CapabilitySetArguments
from ogpsa_trl.capability_set.set_rows import RowGroup
from ogpsa_trl.data.groups import CapabilityGroup
from ogpsa_trl.data.preparation import Preparation, prepare_group
from ogpsa_trl.engines.choose import one_process_backend
from ogpsa_trl.evaluation.group_scores import batch_nll, group_scores
from ogpsa_trl.method.capability_gradients import capability_gradients
from ogpsa_trl.tensors import gradient_rows, matrices


@dataclass(frozen=True)
class GroupMeasures:
    """One group under the starting model, as training would see it."""

    num_samples: int  # with a token to learn
    num_tokens: list[int]  # in the loss of each of them
    num_truncated: int  # samples that are longer than `max_length`
    loss: float  # mean over the tokens, in nats


@dataclass(frozen=True)
class GradientCosines:
    """Cosines between mean capability gradients, in [-1, 1]; `None` where one of them is zero."""

    halves: dict[str, float | None]  # by group, between two random halves of it
    pairs: dict[tuple[str, str], float | None]  # by pair of groups, between the two

    def of_the_same(self, first: str, second: str) -> float | None:
        """
        What the cosine of a pair would be if both were drawn from the same data: less than one by
        the noise of both. `None` where the halves of one do not agree at all.
        """
        halves = [self.halves[name] or 0.0 for name in (first, second)]
        if min(halves) <= 0:
            return None
        return math.sqrt(math.prod(2 * half / (1 + half) for half in halves))


def measure_group(
    group: RowGroup,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: CapabilitySetArguments,
) -> GroupMeasures:
    """
    Count the tokens of a group, and take its loss.

    Raises:
        ValueError: it has no sample with a token to learn.
    """
    values = group_scores(
        model, tokenizer, group.name, Dataset.from_list(group.rows), seed=arguments.seed,
        max_length=arguments.max_length, batch_size=arguments.batch_size,
    )["nll"]  # fmt: skip
    whole = _prepared(group, tokenizer, arguments, max_length=None)
    lengths = [len(sample.features["input_ids"]) for sample in whole.samples]
    return GroupMeasures(
        num_samples=len(values.ids),
        num_tokens=[int(number) for number in values.columns[1]],
        num_truncated=sum(length > arguments.max_length for length in lengths),
        loss=values.value,
    )


def gradient_cosines(
    groups: Sequence[RowGroup],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    arguments: CapabilitySetArguments,
) -> GradientCosines:
    """
    Compare the groups by the gradients of their token-mean losses, over all trainable parameters.

    Raises:
        ValueError: several processes were launched, the model is spread over devices, or a group
            has fewer than two samples with a token to learn.
        FloatingPointError: a gradient is not finite.
    """
    parts = [
        part
        for group in groups
        for part in _prepared(group, tokenizer, arguments, arguments.max_length).parts()
    ]
    backend = one_process_backend(model)
    gradients = capability_gradients(
        backend,
        parts,
        lambda batch: torch.stack(batch_nll(model, batch)).sum(),
        [None] * len(backend.parameters),
    )
    if any(gradients.is_kept):
        name = gradients.names[gradients.is_kept.index(True)]
        raise FloatingPointError(
            f"The gradient of group {name!r} is not finite. Load the model with `dtype: float32`, "
            "or set `gradient_cosine: false`."
        )
    gram_HH = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    for rows_HN in gradients.rows:
        if rows_HN is not None:
            gram_HH += matrices.symmetric(gradient_rows.gram(rows_HN), len(parts)).cpu()
    halves = torch.eye(len(parts), dtype=torch.float64).view(len(groups), 2, len(parts))
    means = (gradients.weights.view(len(groups), 2, 1) * halves).sum(1)
    names = [group.name for group in groups]
    return GradientCosines(
        {name: _cosine(gram_HH, *half) for name, half in zip(names, halves, strict=True)},
        {
            (names[i], names[j]): _cosine(gram_HH, means[i], means[j])
            for i, j in itertools.combinations(range(len(names)), 2)
        },
    )


def _prepared(
    group: RowGroup,
    tokenizer: PreTrainedTokenizerBase,
    arguments: CapabilitySetArguments,
    max_length: int | None,
) -> CapabilityGroup:
    """All rows of a group as training would prepare them; its parts are random halves."""
    return prepare_group(
        group.name,
        Dataset.from_list(group.rows),
        Preparation(tokenizer, tokenizer, max_length),
        num_samples=len(group.rows),
        num_parts=2,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )


def _cosine(gram_HH: Tensor, first_H: Tensor, second_H: Tensor) -> float | None:
    """Between two combinations of the gradients whose Gram matrix it is."""
    product, *squares = (
        (left @ gram_HH @ right).item()
        for left, right in ((first_H, second_H), (first_H, first_H), (second_H, second_H))
    )
    length = math.sqrt(math.prod(squares))
    return product / length if length > 0 else None
