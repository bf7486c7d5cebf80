"""
The divergence of a model from the one that training starts with, KL(start || model) per position.

Of the starting model only the K most likely tokens of every position are kept, and the others
count as one. What is computed is therefore the divergence of two coarser distributions: never
negative, zero where the models agree, never above the full one, and equal to it where K covers the
vocabulary.
A row of K log-probabilities is some hundred bytes; a row of logits may be half a megabyte.

Shapes: T positions, V tokens of the vocabulary, K tokens told apart, X outcomes: K + 1, or K = V.
"""

import torch
from torch import Tensor


def likely_tokens(logits_TV: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """
    What is kept of a distribution over tokens.

    Returns:
        The most likely tokens, shape [T, K], int32; and their log-probabilities, float32, with that
        of all others together as the last, shape [T, X].
    """
    tokens_TK = logits_TV.topk(min(num_tokens, logits_TV.shape[1])).indices
    return tokens_TK.int(), _outcomes(logits_TV, tokens_TK)


def divergence(logits_TV: Tensor, tokens_TK: Tensor, start_TX: Tensor) -> Tensor:
    """
    KL(start || model) of every position, in nats, shape [T], float32.

    It is sum p (e^d - 1 - d) with d = log q - log p. Both distributions sum to one, so that it is
    the sum of -p d; but no first-order terms have to cancel, and small divergences keep their
    digits.

    Args:
        logits_TV: The model's, any floating dtype; no position is allowed.
        tokens_TK: The tokens told apart, from `likely_tokens` of the starting model.
        start_TX: Their log-probabilities and that of the others.
    """
    log_probs_TX = _outcomes(logits_TV, tokens_TK)
    probs_TX = start_TX.exp()
    # A start of probability zero has no logarithm.
    rises_TX = torch.where(probs_TX > 0, log_probs_TX - start_TX, 0.0)
    growth_TX = torch.where(
        rises_TX < 1,
        probs_TX * rises_TX.clamp_max(1).expm1(),
        log_probs_TX.exp() - probs_TX,  # e^d could overflow
    )
    return (growth_TX - probs_TX * rises_TX).sum(dim=1)


def _outcomes(logits_TV: Tensor, tokens_TK: Tensor) -> Tensor:
    """Log-probabilities of some tokens, and of all others together where there are any."""
    logits_TV, tokens_TK = logits_TV.float(), tokens_TK.long()
    outcomes_TX = logits_TV.gather(1, tokens_TK)
    if tokens_TK.shape[1] < logits_TV.shape[1]:
        others_TV = logits_TV.scatter(1, tokens_TK, -torch.inf)
        outcomes_TX = torch.cat([outcomes_TX, others_TV.logsumexp(1, keepdim=True)], dim=1)
    return outcomes_TX.log_softmax(dim=1)
