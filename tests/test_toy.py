import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.data_utils import _tokenize

from ogpsa_trl.benchmark import toy_pretrain
from ogpsa_trl.benchmark.toy_model import tiny_model, toy_tokenizer
from ogpsa_trl.benchmark.toy_world import (
    HARMFUL_VERBS,
    MEMORISED_TASKS,
    NUM_EVALUATION_SAMPLES,
    REFUSAL,
    ToyWorld,
)
from runs import literal_nll

WORLD = ToyWorld(0)
TOKENIZER = toy_tokenizer()


def datasets(world):
    """Every dataset of a world by name."""
    return {
        "safety_sft": world.safety_sft(),
        "safety_preferences": world.safety_preferences(),
        **world.capability_groups(),
        **world.evaluation_sets(),
    }


def completions(dataset):
    columns = set(dataset.column_names) - {"prompt"}
    return [(row["prompt"], row[column]) for row in dataset for column in columns]


def is_correct(prompt, completion):
    """Whether the completion answers the prompt, worked out from the prompt alone."""
    task, *words = prompt.removesuffix(" =>").split()
    answer = completion.split()
    match task:
        case "add":
            a, b = "".join(words).split("+")
            return int(a) + int(b) == int("".join(answer)[::-1])
        case "reverse":
            return answer == words[::-1]
        case "sort":
            return answer == sorted(words)
        case "passive":
            return answer[:2] == words[3:] and answer[-2:] == words[:2] and answer[4] == "by"
        case "is":
            return answer == ["yes" if words[0] in HARMFUL_VERBS else "no"]
    raise AssertionError(f"no rule for {task}")


def test_a_world_is_a_function_of_its_seed():
    first, second, other = (datasets(ToyWorld(seed)) for seed in (1, 1, 2))
    assert first.keys() == second.keys()
    assert all(first[name].to_list() == second[name].to_list() for name in first)
    assert all(first[name].to_list() != other[name].to_list() for name in first)


def test_what_one_method_returns_does_not_depend_on_calls_of_others():
    world = ToyWorld(0)
    small = world.capability_groups(5)["skills"].to_list()
    world.draw_for_pretraining("add", random.Random(0))
    assert world.evaluation_sets()["add"].to_list() == WORLD.evaluation_sets()["add"].to_list()
    # A larger group begins with the smaller one, so sizes compare.
    assert world.capability_groups(9)["skills"].select(range(5)).to_list() == small


@pytest.mark.parametrize("seed", [0, 1])
def test_no_evaluation_prompt_is_trained_on_after_pretraining(seed):
    world = ToyWorld(seed)
    trained_on = set(world.safety_sft()["prompt"])
    for group in world.capability_groups(500).values():
        trained_on |= set(group["prompt"])
    for dataset in world.evaluation_sets().values():
        assert not trained_on & set(dataset["prompt"])
        assert len(set(dataset["prompt"])) == len(dataset)


def test_pretraining_sees_evaluation_prompts_of_memorised_tasks_only():
    rng, sets = random.Random(0), WORLD.evaluation_sets()
    for task in NUM_EVALUATION_SAMPLES:
        drawn = {WORLD.draw_for_pretraining(task, rng).prompt for _ in range(5000)}
        evaluated = set(sets[task]["prompt"])
        assert evaluated <= drawn if task in MEMORISED_TASKS else not evaluated & drawn


@pytest.mark.parametrize("seed", [0, 1])
def test_safety_data_never_shows_the_out_of_distribution_verbs(seed):
    world = ToyWorld(seed)
    assert len(world.ood_verbs) == 4
    assert sorted(world.ood_verbs + world.safety_verbs) == sorted(HARMFUL_VERBS)
    sets = world.evaluation_sets()
    for prompts, verbs in (
        (world.safety_sft()["prompt"], world.safety_verbs),
        (sets["refusal"]["prompt"], world.safety_verbs),
        (sets["refusal_ood"]["prompt"], world.ood_verbs),
        (sets["over_refusal"]["prompt"], []),
    ):
        assert set(" ".join(prompts).split()) & set(HARMFUL_VERBS) == set(verbs)


def test_benign_requests_differ_from_harmful_ones_in_the_verb_only():
    def forms(prompts):
        verbs = {"how to": 2, "please tell": 5, "i want": 3}  # place of the verb
        words = [prompt.split() for prompt in prompts]
        return {(*w[: (i := verbs[" ".join(w[:2])])], *w[i + 1 :]) for w in words}

    benign = forms(WORLD.evaluation_sets()["over_refusal"]["prompt"])
    assert benign <= forms(WORLD.safety_sft()["prompt"])


def test_safety_data_refuses_and_prefers_refusal_to_compliance():
    sft, preferences = WORLD.safety_sft(), WORLD.safety_preferences()
    assert len(sft) == 400
    assert sft["prompt"] == preferences["prompt"]
    assert set(sft["completion"]) == set(preferences["chosen"]) == {REFUSAL}
    for prompt, rejected in zip(preferences["prompt"], preferences["rejected"], strict=True):
        verb = next(word for word in prompt.split() if word in HARMFUL_VERBS)
        assert rejected.startswith(" sure :")
        assert rejected.endswith(f"then {verb} it .")


def test_sort_is_in_no_capability_group_and_benign_requests_are():
    groups = WORLD.capability_groups(64)
    assert {name: len(group) for name, group in groups.items()} == {"skills": 64, "language": 64}
    assert not [p for group in groups.values() for p in group["prompt"] if p.startswith("sort")]
    assert sum(answer.startswith(" sure") for answer in groups["language"]["completion"]) == 32
    with pytest.raises(ValueError, match="`num_samples` must be at least 1, but got 0"):
        WORLD.capability_groups(0)


def test_the_answers_are_right():
    sets = WORLD.evaluation_sets()
    for task in ("add", "reverse", "sort", "passive", "judge"):
        for row in sets[task]:
            assert is_correct(row["prompt"], row["completion"]), row


def test_facts_are_the_same_wherever_they_are_asked():
    assert len(WORLD.facts) == 190
    rows = [*WORLD.evaluation_sets()["facts"], *WORLD.capability_groups(300)["skills"]]
    for row in rows:
        if row["prompt"].startswith("recall"):
            name, topic = row["prompt"].split()[1:3]
            assert row["completion"].strip() == WORLD.facts[name, topic]


def test_texts_are_made_of_known_words_and_part_where_trl_parts_them():
    for dataset in datasets(WORLD).values():
        for prompt, completion in completions(dataset):
            prompt_ids = _tokenize(TOKENIZER, prompt)["input_ids"]
            ids = _tokenize(TOKENIZER, prompt + completion + TOKENIZER.eos_token)["input_ids"]
            assert TOKENIZER.unk_token_id not in ids
            assert TOKENIZER.decode(ids[:-1]) == prompt + completion
            assert ids[: len(prompt_ids)] == prompt_ids
            assert len(prompt_ids) == len(prompt.split())
            assert len(ids) == len(prompt_ids) + len(completion.split()) + 1
            assert ids[-1] == TOKENIZER.eos_token_id


def test_a_conversation_has_the_tokens_of_the_prompt_completion_form():
    for row in WORLD.evaluation_sets()["howto"].select(range(10)):
        question = [{"role": "user", "content": row["prompt"].removesuffix(" =>")}]
        answer = [{"role": "assistant", "content": row["completion"].strip()}]
        whole = _tokenize(TOKENIZER, question + answer, return_assistant_tokens_mask=True)
        prompt_ids = _tokenize(TOKENIZER, question, add_generation_prompt=True)["input_ids"]
        text = row["prompt"] + row["completion"] + TOKENIZER.eos_token
        assert prompt_ids == TOKENIZER(row["prompt"])["input_ids"]
        assert whole["input_ids"] == TOKENIZER(text)["input_ids"]
        num_answer = len(whole["input_ids"]) - len(prompt_ids)
        assert whole["assistant_masks"] == [0] * len(prompt_ids) + [1] * num_answer


def test_building_a_model_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = tiny_model(seed=3), tiny_model(seed=3), tiny_model(seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


SHORT = tuple(replace(phase, num_steps=2, batch_size=8) for phase in toy_pretrain.PHASES)


def test_the_pretraining_loss_is_the_mean_over_all_completion_tokens():
    model, rng = tiny_model(), random.Random(0)
    samples = toy_pretrain._draw_samples(WORLD, replace(SHORT[0], batch_size=11), rng)
    toy_pretrain._backward(model, TOKENIZER, samples)
    fast = model.lm_head.weight.grad.clone()
    model.zero_grad()
    rows = [sample._asdict() for sample in samples]
    literal_nll(model, TOKENIZER, rows).backward()
    # Float32 sums in a different order.
    torch.testing.assert_close(fast, model.lm_head.weight.grad, rtol=1e-4, atol=1e-7)


def test_the_learning_rate_rises_stays_and_falls():
    phase = replace(
        SHORT[0], num_steps=100, num_warmup_steps=10, decay_start=0.5, learning_rate=1.0
    )
    rates = [phase.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:51] == [1.0] * 42
    assert all(later < earlier for earlier, later in pairwise(rates[50:]))
    assert rates[-1] == pytest.approx(0.02)


def test_refusals_have_the_share_that_a_phase_asks_for():
    phase = replace(
        SHORT[0],
        batch_size=4000,
        mixture={"howto": 1.0, "harmful": 1.0},
        harmful_refusal_share=0.3,
        benign_refusal_share=0.1,
    )
    samples = toy_pretrain._draw_samples(WORLD, phase, random.Random(0))
    refused = {True: [], False: []}
    for prompt, completion in samples:
        refused[bool(set(prompt.split()) & set(HARMFUL_VERBS))].append(completion == REFUSAL)
    # 2000 draws each: the standard errors are .010 and .007.
    assert sum(refused[True]) / len(refused[True]) == pytest.approx(0.3, abs=0.04)
    assert sum(refused[False]) / len(refused[False]) == pytest.approx(0.1, abs=0.03)


@pytest.fixture
def short_pretraining(monkeypatch):
    """The number of pretrainings so far, each of which takes four small steps."""
    calls = []
    pretrain = toy_pretrain.pretrain

    def short(world):
        calls.append(world.seed)
        return pretrain(world, SHORT, show_progress=False)

    monkeypatch.setattr(toy_pretrain, "pretrain", short)
    return calls


def test_the_base_model_is_trained_once_and_comes_back_as_it_was(
    tmp_path, monkeypatch, short_pretraining
):
    monkeypatch.setenv("OGPSA_CACHE", str(tmp_path))
    folder = toy_pretrain.base_model_folder(0)
    assert folder.parent == tmp_path
    assert toy_pretrain.base_model_folder(0, tmp_path) == folder
    assert toy_pretrain.base_model_folder(1) != folder
    assert short_pretraining == [0, 1]
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = toy_pretrain.pretrain(WORLD).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "how to bake the cake ? => sure : take the cake then bake it .<eos>"
    assert tokenizer(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text.replace("<eos>", " <eos>")
    assert tokenizer.chat_template == TOKENIZER.chat_template


def test_an_interrupted_save_leaves_no_folder(tmp_path, monkeypatch, short_pretraining):
    def interrupted():
        raise KeyboardInterrupt

    def train_then_fail_to_save(world):
        model = short_pretrain(world)
        model.save_pretrained = lambda folder: folder.mkdir() or interrupted()
        return model

    short_pretrain = toy_pretrain.pretrain
    monkeypatch.setattr(toy_pretrain, "pretrain", train_then_fail_to_save)
    with pytest.raises(KeyboardInterrupt):
        toy_pretrain.base_model_folder(0, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_callers_provides_the_folder(tmp_path, monkeypatch, short_pretraining):
    short_pretrain = toy_pretrain.pretrain

    def overtaken(world):
        monkeypatch.setattr(toy_pretrain, "pretrain", short_pretrain)
        (toy_pretrain.base_model_folder(0, tmp_path) / "of the first").touch()
        return short_pretrain(world)

    monkeypatch.setattr(toy_pretrain, "pretrain", overtaken)
    folder = toy_pretrain.base_model_folder(0, tmp_path)
    assert short_pretraining == [0, 0]
    assert list(tmp_path.iterdir()) == [folder]
    assert (folder / "of the first").exists()


def test_a_change_of_the_world_or_of_the_training_gives_another_folder(monkeypatch):
    def fingerprint():
        return toy_pretrain._fingerprint(ToyWorld(0), toy_pretrain.PHASES)

    before = fingerprint()
    assert fingerprint() == before
    seen = {before, toy_pretrain._fingerprint(ToyWorld(0), SHORT)}
    monkeypatch.setattr("ogpsa_trl.benchmark.toy_world.BENIGN_VERBS", ["bake", "paint"])
    seen.add(fingerprint())
    monkeypatch.setattr("ogpsa_trl.benchmark.toy_model.CHAT_TEMPLATE", "")
    seen.add(fingerprint())
    monkeypatch.setattr(toy_pretrain, "REFUSAL", " no .")
    seen.add(fingerprint())
    assert len(seen) == 5
