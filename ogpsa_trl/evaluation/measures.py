"""Measures of a causal language model: what scores say of it, preferences, divergence, bits."""

# S samples, T scored tokens of one, V vocabulary

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ogpsa_trl.evaluation.group_scores import divergence
from ogpsa_trl.evaluation.likelihoods import (
    CompletionScores,
    Text,
    completion_logits,
    completion_scores,
    sequence_scores,
    tokenise_all,
)


class PreferenceScores(NamedTuple):
    """
    How a model ranks pairs of completions.

    Args:
        accuracy (`float`): Share of pairs, in [0, 1], whose margin is above zero.
        mean_margin (`float`): Mean margin: log-probability of chosen minus rejected, in nats.
    """

    accuracy: float
    mean_margin: float


def exact_match(scores: CompletionScores) -> float:
    """Share of the completions, in [0, 1], that greedy decoding gives exactly."""
    return scores.is_greedy.double().mean().item()


def mean_probability(scores: CompletionScores) -> float:
    """Mean over the samples of the probability of the whole completion, in [0, 1]."""
    return scores.log_probs.exp().mean().item()


def mean_log_likelihood_per_token(scores: CompletionScores) -> float:
    """Mean over all scored tokens of all samples of the log-probability, in nats."""
    return (scores.log_probs.sum() / scores.num_tokens.sum()).item()


def mean_divergence(
    start_model: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    completions: Sequence[Text],
    *,
    batch_size: int = 32,
    append_eos: bool = True,
    max_length: int | None = None,
) -> float:
    """
    Mean over the completion tokens of KL(start || model), over the whole vocabulary, in nats.

    Args:
        start_model (`PreTrainedModel`): The model that training started from.
        model (`PreTrainedModel`): The model after training, with the same tokenizer.
        tokenizer, prompts, completions, batch_size, append_eos, max_length: As for
            `completion_scores`.

    Returns:
        `float`: At least 0, but for rounding; 0 if the models are the same.

    Raises:
        ValueError: As `completion_scores`.
    """
    sequences, starts = tokenise_all(tokenizer, prompts, completions, append_eos, max_length)
    pairs = zip(
        completion_logits(start_model, sequences, starts, batch_size),
        completion_logits(model, sequences, starts, batch_size),
        strict=True,
    )
    total, num_tokens = 0.0, 0
    for (_, start_logits_TV), (_, logits_TV) in pairs:
        total += divergence(start_logits_TV.to(logits_TV.device), logits_TV).sum().item()
        num_tokens += len(logits_TV)
    return total / num_tokens


def preference_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    chosen: Sequence[Text],
    rejected: Sequence[Text],
    *,
    reference_model: PreTrainedModel | None = None,
    batch_size: int = 32,
    append_eos: bool = True,
    max_length: int | None = None,
) -> PreferenceScores:
    """
    How often, and by how much, chosen completions are more probable than rejected ones.

        margin = log p(chosen) - log p(rejected)    (minus the same of the reference model)

    With the model that DPO started from as the reference, the accuracy is what TRL logs as
    `rewards/accuracies`, and the mean margin its `rewards/margins` over `beta`.

    Args:
        model, tokenizer, prompts, batch_size, append_eos, max_length: As for `completion_scores`.
        chosen (`Sequence[str]` or `Sequence[list[dict]]`): The S preferred completions.
        rejected (`Sequence[str]` or `Sequence[list[dict]]`): The S other completions. A tie counts
            as not preferred.
        reference_model (`PreTrainedModel`, *optional*): Model whose margin is subtracted. `None`
            subtracts nothing.

    Returns:
        `PreferenceScores`: Accuracy and mean margin.

    Raises:
        ValueError: As `completion_scores`.
    """
    texts = (tokenizer, prompts, chosen, rejected)
    options: Any = {"batch_size": batch_size, "append_eos": append_eos, "max_length": max_length}
    margin_S = preference_margins(model, *texts, **options)
    if reference_model is not None:
        margin_S = margin_S - preference_margins(reference_model, *texts, **options)
    return PreferenceScores((margin_S > 0).double().mean().item(), margin_S.mean().item())


def preference_margins(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    chosen: Sequence[Text],
    rejected: Sequence[Text],
    **options: Any,
) -> Tensor:
    """
    Log-probability of each chosen completion minus that of the rejected one, in nats.

    Everything as for `preference_accuracy`; the result is `[S]`, float64, on the CPU.
    """
    chosen_S, rejected_S = (
        completion_scores(model, tokenizer, prompts, completions, **options).log_probs
        for completions in (chosen, rejected)
    )
    return chosen_S - rejected_S


def bits_per_character(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int | None = None,
    batch_size: int = 32,
) -> float:
    """
    Bits the model needs for a character of a text; lower is better.

    Total negative log2-likelihood over the number of characters scored, so models with different
    tokenizers compare. The first token is given, not scored: that is nothing where the tokenizer
    puts a beginning-of-sequence token first, and the text's own first token where it does not.

    Args:
        model (`PreTrainedModel`): A causal language model. It is put in evaluation mode for the
            time of the call.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, a fast one: characters are counted by
            the offsets of the kept tokens.
        texts (`Sequence[str]`): The texts.
        max_length (`int`, *optional*): Number of tokens kept of each text, counted from its start.
            `None` keeps all.
        batch_size (`int`, *optional*, defaults to `32`): Number of texts of a forward pass.

    Returns:
        `float`: Bits per character.

    Raises:
        ValueError: If no text has a token to score.
    """
    sequences, num_characters = [], 0
    for text in texts:
        encoded = tokenizer(text, return_offsets_mapping=True)
        ends = [end for _, end in encoded["offset_mapping"]][:max_length]
        if len(ends) > 1:
            sequences.append(encoded["input_ids"][:max_length])
            num_characters += max(ends) - ends[0]  # a token added in front ends at character 0
    if num_characters == 0:
        raise ValueError(
            f"`texts` must hold a text of two tokens or more, but got {len(texts)} texts without a "
            "token to score. Pass longer texts, or raise `max_length`."
        )
    scores = sequence_scores(model, sequences, [1] * len(sequences), batch_size)
    return -scores.log_probs.sum().item() / math.log(2) / num_characters
