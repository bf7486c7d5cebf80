"""What a model says about capability groups, on the tokens that training counts."""

# T scored tokens of a row, V vocabulary

from collections.abc import Iterator

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ogpsa_trl.data.groups import Batch, trained_labels
from ogpsa_trl.data.preparation import Preparation, context_of, prepare_group
from ogpsa_trl.evaluation.intervals import SampleValues, mean_of, ratio_of
from ogpsa_trl.evaluation.likelihoods import evaluating


def group_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    dataset: Dataset,
    *,
    start_model: PreTrainedModel | None = None,
    max_samples: int | None = None,
    max_length: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, SampleValues]:
    """
    What a model says about a capability group.

    Rows become tokens and labels as in training, by TRL's own preparation: every token of a text
    and of a conversation counts, of a prompt with a completion those of the completion.

    Args:
        model, tokenizer, batch_size: As for `completion_scores`.
        name: Of the group.
        dataset: Rows in a format of `SFTTrainer`, or preferences, of which the chosen completions
            are used.
        start_model: The model that training started from, with the same tokenizer. `None`: no
            divergence.
        max_samples: Number of rows, chosen by `seed`. `None` takes all.
        max_length: Number of tokens kept of each row. `None` keeps all.
        seed: Of the choice of rows.

    Returns:
        `nll`: negative log-likelihood per token, in nats; `exact_match`: share of the rows whose
        tokens are all the most probable ones, which greedy decoding would give; with a start model
        `drift`: KL(start || model) per token over the whole vocabulary, in nats. Rows without a
        token to predict are left out.

    Raises:
        ValueError: the group is empty, or its format is unknown.
    """
    group = prepare_group(
        name,
        dataset,
        Preparation(tokenizer, tokenizer, max_length, context=context_of(model.config)),
        num_samples=min(len(dataset), max_samples or len(dataset)),
        num_parts=1,
        batch_size=batch_size,
        seed=seed,
    )
    samples, nll, matches, divergences = [], [], [], []
    with evaluating(model), evaluating(start_model or model):
        for batch in group.whole().batches_of(0, 1):
            samples += batch.samples
            starts = None if start_model is None else scored_rows(start_model, batch)
            for logits_TV, labels_T in scored_rows(model, batch):
                nll.append(_nll(logits_TV, labels_T).item())
                matches.append((logits_TV.argmax(-1) == labels_T).all().item())
                if starts is not None:
                    start_logits_TV = next(starts)[0].to(logits_TV.device)
                    divergences.append(divergence(start_logits_TV, logits_TV).sum().item())
    names, sizes = [s.name for s in samples], [s.num_tokens for s in samples]
    scores = {"nll": ratio_of(names, nll, sizes), "exact_match": mean_of(names, matches)}
    return scores | ({} if start_model is None else {"drift": ratio_of(names, divergences, sizes)})


def batch_nll(model: torch.nn.Module, batch: Batch) -> list[Tensor]:
    """Negative log-likelihood of each row of a batch, summed, in nats, float64, with its graph."""
    return [_nll(logits_TV, labels_T) for logits_TV, labels_T in scored_rows(model, batch)]


def scored_rows(model: torch.nn.Module, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """
    Logits, float32, and tokens where a row of a batch is scored: `[T, V]` and `[T]`, row by row,
    so that the float32 logits of a whole batch are never held.
    """
    device = next(model.parameters()).device
    inputs = {key: value.to(device) for key, value in batch.inputs.items()}
    labels_BL = inputs.pop("labels")
    logits_BLV = model(**inputs, use_cache=False).logits
    labels_BL = labels_BL.to(logits_BLV.device)
    is_scored_BL = trained_labels(labels_BL)
    rows = zip(logits_BLV[:, :-1], labels_BL[:, 1:], is_scored_BL, strict=True)
    return ((logits[scored].float(), labels[scored]) for logits, labels, scored in rows)


def divergence(start_logits_TV: Tensor, logits_TV: Tensor) -> Tensor:
    """KL(start || model) of every token, in nats, float64, `[T]`."""
    start_log_probs_TV = start_logits_TV.double().log_softmax(-1)
    log_probs_TV = logits_TV.double().log_softmax(-1)
    return (start_log_probs_TV.exp() * (start_log_probs_TV - log_probs_TV)).sum(-1)


def _nll(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    return cross_entropy(logits_TV, labels_T, reduction="none").double().sum()
