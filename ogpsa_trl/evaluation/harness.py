"""Tasks of EleutherAI's lm-evaluation-harness, sample by sample."""

import copy
import difflib
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ogpsa_trl.evaluation.generation import rows_at_once
from ogpsa_trl.evaluation.intervals import SampleValues, mean_of, ratio_of, statistic_of
from ogpsa_trl.evaluation.results import Measured

# Metrics of which less is better, where a task does not say so.
_LOWER_IS_BETTER = {"word_perplexity", "byte_perplexity", "perplexity", "bits_per_byte"}


def check_installed() -> None:
    """
    The harness is an optional package.

    Raises:
        ValueError: lm-eval is not installed.
    """
    if find_spec("lm_eval") is None:
        raise ValueError(
            "`lm_eval_tasks` needs lm-evaluation-harness, but lm-eval is not installed. Install it "
            "with `pip install 'ogpsa_trl[eval]'`, or leave `lm_eval_tasks` out."
        )


def harness_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    chat_template: bool = False,
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, Measured]:
    """
    Run tasks of the harness.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        tasks: Names of tasks, groups and tags. A group is reported as one, over the samples of all
            its tasks; a tag is a list of tasks.
        include_path: Folder of task files of your own. Where all tasks are found in it, those that
            come with the harness are not read.
        limit: Number of samples of each task, the first ones. `None` takes all.
        chat_template: Whether prompts go through the tokenizer's chat template.
        batch_size: Number of sequences of a forward pass.
        seed: Of few-shot examples and shuffled choices.

    Returns:
        By `<task>/<metric>`; with the filter of the answers behind it where a task has several.

    Raises:
        ValueError: lm-eval is not installed, or there is no such task.
    """
    check_installed()
    import lm_eval
    from lm_eval.models import huggingface

    upstream: Any = lm_eval.simple_evaluate, huggingface.HFLM  # their decorators hide the types
    simple_evaluate, wrapper = upstream
    measured: dict[str, Measured] = {}
    with _seeded(seed), _quiet():
        manager = _task_manager(tasks, include_path)
        # It sets the padding token of what it gets.
        own_tokenizer = copy.deepcopy(tokenizer)
        batch_size = rows_at_once(model, batch_size)
        lm = wrapper(pretrained=model, tokenizer=own_tokenizer, batch_size=batch_size)
        for name in tasks:
            loaded = manager.load([name])
            leaves = loaded["tasks"]
            results: Any = simple_evaluate(
                lm,
                tasks=list(leaves.values()),
                limit=limit,
                apply_chat_template=chat_template,
                bootstrap_iters=0,  # its standard errors are of one model, not of a difference
                log_samples=True,
                task_manager=manager,
                random_seed=None,  # seeded already, before the tasks were loaded
                numpy_random_seed=None,
                torch_random_seed=None,
                fewshot_random_seed=seed,
            )
            samples = results["samples"]
            is_group = name in loaded["groups"]
            reported = {name: leaves} if is_group else {n: {n: task} for n, task in leaves.items()}
            for reported_name, of_name in reported.items():
                measured |= _measures_of(reported_name, of_name, samples)
    return measured


def _measures_of(
    name: str, tasks: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Measured]:
    """The metrics that all of the tasks have, over all of their samples."""
    rows = [
        (f"{task_name}/{row['doc_id']}/{row['doc_hash'][:8]}", row)
        for task_name in tasks
        for row in samples[task_name]
    ]
    filters = list(dict.fromkeys(row["filter"] for _, row in rows))
    first = next(iter(tasks.values()))
    metrics = [
        metric
        for metric in first.aggregation()
        if all(metric in task.aggregation() for task in tasks.values())
    ]
    measured = {}
    for filter_name in filters:
        chosen = [(key, row) for key, row in rows if row["filter"] == filter_name]
        for metric in metrics:
            if not all(metric in row for _, row in chosen):
                continue
            stated = first.higher_is_better().get(metric)
            higher = False if metric in _LOWER_IS_BETTER else stated
            label = f"{name}/{metric}" + (f",{filter_name}" if len(filters) > 1 else "")
            values = _values([key for key, _ in chosen], [row[metric] for _, row in chosen],
                             first.aggregation()[metric])  # fmt: skip
            measured[label] = Measured(_unit(metric, values), higher, values)
    return measured


def _values(
    ids: Sequence[str], items: Sequence[Any], aggregate: Callable[[Any], Any]
) -> SampleValues:
    """Items of a metric in the quickest form that gives the harness's own number."""
    from lm_eval.api import metrics

    if aggregate is metrics.mean:
        return mean_of(ids, items)
    if aggregate in (metrics.weighted_perplexity, metrics.bits_per_byte):
        log_likelihoods, counts = (np.array(column) for column in zip(*items, strict=True))
        if aggregate is metrics.bits_per_byte:
            return ratio_of(ids, -log_likelihoods / math.log(2), counts)
        return ratio_of(ids, -log_likelihoods, counts, exp=True)
    return statistic_of(ids, items, aggregate)


def _unit(metric: str, values: SampleValues) -> str:
    # What accuracies, rates and the like have in common, by what they are made of.
    is_share = values.form == "mean" and all(0 <= v <= 1 for v in values.columns[0])
    return "share" if is_share else metric.replace("_", " ")


def _task_manager(tasks: Sequence[str], include_path: str | Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        if not Path(include_path).is_dir():
            raise ValueError(
                f"`lm_eval_include_path` must name a folder of task files, but there is none at "
                f"{str(include_path)!r}. Correct it, or leave it out."
            )
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(tasks) <= set(own.task_index):
            return own  # there are more than ten thousand others, read in many seconds
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for name in tasks:
        if name not in manager.task_index:
            nearest = difflib.get_close_matches(name, manager.task_index, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"There is no task {name!r} in lm-eval or in `lm_eval_include_path`. The nearest "
                f"known task is {nearest!r}."
            )
    return manager


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """
    The global generators from a seed, and afterwards as they were.

    Tasks shuffle their choices with them as they are loaded, and both models are to see the same.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the harness says about every task that it runs."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
