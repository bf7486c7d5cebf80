"""What a model answers where it always takes the most probable token."""

# B prompts in a batch, L tokens of the longest, or of one with its answer, V vocabulary

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)

from ogpsa_trl.evaluation.likelihoods import Text, evaluating, prompt_tokens

# Where RWKV goes on from its state, transformers (5.23) mixes up the rows of a batch.
_ONE_BY_ONE = {"rwkv"}


class Answer(NamedTuple):
    """
    What a model answers.

    Args:
        text (`str`): The answer, without special tokens.
        is_complete (`bool`): Whether the model has ended it; otherwise it was cut.
    """

    text: str
    is_complete: bool


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 64,
) -> list[Answer]:
    """
    What a model answers where it always takes the most probable token.

    Nothing else decides: settings that the model brings along for generation, such as a repetition
    penalty, do not count, but for the tokens that end an answer. Nothing is padded: prompts of a
    batch begin together, the longer ones go on while the shorter ones are answered, and a model
    that would read padding in front of a prompt reads none.

    Args:
        model: A causal language model. It is put in evaluation mode for the time of the call.
        tokenizer: Its tokenizer.
        prompts: Texts, or conversations, which go through the chat template.
        batch_size: Largest number of prompts of a forward pass; in low precision a token may change
            with it.
        max_new_tokens: Length at which an answer is cut. 150 characters are about 40 tokens of a
            large vocabulary.

    Returns:
        The answers, in the order of the prompts.
    """
    sequences = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    answers: dict[int, Answer] = {}
    with evaluating(model), _greedy(model, tokenizer) as ends:
        ends = torch.tensor(ends, device=model.device)
        for batch in _batches(sequences, rows_at_once(model, batch_size), max_new_tokens):
            told = _Prompts([sequences[i] for i in batch], model.device)
            stop = _Ends(told.lengths_B, ends, max_new_tokens)
            together = len(sequences[batch[0]])
            ids_BL = told.ids_BL[:, :together]
            generate: Any = model.generate
            output_BL = generate(
                input_ids=ids_BL,
                attention_mask=torch.ones_like(ids_BL),
                max_new_tokens=told.ids_BL.shape[1] - together + max_new_tokens,
                logits_processor=[told],
                stopping_criteria=[stop],
            )
            for i, ids_L in zip(batch, output_BL, strict=True):
                ids_L = ids_L[len(sequences[i]) :][:max_new_tokens]
                is_end_L = torch.isin(ids_L, ends)
                is_complete = bool(is_end_L.any())
                if is_complete:
                    ids_L = ids_L[: int(is_end_L.int().argmax()) + 1]
                text: Any = tokenizer.decode(ids_L, skip_special_tokens=True)
                answers[i] = Answer(text, is_complete)
    return [answers[i] for i in range(len(sequences))]


def rows_at_once(model: PreTrainedModel, batch_size: int) -> int:
    """How many of `batch_size` sequences a model can go on with without mixing them up."""
    return 1 if model.config.model_type in _ONE_BY_ONE else batch_size


def _batches(
    sequences: Sequence[list[int]], batch_size: int, max_new_tokens: int
) -> Iterator[list[int]]:
    """
    The numbers of sequences, short ones first, batch by batch. In a batch no prompt is longer than
    the shortest one with its answer, so that at most half of the steps are spent on prompts.
    """
    batch: list[int] = []
    for i in sorted(range(len(sequences)), key=lambda i: len(sequences[i])):
        if batch and (
            len(batch) == batch_size
            or len(sequences[i]) > len(sequences[batch[0]]) + max_new_tokens
        ):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


class _Prompts(LogitsProcessor):
    """Gives a prompt that is longer than others its own tokens, in place of the most probable."""

    def __init__(self, prompts: Sequence[list[int]], device: torch.device) -> None:
        longest = max(map(len, prompts))
        self.lengths_B = torch.tensor([len(ids) for ids in prompts], device=device)
        self.ids_BL = torch.tensor(
            [ids + [0] * (longest - len(ids)) for ids in prompts], device=device
        )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # [B, L], [B, V]
        position = input_ids.shape[1]
        if position >= self.ids_BL.shape[1]:
            return scores
        is_told_B1 = (position < self.lengths_B)[:, None]
        told_BV = torch.full_like(scores, -torch.inf).scatter(1, self.ids_BL[:, [position]], 0.0)
        return torch.where(is_told_B1, told_BV, scores)


class _Ends(StoppingCriteria):
    """Whether answers have ended, each at its own time; prompts may hold what ends an answer."""

    def __init__(self, lengths_B: Tensor, ends: Tensor, max_new_tokens: int) -> None:
        self.lengths_B = lengths_B
        self.ends = ends
        self.max_new_tokens = max_new_tokens
        self.is_done_B = torch.zeros_like(lengths_B, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, *_: Any, **__: Any) -> Any:  # [B, L] -> [B], bool
        num_new_B = input_ids.shape[1] - self.lengths_B
        has_end_B = torch.isin(input_ids[:, -1], self.ends) & (num_new_B > 0)
        self.is_done_B = self.is_done_B | has_end_B | (num_new_B >= self.max_new_tokens)
        return self.is_done_B


@contextmanager
def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """
    Let the model decode greedily, without its own settings; gives the tokens that end an answer.

    `generate` fills in what a configuration leaves open from the model's own one, the repetition
    penalty of a chat model for one: it has to be out of reach, not overridden.
    """
    own: Any = model.generation_config
    ends: Any = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    model.generation_config = GenerationConfig(do_sample=False, bos_token_id=own.bos_token_id)
    try:
        yield [] if ends is None else ends if isinstance(ends, list) else [ends]
    finally:
        model.generation_config = own
