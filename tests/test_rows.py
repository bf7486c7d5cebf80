"""Rows: whatever stands in them is read as TRL reads it, or named by data set and number."""

import json
import logging
import re

import pytest
import torch
from datasets import Dataset, IterableDataset, config, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from ogpsa_trl import CapabilityGate
from ogpsa_trl.benchmark.toy_model import CHAT_TEMPLATE, tiny_model, toy_tokenizer
from ogpsa_trl.capability_set.set_keys import CapabilitySetArguments
from ogpsa_trl.capability_set.set_rows import choose_rows, known_prompts
from ogpsa_trl.data.columns import Source
from ogpsa_trl.data.preparation import Preparation, context_of, prepare_group
from ogpsa_trl.data.rendering import check_rendering, prepared
from ogpsa_trl.data.row_values import RowError
from ogpsa_trl.data.rows import check_rows, readable
from ogpsa_trl.evaluation.evaluation_keys import EvaluationArguments
from ogpsa_trl.evaluation.group_scores import group_scores
from ogpsa_trl.evaluation.models import length_for
from ogpsa_trl.evaluation.sets import load_sets
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
MAY_BE_TEXT = {"text", "prompt", "completion", "chosen", "rejected"}
TOKENS = {"input_ids", "labels"}

# What is no text, and no conversation either.
WRONG = {
    "null": None, "number": 3, "fraction": 0.5, "truth": True, "texts": ["add 1 2"], "nothing": [],
    "mapping": {"a": 1}, "JSON": json.dumps([ASKED, ANSWER]), "message that is text": [ASKED, "3"],
    "message without a role": [{"content": "add"}],
    "role without a name": [{"role": "", "content": "add"}],
    "number as a role": [{"role": 3, "content": "add"}],
    "message without content": [ASKED, {"role": "assistant"}],
    "null content": [ASKED, {"role": "assistant", "content": None}],
    "number as content": [ASKED, {"role": "assistant", "content": 3}],
    "no parts": [{"role": "user", "content": []}],
    "parts without a type": [{"role": "user", "content": ["add"]}],
}  # fmt: skip


@st.composite
def wrong_rows(draw):
    """Good rows, of which one has a wrong value in one column; its place, and what it is for."""
    form, use = draw(st.sampled_from(READ))
    good = FORMS[form][0]
    columns = [c for c in good if c != "prompt" or "chosen" not in good or use == "dpo"]
    column = draw(st.sampled_from(columns))  # a text prompt beside a pair may be left out
    has_meaning = {"JSON"} if column in MAY_BE_TEXT else {"nothing"} if column in TOKENS else set()
    has_meaning |= {"null"} if use == "set" else set()  # a row of other columns, or unanswered
    value = WRONG[draw(st.sampled_from(sorted(WRONG.keys() - has_meaning)))]
    if column == "conversations":
        text = json.dumps(value).replace('"role":', '"from":').replace('"content":', '"value":')
        value = json.loads(text)
    rows = [dict(good) for _ in range(draw(st.integers(2, 6)))]
    place = draw(st.integers(0, len(rows) - 1))
    rows[place][column] = value
    return use, rows, place, column


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def written(rows, folder):
    """An entry of a list of data sets that holds these rows."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [{"path": str(path), "group": "facts"}]


def from_file(rows, folder):
    """Rows as a user's file gives them, with whatever types `datasets` finds in them."""
    [entry] = written(rows, folder)
    return load_dataset("json", data_files=entry["path"], split="train")


def names(error, number, where=WHERE):
    message = str(error.value)
    assert where[1:] in message  # it may begin a sentence
    assert re.search(rf"\b[Rr]ow {number}\b", message)
    assert "\n" not in message
    assert len(message) < 900
    return message


@pytest.mark.parametrize(("form", "use"), READ)
def test_good_rows_stay_as_they_are_whatever_columns_of_nulls_stand_beside_them(form, use):
    row, _ = FORMS[form]
    source = Source(WHERE, use)
    dataset = Dataset.from_list([row] * 3)
    kept = readable(dataset, source)
    assert kept.to_list() == dataset.to_list()
    check_rendering(kept, source, TOKENIZER)
    check_rows([row] * 3, source)
    if use == "set":  # such rows have a form of their own each
        return
    nulls = dict.fromkeys(
        ("text", "messages", "prompt", "completion", "chosen", "input_ids", "tools",
         "chat_template_kwargs", "image", "conversations", "source")
    )  # fmt: skip
    kept = readable(Dataset.from_list([nulls | row] * 3), source)
    assert set(kept.column_names) == {"source", *row}
    check_rows([nulls | row] * 3, source)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(wrong=wrong_rows())
def test_a_wrong_value_in_any_row_at_any_place_is_named(wrong):
    use, rows, place, column = wrong
    with pytest.raises(RowError) as error:
        check_rows(rows, Source(WHERE, use))
    message = names(error, place)
    assert f"`{column}`" in message or "all be text or all be conversations" in message


# What each rule says; the kinds of wrong messages are those above.
RULES = {
    "text": ({"text": 3}, r"`text` in .* must be text, but row 1 has 3\. Write .* in quotes"),
    "null": ({"text": None}, r"`text` in .* has None\. Remove such rows"),
    "no messages": ({"messages": []}, r"`messages` in .* must be a list of messages .* has \[\]"),
    "JSON": ({"messages": WRONG["JSON"]}, r"`messages` in .* `json\.loads`"),
    "message": ({"messages": [ASKED, "3"]}, r"but message 1 of row 1 has '3'"),
    "other keys": ({"conversations": [ASKED, 3]}, "messages with `from` and `value`, but message"),
    "turns": ({"prompt": {"a": 1}, "completion": "b"}, "must be text, or a list of messages"),
    "two forms": (
        {"prompt": [ASKED], "completion": [ANSWER]}, "row 0 is text and row 1 a conversation"),
    "two forms in a row": (
        {"prompt": [ASKED], "completion": "b"}, r"in row 1 \['completion'\] are text"),
    "token that is text": ({"input_ids": [3, "4"]}, "`input_ids` .* list of numbers of tokens"),
    "lengths": ({"input_ids": [3, 4], "labels": [3]}, r"of one length, .* \[2, 1\]"),
    "tools": ({"messages": [ASKED], "tools": 3}, "`tools` .* has 3"),
    "tool": ({"messages": [ASKED], "tools": ["add"]}, "`tools` .* has"),
    "tools of a text": ({"text": "add", "tools": "[{'a'}]"}, "`tools` .* JSON text"),
    "settings of a template": (
        {"messages": [ASKED], "chat_template_kwargs": "a"}, "`chat_template_kwargs` .* mapping"),
    "long value": ({"text": ["a" * 10_000] * 100}, r"`text` in .* \.\.\."),
}  # fmt: skip


@pytest.mark.parametrize(("row", "message"), RULES.values(), ids=RULES)
def test_every_rule_has_its_words(row, message):
    good = {
        "text": "add", "messages": [ASKED], "prompt": "a", "completion": "b", "input_ids": [3],
        "labels": [3], "tools": [], "chat_template_kwargs": {},
        "conversations": [{"from": "user", "value": "a"}],
    }  # fmt: skip
    rows = [{column: good[column] for column in row}, row]
    with pytest.raises(RowError, match=message) as error:
        check_rows(rows, Source(WHERE, "sft"))
    names(error, 1)


@pytest.mark.parametrize(("place", "kind"), [(0, "number"), (1001, "null"), (1499, "texts")])
def test_whatever_types_datasets_finds_the_row_is_named(place, kind, tmp_path):
    """A file of mixed types is read as JSON, one of numbers as numbers."""
    rows = [{"messages": [ASKED, {"role": "assistant", "content": "yes"}]} for _ in range(1500)]
    rows[place]["messages"] = WRONG[kind]
    with pytest.raises(RowError) as error:
        readable(from_file(rows, tmp_path), Source(WHERE, "group"))
    names(error, place)


@pytest.mark.parametrize(
    ("use", "columns"),
    [("prompts", "`prompt`"), ("pairs", "`chosen`, `rejected`"), ("set", "`messages`, `prompt`")],
)
def test_rows_of_no_known_format_are_refused_by_every_command(use, columns):
    message = rf"must have .*{columns}.* but has \['question'\]\. Rename its columns"
    with pytest.raises(ValueError, match=message):
        check_rows([{"question": "add"}], Source(WHERE, use))


def test_of_a_column_that_is_not_in_use_some_may_be_null():
    """TRL would put an end token behind the null text."""
    rows = [{"prompt": "add", "completion": " A"} | {"text": text} for text in ("a", None, "b")]
    kept = readable(Dataset.from_list(rows), Source(WHERE, "sft"))
    assert kept.column_names == ["prompt", "completion"]


def test_an_answer_that_calls_tools_may_say_nothing():
    message = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    check_rows([{"messages": [ASKED, message]}], Source(WHERE, "sft"))
    with pytest.raises(RowError, match="message 1 of row 0"):
        check_rows([{"messages": [ASKED, message | {"tool_calls": []}]}], Source(WHERE, "sft"))


def group_of(dataset, *, seed=1, **settings):
    preparation = Preparation(TOKENIZER, TOKENIZER, **{"max_length": 64, **settings})
    num_samples = len(dataset) if isinstance(dataset, Dataset) else 10
    return prepare_group(
        "facts", dataset, preparation, num_samples=num_samples, num_parts=1, batch_size=2, seed=seed
    )


@pytest.mark.parametrize("as_stream", [False, True])
def test_a_group_names_a_wrong_value(as_stream, tmp_path):
    rows = [{"messages": [ASKED, ANSWER]} for _ in range(5)]
    rows[2]["messages"] = 3
    dataset = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(RowError) as error:
        group_of(dataset if as_stream else from_file(rows, tmp_path))
    names(error, 2, "capability group 'facts'")


def test_a_stream_of_other_types_in_a_column_of_no_use_is_refused():
    rows = [{"text": "add", "source": source} for source in ("a", {"b": 1})]
    with pytest.raises(ValueError, match="group 'facts' must have values of one type"):
        group_of(IterableDataset.from_generator(lambda: iter(rows)))


def test_the_row_is_named_by_its_place_in_the_data_not_among_those_chosen():
    rows = [{"text": "add"}] * 13 + [{"text": None}] + [{"text": "add"}] * 6
    for seed in range(3):
        with pytest.raises(RowError, match="row 13 has None"):
            group_of(Dataset.from_list(rows), seed=seed)


@pytest.mark.parametrize("token", [-1, len(TOKENIZER)])
def test_a_token_that_the_tokenizer_does_not_know_is_named(token):
    rows = [{"input_ids": [3, 4, 5]}] * 2 + [{"input_ids": [3, token]}]
    with pytest.raises(RowError, match=f"from 0 to {len(TOKENIZER) - 1}, but row 2 has"):
        group_of(Dataset.from_list(rows))


def test_one_conversation_without_an_answer_under_assistant_only_loss():
    rows = [{"messages": [ASKED, ANSWER]}] * 5 + [{"messages": [ASKED]}]
    with pytest.raises(RowError, match=r"turn of the assistant, .* row 5 has none"):
        group_of(Dataset.from_list(rows), assistant_only_loss=True)


def test_a_template_that_marks_no_answer_is_named_by_trl_and_the_row_by_us():
    template = CHAT_TEMPLATE.replace(
        "{% generation %}", "{% if message['content'] != '4' %}{% generation %}"
    ).replace("{% endgeneration %}", "{% endgeneration %}{% endif %}")
    rows = [{"messages": [ASKED, ANSWER]}] * 5 + [{"messages": [ASKED, OTHER]}]
    with pytest.raises(RowError) as error:
        group_of(Dataset.from_list(rows), assistant_only_loss=True, chat_template=template)
    assert "no assistant tokens" in names(error, 5, "capability group 'facts'")


@pytest.mark.parametrize("form", ["messages", "pair"])
def test_columns_of_nulls_change_no_token(form):
    row, _ = FORMS[form]
    nulls = dict.fromkeys(("text", "messages", "conversations", "tools", "chat_template_kwargs"))
    groups = [group_of(Dataset.from_list([made] * 3)) for made in (row, nulls | row)]
    assert groups[0].samples[0].features == groups[1].samples[0].features


def test_a_trainer_and_a_gate_name_them(base_model_path, tmp_path):
    rows = {"facts": Dataset.from_list([{"text": "add"}, {"text": None}])}
    with pytest.raises(ValueError, match=r"`text` in capability group 'facts' .* row 1 has"):
        make_trainer("sft", base_model_path, tmp_path, capability=rows)
    trainer = make_trainer("sft", base_model_path, tmp_path)
    with pytest.raises(ValueError, match=r"`text` in gate group 'facts' .* row 1 has None"):
        CapabilityGate(trainer, rows)


REFUSING = "{% if messages[-1]['content'] == '4' %}{{ raise_exception('no four') }}{% endif %}x"
PAIR = {"rejected": [ASKED, {**ANSWER, "content": "5"}]}


@pytest.mark.parametrize(("raising", "reason", "good", "bad", "place"), [
    ("raise_exception('no four')", "no four",
     {"messages": [ASKED, ANSWER]}, {"messages": [ASKED, OTHER]}, 0),
    ("1 / 0", "Zero",
     {"prompt": [ASKED], "completion": [ANSWER]}, {"prompt": [ASKED], "completion": [OTHER]}, 2),
    ("messages[-1]['a']['b']", "'a'",
     {"chosen": [ASKED, ANSWER], **PAIR}, {"chosen": [ASKED, OTHER], **PAIR}, 3),
])  # fmt: skip
def test_what_a_chat_template_raises_is_named(raising, reason, good, bad, place):
    template = REFUSING.replace("raise_exception('no four')", raising)
    rows = [good] * 4
    rows[place] = bad
    dataset = Dataset.from_list(rows)
    with pytest.raises(RowError) as error:
        check_rendering(dataset, Source(WHERE, "group"), TOKENIZER, template)
    assert reason in names(error, place)
    with pytest.raises(RowError) as error:
        group_of(dataset, chat_template=template)
    names(error, place, "capability group 'facts'")


READS_PARTS = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{% endfor %}"
)
PRINTS = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def test_parts_are_refused_where_the_template_reads_text():
    """One that joins texts fails on them, one that prints would write them as Python does."""
    parts = [{**turn, "content": [{"type": "text", "text": "add"}]} for turn in (ASKED, ANSWER)]
    dataset, source = Dataset.from_list([{"messages": parts}]), Source(WHERE, "group")
    for template in (CHAT_TEMPLATE, PRINTS):
        with pytest.raises(RowError, match="has parts") as error:
            check_rendering(dataset, source, TOKENIZER, template, [7])
        names(error, 7)
    assert check_rendering(dataset, source, TOKENIZER, READS_PARTS) is dataset


@pytest.mark.parametrize("bad", [[0], [9], [3, 7]])
def test_the_first_row_that_fails_in_a_map_of_trl_is_named(bad):
    def prepare(rows):
        if set(bad) & set(rows["number"]):
            raise KeyError("some\nkey")
        return rows

    dataset = Dataset.from_dict({"number": range(10)})
    for numbers, named in ((None, bad[0]), (range(0, 100, 10), 10 * bad[0])):
        with pytest.raises(RowError, match="KeyError: 'some") as error:
            prepared(dataset, prepare, WHERE, numbers)
        names(error, named)


def test_a_map_that_fails_on_no_row_alone_stays_what_it_is():
    def prepare(rows):
        if len(rows) > 1:
            raise KeyError("bug")

    with pytest.raises(KeyError, match="bug"):
        prepared(Dataset.from_dict({"number": range(4)}), prepare, WHERE)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_trainer_names_the_row_of_its_training_and_evaluation_data(
    stage, base_model_path, tmp_path
):
    rows = safety_data(stage).to_list()
    rows[3]["completion" if stage == "sft" else "rejected"] = None
    data = Dataset.from_list(rows)
    kinds = {"training": {"data": data}, "evaluation": {"more": {"eval_dataset": data}}}
    for name, keywords in kinds.items():
        with pytest.raises(RowError, match=f"Row 3 of the {name} data"):
            make_trainer(stage, base_model_path, tmp_path, **keywords)


@pytest.mark.parametrize("value", [3, [ASKED, OTHER]], ids=["value", "template"])
def test_the_first_row_of_a_stream_is_looked_at_now_the_others_when_they_are_read(value):
    def checked(rows):
        stream = IterableDataset.from_generator(lambda: iter(rows))
        source = Source(WHERE, "sft")
        return check_rendering(readable(stream, source), source, TOKENIZER, REFUSING)

    good, bad = {"messages": [ASKED, ANSWER]}, {"messages": value}
    with pytest.raises(RowError) as error:
        checked([bad, good])
    names(error, 0)
    stream = checked([*[good] * 4, bad])
    with pytest.raises(RowError) as error:
        list(stream)
    names(error, 4)
    assert list(checked([good, {"messages": [ASKED]}])) == [good, {"messages": [ASKED]}]


def evaluate(key, entries, tokenizer=TOKENIZER):
    load_sets(EvaluationArguments(model_name_or_path="toy", **{key: entries}), [tokenizer])


def make_set(key, entries):
    arguments = CapabilitySetArguments(**{key: entries})
    if key == "harmful_datasets":
        known_prompts(arguments.harmful_datasets)
    choose_rows(arguments, TOKENIZER)


ANSWERED, PREFERRED = {"prompt": "add", "completion": " A"}, {"chosen": " A", "rejected": " B"}


@pytest.mark.parametrize(("command", "key", "row", "bad"), [
    (evaluate, "capability_datasets", ANSWERED, ANSWERED | {"completion": None}),
    (evaluate, "harmful_datasets", {"prompt": "how to bake"}, {"prompt": None}),
    (evaluate, "over_refusal_datasets", {"prompt": "how to bake"}, {"prompt": None}),
    (evaluate, "preference_datasets", PREFERRED, PREFERRED | {"chosen": None}),
    (make_set, "capability_datasets", ANSWERED, ANSWERED | {"completion": {"a": 1}}),
    (make_set, "capability_datasets", ANSWERED, {"messages": [{"role": "user"}]}),
    (make_set, "capability_datasets", ANSWERED, {"prompt": None, "completion": None}),
    (make_set, "look_alike_datasets", ANSWERED, {"prompt": []}),
    (make_set, "look_alike_datasets", ANSWERED, {"text": ["a"]}),
    (make_set, "harmful_datasets", {"prompt": "add"}, {"prompt": 3}),
])  # fmt: skip
def test_a_command_names_a_wrong_value_before_a_model_is_loaded(command, key, row, bad, tmp_path):
    with pytest.raises(RowError) as error:
        command(key, written([row, row, bad], tmp_path))
    names(error, 2, f"group 'facts' of `{key}`")


@pytest.mark.parametrize("key", ["harmful_datasets", "preference_datasets"])
def test_an_evaluation_names_what_a_template_raises(key, tmp_path):
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = REFUSING.replace("== '4'", "== 'bad'")
    row = {"prompt": [ASKED], "chosen": [ANSWER], "rejected": [OTHER]}
    bad = row | {"prompt": [{"role": "user", "content": "bad"}]}
    with pytest.raises(RowError) as error:
        evaluate(key, written([row, row, bad], tmp_path), tokenizer)
    assert "no four" in names(error, 2, f"group 'facts' of `{key}`")


def test_null_columns_of_a_capability_set_do_not_matter(tmp_path):
    rows = [{"messages": [ASKED, ANSWER], "text": None, "tools": None, "images": None}] * 3
    arguments = CapabilitySetArguments(capability_datasets=written(rows, tmp_path))
    [group] = choose_rows(arguments, TOKENIZER)
    assert group.rows == [{"prompt": [ASKED], "completion": [ANSWER]}] * 3


def short_model():
    """A GPT-2 with positions for 16 tokens."""
    torch.manual_seed(0)
    size = {"n_embd": 16, "n_layer": 1, "n_head": 1, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(TOKENIZER), **size))
    model.config.eos_token_id = model.config.bos_token_id = TOKENIZER.eos_token_id
    return model


def lengths(samples):
    return sorted(len(sample.features["input_ids"]) for sample in samples)


def warned(caplog):
    return [r.getMessage() for r in caplog.records if "can read" in r.getMessage()]


class TestContext:
    """No sample is longer than what the model has positions for."""

    ROWS = Dataset.from_dict({"text": ["add 1 2 => 3 " * 10, "the cat sees a dog"]})

    def test_a_table_of_positions_ends_rotary_ones_do_not(self):
        assert context_of(short_model().config) == 16
        assert context_of(tiny_model().config) is None

    @pytest.mark.parametrize(("max_length", "kept"), [(None, 16), (12, 12), (1024, 16)])
    def test_samples_are_cut_with_a_warning(self, max_length, kept, caplog):
        group = group_of(self.ROWS, max_length=max_length, context=16)
        assert lengths(group.samples) == [6, kept]
        assert len(warned(caplog)) == (kept == 16)
        for message in warned(caplog):
            assert message.startswith("Capability group")
            assert "1 of its 2 samples fill the 16 tokens" in message

    def test_a_trainer_and_a_gate_cut_them(self, tmp_path, caplog):
        data = Dataset.from_dict({"text": ["the cat sees a dog"] * 8})
        trainer = make_trainer(
            "sft", short_model(), tmp_path, data=data, max_length=1024, capability=self.ROWS,
            config=paper(num_samples=2), more={"processing_class": toy_tokenizer()},
        )  # fmt: skip
        gate = CapabilityGate(trainer, {"facts": self.ROWS})
        [group] = trainer.capability_groups
        assert lengths(group.samples) == lengths(gate.parts["facts"].samples) == [6, 16]
        kinds = [message.partition(" '")[0] for message in warned(caplog)]
        assert kinds == ["Capability group", "Gate group"]

    def test_a_likelihood_is_taken_of_what_can_be_read(self):
        values = group_scores(short_model(), TOKENIZER, "facts", self.ROWS, max_length=1024)["nll"]
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
