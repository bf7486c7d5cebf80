"""What a model answers where it always takes the most probable token."""

# B prompts in a batch, L tokens of the longest, or of the longest answer

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ogpsa_trl.evaluation.measures import Text, evaluating, prompt_tokens


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
    penalty, do not count, but for the tokens that end an answer.

    Args:
        model (`PreTrainedModel`): A causal language model. It is put in evaluation mode for the
            time of the call.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        prompts (`Sequence[str]` or `Sequence[list[dict]]`): Texts, or conversations, which go
            through the chat template.
        batch_size (`int`, *optional*, defaults to `32`): Number of prompts of a forward pass. They
            are padded on the left: in low precision a token may change with the padding.
        max_new_tokens (`int`, *optional*, defaults to `64`): Length at which an answer is cut. 150
            characters are about 40 tokens of a large vocabulary.

    Returns:
        `list[Answer]`: The answers, in the order of the prompts.
    """
    sequences = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    answers: dict[int, Answer] = {}
    with evaluating(model), _greedy(model, tokenizer, max_new_tokens) as settings:
        pad_id, ends = settings.pad_token_id, settings.eos_token_id
        ends = torch.tensor([] if ends is None else ends)
        for first in range(0, len(sequences), batch_size):
            batch = by_length[first : first + batch_size]
            length = max(len(sequences[i]) for i in batch)
            ids_BL = torch.tensor(
                [[pad_id] * (length - len(sequences[i])) + sequences[i] for i in batch]
            )
            mask_BL = torch.tensor(
                [[0] * (length - len(sequences[i])) + [1] * len(sequences[i]) for i in batch]
            )
            generate: Any = model.generate
            output_BL = generate(
                input_ids=ids_BL.to(model.device), attention_mask=mask_BL.to(model.device)
            )
            for i, ids_L in zip(batch, output_BL[:, length:], strict=True):
                text: Any = tokenizer.decode(ids_L, skip_special_tokens=True)
                answers[i] = Answer(text, bool(torch.isin(ids_L.cpu(), ends).any()))
    return [answers[i] for i in range(len(sequences))]


@contextmanager
def _greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> Iterator[GenerationConfig]:
    """
    Let the model decode greedily, without its own settings; gives those that count.

    `generate` fills in what a configuration leaves open from the model's own one, the repetition
    penalty of a chat model for one: it has to be out of reach, not overridden.
    """
    own: Any = model.generation_config
    ends = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    first_end = ends[0] if isinstance(ends, list) else ends
    padding = [tokenizer.pad_token_id, own.pad_token_id, first_end, 0]
    pad_id = next(token for token in padding if isinstance(token, int))
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        bos_token_id=own.bos_token_id,
        eos_token_id=ends,
        pad_token_id=pad_id,
    )
    model.generation_config = settings
    try:
        yield settings
    finally:
        model.generation_config = own
