"""The likelihood of capability data, on the very tokens that the training code takes."""

# B sequences in a batch, L tokens of the longest, V vocabulary

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ogpsa_trl.data.preparation import Preparation, context_of, prepare_group
from ogpsa_trl.evaluation.intervals import SampleValues, ratio_of
from ogpsa_trl.evaluation.measures import evaluating


def group_nll(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    dataset: Dataset,
    *,
    max_samples: int | None = None,
    max_length: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> SampleValues:
    """
    Negative log-likelihood per token of a capability group, in nats.

    Rows become tokens and labels as in training, by TRL's own preparation: every token of a text
    and of a conversation counts, of a prompt with a completion those of the completion.

    Args:
        model (`PreTrainedModel`): A causal language model. It is put in evaluation mode for the
            time of the call.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        name (`str`): Of the group.
        dataset (`Dataset`): Rows in a format of `SFTTrainer`, or preferences, of which the chosen
            completions are used.
        max_samples (`int`, *optional*): Number of rows, chosen by `seed`. `None` takes all.
        max_length (`int`, *optional*): Number of tokens kept of each row. `None` keeps all.
        batch_size (`int`, *optional*, defaults to `32`): Number of rows of a forward pass.
        seed (`int`, *optional*, defaults to `0`): Of the choice of rows.

    Returns:
        `SampleValues`: Of each row the sum over its tokens, and their number; rows without a token
            to predict are left out.

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
    ids, nll, num_tokens = [], [], []
    with evaluating(model):
        for batch in group.whole().batches_of(0, 1):
            labels_BL = batch.inputs.pop("labels").to(model.device)
            inputs = {key: value.to(model.device) for key, value in batch.inputs.items()}
            logits_BLV = model(**inputs, use_cache=False).logits
            for row, sample in enumerate(batch.samples):
                # Only what is scored, so that float32 logits of a whole batch are never held.
                scored = labels_BL[row, 1:] != -100
                targets = labels_BL[row, 1:][scored].to(logits_BLV.device)
                logits = logits_BLV[row, :-1][scored.to(logits_BLV.device)].float()
                loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
                ids.append(sample.name)
                nll.append(loss.double().sum().item())
                num_tokens.append(sample.num_tokens)
    return ratio_of(ids, nll, num_tokens)
