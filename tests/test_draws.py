"""Which samples a refresh sees: a budget of tokens, turns, and none twice before all were seen."""

import dataclasses
from collections import Counter

import pytest
import torch
from datasets import Dataset

from ogpsa_trl import OGPSAConfig
from ogpsa_trl.data.groups import CapabilityGroup, Sample, beginning, trained_labels
from ogpsa_trl.method.draws import BEGINNING, Draws, mean_beginning, mean_length
from ogpsa_trl.training.budget import mean_training_length
from runs import max_difference, weights


def group(name, num_samples, length=10, num_parts=1, prompt=None):
    """Samples of which half is a prompt, if no other number of tokens is."""
    prompt = length // 2 if prompt is None else prompt
    features = {"input_ids": [0] * length, "labels": [-100] * prompt + [0] * (length - prompt)}
    samples = [Sample(f"{name}/{i}", features, length - prompt) for i in range(num_samples)]
    return CapabilityGroup(name, samples, num_parts, 4, lambda features: {})


def seen(draws, groups, refresh):
    """Names of the samples of a refresh, by group; groups whose turn it is not are left out."""
    names = {}
    for part in draws.parts(groups, refresh):
        if part is not None:
            names.setdefault(part.group, []).extend(sample.name for sample in part.samples)
    return names


def within(budget, groups, num_processes=1, num_parts=1):
    lengths = [mean_length(group.samples) for group in groups]
    beginnings = [mean_beginning(group.samples) for group in groups]
    return Draws.within(
        budget, lengths, beginnings, num_processes=num_processes, num_parts=num_parts, seed=3
    )


class TestBudget:
    @pytest.mark.parametrize("num_processes", [1, 2, 8])
    @pytest.mark.parametrize("budget", [1, 25, 100, 130, 500, 3000])
    def test_is_kept_where_it_buys_a_sample(self, budget, num_processes):
        groups = [group("a", 50, length=10), group("b", 60, length=30), group("c", 70, length=20)]
        draws = within(budget, groups, num_processes)
        spent = [
            sum(10 * "abbc".count(name) * len(names) for name, names in drawn.items())
            for drawn in (seen(draws, groups, refresh) for refresh in range(1, 31))
        ]
        # A refresh of one group has at least a sample for each process.
        assert max(spent) <= max(budget, num_processes * 30)
        assert sum(spent) / 30 > min(budget / 3, 8 * 60) / 2

    def test_gives_every_process_as_many_samples(self):
        draws = within(1000, [group("a", 50), group("b", 50)], num_processes=3)
        assert draws.num_samples == 9

    @pytest.mark.parametrize(("num_processes", "enough"), [(1, 8), (3, 9), (8, 8), (64, 64)])
    def test_buys_no_more_than_is_enough(self, num_processes, enough):
        draws = within(1e9, [group("a", 50), group("b", 50)], num_processes)
        assert draws.num_samples == enough

    def test_gives_every_gradient_of_a_group_a_sample(self):
        groups = [group("a", 50, num_parts=3), group("b", 50, num_parts=3)]
        draws = within(1, groups, num_processes=2, num_parts=3)
        assert (draws.num_samples, draws.num_groups) == (4, 1)
        parts = draws.parts(groups, 1)
        assert [part is None for part in parts].count(True) == 3
        assert sorted(len(part.samples) for part in parts if part is not None) == [1, 1, 2]


class TestTurns:
    def test_all_groups_have_one_in_the_first_refresh(self):
        groups = [group(name, 20) for name in "abc"]
        assert len(seen(Draws(3, 2, 1), groups, 0)) == 3

    @pytest.mark.parametrize("num_groups", [1, 2])
    def test_come_to_all_groups_equally_often(self, num_groups):
        groups = [group(name, 20) for name in "abc"]
        draws = Draws(3, 2, num_groups)
        turns = Counter(name for refresh in range(1, 31) for name in seen(draws, groups, refresh))
        assert set(turns.values()) == {10 * num_groups}


class TestSamples:
    @pytest.mark.parametrize("num_groups", [None, 1])
    def test_come_again_when_all_were_seen(self, num_groups):
        groups = [group("a", 12), group("b", 12)]
        draws = Draws(3, 5, num_groups)
        times = [seen(draws, groups, refresh).get("a", []) for refresh in range(61)]
        names = [name for drawn in times for name in drawn]
        for start in range(0, len(names) - 11, 12):
            assert len(set(names[start : start + 12])) == 12
        assert names[:12] != names[12:24]

    def test_are_others_for_another_seed(self):
        groups = [group("a", 50)]
        assert seen(Draws(3, 5), groups, 1) != seen(Draws(4, 5), groups, 1)

    @pytest.mark.parametrize("num_samples", [None, 20, 21])
    def test_are_all_where_there_are_no_more(self, num_samples):
        groups = [group("a", 20)]
        assert len(seen(Draws(3, num_samples), groups, 7)["a"]) == 20

    @pytest.mark.parametrize("num_groups", [None, 1, 2])
    @pytest.mark.parametrize("num_refreshes", [1, 2, 5, 40])
    def test_that_a_run_needs_are_no_more_than_it_draws(self, num_refreshes, num_groups):
        groups = [group(name, 50) for name in "abc"]
        draws = Draws(3, 4, num_groups)
        used = draws.used(groups, num_refreshes)
        drawn = [seen(draws, used, refresh) for refresh in range(num_refreshes)]
        for one in used:
            names = {name for names in drawn for name in names.get(one.name, [])}
            assert len(one.samples) - len(names) <= 4  # a turn more than the last group has had


class TestBeginnings:
    """Where few whole texts are bought, every second turn of a group reads beginnings."""

    GROUPS = tuple(group(name, 60, length=100, prompt=10) for name in "ab")

    def test_have_their_prompt_and_the_first_tokens_of_the_answer(self):
        """As many as count in the loss; a first token, which nothing predicts, does not."""
        for prompt in (0, 1, 10):
            [sample, *_] = group("a", 1, length=100, prompt=prompt).samples
            cut = beginning(sample, 8)
            labels = torch.tensor([cut.features["labels"]])
            assert len(cut.features["input_ids"]) == max(prompt, 1) + 8
            assert trained_labels(labels).sum() == cut.num_tokens == 8
            assert cut.name == sample.name
            assert beginning(cut, 8) is cut

    @pytest.mark.parametrize(("budget", "groups_at_once"), [(200, 2), (110, 1)])
    def test_are_every_second_turn_of_a_group_for_the_same_tokens(self, budget, groups_at_once):
        draws = within(budget, self.GROUPS)
        used, turns = draws.used(self.GROUPS, 41), Counter()
        for refresh in range(1, 41):
            drawn = [part for part in draws.parts(used, refresh) if part is not None]
            assert len(drawn) == groups_at_once
            for part in drawn:
                turns[part.group] += 1
                lengths = [len(sample.features["input_ids"]) for sample in part.samples]
                is_whole = turns[part.group] % 2 == 0
                assert lengths == ([100] if is_whole else [18] * (budget // groups_at_once // 18))

    def test_are_none_of_texts_without_prompts(self):
        text, answers = group("a", 60, length=100, prompt=0), group("b", 60, length=100, prompt=10)
        assert within(200, [text, answers]).num_beginnings == (0, 5)

    def test_are_none_of_texts_that_are_hardly_longer(self):
        assert within(30, [group("a", 20, length=20, prompt=10), group("b", 9)]).num_beginnings == (
            0, 0,
        )  # fmt: skip

    def test_are_none_where_they_buy_no_more_samples(self):
        assert within(100, [group("a", 20, length=100, prompt=80)]).num_beginnings == (0,)
        assert within(1600, self.GROUPS).num_beginnings == (0, 0)
        assert within(1400, self.GROUPS).num_beginnings == (8, 8)

    @pytest.mark.parametrize("budget", [60, 200, 900])
    def test_are_of_other_samples_than_whole_texts(self, budget):
        draws = within(budget, self.GROUPS)
        used = draws.used(self.GROUPS, 41)
        whole, begun = [], []
        for refresh in range(41):
            for part in draws.parts(used, refresh)[:1]:
                for sample in part.samples if part is not None else ():
                    (begun if sample.num_tokens == BEGINNING else whole).append(sample.name)
        assert whole and begun and not {*whole} & {*begun}
        for names in (whole, begun):  # none comes again before all have come
            assert len(set(names[: len({*names})])) == len({*names})

    def test_of_a_group_of_one_are_the_text_itself(self):
        groups = [group("a", 1, length=100, prompt=10)]
        draws = within(200, groups)
        used = draws.used(groups, 9)
        assert all(draws.parts(used, refresh)[0].samples == used[0].samples for refresh in range(4))

    @pytest.mark.parametrize("budget", [30, 200])
    def test_are_the_same_in_a_longer_run(self, budget):
        """A checkpoint holds the starting point of the samples of a shorter one."""
        draws = within(budget, self.GROUPS)
        shorter, longer = (draws.used(self.GROUPS, number) for number in (7, 13))
        for one, other in zip(shorter, longer, strict=True):
            known = {sample.name: sample for sample in other.samples}
            assert all(known[sample.name] == sample for sample in one.samples)


class TestTrainingLength:
    """Tokens of a row of training data: both texts of a pair, each cut where TRL cuts it."""

    @pytest.mark.parametrize(
        ("row", "length"),
        [
            ({"input_ids": [1] * 7}, 7),
            ({"input_ids": [1] * 70}, 20),
            ({"prompt_ids": [1] * 5, "chosen_ids": [1] * 3, "rejected_ids": [1] * 40}, 8 + 20),
            ({"prompt_ids": [1] * 5, "completion_ids": [1] * 3, "label": True}, 8),
            ({"prompt": "How?"}, None),
        ],
        ids=["sft", "cut", "dpo", "kto", "texts"],
    )
    @pytest.mark.parametrize("is_stream", [False, True])
    def test_is_known_by_the_columns(self, row, length, is_stream):
        dataset = Dataset.from_list([row] * 3)
        dataset = dataset.to_iterable_dataset() if is_stream else dataset
        assert mean_training_length(dataset, 20) == length


def test_nothing_is_known_of_data_that_are_no_data_set():
    assert mean_training_length([{"input_ids": [1, 2]}] * 3, 20) is None


def test_all_groups_have_their_turn_until_a_direction_is_known(make):
    """The divergence has none at the start: the refresh after the first step sees all once more."""
    trainer = make(
        config=OGPSAConfig(capability_token_share=0.02, refresh_interval=3), max_steps=6,
        optim="adamw_torch",
    )  # fmt: skip
    trainer.train()
    assert trainer.constrained_step.draws.num_groups == 1
    seen = [
        (entry["step"], name)
        for entry in trainer.state.log_history
        for name in ("skills", "language")
        if f"ogpsa/capability_loss/{name}" in entry
    ]
    both = [(step, name) for step in (1, 2) for name in ("skills", "language")]
    assert seen[:4] == both
    assert len(seen) == 5


def test_all_groups_have_their_turn_where_a_checkpoint_has_other_gradients(make, tmp_path):
    """A gradient of a group at rest would be zero: there is no older one."""
    options = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}
    config = OGPSAConfig(capability_token_share=0.02)
    make(config=config, max_steps=4, **options).train()
    trainer = make(
        config=dataclasses.replace(config, gradients_per_group=2), max_steps=5, **options
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    entry = next(e for e in trainer.state.log_history if e.get("step") == 5)
    assert trainer.constrained_step.draws.num_groups == 1
    assert {f"ogpsa/capability_loss/{name}" for name in ("skills", "language")} <= entry.keys()


@pytest.mark.parametrize("share", [0.5, 0.25, 0.05])
def test_a_run_reads_its_share_of_tokens(share, make):
    """The smallest share buys less than one sample of each group."""
    trainer = make(
        config=OGPSAConfig(capability_token_share=share), max_steps=6, optim="adamw_torch",
        per_device_train_batch_size=4, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train()
    draws, groups = trainer.constrained_step.draws, trainer.capability_groups
    assert (draws.num_groups is None) == (share > 0.1)
    read = [
        sum(len(s.features["input_ids"]) for p in draws.parts(groups, step) if p for s in p.samples)
        for step in range(1, 61)
    ]
    budget = share * 8 * mean_training_length(trainer.train_dataset, None)
    if share > 0.1:
        assert 0.5 * budget < sum(read) / 60 < 1.05 * budget
    # No more samples are measured at the start than the run draws, with a second first refresh.
    assert all(len(group.samples) <= 7 * draws.num_samples for group in groups)
    assert len(trainer.capability_loss.start.samples) == sum(len(g.samples) for g in groups)


def test_a_run_reads_beginnings_and_resumes_bit_for_bit(make, tmp_path):
    """Answers that are long beside those of training; the start is measured of what is read."""
    rows = [{"prompt": "add 1 2 =>", "completion": " 3" * n} for n in range(30, 42)]
    options = {
        "capability": {"sums": Dataset.from_list(rows)}, "optim": "adamw_torch",
        "config": OGPSAConfig(capability_token_share=1.0),
        "save_strategy": "steps", "save_steps": 3,
    }  # fmt: skip
    straight = make(max_steps=5, **options)
    straight.train()
    [number] = straight.constrained_step.draws.num_beginnings
    assert number > straight.constrained_step.draws.num_samples
    start = straight.capability_loss.start
    lengths = {sample.num_tokens for sample in start.samples}
    assert BEGINNING in lengths and max(lengths) > 30
    resumed = make(max_steps=5, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert max_difference(weights(resumed), weights(straight)) == 0
