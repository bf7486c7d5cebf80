"""
What a model says about given completions.

Nothing is generated. Greedy decoding would give exactly a completion if and only if every token of
the completion is the most probable one after the tokens before it. So one forward pass over prompt
and completion gives the exact match, the probability and the log-likelihood.
"""

# S samples, B sequences in a batch, L tokens of the longest, T scored tokens of one, V vocabulary

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A text, or the messages of a conversation.
Text = str | list[dict[str, str]]


@dataclass(frozen=True)
class CompletionScores:
    """
    What a model says about each of S completions, on the CPU.

    Args:
        log_probs (`Tensor`): Log-probability of the whole completion, in nats, `[S]`, float64.
        num_tokens (`Tensor`): Scored tokens, the end-of-sequence token included, `[S]`, int64.
        is_greedy (`Tensor`): Whether greedy decoding gives exactly this completion, `[S]`, bool.
    """

    log_probs: Tensor
    num_tokens: Tensor
    is_greedy: Tensor


def completion_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    completions: Sequence[Text],
    *,
    batch_size: int = 32,
    append_eos: bool = True,
    max_length: int | None = None,
) -> CompletionScores:
    """
    Score completions as TRL trains on them.

    Prompt and completion are tokenised together; the completion starts where these tokens and those
    of the prompt alone part. A conversation goes through the chat template, which alone decides
    about its special tokens: pass it as messages, because in front of a rendered text the tokenizer
    may put a token that training has not seen. The batch size does not change the scores beyond
    rounding.

    Args:
        model (`PreTrainedModel`): A causal language model. It is put in evaluation mode for the
            time of the call.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        prompts (`Sequence[str]` or `Sequence[list[dict]]`): S prompts: texts, or conversations.
        completions (`Sequence[str]` or `Sequence[list[dict]]`): One per prompt, of the same form.
        batch_size (`int`, *optional*, defaults to `32`): Number of samples of a forward pass.
        append_eos (`bool`, *optional*, defaults to `True`): Whether to end each completion with the
            end-of-sequence token, where it does not already. In a conversation that is up to the
            chat template.
        max_length (`int`, *optional*): Number of tokens kept of each sample, counted from its
            start. `None` keeps all.

    Returns:
        `CompletionScores`: The scores, in the order of the prompts.

    Raises:
        ValueError: If there are no samples, the numbers of prompts and completions differ,
            `append_eos` is set without an end-of-sequence token, or a sample has no token to score
            or none before it.
    """
    sequences, starts = tokenise_all(tokenizer, prompts, completions, append_eos, max_length)
    return sequence_scores(model, sequences, starts, batch_size)


def preference_margins(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    chosen: Sequence[Text],
    rejected: Sequence[Text],
    *,
    batch_size: int = 32,
) -> Tensor:
    """Log-probability of each chosen completion minus that of the rejected one, in nats, `[S]`."""
    chosen_S, rejected_S = (
        completion_scores(model, tokenizer, prompts, completions, batch_size=batch_size).log_probs
        for completions in (chosen, rejected)
    )
    return chosen_S - rejected_S


def tokenise_all(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    completions: Sequence[Text],
    append_eos: bool,
    max_length: int | None,
) -> tuple[list[list[int]], list[int]]:
    """The tokens of every sample, and where its completion starts among them."""
    if not prompts or len(prompts) != len(completions):
        raise ValueError(
            f"`prompts` and `completions` must be equally many and at least one, but got "
            f"{len(prompts)} and {len(completions)}. Pass one completion per prompt."
        )
    sequences, starts = [], []
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        prompt_ids, ids = tokenise(tokenizer, prompt, completion, append_eos)
        pairs = zip(prompt_ids, ids, strict=False)
        start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        ids = ids[:max_length]
        if not 0 < start < len(ids):
            raise ValueError(
                f"Each sample needs a token to score and a token before it, but the completion of "
                f"sample {i} starts at token {start} of {len(ids)} kept. Raise `max_length`, or "
                "leave out samples with an empty prompt or completion."
            )
        sequences.append(ids)
        starts.append(start)
    return sequences, starts


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Text) -> list[int]:
    """The tokens of a prompt, up to where its completion starts."""
    if not isinstance(prompt, str):
        rendered: Any = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=True
        )
        return rendered["input_ids"]
    return tokenizer(prompt, add_special_tokens=not _is_rendered(tokenizer, prompt))["input_ids"]


def tokenise(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text, append_eos: bool = True
) -> tuple[list[int], list[int]]:
    """The tokens of a prompt, and those of the prompt with its completion."""
    if not isinstance(prompt, str) and not isinstance(completion, str):
        whole: Any = tokenizer.apply_chat_template([*prompt, *completion], return_dict=True)
        return prompt_tokens(tokenizer, prompt), whole["input_ids"]
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise ValueError(
            f"A prompt and its completion must both be texts or both be conversations, but got "
            f"{type(prompt).__name__} and {type(completion).__name__}. Convert one of them."
        )
    if append_eos:
        eos = tokenizer.eos_token
        if not isinstance(eos, str):
            raise ValueError(
                f"`append_eos=True` needs a tokenizer with an `eos_token`, but got {eos!r}. Set "
                "`tokenizer.eos_token`, or pass `append_eos=False`."
            )
        completion = completion if completion.endswith(eos) else completion + eos
    ids = tokenizer(prompt + completion, add_special_tokens=not _is_rendered(tokenizer, prompt))[
        "input_ids"
    ]
    return prompt_tokens(tokenizer, prompt), ids


def answer_to(prompt: Text, text: str) -> Text:
    """A text as the completion of a prompt: a message, or behind a text after one space."""
    if not isinstance(prompt, str):
        return [{"role": "assistant", "content": text}]
    is_apart = prompt[-1:].isspace() or text[:1].isspace()
    return text if is_apart else f" {text}"


def _is_rendered(tokenizer: PreTrainedTokenizerBase, prompt: str) -> bool:
    """A chat template that writes the first token into the text has written all that are due."""
    bos = tokenizer.bos_token
    return isinstance(bos, str) and prompt.startswith(bos)


def sequence_scores(
    model: PreTrainedModel, sequences: list[list[int]], starts: list[int], batch_size: int
) -> CompletionScores:
    """Score the tokens of each sequence from its start on, as one completion."""
    num_samples = len(sequences)
    log_probs_S = torch.zeros(num_samples, dtype=torch.float64)
    is_greedy_S = torch.zeros(num_samples, dtype=torch.bool)
    num_tokens_S = torch.tensor(
        [len(ids) - start for ids, start in zip(sequences, starts, strict=True)]
    )
    for i, logits_TV in completion_logits(model, sequences, starts, batch_size):
        targets_T = torch.tensor(sequences[i][starts[i] :], device=logits_TV.device)
        token_log_probs_T = logits_TV.log_softmax(-1).gather(-1, targets_T[:, None])[:, 0]
        log_probs_S[i] = token_log_probs_T.double().sum().cpu()
        is_greedy_S[i] = (logits_TV.argmax(-1) == targets_T).all().cpu()
    return CompletionScores(log_probs_S, num_tokens_S, is_greedy_S)


def completion_logits(
    model: PreTrainedModel, sequences: list[list[int]], starts: list[int], batch_size: int
) -> Iterator[tuple[int, Tensor]]:
    """
    The number of a sequence and the logits for its tokens from its start on, `[T, V]`, float32.

    Every sequence comes once, short ones first, so that there is little padding.
    """
    by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for first in range(0, len(sequences), batch_size):
        batch = by_length[first : first + batch_size]
        longest = len(sequences[batch[-1]])
        rows = [sequences[i] + [0] * (longest - len(sequences[i])) for i in batch]
        # Any token will do as padding: it is masked and comes after all that is scored.
        ids_BL = torch.tensor(rows)
        lengths_B = torch.tensor([len(sequences[i]) for i in batch])
        mask_BL = (torch.arange(longest) < lengths_B[:, None]).long()
        with evaluating(model):
            logits_BLV = model(
                input_ids=ids_BL.to(model.device),
                attention_mask=mask_BL.to(model.device),
                use_cache=False,
            ).logits
        for row, i in enumerate(batch):
            # The logits at a position are about the token at the next one.
            yield i, logits_BLV[row, starts[i] - 1 : len(sequences[i]) - 1].float()


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module is in the mode it was in."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in was_training.items():
            module.training = training
