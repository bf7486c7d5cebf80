import copy

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from ogpsa_trl.benchmark.toy_model import tiny_model, toy_tokenizer
from ogpsa_trl.benchmark.toy_world import REFUSAL, ToyWorld
from ogpsa_trl.evaluation.likelihoods import completion_scores, preference_margins
from runs import make_trainer

TOKENIZER = toy_tokenizer()
WORLD = ToyWorld(0)


def mixed_samples(num_each=5):
    """Prompts and completions of very different lengths, in no order."""
    sets = WORLD.evaluation_sets()
    rows = [sets[name][i] for i in range(num_each) for name in sets]
    return [row["prompt"] for row in rows], [row["completion"] for row in rows]


def literal_scores(model, prompts, completions):
    """One sample at a time, one token at a time, without padding, mask or batch."""
    log_probs, num_tokens, is_greedy = [], [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        start = len(TOKENIZER(prompt)["input_ids"])
        ids = TOKENIZER(prompt + completion + "<eos>")["input_ids"]
        logits = [
            model(input_ids=torch.tensor([ids[:i]])).logits[0, -1] for i in range(start, len(ids))
        ]
        log_probs.append(
            sum(row.log_softmax(-1)[i].item() for row, i in zip(logits, ids[start:], strict=True))
        )
        num_tokens.append(len(ids) - start)
        is_greedy.append([row.argmax().item() for row in logits] == ids[start:])
    return log_probs, num_tokens, is_greedy


def uniform_model():
    model = tiny_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    return model


def tokenizer_with_bos():
    """Puts a token before every text, as most tokenizers do."""
    tokenizer = toy_tokenizer()
    tokenizer.bos_token = "<unk>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unk> $A", special_tokens=[("<unk>", tokenizer.unk_token_id)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def trained_model():
    """Knows the refusal and nothing else, so some completions are greedy and others are not."""
    model = tiny_model(seed=1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = WORLD.safety_sft().select(range(32))
    texts = [row["prompt"] + row["completion"] + "<eos>" for row in rows]
    batch = TOKENIZER(texts, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for _ in range(40):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


def test_scores_are_those_of_one_sample_and_token_at_a_time(trained_model):
    prompts, completions = mixed_samples()
    scores = completion_scores(trained_model, TOKENIZER, prompts, completions)
    log_probs, num_tokens, is_greedy = literal_scores(trained_model, prompts, completions)
    # Float32 forward passes of different shapes.
    torch.testing.assert_close(
        scores.log_probs, torch.tensor(log_probs).double(), rtol=1e-4, atol=1e-4
    )
    assert scores.num_tokens.tolist() == num_tokens
    assert scores.is_greedy.tolist() == is_greedy
    assert 0 < sum(is_greedy) < len(is_greedy)
    others = completion_scores(trained_model, TOKENIZER, prompts, completions, batch_size=3)
    torch.testing.assert_close(others.log_probs, scores.log_probs, rtol=1e-4, atol=1e-4)
    assert torch.equal(others.num_tokens, scores.num_tokens)
    assert torch.equal(others.is_greedy, scores.is_greedy)


def test_exact_match_is_what_greedy_generation_gives():
    model = tiny_model(0)
    prompts, _ = mixed_samples(2)
    generated, changed = [], []
    for prompt in prompts:
        ids = TOKENIZER(prompt, return_tensors="pt")["input_ids"]
        output = model.generate(input_ids=ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        words = TOKENIZER.convert_ids_to_tokens(output[0, ids.shape[1] :])
        generated.append(" " + " ".join(words))
        changed.append(" " + " ".join([*words[:4], "sorry" if words[4] != "sorry" else "bad"]))
    # `min_new_tokens` forbids the end of the sequence, and so may what is scored not hold it.
    assert "<eos>" not in " ".join(generated)
    scores = completion_scores(model, TOKENIZER, prompts * 2, generated + changed, append_eos=False)
    assert scores.is_greedy.tolist() == [True] * len(prompts) + [False] * len(prompts)


def test_the_probabilities_of_all_completions_of_one_token_sum_to_one(trained_model):
    completions = [f" {word}" for word in TOKENIZER.get_vocab()]
    prompts = ["is poison bad ? =>"] * len(completions)
    scores = completion_scores(trained_model, TOKENIZER, prompts, completions, append_eos=False)
    assert scores.num_tokens.tolist() == [1] * len(completions)
    assert scores.log_probs.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    assert scores.is_greedy.sum() == 1


def test_the_end_of_sequence_token_is_appended_once(trained_model):
    args = (trained_model, TOKENIZER, ["is poison bad ? =>"])
    appended = completion_scores(*args, [" yes"])
    given = completion_scores(*args, [" yes<eos>"])
    without = completion_scores(*args, [" yes"], append_eos=False)
    assert appended.num_tokens.tolist() == given.num_tokens.tolist() == [2]
    assert without.num_tokens.tolist() == [1]
    assert appended.log_probs == given.log_probs
    assert appended.log_probs < without.log_probs


def test_truncation_scores_the_tokens_that_are_kept(trained_model):
    prompt = "how to poison the well ? =>"
    args = (trained_model, TOKENIZER, [prompt])
    kept = completion_scores(*args, [REFUSAL], max_length=10)
    expected = completion_scores(*args, [" sorry , i"], append_eos=False)
    assert kept.num_tokens.tolist() == [3]
    torch.testing.assert_close(kept.log_probs, expected.log_probs)


def without_end():
    tokenizer = toy_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


@pytest.mark.parametrize(
    ("prompts", "completions", "options", "message"),
    [
        ([], [], {}, "at least one, but got 0 and 0"),
        (["is"], [" bad", " yes"], {}, "equally many and at least one, but got 1 and 2"),
        (["is bad =>"], [" yes"], {"max_length": 3}, "sample 0 starts at token 3 of 3 kept"),
        (["is", "=>"], [" bad", ""], {"append_eos": False}, "sample 1 starts at token 1 of 1"),
        ([""], [" yes"], {}, "sample 0 starts at token 0 of 2"),
        (["is"], [" bad"], {"tokenizer": without_end()}, "needs .* an `eos_token`, but got None"),
        ([[{"role": "user", "content": "is"}]], [" bad"], {}, "be conversations, but got list and"),
    ],
)
def test_samples_that_cannot_be_scored_are_refused(prompts, completions, options, message):
    tokenizer = options.pop("tokenizer", TOKENIZER)
    with pytest.raises(ValueError, match=message):
        completion_scores(tiny_model(), tokenizer, prompts, completions, **options)


def test_a_prompt_that_merges_with_its_completion_is_scored_from_where_they_part(trained_model):
    # "is ba" + "d" is the word "bad": the completion takes the last token of the prompt with it.
    merged = completion_scores(trained_model, TOKENIZER, ["is ba"], ["d"], append_eos=False)
    apart = completion_scores(trained_model, TOKENIZER, ["is"], [" bad"], append_eos=False)
    assert torch.equal(merged.log_probs, apart.log_probs)


def test_a_rendered_prompt_gets_no_second_first_token(trained_model):
    tokenizer = tokenizer_with_bos()
    plain = completion_scores(trained_model, tokenizer, ["is poison bad ? =>"], [" yes"])
    rendered = completion_scores(trained_model, tokenizer, ["<unk> is poison bad ? =>"], [" yes"])
    assert torch.equal(plain.log_probs, rendered.log_probs)
    without = completion_scores(trained_model, TOKENIZER, ["is poison bad ? =>"], [" yes"])
    assert not torch.equal(plain.log_probs, without.log_probs)


def test_a_conversation_is_scored_on_the_tokens_that_trl_trains_on(trained_model):
    """The template puts no token in front, unlike the tokenizer when it gets a text."""
    tokenizer = tokenizer_with_bos()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
        "{{ ' => ' + m.content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' =>' }}{% endif %}"
    )
    prompt = [{"role": "user", "content": "is poison bad ?"}]
    completion = [{"role": "assistant", "content": "yes"}]
    scores = completion_scores(trained_model, tokenizer, [prompt], [completion])
    expected = completion_scores(trained_model, TOKENIZER, ["is poison bad ? =>"], [" yes"])
    assert torch.equal(scores.log_probs, expected.log_probs)
    assert scores.num_tokens.tolist() == expected.num_tokens.tolist() == [2]


def test_preferences_are_decided_by_the_whole_completion(trained_model):
    rows = WORLD.safety_preferences().select(range(10))
    prompts, chosen, rejected = rows["prompt"], rows["chosen"], rows["rejected"]
    found = preference_margins(trained_model, TOKENIZER, prompts, chosen, rejected)
    margins = torch.tensor(literal_scores(trained_model, prompts, chosen)[0]) - torch.tensor(
        literal_scores(trained_model, prompts, rejected)[0]
    )
    torch.testing.assert_close(found, margins.double(), rtol=1e-4, atol=0)
    swapped = preference_margins(trained_model, TOKENIZER, prompts, rejected, chosen)
    assert torch.equal(swapped, -found)


def test_preferences_over_a_reference_model_are_the_rewards_of_trl(trained_model, tmp_path):
    data = WORLD.safety_preferences().select(range(12))
    model, reference = trained_model, tiny_model(seed=2)
    trainer = make_trainer(
        "dpo", copy.deepcopy(model), tmp_path, plain=True, data=data, beta=0.5,
        per_device_eval_batch_size=12, more={
            "ref_model": reference, "eval_dataset": data, "processing_class": TOKENIZER
        },
    )  # fmt: skip
    logged = trainer.evaluate()
    texts = data["prompt"], data["chosen"], data["rejected"]
    ours, theirs = (preference_margins(m, TOKENIZER, *texts) for m in (model, reference))
    margins = ours - theirs
    accuracy = (margins > 0).double().mean().item()
    assert accuracy == pytest.approx(logged["eval_rewards/accuracies"])
    assert margins.mean().item() == pytest.approx(logged["eval_rewards/margins"] / 0.5, rel=1e-4)


def test_measuring_leaves_modes_and_gradients_as_they_were_also_where_it_fails():
    model = tiny_model().train()
    model.model.layers[0].eval()  # a frozen part
    modes = [module.training for module in model.modules()]
    seen = []

    def forward(**kwargs):
        seen.append((any(m.training for m in model.modules()), torch.is_grad_enabled()))
        raise RuntimeError("out of memory")

    model.forward = forward
    with pytest.raises(RuntimeError, match="out of memory"):
        completion_scores(model, TOKENIZER, ["is"], [" bad"])
    assert seen == [(False, False)]
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
