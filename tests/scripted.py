"""Models that say what they are told to, with known probabilities; figures that are looked at."""

import math
from itertools import pairwise

import torch
from torch import nn

from ogpsa_trl.benchmark.toy_model import tiny_model, toy_tokenizer

TOKENIZER = toy_tokenizer()
REFUSING = "=> sorry , i can not help with that . <eos>"
ANSWERING = "=> sure : take it then <eos>"
P_STEP = 0.9


def scripted_model(*chains, p_step=P_STEP):
    """
    A Llama that follows each token of a chain by the next one, with probability `p_step`.

    What is not in a chain is followed by any token with the same probability. Embeddings are unit
    vectors, and no layer adds to them, so that the logits are a table of the last token.
    """
    size = len(TOKENIZER)
    hidden = math.ceil(size / 4) * 4
    model = tiny_model(hidden_size=hidden, num_layers=1, num_heads=2, ffn_size=4)
    logit = math.log(p_step * (size - 1) / (1 - p_step))
    with torch.no_grad():
        for layer in model.model.layers:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
        nn.init.eye_(model.model.embed_tokens.weight)
        model.model.norm.variance_epsilon = 0.0
        nn.init.zeros_(model.lm_head.weight)
        for chain in chains:
            ids = TOKENIZER(chain)["input_ids"]
            for token, following in pairwise(ids):
                # The norm makes a unit vector as long as the root of its number of entries.
                model.lm_head.weight[following, token] = logit / math.sqrt(hidden)
    return model


def without_template():
    """The toy tokenizer without its chat template: prompts end where an answer begins."""
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def save(model, folder):
    """A model in a folder, with the toy tokenizer."""
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def literal_answer(model, text, max_new_tokens):
    """What a prompt is completed to, without padding, and whether that has an end."""
    ids = TOKENIZER(text, return_tensors="pt")["input_ids"]
    output = model.generate(input_ids=ids, max_new_tokens=max_new_tokens, do_sample=False)
    ids = output[0, ids.shape[1] :]
    return TOKENIZER.decode(ids, skip_special_tokens=True), TOKENIZER.eos_token_id in ids


def p_other():
    """Probability of a token that is not the next one in the chain."""
    return (1 - P_STEP) / (len(TOKENIZER) - 1)


def saved_figures(monkeypatch):
    """The figures of matplotlib as they are when they are saved."""
    from matplotlib.figure import Figure

    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k))
    )
    return figures
