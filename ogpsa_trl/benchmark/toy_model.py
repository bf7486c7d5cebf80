"""Tokenizer and models of the toy world."""

import string

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ogpsa_trl.benchmark import toy_world as world

# The special tokens, and the words of prompts and completions that belong to no list.
FRAME_WORDS = (
    "<pad> <eos> <unk> => add + reverse sort recall passive is by ? : . , how to "
    "please tell me i want sure take then it sorry can not help with that bad yes no"
)

# Renders a conversation to the very text, and so the tokens, of the prompt-completion form.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- ' => ' -}}{% generation %}{{- message['content'] + eos_token -}}{% endgeneration %}"
    "{%- else -%}{{- message['content'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- ' =>' -}}{%- endif -%}"
)


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """
    A tokenizer with one token per word of the world, the same for every seed.

    It adds nothing to a text of its own accord; texts come back from decoding as they went in.
    `<pad>`, `<eos>` and `<unk>` are the tokens 0, 1 and 2. The chat template renders a user's
    question and the assistant's answer to the prompt and completion forms of the world, with the
    answer marked for `assistant_only_loss`.
    """
    words = [
        *FRAME_WORDS.split(),
        *[*string.digits, *world.LETTERS, *world.DETERMINERS, *world.NOUNS],
        *[*world.PARTICIPLES, *world.PARTICIPLES.values(), *world.BENIGN_VERBS],
        *[*world.HARMFUL_VERBS, *world.OBJECTS, *world.NAMES, *world.TOPICS, *world.VALUES],
    ]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,  # would join a word and the full stop after it
        chat_template=CHAT_TEMPLATE,
        model_max_length=64,
    )


def tiny_llama_config(
    hidden_size: int = 128, num_layers: int = 3, num_heads: int = 4, ffn_size: int = 256
) -> LlamaConfig:
    """The architecture of the base model: a Llama of 0.5 M parameters on the toy vocabulary."""
    vocabulary = toy_tokenizer().get_vocab()
    return LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden_size,
        intermediate_size=ffn_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=64,
        # Texts have 20 tokens. At the usual 10000 half of the frequencies hardly turn within them.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        bos_token_id=None,
        eos_token_id=vocabulary["<eos>"],
        pad_token_id=vocabulary["<pad>"],
    )


def tiny_model(seed: int = 0, **sizes: int) -> LlamaForCausalLM:
    """
    An untrained model on the toy vocabulary, built in milliseconds, for unit tests.

    Args:
        seed: Of the initial parameters. The global generator is left as it was.
        sizes: As for `tiny_llama_config`; `hidden_size` is a multiple of `2 * num_heads`.

    Returns:
        The model, float32, on the CPU, in evaluation mode.
    """
    small = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_size": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(tiny_llama_config(**small | sizes))
    return model.eval()
