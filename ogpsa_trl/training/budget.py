"""What refreshes may cost: a share of the tokens that training reads."""

import logging
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from ogpsa_trl.data.groups import CapabilityGroup
from ogpsa_trl.engines.backend import GradientBackend
from ogpsa_trl.method.draws import BEGINNING, Draws, mean_beginning, mean_length

logger = logging.getLogger(__name__)

# Rows of the training data that their mean length is taken of.
_ROWS_LOOKED_AT = 256
_SIDES = ("chosen_ids", "rejected_ids", "completion_ids")
_COLUMNS = ("input_ids", "prompt_ids", *_SIDES)


def planned_draws(
    trainer: Any, groups: Sequence[CapabilityGroup], backend: GradientBackend
) -> Draws:
    """
    Which samples the refreshes of a run see, by the settings; it is logged. A collective call: a
    stream may begin with other rows on every process.
    """
    config, seed = trainer.ogpsa_config, trainer.args.seed
    share = config.capability_token_share
    if config.samples_per_refresh is not None or share is None:
        return Draws(seed, config.samples_per_refresh)
    args, num_processes = trainer.args, backend.num_processes
    # That of the arguments, or less: `auto_find_batch_size`.
    num_rows = trainer._train_batch_size * args.gradient_accumulation_steps * num_processes
    lengths = [mean_length(group.samples) for group in groups]
    beginnings = [mean_beginning(group.samples) for group in groups]
    max_length = getattr(args, "max_length", None)
    length = backend.from_first_process(
        lambda: mean_training_length(trainer.train_dataset, max_length)
    )
    if length is None:  # of texts that are not made yet, or whose columns nothing is known of
        length = statistics.mean(lengths)
    budget = share * num_rows * length * config.refresh_interval
    draws = Draws.within(
        budget, lengths, beginnings,
        num_processes=num_processes, num_parts=config.gradients_per_group, seed=seed,
    )  # fmt: skip
    logger.info(
        "Groups in a refresh: %d of %d; samples of each: %s. `capability_token_share` %g of %d "
        "rows of %.0f tokens buys %.0f tokens; steps between refreshes: %d.",
        draws.num_groups or len(groups), len(groups), draws.num_samples or "all", share, num_rows,
        length, budget, config.refresh_interval,
    )  # fmt: skip
    for group, number in zip(groups, draws.num_beginnings, strict=True):
        if number:
            logger.info(
                "Capability group %r: every second turn reads the first %d tokens of %d answers.",
                group.name, BEGINNING, number,
            )  # fmt: skip
    return draws


def mean_training_length(dataset: Any, max_length: int | None) -> float | None:
    """
    Tokens of a row of prepared training data on average, both texts of a pair counted.

    Args:
        dataset: The data. Of a stream the first rows are looked at.
        max_length: Where texts are cut.

    Returns:
        `None` where the data are no data set of `datasets`, or its columns of no known kind.
    """
    rows: list[Any]
    if isinstance(dataset, IterableDataset):
        rows = list(dataset.take(_ROWS_LOOKED_AT))
    elif isinstance(dataset, Dataset):
        step = max(1, len(dataset) // _ROWS_LOOKED_AT)
        known = [name for name in dataset.column_names if name in _COLUMNS]
        rows = list(dataset.select_columns(known).select(range(0, len(dataset), step)))
    else:
        return None
    lengths = [sum(min(n, max_length or n) for n in _text_lengths(row)) for row in rows]
    return statistics.mean(lengths) if any(lengths) else None


def _text_lengths(row: Mapping[str, Any]) -> list[int]:
    """Tokens of the texts of a row, in the columns of SFT, DPO and KTO."""
    if "input_ids" in row:
        return [len(row["input_ids"])]
    prompt = len(row.get("prompt_ids", []))
    return [prompt + len(row[name]) for name in _SIDES if name in row]
