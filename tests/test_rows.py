"""Rows: whatever stands in them is read as TRL reads it, or named by data set and number."""

import json
import logging
import re

import pytest
import torch
from datasets import Dataset, IterableDataset, config, load_dataset
from transformers import GPT2Config, GPT2LMHeadModel

from ogpsa_trl import CapabilityGate
from ogpsa_trl.capability_set.arguments import CapabilitySetArguments
from ogpsa_trl.capability_set.rows import choose_rows, known_prompts
from ogpsa_trl.columns import Source
from ogpsa_trl.data import Preparation, context_of, prepare_group
from ogpsa_trl.evaluation.arguments import EvaluationArguments
from ogpsa_trl.evaluation.capability import group_nll
from ogpsa_trl.evaluation.sets import length_for, load_sets
from ogpsa_trl.rendering import check_rendering, prepared
from ogpsa_trl.row_values import RowError
from ogpsa_trl.rows import check_rows, readable
from ogpsa_trl.toy_model import CHAT_TEMPLATE, tiny_model, toy_tokenizer
from runs import make_trainer, paper, safety_data

TOKENIZER = toy_tokenizer()
WHERE = "group 'facts' of `some_datasets`"
ASKED, ANSWER = {"role": "user", "content": "add 1 2"}, {"role": "assistant", "content": "3"}
OTHER = {"role": "assistant", "content": "4"}

# A good row of every form, and the uses that read it.
FORMS = {
    "text": ({"text": "add 1 2 => 3"}, "sft group set"),
    "messages": ({"messages": [ASKED, ANSWER]}, "sft group set"),
    "conversations": (
        {"conversations": [{"from": "user", "value": "add"}, {"from": "assistant", "value": "3"}]},
        "sft group set",
    ),
    "completion": ({"prompt": "add 1 2 =>", "completion": " 3"}, "sft group set"),
    "turns": ({"prompt": [ASKED], "completion": [ANSWER]}, "sft group set"),
    "pair": ({"prompt": "add =>", "chosen": " 3", "rejected": " 4"}, "dpo group pairs set"),
    "pair of turns": (
        {"prompt": [ASKED], "chosen": [ANSWER], "rejected": [OTHER]},
        "dpo group pairs set",
    ),
    "pair without a prompt": (
        {"chosen": [ASKED, ANSWER], "rejected": [ASKED, OTHER]},
        "dpo group pairs set",
    ),
    "request": ({"prompt": "add 1 2"}, "prompts set"),
    "asked": ({"prompt": [ASKED]}, "prompts set"),
    "tokens": ({"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}, "sft group"),
}
READ = [(form, use) for form, (_, uses) in FORMS.items() for use in uses.split()]

# What is no text, and no conversation either.
WRONG = {
    "null": None,
    "number": 3,
    "fraction": 0.5,
    "truth": True,
    "texts": ["add 1 2"],
    "nothing": [],
    "mapping": {"a": 1},
    "JSON": json.dumps([ASKED, ANSWER]),
    "message without a role": [{"content": "add"}],
    "message without content": [ASKED, {"role": "assistant"}],
    "null content": [ASKED, {"role": "assistant", "content": None}],
    "number as content": [ASKED, {"role": "assistant", "content": 3}],
    "number as a role": [{"role": 3, "content": "add"}],
    "parts without a type": [{"role": "user", "content": ["add"]}],
    "message that is text": [ASKED, "3"],
}
MAY_BE_TEXT = {"JSON"}


def with_other_keys(value):
    """Messages with the keys of the column `conversations`."""
    text = json.dumps(value).replace('"role":', '"from":').replace('"content":', '"value":')
    return json.loads(text)


def wrong_rows():
    """Every column of every form with every wrong value."""
    for form, use in READ:
        row, _ = FORMS[form]
        for column in row:
            for name, value in WRONG.items():
                is_text = column not in ("messages", "conversations", "input_ids", "labels")
                if name in MAY_BE_TEXT and is_text:
                    continue
                # Such rows have a meaning: other columns, a prompt that is taken from the pair, no
                # tokens, a prompt to complete.
                if column == "prompt" and {"chosen", "rejected"} <= row.keys() and use != "dpo":
                    continue
                if name == "nothing" and column in ("input_ids", "labels"):
                    continue
                if name == "null" and use == "set":
                    continue
                if column == "conversations":
                    value = with_other_keys(value)
                yield pytest.param(form, use, column, value, id=f"{use}: {form}: {column}: {name}")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def from_file(rows, folder):
    """Rows as a user's file gives them, with whatever types `datasets` finds in them."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_dataset("json", data_files=str(path), split="train")


def names(error, number, where=WHERE):
    message = str(error.value)
    assert where[1:] in message  # it may begin a sentence
    assert re.search(rf"\b[Rr]ow {number}\b", message)
    assert "\n" not in message
    assert len(message) < 900
    return message


@pytest.mark.parametrize(("form", "use"), READ)
def test_good_rows_stay_as_they_are(form, use):
    row, _ = FORMS[form]
    dataset = Dataset.from_list([row] * 3)
    source = Source(WHERE, use)
    assert readable(dataset, source).to_list() == dataset.to_list()
    check_rendering(readable(dataset, source), source, TOKENIZER)
    check_rows([row] * 3, source)


@pytest.mark.parametrize(("form", "use", "column", "value"), list(wrong_rows()))
@pytest.mark.parametrize("place", [0, 1, 4])
def test_a_wrong_value_in_any_row_is_named(form, use, column, value, place):
    row, _ = FORMS[form]
    rows = [dict(row) for _ in range(5)]
    rows[place][column] = value
    with pytest.raises(RowError) as error:
        check_rows(rows, Source(WHERE, use))
    names(error, place)


# Text beside lists, `datasets` takes for their JSON and reads it.
IN_A_FILE = {name: value for name, value in WRONG.items() if name != "JSON"}


@pytest.mark.parametrize("value", IN_A_FILE.values(), ids=IN_A_FILE)
@pytest.mark.parametrize("place", [0, 1001, 1499])
def test_whatever_types_datasets_finds_the_row_is_named(value, place, tmp_path):
    """A file of mixed types is read as JSON, one of numbers as numbers."""
    rows = [{"messages": [ASKED, {"role": "assistant", "content": "yes"}]} for _ in range(1500)]
    rows[place]["messages"] = value
    with pytest.raises(RowError) as error:
        readable(from_file(rows, tmp_path), Source(WHERE, "group"))
    names(error, place)


@pytest.mark.parametrize("use", ["sft", "group", "set"])
def test_a_table_of_numbers_is_refused_with_the_way_out(use, tmp_path):
    (tmp_path / "sums.csv").write_text("prompt,completion\nadd 1 2,3\nadd 2 2,4\n")
    rows = load_dataset("csv", data_files=str(tmp_path / "sums.csv"), split="train")
    with pytest.raises(RowError, match=r"`completion` in .* row 0 has 3\. Write .* in quotes"):
        check_rows(list(rows), Source(WHERE, use))


def test_the_way_out_of_json_is_its_reader():
    with pytest.raises(RowError, match=r"json\.loads"):
        check_rows([{"messages": WRONG["JSON"]}], Source(WHERE, "group"))


def test_a_long_value_is_shortened():
    with pytest.raises(RowError) as error:
        check_rows([{"text": ["a" * 10_000] * 100}], Source(WHERE, "group"))
    names(error, 0)


def test_rows_of_two_forms_are_named():
    rows = [{"prompt": "a", "completion": "b"}] * 2 + [{"prompt": [ASKED], "completion": [ANSWER]}]
    with pytest.raises(RowError, match="row 0 is text and row 2 a conversation"):
        check_rows(rows, Source(WHERE, "group"))
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": [ASKED], "completion": "b"}]
    with pytest.raises(RowError, match=r"in row 1 \['completion'\] are text"):
        check_rows(rows, Source(WHERE, "sft"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [3, "4"]}, "`input_ids` .* list of numbers of tokens"),
        ({"input_ids": [3, -1]}, "`input_ids` .* from 0 to"),
        ({"input_ids": "3 4"}, "`input_ids` .* has '3 4'"),
        ({"input_ids": [3, 4], "labels": [3]}, r"of one length, .* \[2, 1\]"),
        ({"messages": [ASKED], "tools": 3}, "`tools` .* has 3"),
        ({"messages": [ASKED], "tools": "[{'a'}]"}, "`tools` .* JSON text"),
        ({"messages": [ASKED], "tools": ["add"]}, "`tools` .* has"),
        ({"messages": [ASKED], "chat_template_kwargs": "a"}, "`chat_template_kwargs` .* mapping"),
        ({"text": "add", "tools": "[{'a'}]"}, "`tools` .* JSON text"),
    ],
)
@pytest.mark.parametrize("use", ["sft", "group"])
def test_what_stands_beside_the_text_is_looked_at_too(row, message, use):
    good = {"input_ids": [3], "labels": [3], "messages": [ASKED], "text": "add", "tools": []}
    rows = [{column: good.get(column, {}) for column in row}, row]
    with pytest.raises(RowError, match=message) as error:
        check_rows(rows, Source(WHERE, use))
    names(error, 1)


NULLS = [
    (form, use, column)
    for form, use in READ
    for column in ("text", "messages", "prompt", "completion", "chosen", "input_ids", "tools",
                   "chat_template_kwargs", "image", "conversations", "source")
    if column not in FORMS[form][0] and use != "set"
]  # fmt: skip


@pytest.mark.parametrize(("form", "use", "column"), NULLS)
def test_a_column_of_nulls_beside_those_in_use_does_not_matter(form, use, column):
    row, _ = FORMS[form]
    rows = [{column: None, **row}] * 3
    source = Source(WHERE, use)
    kept = readable(Dataset.from_list(rows), source)
    assert kept.column_names == [c for c in (column, *row) if c in row or column == "source"]
    check_rows(rows, source)


def test_of_a_column_that_is_not_in_use_some_may_be_null(tmp_path):
    """TRL would put an end token behind the null text."""
    rows = [{"prompt": "add", "completion": " A"} | {"text": text} for text in ("a", None, "b")]
    kept = readable(Dataset.from_list(rows), Source(WHERE, "sft"))
    assert kept.column_names == ["prompt", "completion"]


def group_of(dataset, *, where=None, **settings):
    preparation = Preparation(
        **{"processing_class": TOKENIZER, "tokenizer": TOKENIZER, "max_length": 64} | settings
    )
    num_samples = len(dataset) if isinstance(dataset, Dataset) else 10
    return prepare_group(
        "facts", dataset, preparation, num_samples=num_samples, num_parts=1, batch_size=2, seed=1,
        where=where,
    )  # fmt: skip


class TestGroups:
    """The library: a group is checked where it is prepared."""

    @pytest.mark.parametrize("as_stream", [False, True])
    @pytest.mark.parametrize("value", IN_A_FILE.values(), ids=IN_A_FILE)
    @pytest.mark.parametrize("place", [0, 2, 4])
    def test_a_wrong_value_is_named_by_group_and_row(self, value, place, as_stream, tmp_path):
        rows = [{"messages": [ASKED, ANSWER]} for _ in range(5)]
        rows[place]["messages"] = value
        dataset = IterableDataset.from_generator(lambda: iter(rows))
        dataset = dataset if as_stream else from_file(rows, tmp_path)
        with pytest.raises(RowError) as error:
            group_of(dataset)
        # In a column of mixed types `datasets` reads the content "3" as a number.
        if as_stream or value is None or not isinstance(value, list):
            names(error, place, "capability group 'facts'")

    def test_the_row_is_named_by_its_place_in_the_data_not_among_those_chosen(self):
        rows = [{"text": "add"} for _ in range(20)]
        rows[13]["text"] = None
        for seed in range(3):
            preparation = Preparation(TOKENIZER, TOKENIZER, 64)
            with pytest.raises(RowError, match="row 13 has None"):
                prepare_group(
                    "facts", Dataset.from_list(rows), preparation,
                    num_samples=20, num_parts=1, batch_size=2, seed=seed,
                )  # fmt: skip

    @pytest.mark.parametrize("token", [-1, len(TOKENIZER), 10**9])
    def test_a_token_that_the_tokenizer_does_not_know_is_named(self, token):
        rows = [{"input_ids": [3, 4, 5]} for _ in range(4)]
        rows[2] = {"input_ids": [3, token]}
        with pytest.raises(RowError, match=f"from 0 to {len(TOKENIZER) - 1}, but row 2 has"):
            group_of(Dataset.from_list(rows))

    def test_one_conversation_without_an_answer_under_assistant_only_loss(self):
        rows = [{"messages": [ASKED, ANSWER]}] * 5 + [{"messages": [ASKED]}]
        with pytest.raises(RowError, match=r"turn of the assistant, .* row 5 has none"):
            group_of(Dataset.from_list(rows), assistant_only_loss=True)

    def test_a_template_that_marks_no_answer_is_named_by_trl_and_the_row_by_us(self):
        template = CHAT_TEMPLATE.replace(
            "{% generation %}", "{% if message['content'] != '4' %}{% generation %}"
        ).replace("{% endgeneration %}", "{% endgeneration %}{% endif %}")
        rows = [{"messages": [ASKED, ANSWER]}] * 5 + [{"messages": [ASKED, OTHER]}]
        with pytest.raises(RowError) as error:
            group_of(Dataset.from_list(rows), assistant_only_loss=True, chat_template=template)
        assert "no assistant tokens" in names(error, 5, "capability group 'facts'")

    def test_a_null_column_changes_no_token(self):
        for form in ("messages", "completion", "turns", "pair", "conversations"):
            row, _ = FORMS[form]
            expected = group_of(Dataset.from_list([row] * 3)).samples[0].features
            for column in ("text", "messages", "conversations", "tools", "chat_template_kwargs"):
                if column not in row:
                    rows = Dataset.from_list([{**row, column: None}] * 3)
                    features = group_of(rows).samples[0].features
                    assert features["input_ids"] == expected["input_ids"]
                    assert features["labels"] == expected["labels"]

    def test_a_trainer_names_them(self, base_model_path, tmp_path):
        rows = {"facts": Dataset.from_list([{"text": "add"}, {"text": None}])}
        with pytest.raises(ValueError, match=r"`text` in capability group 'facts' .* row 1 has"):
            make_trainer("sft", base_model_path, tmp_path, capability=rows)
        trainer = make_trainer("sft", base_model_path, tmp_path)
        with pytest.raises(ValueError, match=r"`text` in gate group 'facts' .* row 1 has None"):
            CapabilityGate(trainer, rows)


# A template that refuses, one that divides by zero, one that reads parts, one that prints them.
REFUSING = "{% if messages[-1]['content'] == '4' %}{{ raise_exception('no four') }}{% endif %}x"
TEMPLATES = {
    "raises": (REFUSING, "no four"),
    "has a bug": ("{% if messages[-1]['content'] == '4' %}{{ 1 / 0 }}{% endif %}x", "Zero"),
    "looks for a key": (
        "{% if messages[-1]['content'] == '4' %}{{ messages[-1]['a']['b'] }}{% endif %}x", "'a'",
    ),
}  # fmt: skip
ANSWERED = {
    "messages": ({"messages": [ASKED, ANSWER]}, {"messages": [ASKED, OTHER]}),
    "turns": (
        {"prompt": [ASKED], "completion": [ANSWER]},
        {"prompt": [ASKED], "completion": [OTHER]},
    ),
    "pair": (
        {"chosen": [ASKED, ANSWER], "rejected": [ASKED, {**ANSWER, "content": "5"}]},
        {"chosen": [ASKED, OTHER], "rejected": [ASKED, {**ANSWER, "content": "5"}]},
    ),
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("form", ANSWERED)
@pytest.mark.parametrize("place", [0, 2, 3])
def test_what_a_chat_template_raises_is_named(form, template, place):
    text, reason = TEMPLATES[template]
    good, bad = ANSWERED[form]
    rows = [good] * 4
    rows[place] = bad
    dataset = Dataset.from_list(rows)
    with pytest.raises(RowError) as error:
        check_rendering(dataset, Source(WHERE, "group"), TOKENIZER, text)
    assert reason in names(error, place)
    with pytest.raises(RowError) as error:
        group_of(dataset, chat_template=text)
    names(error, place, "capability group 'facts'")


PARTS = [
    {"role": role, "content": [{"type": "text", "text": "add"}]} for role in ("user", "assistant")
]
READS_PARTS = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{% endfor %}"
)
PRINTS = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PRINTS])
def test_parts_are_refused_where_the_template_reads_text(template):
    rows = [{"messages": [ASKED, ANSWER]}, {"messages": PARTS}]
    check = Source(WHERE, "group")
    for number, row in enumerate(rows):
        dataset = Dataset.from_list([row])
        if number == 0:
            check_rendering(dataset, check, TOKENIZER, template, [7])
            continue
        with pytest.raises(RowError, match="has parts") as error:
            check_rendering(dataset, check, TOKENIZER, template, [7])
        names(error, 7)


def test_parts_are_taken_where_the_template_reads_them():
    dataset = Dataset.from_list([{"messages": PARTS}])
    check_rendering(dataset, Source(WHERE, "group"), TOKENIZER, READS_PARTS)


class TestPreparation:
    """What TRL raises in the middle of a map."""

    def prepare(self, bad):
        def prepare(rows):
            if set(bad) & set(rows["number"]):
                raise KeyError("some\nkey")
            return rows

        return prepare

    @pytest.mark.parametrize("bad", [[0], [4], [9], [3, 7]])
    def test_names_the_first_row_that_fails(self, bad):
        dataset = Dataset.from_dict({"number": range(10)})
        with pytest.raises(RowError, match="KeyError: 'some") as error:
            prepared(dataset, self.prepare(bad), WHERE)
        names(error, bad[0])
        numbers = [10 * number for number in range(10)]
        with pytest.raises(RowError) as error:
            prepared(dataset, self.prepare(bad), WHERE, numbers)
        names(error, 10 * bad[0])

    def test_that_fails_on_no_row_alone_stays_what_it_is(self):
        def prepare(rows):
            if len(rows) > 1:
                raise KeyError("bug")

        with pytest.raises(KeyError, match="bug"):
            prepared(Dataset.from_dict({"number": range(4)}), prepare, WHERE)

    @pytest.mark.parametrize("stage", ["sft", "dpo"])
    def test_of_a_trainer_names_its_training_data(self, stage, base_model_path, tmp_path):
        rows = safety_data(stage).to_list()
        rows[3]["completion" if stage == "sft" else "rejected"] = None
        with pytest.raises(RowError, match="Row 3 of the training data"):
            make_trainer(stage, base_model_path, tmp_path, data=Dataset.from_list(rows))
        more = {"eval_dataset": Dataset.from_list(rows)}
        with pytest.raises(RowError, match="Row 3 of the evaluation data"):
            make_trainer(stage, base_model_path, tmp_path, more=more)


class TestStreams:
    def stream(self, place, value):
        rows = [{"messages": [ASKED, ANSWER]} for _ in range(6)]
        rows[place]["messages"] = value
        return IterableDataset.from_generator(lambda: iter(rows))

    def checked(self, stream):
        source = Source(WHERE, "sft")
        return check_rendering(readable(stream, source), source, TOKENIZER, REFUSING)

    @pytest.mark.parametrize("value", [*WRONG.values(), [ASKED, OTHER]])
    def test_the_first_row_is_looked_at_now_the_others_when_they_are_read(self, value):
        with pytest.raises((RowError, ValueError)):
            self.checked(self.stream(0, value))
        stream = self.checked(self.stream(4, value))
        with pytest.raises(RowError) as error:
            list(stream)
        names(error, 4)

    def test_good_rows_come_as_they_are(self):
        assert list(self.checked(self.stream(2, [ASKED]))) == list(self.stream(2, [ASKED]))


MEASURED = {
    "capability_datasets": {"prompt": "add =>", "completion": " A"},
    "harmful_datasets": {"prompt": "how to bake"},
    "over_refusal_datasets": {"prompt": "how to bake"},
    "preference_datasets": {"prompt": "add", "chosen": " A", "rejected": " B"},
}


class TestEvaluation:
    """`ogpsa evaluate`: every list of it, before a model is loaded."""

    def refused(self, key, rows, tmp_path, tokenizer=TOKENIZER):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments = EvaluationArguments(
            model_name_or_path="toy", **{key: [{"path": str(path), "group": "facts"}]}
        )
        with pytest.raises(RowError) as error:
            load_sets(arguments, [tokenizer])
        return error, f"group 'facts' of `{key}`"

    @pytest.mark.parametrize("key", MEASURED)
    @pytest.mark.parametrize("value", [None, 3, ["a"], [], {"a": 1}, [{"role": "user"}]])
    @pytest.mark.parametrize("place", [0, 3])
    def test_a_wrong_value_is_named(self, key, value, place, tmp_path):
        rows = [dict(MEASURED[key]) for _ in range(4)]
        rows[place]["chosen" if "preference" in key else "prompt"] = value
        error, where = self.refused(key, rows, tmp_path)
        names(error, place, where)

    @pytest.mark.parametrize("key", ["harmful_datasets", "preference_datasets"])
    def test_what_a_template_raises_is_named(self, key, tmp_path):
        tokenizer = toy_tokenizer()
        tokenizer.chat_template = REFUSING.replace("== '4'", "== 'bad'")
        row = {"prompt": [{"role": "user", "content": "add"}], "chosen": [ANSWER],
               "rejected": [OTHER]}  # fmt: skip
        bad = row | {"prompt": [{"role": "user", "content": "bad"}]}
        error, where = self.refused(key, [row, row, bad], tmp_path, tokenizer)
        assert "no four" in names(error, 2, where)


class TestCapabilitySets:
    """`ogpsa capability`: each row in a form of its own."""

    def arguments(self, rows, tmp_path, key="capability_datasets"):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return CapabilitySetArguments(**{key: [{"path": str(path), "group": "facts"}]})

    @pytest.mark.parametrize("key", ["capability_datasets", "look_alike_datasets"])
    @pytest.mark.parametrize("column", ["prompt", "completion", "messages", "text"])
    @pytest.mark.parametrize("value", [3, ["a"], [], {"a": 1}, [{"role": "user"}]])
    def test_a_wrong_value_is_named(self, key, column, value, tmp_path):
        rows = [{"prompt": "add", "completion": " A"} for _ in range(4)]
        rows[2] = {"prompt": "add", column: value} if column == "completion" else {column: value}
        with pytest.raises(RowError) as error:
            choose_rows(self.arguments(rows, tmp_path, key), TOKENIZER)
        names(error, 2, f"group 'facts' of `{key}`")
        if column == "prompt":
            arguments = self.arguments(rows, tmp_path, "harmful_datasets")
            with pytest.raises(RowError) as error:
                known_prompts(arguments.harmful_datasets)
            names(error, 2, "group 'facts' of `harmful_datasets`")

    def test_a_row_of_nulls_is_named(self, tmp_path):
        rows = [{"prompt": "add", "completion": " A"}] * 2 + [{"prompt": None, "completion": None}]
        with pytest.raises(RowError) as error:
            choose_rows(self.arguments(rows, tmp_path), TOKENIZER)
        names(error, 2, "group 'facts' of `capability_datasets`")

    def test_null_columns_do_not_matter(self, tmp_path):
        rows = [{"messages": [ASKED, ANSWER], "text": None, "tools": None, "images": None}] * 3
        [group] = choose_rows(self.arguments(rows, tmp_path), TOKENIZER)
        assert group.rows == [{"prompt": [ASKED], "completion": [ANSWER]}] * 3


def short_model():
    """A GPT-2 with positions for 16 tokens."""
    size = len(TOKENIZER)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=1, n_head=1, n_positions=16, vocab_size=size)
    )
    model.config.eos_token_id = model.config.bos_token_id = TOKENIZER.eos_token_id
    return model


class TestContext:
    """No sample is longer than what the model has positions for."""

    ROWS = Dataset.from_dict({"text": ["add 1 2 => 3 " * 10, "the cat sees a dog"]})

    def test_a_table_of_positions_ends_rotary_ones_do_not(self):
        assert context_of(short_model().config) == 16
        assert context_of(tiny_model().config) is None

    @pytest.mark.parametrize("max_length", [None, 12, 1024])
    def test_samples_are_cut_with_a_warning(self, max_length, tmp_path, caplog):
        def lengths(samples):
            return sorted(len(sample.features["input_ids"]) for sample in samples)

        kept = 12 if max_length == 12 else 16
        data = Dataset.from_dict({"text": ["the cat sees a dog"] * 8})
        trainer = make_trainer(
            "sft", short_model(), tmp_path, data=data, max_length=max_length, capability=self.ROWS,
            config=paper(num_samples=2), more={"processing_class": toy_tokenizer()},
        )  # fmt: skip
        gate = CapabilityGate(trainer, {"facts": self.ROWS})
        [group] = trainer.capability_groups
        assert lengths(group.samples) == lengths(gate.parts["facts"].samples) == [6, kept]
        warned = [r.getMessage() for r in caplog.records if "can read" in r.getMessage()]
        assert len(warned) == (0 if kept == 12 else 2)
        for message, where in zip(warned, ("Capability group", "Gate group"), strict=False):
            assert message.startswith(where)
            assert "1 of its 2 samples fill the 16 tokens" in message

    def test_a_likelihood_is_taken_of_what_can_be_read(self):
        values = group_nll(short_model(), TOKENIZER, "facts", self.ROWS, max_length=1024)
        assert sorted(values.columns[1]) == [5, 15]

    def test_an_evaluation_keeps_to_the_shortest_of_its_models(self, tmp_path, caplog):
        short_model().save_pretrained(tmp_path / "short")
        tiny_model().save_pretrained(tmp_path / "tiny")
        (tmp_path / "adapter").mkdir()
        adapter = {"base_model_name_or_path": str(tmp_path / "short")}
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))

        def length(*names):
            models = {str(tmp_path / name): None for name in names}
            return length_for(40, models, trust_remote_code=False)

        caplog.set_level(logging.WARNING)
        assert length("tiny") == 40
        assert not caplog.records
        assert length("tiny", "short") == length("adapter") == 16
        assert "`max_length` (40) is above the 16 tokens" in caplog.text
