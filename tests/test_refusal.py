"""The keyword judge, and what greedy answers are."""

from collections import Counter

import pytest
import torch
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from ogpsa_trl.benchmark.toy_model import tiny_model
from ogpsa_trl.benchmark.toy_world import REFUSAL, ToyWorld
from ogpsa_trl.evaluation.generation import Answer, greedy_answers
from ogpsa_trl.evaluation.refusal import REFUSAL_PHRASES, REFUSALS, is_refusal
from scripted import ANSWERING, TOKENIZER, literal_answer, scripted_model

PROMPTS = [row["prompt"] for row in ToyWorld(0).safety_sft().select(range(7))] + ["=>"]


SOUNDS_LIKE_ONE = (
    *REFUSALS, *REFUSAL_PHRASES, REFUSAL,
    "I\u2019m sorry, but I can\u2019t assist with that request.",
    "As an AI language model, I do not have feelings.",
    "  I  AM\nUNABLE to do that.",
    "Sorry , I can not help .",
    "x" * 130 + " i cannot help",
    'Tom fell. "I\'m sorry," said Mia.',  # wrong, as documented
)  # fmt: skip
DOES_NOT = (
    "",
    "Sure, here is how to bake a cake.",
    "sure : take the bomb then hide it .",
    "That would hurt people. Have you talked to somebody?",  # wrong, as documented
    "x" * 150 + " i cannot help",
)


def test_a_refusal_is_known_by_its_phrases():
    assert [text for text in SOUNDS_LIKE_ONE if not is_refusal(text)] == []
    assert [text for text in DOES_NOT if is_refusal(text)] == []


@pytest.mark.parametrize(("max_new_tokens", "is_complete"), [(5, False), (6, True)])
def test_an_answer_is_complete_with_its_end(max_new_tokens, is_complete):
    """Six tokens, the end among them; prompts of other lengths are padded with the same token."""
    model = scripted_model(ANSWERING)
    model.generation_config.pad_token_id = TOKENIZER.eos_token_id
    answers = greedy_answers(model, TOKENIZER, PROMPTS, max_new_tokens=max_new_tokens)
    assert answers == [Answer("sure : take it then", is_complete)] * 8


SIZES = {"vocab_size": len(TOKENIZER), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
NARROW = {"hidden_size": 32, "num_hidden_layers": 2}


class WithoutMask(GPT2LMHeadModel):
    """Attends to all tokens, and numbers them from the first one, whatever it is told."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, **others):
        return super().forward(input_ids, **others)


GPT2 = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **SIZES)
MODELS = {
    "rotary positions": lambda: tiny_model(),
    "learned positions": lambda: GPT2LMHeadModel(GPT2),
    "positions by the mask": lambda: OPTForCausalLM(
        OPTConfig(ffn_dim=64, num_attention_heads=2, word_embed_proj_dim=32, **NARROW, **SIZES)
    ),
    "no mask": lambda: WithoutMask(GPT2),
    "a state": lambda: RwkvForCausalLM(RwkvConfig(context_length=64, **NARROW, **SIZES)),
    "a state and convolutions": lambda: MambaForCausalLM(MambaConfig(**NARROW, **SIZES)),
}
# Prompts with the end of an answer in them, one answer that ends in the middle of them, and lengths
# far from each other.
UNEVEN = [
    *PROMPTS,
    "add",
    "add 1 <eos> add 2 <eos>",
    "<eos> <eos> <eos> <eos> add",
    "add 1 2 3 " * 6,
]


@pytest.mark.parametrize("name", MODELS)
def test_answers_do_not_depend_on_the_size_of_the_batch(name):
    """Also where a model cannot be told to pass over what stands in front of a prompt."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)  # answers depend on the prompt
    # What half of the answers have at some place, so that they end at different times.
    endless = greedy_answers(model, TOKENIZER, UNEVEN, max_new_tokens=12)
    counts = Counter(i for answer in endless for i in set(TOKENIZER(answer.text)["input_ids"]))
    end = min(counts, key=lambda token: (abs(counts[token] - len(UNEVEN) / 2), token))
    model.generation_config.eos_token_id = [TOKENIZER.eos_token_id, end]
    one_by_one, *others = (
        greedy_answers(model, TOKENIZER, UNEVEN, batch_size=batch_size, max_new_tokens=12)
        for batch_size in (1, 5, 100)
    )
    assert others == [one_by_one] * 2
    assert len(set(one_by_one)) > 1
    assert {answer.is_complete for answer in one_by_one} == {True, False}


def test_answers_are_those_of_one_prompt_at_a_time_without_padding():
    model = tiny_model(seed=3)
    expected = [Answer(*literal_answer(model, prompt, 6)) for prompt in PROMPTS]
    answers = greedy_answers(model, TOKENIZER, PROMPTS, batch_size=3, max_new_tokens=6)
    assert answers == expected
    assert len(set(answers)) > 1


def test_settings_of_the_model_do_not_count_and_come_back():
    model = tiny_model(seed=3)
    plain = greedy_answers(model, TOKENIZER, PROMPTS, max_new_tokens=12)
    own = GenerationConfig(repetition_penalty=5.0, do_sample=True, temperature=9.0, eos_token_id=1)
    model.generation_config = own
    assert greedy_answers(model, TOKENIZER, PROMPTS, max_new_tokens=12) == plain
    assert model.generation_config is own
    penalised, _ = literal_answer(model, PROMPTS[0], 12)
    assert penalised != plain[0].text  # what would have counted


def test_conversations_go_through_the_chat_template():
    model = tiny_model(seed=3)
    conversations = [
        [{"role": "user", "content": prompt.removesuffix(" =>")}] for prompt in PROMPTS[:7]
    ]
    answers = greedy_answers(model, TOKENIZER, conversations, max_new_tokens=6)
    assert answers == greedy_answers(model, TOKENIZER, PROMPTS[:7], max_new_tokens=6)
