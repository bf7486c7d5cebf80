"""Capability groups: the tokens and labels of TRL, each sample exactly once, whatever the batches.

`test_tokens_and_labels_are_those_of_trl` pins `SFTTrainer._prepare_dataset`, a private method that
`ogpsa_trl.data` calls: it fails when a version of TRL changes it.
"""

import functools
import itertools
import logging
import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from ogpsa_trl.benchmark.toy_model import CHAT_TEMPLATE, tiny_model, toy_tokenizer
from ogpsa_trl.data.groups import named_groups
from ogpsa_trl.data.preparation import Preparation, prepare_group
from runs import WORLD, make_trainer, paper, to_messages

TOKENIZER = toy_tokenizer()
# Prompts of 5 to 9 tokens, completions of 2 to 10 with the end token; all different.
ROWS = list({row["prompt"]: row for row in WORLD.capability_groups(20)["language"]}.values())[:10]


def conversation(row):
    """A prompt-completion row as a conversation that renders to the same text."""
    [messages] = to_messages([row])["messages"]
    return messages


def tokenised(row, **more):
    ids = TOKENIZER(row["prompt"] + row["completion"] + "<eos>")["input_ids"]
    return {"input_ids": ids, **{name: make(row, ids) for name, make in more.items()}}


def prompt_length(row):
    return len(row["prompt"].split())


FORMATS = {
    "text": lambda row: {"text": row["prompt"] + row["completion"]},
    "text with its end": lambda row: {"text": row["prompt"] + row["completion"] + "<eos>"},
    "prompt-completion": dict,
    "messages": lambda row: {"messages": conversation(row)},
    "messages of two turns": lambda row: {"messages": conversation(row) + conversation(ROWS[0])},
    "conversations": lambda row: {
        "conversations": [{"from": m["role"], "value": m["content"]} for m in conversation(row)]
    },
    "conversational completion": lambda row: {
        "prompt": conversation(row)[:1],
        "completion": conversation(row)[1:],
    },
    "tokenised": tokenised,
    "tokenised with labels": lambda row: tokenised(
        row, labels=lambda row, ids: [-100] * 3 + ids[3:-1] + [-100]
    ),
    "tokenised with a completion mask": lambda row: tokenised(
        row,
        completion_mask=lambda row, ids: [int(i >= prompt_length(row)) for i in range(len(ids))],
    ),
}


def dataset(format_name, rows=ROWS):
    return Dataset.from_list([FORMATS[format_name](row) for row in rows])


def preparation(**settings):
    return Preparation(**{
        "processing_class": TOKENIZER, "tokenizer": TOKENIZER, "max_length": 64, **settings
    })  # fmt: skip


def group(rows, preparation=preparation(), **options):  # noqa: B008 - frozen
    rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
    defaults = {"num_samples": 10, "num_parts": 1, "batch_size": 4, "seed": 0}
    return prepare_group("facts", rows, preparation, **defaults | options)


@functools.cache
def whole_group():
    return group(ROWS)


def divided(num_parts=1, num_samples=10, batch_size=4):
    """The first samples of the group, in other parts and batches."""
    whole = whole_group()
    samples = whole.samples[:num_samples]
    return replace(whole, samples=samples, num_parts=num_parts, batch_size=batch_size)


def samples_of(batches):
    """The samples in some batches without their padding: (tokens, labels), in a fixed order."""
    samples = []
    for batch in batches:
        tensors = [batch.inputs[name] for name in ("input_ids", "labels", "attention_mask")]
        for ids, labels, mask in zip(*tensors[:2], tensors[2].bool(), strict=True):
            assert (labels[~mask] == -100).all()
            samples.append((ids[mask].tolist(), labels[mask].tolist()))
    return sorted(samples)


def samples(capability_group):
    return samples_of(b for part in capability_group.parts() for b in part.batches_of(0, 1))


# Settings of a run, each with the formats that it treats in different ways.
SETTINGS = {
    "defaults": ({}, FORMATS),
    "completion only": (
        {"completion_only_loss": True}, ("prompt-completion", "tokenised with a completion mask")),
    "whole sequence": ({"completion_only_loss": False}, ("prompt-completion",)),
    "assistant only": (
        {"assistant_only_loss": True}, ("messages of two turns", "conversational completion")),
    "assistant only, prompt too": (
        {"assistant_only_loss": True, "completion_only_loss": False},
        ("conversational completion",)),
    "keep start": ({"max_length": 8}, ("prompt-completion", "tokenised with labels")),
    "keep end": (
        {"max_length": 5, "truncation_mode": "keep_end"}, ("messages", "tokenised with labels")),
    "no limit": ({"max_length": None}, ("prompt-completion",)),
    "another end token": ({"eos_token": "yes"}, ("text", "messages")),
}  # fmt: skip


def assert_same_as_trl(groups, tmp_path, tokenizer=None, **settings):
    """The same rows as training data of trainers of TRL and as capability data of one of ours."""
    model, more = tiny_model(), {"processing_class": tokenizer or toy_tokenizer()}
    ours = make_trainer(
        "sft", model, tmp_path, data=next(iter(groups.values())), more=more, capability=groups,
        config=paper(num_samples=len(ROWS), gradients_per_group=2), **settings,
    )  # fmt: skip
    for made in ours.capability_groups:
        rows = groups[made.name]
        pin = make_trainer("sft", model, tmp_path, plain=True, data=rows, more=more, **settings)
        expected = sorted((row["input_ids"], row["labels"]) for row in pin.train_dataset)
        assert samples(made) == expected, made.name
        assert len(made.samples) == len(expected) > 0
    return ours.capability_groups


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
@pytest.mark.parametrize("setting", SETTINGS)
def test_tokens_and_labels_are_those_of_trl(setting, tmp_path):
    settings, names = SETTINGS[setting]
    groups = {name: dataset(name) for name in names}
    first, *_ = assert_same_as_trl(groups, tmp_path, **settings)
    if setting == "keep start":
        assert len(first.samples) < len(ROWS), "some prompts are meant to fill `max_length`"


@pytest.mark.parametrize("case", ["another text column", "no padding", "arguments of a template"])
def test_less_usual_data_and_tokenizers_are_those_of_trl(case, tmp_path):
    tokenizer, rows, settings = toy_tokenizer(), dataset("prompt-completion"), {}
    if case == "another text column":
        rows, settings = (
            dataset("text").rename_column("text", "body"),
            {"dataset_text_field": "body"},
        )
    elif case == "no padding":
        tokenizer.pad_token = None
    else:
        tokenizer.chat_template = "{{ polite + ' ' }}" + CHAT_TEMPLATE
        polite = {"chat_template_kwargs": {"polite": "please"}}
        rows = Dataset.from_list([row | polite for row in dataset("messages")])
    [made] = assert_same_as_trl({"facts": rows}, tmp_path, tokenizer=tokenizer, **settings)
    if case == "arguments of a template":
        assert all(TOKENIZER.decode(ids).startswith("please") for ids, _ in samples(made))


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
def test_capability_data_of_dpo_is_tokenised_as_that_of_sft(base_model_path, tmp_path):
    names = ("prompt-completion", "messages", "tokenised with labels")
    groups = {name: dataset(name) for name in names}
    cut = {"max_length": 8, "truncation_mode": "keep_end"}
    sft, dpo = (
        make_trainer(stage, base_model_path, tmp_path, capability=groups, **cut).capability_groups
        for stage in ("sft", "dpo")
    )
    assert list(map(samples, sft)) == list(map(samples, dpo))
    assert [group.name for group in dpo] == list(names)


def test_a_chat_template_of_its_own_replaces_that_of_the_tokenizer():
    template, tokenizer = "{{ 'please ' }}" + CHAT_TEMPLATE, toy_tokenizer()
    tokenizer.chat_template = template
    own = preparation(processing_class=tokenizer, tokenizer=tokenizer)
    actual = samples(group(dataset("messages"), preparation(chat_template=template)))
    assert actual == samples(group(dataset("messages"), own)) != samples(group(dataset("messages")))


def test_assistant_only_loss_is_about_conversations_however_they_are_written():
    """TRL itself refuses it for from/value conversations. A group of plain text has none."""
    only = preparation(assistant_only_loss=True)
    conversations, messages = (group(dataset(n), only) for n in ("conversations", "messages"))
    assert samples(conversations) == samples(messages)
    for name in ("text", "prompt-completion", "tokenised"):
        assert samples(group(dataset(name), only)) == samples(group(dataset(name)))


REJECTED = " can help"  # these words are in no row
PREFERRED = [
    {"prompt": row["prompt"], "chosen": row["completion"], "rejected": REJECTED} for row in ROWS
]


def preferred_turns(*, implicit, **more):
    """Preferences between conversations, which begin with the prompt if it is `implicit`."""
    rows = []
    for prompt, chosen in map(conversation, ROWS):
        before, rejected = (
            [prompt] if implicit else [],
            {"role": "assistant", "content": "can help"},
        )
        row = {"chosen": [*before, chosen], "rejected": [*before, rejected], **more}
        rows.append(row if implicit else row | {"prompt": [prompt]})
    return rows


POLITE = {"chat_template_kwargs": {"polite": "please"}}
# Rows, those of which they are to be the tokens, and settings.
PREFERENCES = {
    "texts": (
        [row | {"score_chosen": 8.0, "source": "unknown"} for row in PREFERRED],
        dataset("prompt-completion"), {}),
    "loss on the prompt too": (
        PREFERRED, dataset("prompt-completion"), {"completion_only_loss": False}),
    "a stream": (
        Dataset.from_list(PREFERRED).to_iterable_dataset(), dataset("prompt-completion"), {}),
    "texts with the prompt in both": (
        [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in PREFERRED],
        dataset("prompt-completion"), {}),
    "conversations": (
        preferred_turns(implicit=False), dataset("conversational completion"), {}),
    "conversations with the prompt in both": (
        preferred_turns(implicit=True), dataset("conversational completion"), {}),
    # The form of HuggingFaceH4/ultrafeedback_binarized.
    "a text prompt beside conversations": (
        [row | {"prompt": row["chosen"][0]["content"], "messages": row["chosen"]}
         for row in preferred_turns(implicit=True)],
        dataset("conversational completion"), {}),
    "arguments of the chat template": (  # TRL's DPO reads this column too
        preferred_turns(implicit=False, **POLITE),
        [row | POLITE for row in dataset("conversational completion")],
        {"chat_template": "{{ polite + ' ' }}" + CHAT_TEMPLATE}),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "completions", "settings"), PREFERENCES.values(), ids=PREFERENCES)
def test_of_preferences_the_prompt_and_the_chosen_completion_are_used(rows, completions, settings):
    prepared = preparation(**settings)
    taken = samples(group(rows, prepared))
    assert taken == samples(group(completions, prepared))
    rejected = set(TOKENIZER(REJECTED)["input_ids"])
    assert rejected.isdisjoint(token for ids, _ in taken for token in ids)


@pytest.mark.parametrize("num_parts", [1, 3, 10])
def test_parts_are_disjoint_and_cover_the_samples(num_parts):
    parts = divided(num_parts).parts()
    assert len(parts) == num_parts
    # All rows are different, so samples that are counted once are disjoint.
    assert samples_of(b for part in parts for b in part.batches_of(0, 1)) == samples(divided())
    sizes = [len(part.samples) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_the_token_count_is_the_number_of_predicted_tokens():
    """Nothing predicts the first token of a sequence, so its label never counts."""
    two_parts = group(dataset("text"), num_parts=2)
    for part in two_parts.parts():
        batches = part.batches_of(0, 1)
        labels = [label for _, labels in samples_of(batches) for label in labels[1:]]
        assert part.num_tokens == sum(label != -100 for label in labels)
    num_words = sum(len((row["prompt"] + row["completion"]).split()) for row in ROWS)
    assert two_parts.num_tokens == num_words  # the end token in, the first one out
    assert divided().num_tokens == sum(len(row["completion"].split()) + 1 for row in ROWS)


@pytest.mark.parametrize("batch_size", [1, 3, 11])
def test_the_batch_size_does_not_change_samples_or_token_counts(batch_size):
    one, other = (divided(num_parts=2, batch_size=size) for size in (4, batch_size))
    for left, right in zip(one.parts(), other.parts(), strict=True):
        assert samples_of(left.batches_of(0, 1)) == samples_of(right.batches_of(0, 1))
        assert left.num_tokens == right.num_tokens
    sizes = [[len(batch.samples) for batch in part.batches_of(0, 1)] for part in other.parts()]
    assert all(0 < size <= batch_size for part in sizes for size in part)
    assert [len(part) for part in sizes] == [math.ceil(5 / batch_size)] * 2


def test_a_batch_holds_samples_of_similar_length():
    batches = divided().whole().batches_of(0, 1)
    lengths = [n for b in batches for n in b.inputs["attention_mask"].sum(dim=1).tolist()]
    assert lengths == sorted(lengths)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_every_process_has_equally_many_batches_and_each_sample_once(batch_size):
    for num_samples, num_processes in itertools.product(range(1, 11), range(1, 6)):
        [part] = divided(num_samples=num_samples, batch_size=batch_size).parts()
        shares = [part.batches_of(index, num_processes) for index in range(num_processes)]
        num_batches = part.num_batches_of(num_processes)
        assert [len(share) for share in shares] == [num_batches] * num_processes
        assert num_batches == math.ceil(num_samples / num_processes / batch_size)
        used = [sample.name for share in shares for batch in share for sample in batch.samples]
        assert sorted(used) == sorted(f"facts/{index}" for index in range(num_samples))
        # No process waits for another's batch of four while it has none.
        largest = max(len(batch.samples) for share in shares for batch in share)
        assert largest == math.ceil(num_samples / (num_batches * num_processes))


def test_a_spare_batch_has_no_trainable_token():
    [part] = divided(num_samples=1).parts()
    [[real], [spare]] = (part.batches_of(index, 2) for index in range(2))
    assert spare.samples == [] and len(real.samples) == 1
    assert spare.inputs.keys() == real.inputs.keys()
    assert torch.equal(spare.inputs["input_ids"], real.inputs["input_ids"])
    assert (spare.inputs["labels"] == -100).all()
    assert (real.inputs["labels"] != -100).any()


def test_samples_without_a_trainable_token_are_left_out():
    rows = [tokenised(ROWS[0]), {"input_ids": [3, 4, 5], "labels": [-100] * 3}, tokenised(ROWS[1])]
    rows[0]["labels"], rows[2]["labels"] = rows[0]["input_ids"], rows[2]["input_ids"]
    assert [sample.name for sample in group(rows).samples] in (
        ["facts/0", "facts/1"], ["facts/0", "facts/2"], ["facts/1", "facts/2"],
    )  # fmt: skip


def test_the_seed_decides_which_samples_are_chosen():
    rows = [{"text": f"{a} {b} {c}"} for a, b, c in itertools.product("ABCDE", repeat=3)]
    given = Dataset.from_list(rows)
    first, again, other = (samples(group(given, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert given.to_list() == rows  # their order is left alone
    everything = samples(group(rows, num_samples=len(rows)))
    for choice in (first, other):
        assert len({tuple(ids) for ids, _ in choice}) == 10
        assert all(sample in everything for sample in choice)


def test_a_stream_gives_its_first_samples_and_is_read_no_further():
    num_read = itertools.count()

    def endless():
        for row, _ in zip(itertools.cycle(ROWS), num_read, strict=False):
            yield dict(row)

    used = group(IterableDataset.from_generator(endless), num_samples=5, seed=1)
    assert samples(used) == samples(group(ROWS[:5]))
    assert next(num_read) <= 6  # `IterableDataset.take` looks one sample ahead


@pytest.mark.parametrize("as_stream", [False, True])
def test_fewer_samples_than_asked_for_are_all_used_with_a_warning(as_stream, caplog):
    rows = Dataset.from_list(ROWS[:3])
    used = group(rows.to_iterable_dataset() if as_stream else rows, num_samples=8)
    assert len(used.samples) == 3
    assert samples(used) == samples(group(ROWS[:3], num_samples=3))
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == [
        "Capability group 'facts' has 3 samples, fewer than `num_samples` (8). All are used."
    ]


def test_the_log_says_what_a_group_is_made_of(caplog):
    caplog.set_level(logging.INFO, "ogpsa_trl.data.preparation")
    prepared = group(ROWS, seed=5)
    chosen, made = [record.getMessage() for record in caplog.records]
    start, end = "Capability group 'facts': seed 5 chooses the rows ", " of 10"
    assert chosen.startswith(start)
    assert chosen.endswith(end)
    rows = chosen.removeprefix(start).removesuffix(end).split(", ")
    assert sorted(map(int, rows)) == list(range(10))
    tokens = prepared.num_tokens
    assert made == f"Capability group 'facts': 10 samples, {tokens} tokens in the loss"


class TestNamedGroups:
    ROWS = Dataset.from_list(ROWS)

    def test_one_data_set_is_one_group(self):
        for rows in (self.ROWS, self.ROWS.to_iterable_dataset()):
            assert named_groups(rows) == {"capability": rows}

    def test_groups_keep_their_names_and_order(self):
        groups = {"second": self.ROWS, "first": self.ROWS.to_iterable_dataset()}
        assert list(named_groups(groups).items()) == list(groups.items())

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (DatasetDict(train=ROWS, test=ROWS),
             r"got splits \(train, test\). Choose one: `capability_dataset\[split\]`"),
            (IterableDatasetDict(train=ROWS.to_iterable_dataset()), r"got splits \(train\)"),
            ("facts.json", "must be a `Dataset`, an `IterableDataset` or a dict of at least one "
             r"group of them, but got str. Make one with `Dataset.from_list\(rows\)`"),
            ({}, "at least one group of them, but got an empty dict. .* leave it out"),
            ({"": ROWS}, "name must be a text on one line, but got ''"),
            ({3: ROWS}, "name must be a text on one line, but got 3"),
            ({"a\nb": ROWS}, r"name must be a text on one line, but got 'a\\nb'"),
            ({"facts": DatasetDict(train=ROWS)},
             "group 'facts' must be a `Dataset` or an `IterableDataset`, but got DatasetDict. Make "
             r"one with `Dataset.from_list\(rows\)`"),
        ],
        ids=["splits", "splits of streams", "text", "nothing", "no name", "number", "lines",
             "splits in a group"],
    )  # fmt: skip
    def test_what_is_no_group_is_refused(self, value, message):
        with pytest.raises(ValueError, match=message):
            named_groups(value)


LEFT_TOO_FEW = (
    r"group 'facts' must have at least 1 samples with a token to learn from "
    r"\(`gradients_per_group`\), but has 0: the others of its 10 have none within "
    "`max_length` 3. Raise `max_length` or `num_samples`, lower `gradients_per_group`, or "
    "look for empty completions"
)
UNLABELLED = {"input_ids": [3, 4], "labels": [-100, -100]}
REFUSED = {
    "no samples": ([], {}, "must have at least one sample, but it is empty. Check its file or"),
    "a stream without samples": (
        IterableDataset.from_generator(lambda: iter(())), {}, "at least one sample, but it is"),
    "no known format": (
        [{"question": "add", "answer": "A"}], {},
        "group 'facts' must have a column `messages`, `text` or `input_ids`, or the columns "
        r"`prompt` and `completion` \(or `chosen` and `rejected`\), but has "
        r"\['answer', 'question'\]. Rename its columns with `Dataset.rename_column`"),
    "another text column": (
        [{"text": "add"}], {"dataset_text_field": "body"},
        r"column `messages`, `body` or .* but has \['text'\]"),
    "a completion alone": ([{"completion": "add"}], {}, r"but has \['completion'\]"),
    "half a pair": ([{"chosen": "add"}], {}, r"but has \['chosen'\]"),
    # The form of HuggingFaceH4/ultrachat_200k, of which TRL wants a completion.
    "a prompt beside text": (
        [{"prompt": "add", "text": "add A"}], {}, "group 'facts' .*`prompt`.*`completion`"),
    # TRL converts from/value conversations only, and looks for a text otherwise.
    "conversations with the keys of messages": (
        [{"conversations": conversation(ROWS[0])}], {},
        "group 'facts' must have a column `messages`.*conversations"),
    "all truncated": (ROWS, {"max_length": 3}, LEFT_TOO_FEW),
    # One token per sample: it is kept, but nothing comes before it.
    "nothing to predict": ([{"text": "add A"}], {"max_length": 1}, "but has 0"),
    "no labels": ([UNLABELLED], {"max_length": None}, "none within `max_length` None"),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "settings", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_capability_data_is_refused(rows, settings, message):
    rows = rows if rows else Dataset.from_list([])
    with pytest.raises(ValueError, match=message):
        group(rows, preparation(**settings))


def test_fewer_samples_than_parts_are_refused():
    with pytest.raises(ValueError, match=r"at least 4 samples .*lower `gradients_per_"):
        group(ROWS[:3], num_parts=4)
    rows = [ROWS[0], {"prompt": "add " * 9, "completion": "A"}]
    with pytest.raises(
        ValueError, match=r"least 2 samples .* has 1: the others of its 2 have none"
    ):
        group(rows, preparation(max_length=9), num_parts=2, num_samples=2)


def test_the_rows_are_what_these_tests_assume():
    assert len(ROWS) == 10
    assert max(map(prompt_length, ROWS)) > 8
    words = {word for row in ROWS for word in (row["prompt"] + row["completion"]).split()}
    assert words.isdisjoint(REJECTED.split())
