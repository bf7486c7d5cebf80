"""Capability sets: known answers of the measures, the written groups, the warnings, the keys."""

import contextlib
import io
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import config
from peft import LoraConfig, get_peft_model

from ogpsa_trl.benchmark.toy_model import tiny_model
from ogpsa_trl.benchmark.toy_world import REFUSAL, ToyWorld
from ogpsa_trl.capability_set.group_measures import GradientCosines, gradient_cosines, measure_group
from ogpsa_trl.capability_set.set_keys import CapabilitySetArguments
from ogpsa_trl.capability_set.set_report import training_entries, warnings_of
from ogpsa_trl.capability_set.set_rows import (
    RowGroup,
    choose_rows,
    complete_rows,
    known_prompts,
    num_known,
    write_group,
)
from ogpsa_trl.cli import capability, train
from ogpsa_trl.cli.capability import parse_capability_set
from ogpsa_trl.cli.train_keys import parse_run
from ogpsa_trl.data.entries import GroupedDatasetConfig
from ogpsa_trl.engines import choose
from runs import literal_nll, to_messages
from scripted import (
    ANSWERING,
    REFUSING,
    TOKENIZER,
    literal_answer,
    scripted_model,
    without_template,
)

ROOT = Path(__file__).resolve().parent.parent
WORLD = ToyWorld(0)
SETS = WORLD.evaluation_sets()


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """What `load_dataset` makes of the files here does not stay in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def rows_of(task, num_rows, start=0):
    """Rows of a task as texts; the prompts end in `=>`, as the chat template writes them."""
    return [dict(row) for row in SETS[task].select(range(start, start + num_rows))]


def conversations(rows):
    """The same rows as the capability set writes them."""
    return [
        {"prompt": messages[:1], "completion": messages[1:]}
        for messages in to_messages(rows)["messages"]
    ]


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def arguments(**keys):
    return CapabilitySetArguments(**{"max_length": 64, "max_new_tokens": 12} | keys)


@pytest.fixture(scope="module")
def entry(tmp_path_factory):
    """Write rows as a file; returns the entry of a list of data sets that reads them."""
    numbers, folder = itertools.count(), tmp_path_factory.mktemp("data")

    def write(rows, **more):
        path = folder / f"data-{next(numbers)}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"path": str(path), **more}

    return write


ROWS = rows_of("howto", 3)
FORMS = {
    "messages": lambda row: {"messages": row["prompt"] + row["completion"]},
    "conversations": lambda row: {
        "conversations": [
            {"from": m["role"], "value": m["content"]} for m in row["prompt"] + row["completion"]
        ]
    },
    "prompt and completion": dict,
    "texts": lambda row: {
        "prompt": row["prompt"][0]["content"], "completion": " " + row["completion"][0]["content"]
    },
    "preference": lambda row: {
        "prompt": row["prompt"], "chosen": row["completion"], "rejected": assistant("no")
    },
    "preference without a prompt": lambda row: {
        "chosen": row["prompt"] + row["completion"], "rejected": row["prompt"] + assistant("no")
    },
    "preference beside other forms": lambda row: {
        "prompt": row["prompt"][0]["content"], "messages": row["prompt"] + assistant("no"),
        "chosen": row["prompt"] + row["completion"], "rejected": row["prompt"] + assistant("no"),
        "score": 1.0,
    },
}  # fmt: skip


class TestRows:
    @pytest.mark.parametrize("form", FORMS)
    def test_every_form_of_training_becomes_one(self, form, entry):
        expected = conversations(ROWS)
        data = entry([FORMS[form](row) for row in expected])
        [group] = choose_rows(arguments(capability_datasets=[data]), TOKENIZER)
        assert sorted(group.rows, key=str) == sorted(expected, key=str)

    def test_all_turns_but_the_last_answer_are_the_prompt(self, entry):
        turns = [{"role": "system", "content": "s"}, *user("a"), *assistant("b"), *user("c")]
        data = entry([{"messages": turns + assistant("d")}, {"messages": turns}])
        [group] = choose_rows(arguments(capability_datasets=[data]), TOKENIZER)
        assert [row["prompt"] for row in group.rows] == [turns, turns]
        assert sorted(str(row["completion"]) for row in group.rows) == [
            "None", str(assistant("d")),
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("rows", "tokenizer"),
        [([{"text": "the cat"}, {"text": "a dog"}], TOKENIZER), (ROWS, without_template())],
        ids=["plain texts", "texts without a chat template"],
    )
    def test_texts_stay_as_they_are(self, rows, tokenizer, entry):
        [group] = choose_rows(arguments(capability_datasets=[entry(rows)]), tokenizer)
        assert sorted(group.rows, key=str) == sorted(rows, key=str)

    def test_entries_of_a_group_are_mixed_and_may_lack_completions(self, entry):
        with_answers, without = conversations(ROWS)[:2], conversations(ROWS)[2:]
        lists = [entry(with_answers), entry([{"prompt": row["prompt"]} for row in without])]
        [group] = choose_rows(arguments(capability_datasets=lists), TOKENIZER)
        assert sum(row["completion"] is None for row in group.rows) == 1
        assert len(group.rows) == 3

    def test_samples_are_chosen_by_the_seed(self, entry):
        data = entry(conversations(rows_of("add", 50)))

        def chosen(seed):
            keys = arguments(capability_datasets=[data], num_samples=10, seed=seed)
            return choose_rows(keys, TOKENIZER)[0].rows

        assert len(chosen(0)) == 10
        assert chosen(0) == chosen(0) != chosen(1)

    def test_prompts_without_room_for_a_completion_are_left_out(self, entry):
        """The prompt has 6 tokens, and `=>` follows."""
        short, long = {"prompt": user("how to bake the cake ?")}, {"prompt": user("cake " * 30)}
        data = entry([short, short, long, long])
        keys = arguments(capability_datasets=[data], max_length=19, max_new_tokens=12)
        [group] = choose_rows(keys, TOKENIZER)
        assert group.rows == [{**short, "completion": None}] * 2
        assert group.left_out == {"no room for a completion": 2}

    @pytest.mark.parametrize(
        ("rows", "keys", "message"),
        [
            ([{"text": "a"}, {"prompt": "b"}], {},
             "Group 'capability' must have one form, but mixes rows with `text` and rows with "
             "`prompt`. Give the texts a group of their own"),
            ([{"question": "a", "answer": "b"}], {},
             r"must have a column `messages`, `prompt` or `text`.* but has \['answer', 'question'\]"
             ".*or name a `conversion`"),
            ([{"messages": user("a"), "tools": ["t"]}], {},
             "has a column `tools`, which a capability set cannot keep. Leave it out with"),
            ([{"prompt": "a"}] * 3, {"generate_completions": False},
             "has 3 prompts without a completion, but `generate_completions` is false. Set it to"),
            ([{"text": "a"}], {},
             "must have at least 2 samples, but has 1. Add data"),
            ([{"prompt": "cake " * 60}] * 5, {},
             r"at least 2 samples, but has 0, 5 left out \(no room for a completion\). Add data, "
             "lower `max_new_tokens`"),
        ],
    )  # fmt: skip
    def test_groups_that_cannot_be_built_are_named(self, rows, keys, message, entry):
        with pytest.raises(ValueError, match=message):
            choose_rows(arguments(capability_datasets=[entry(rows)], **keys), TOKENIZER)

    def test_conversations_need_a_chat_template(self, entry):
        data = entry(conversations(ROWS))
        with pytest.raises(ValueError, match="holds conversations, but the tokenizer of the model"):
            choose_rows(arguments(capability_datasets=[data]), without_template())


def greedy(model, text):
    return literal_answer(model, text, 12)[0]


def group_of(rows, name="group", is_look_alike=False):
    return RowGroup(name, [dict(row) for row in rows], is_look_alike)


def unanswered(rows):
    return [{**row, "completion": None} for row in rows]


class TestCompletions:
    def test_are_those_of_greedy_decoding_one_by_one(self):
        """Prompts of other lengths, so that some are padded."""
        model, texts = tiny_model(seed=3), rows_of("howto", 6) + rows_of("judge", 3)
        group = group_of(unanswered(conversations(texts)))
        complete_rows(group, arguments(batch_size=4), model, TOKENIZER)
        expected = [assistant(greedy(model, row["prompt"])) for row in texts]
        assert [row["completion"] for row in group.rows] == expected
        assert len({str(completion) for completion in expected}) > 2
        assert group.num_generated == 9

    def test_of_texts_go_on_where_the_prompt_ends(self):
        model, texts = tiny_model(seed=3), rows_of("howto", 4)
        group = group_of(unanswered(texts))
        complete_rows(group, arguments(), model, without_template())
        for row, text in zip(group.rows, texts, strict=True):
            assert row == {
                "prompt": text["prompt"],
                "completion": " " + greedy(model, text["prompt"]),
            }

    @pytest.mark.parametrize("mode", ["missing", "TRUE"])
    def test_replace_those_of_the_data_only_where_all_are_asked_for(self, mode):
        rows, model = conversations(rows_of("howto", 5)), tiny_model(seed=3)
        group = group_of(rows[:3] + unanswered(rows[3:]))
        complete_rows(group, arguments(generate_completions=mode), model, TOKENIZER)
        own = [assistant(greedy(model, text["prompt"])) for text in rows_of("howto", 5)]
        if mode == "missing":
            own[:3] = [row["completion"] for row in rows[:3]]
        assert [row["completion"] for row in group.rows] == own
        assert group.num_generated == (2 if mode == "missing" else 5)

    def test_without_an_end_are_counted(self):
        rows = conversations(rows_of("howto", 4))
        model = scripted_model(ANSWERING)  # five tokens and the end
        for max_new_tokens, num_cut in ((5, 4), (6, 0)):
            group = group_of(unanswered(rows))
            complete_rows(group, arguments(max_new_tokens=max_new_tokens), model, TOKENIZER)
            assert group.num_cut == num_cut

    def test_that_say_nothing_are_left_out(self):
        rows = conversations(rows_of("howto", 3))
        group = group_of([*rows, {**rows[0], "completion": assistant(" ")}])
        complete_rows(group, arguments(), tiny_model(), TOKENIZER)
        assert group.rows == rows
        assert group.left_out == {"empty": 1}

    def test_of_look_alikes_that_refuse_are_left_out(self):
        rows = conversations(rows_of("howto", 3))
        refusing = [{**rows[0], "completion": assistant(REFUSAL.strip())}] * 2
        for is_look_alike, num_rows in ((True, 3), (False, 5)):
            group = group_of([*rows, *refusing], is_look_alike=is_look_alike)
            complete_rows(group, arguments(), tiny_model(), TOKENIZER)
            assert len(group.rows) == num_rows
        group = group_of(unanswered(rows), is_look_alike=True)
        message = r"but has 0, 3 left out \(sounds like a refusal\)"
        with pytest.raises(ValueError, match=message):
            complete_rows(group, arguments(), scripted_model(REFUSING), TOKENIZER)


GROUPS = {
    "add": rows_of("add", 12),
    "again": rows_of("add", 12),
    "passive": rows_of("passive", 12),
    "howto": rows_of("howto", 12),
    # Halves of two samples and of one, of other lengths.
    "mixed": rows_of("reverse", 2) + rows_of("judge", 1),
}


@pytest.fixture(scope="module")
def measured():
    """Cosines of several tasks, one of which stands there twice, under an untrained model."""
    groups = [group_of(conversations(rows), name) for name, rows in GROUPS.items()]
    model = tiny_model(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cosines = gradient_cosines(groups, model, TOKENIZER, arguments())
    return SimpleNamespace(groups=groups, model=model, before=before, cosines=cosines)


def literal_gradient(model, rows):
    """Of the token-mean loss of some rows, one sample at a time."""
    loss = literal_nll(model, TOKENIZER, rows)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, trained)
    return torch.cat([gradient.flatten().double() for gradient in gradients])


class TestMeasures:
    def test_a_group_under_two_names_has_the_cosine_one(self, measured):
        # Float32 gradients of the same samples in the same batches.
        assert measured.cosines.pairs["add", "again"] == pytest.approx(1, abs=1e-6)
        [warning] = warnings_of_cosines(measured.cosines)
        assert warning.startswith(
            "Groups 'add' and 'again' are redundant: their gradients have a cosine of 1.000, two "
            "draws of the same data 0."
        )
        assert warning.endswith("give them one `group` name, or drop one.")

    def test_two_draws_of_one_task_are_redundant_and_two_tasks_are_not(self):
        draws = [("add", 0), ("add", 48), ("passive", 0), ("passive", 48)]
        groups = [
            group_of(conversations(rows_of(task, 48, start)), f"{task}-{start}")
            for task, start in draws
        ]
        cosines = gradient_cosines(groups, tiny_model(), TOKENIZER, arguments(batch_size=48))
        shares = {p: cosine / cosines.of_the_same(*p) for p, cosine in cosines.pairs.items()}
        same = {("add-0", "add-48"), ("passive-0", "passive-48")}
        assert all((share > 0.9) == (pair in same) for pair, share in shares.items())
        assert all(abs(share) < 0.3 for pair, share in shares.items() if pair not in same)
        assert len(warnings_of_cosines(cosines)) == 2

    def test_cosines_are_those_of_the_literal_gradients(self, measured):
        literal = {name: literal_gradient(measured.model, rows) for name, rows in GROUPS.items()}
        assert len(measured.cosines.pairs) == 10
        for (first, second), cosine in measured.cosines.pairs.items():
            expected = torch.cosine_similarity(literal[first], literal[second], dim=0).item()
            assert cosine == pytest.approx(expected, abs=1e-5)  # float32

    def test_halves_are_disjoint_and_make_up_the_group(self, measured):
        """The cosine is that of one of the three ways to take half of four samples."""
        rows = rows_of("howto", 2) + rows_of("passive", 2)
        group = group_of(conversations(rows))
        taken = gradient_cosines([group], measured.model, TOKENIZER, arguments()).halves["group"]
        cosines = []
        for half in ((0, 1), (0, 2), (0, 3)):
            other = [place for place in range(4) if place not in half]
            gradients = [
                literal_gradient(measured.model, [rows[place] for place in places])
                for places in (half, other)
            ]
            cosines.append(torch.cosine_similarity(*gradients, dim=0).item())
        assert max(cosines) - min(cosines) > 0.01
        assert min(abs(taken - cosine) for cosine in cosines) < 1e-5  # float32

    def test_of_an_adapter_are_those_of_its_own_gradients(self):
        """Without its dropout; A has none, because B is zero."""
        lora = LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear")
        model = get_peft_model(tiny_model(seed=1), lora).train()
        names = ("add", "howto")
        groups = [group_of(conversations(rows_of(name, 6)), name) for name in names]
        taken = gradient_cosines(groups, model, TOKENIZER, arguments()).pairs[names]
        literal = [literal_gradient(model.eval(), rows_of(name, 6)) for name in names]
        expected = torch.cosine_similarity(*literal, dim=0).item()
        assert taken == pytest.approx(expected, abs=1e-5)  # float32

    def test_two_draws_of_the_same_data_have_the_cosine_that_their_halves_say(self):
        """Gradients that have a direction in common and noise of their own, of many entries."""
        generator = torch.Generator().manual_seed(0)
        common = torch.randn(200_000, generator=generator)
        halves = common + 1.5 * torch.randn(4, 200_000, generator=generator)
        wholes = halves.view(2, 2, -1).mean(1)

        def cosine(pair):
            return torch.cosine_similarity(*pair, dim=0).item()

        cosines = GradientCosines(
            {"a": cosine(halves[:2]), "b": cosine(halves[2:])}, {("a", "b"): cosine(wholes)}
        )
        # The noise of a cosine is about the root of the number of entries.
        expected = pytest.approx(cosines.pairs["a", "b"], abs=0.01)
        assert cosines.of_the_same("a", "b") == expected

    def test_halves_that_do_not_agree_say_nothing_of_a_pair(self):
        cosines = GradientCosines({"a": -0.1, "b": 0.5}, {("a", "b"): 0.1})
        assert cosines.of_the_same("a", "b") is None
        assert warnings_of_cosines(cosines) == []
        by_chance = GradientCosines({"a": 0.05, "b": 0.05}, {("a", "b"): 0.1})
        assert by_chance.of_the_same("a", "b") == pytest.approx(0.095, abs=1e-3)
        assert warnings_of_cosines(by_chance) == []
        for halves in ({"a": -0.1, "b": -0.1}, {"a": 0.05, "b": 0.05}):
            [warning] = warnings_of_cosines(GradientCosines(halves, {("a", "b"): 1.0}))
            assert "redundant: their gradients have a cosine of 1.000. Both protect" in warning

    def test_measuring_leaves_the_model_as_it_was(self, measured):
        assert all(parameter.grad is None for parameter in measured.model.parameters())
        after = measured.model.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in measured.before.items())

    def test_losses_and_tokens_are_those_of_training(self):
        rows, model = rows_of("passive", 9), tiny_model(seed=1)
        taken = measure_group(group_of(conversations(rows)), model, TOKENIZER, arguments())
        assert taken.loss == pytest.approx(literal_nll(model, TOKENIZER, rows).item(), rel=1e-5)
        expected = [len(row["completion"].split()) + 1 for row in rows]  # and the end
        assert sorted(taken.num_tokens) == sorted(expected)
        assert (taken.num_samples, taken.num_truncated) == (9, 0)

    def test_truncated_samples_are_counted_as_training_cuts_them(self):
        """Prompts of 5 to 9 tokens: some completions are cut, and of some nothing is left."""
        rows = rows_of("howto", 9)
        lengths = [len(f"{row['prompt']}{row['completion']}".split()) + 1 for row in rows]
        group = group_of(conversations(rows))
        limit = sorted(lengths)[3]
        taken = measure_group(group, tiny_model(), TOKENIZER, arguments(max_length=limit))
        assert taken.num_truncated == sum(length > limit for length in lengths) > 0
        taken = measure_group(group, tiny_model(), TOKENIZER, arguments(max_length=8))
        kept = [8 - len(row["prompt"].split()) for row in rows]
        assert sorted(taken.num_tokens) == sorted(number for number in kept if number > 0)
        assert taken.num_samples < 9

    def test_a_gradient_that_is_not_finite_is_an_error(self):
        model = tiny_model()
        with torch.no_grad():
            model.lm_head.weight[0] = torch.nan
        group = group_of(conversations(ROWS))
        message = "gradient of group 'group' is not finite. Load the model with `dtype: float32`"
        with pytest.raises(FloatingPointError, match=message):
            gradient_cosines([group], model, TOKENIZER, arguments())

    def test_gradients_are_taken_on_one_process(self, monkeypatch):
        launched = SimpleNamespace(num_processes=2)
        monkeypatch.setattr(choose, "Accelerator", lambda **_: launched)
        with pytest.raises(ValueError, match="taken on one process, but 2 were launched"):
            choose.one_process_backend(tiny_model())


def warnings_of_cosines(cosines):
    return warnings_of([], {}, cosines, arguments(), set())


def plenty(is_look_alike=False, **counts):
    group = group_of(conversations(rows_of("howto", 60)), "plenty", is_look_alike)
    for name, number in counts.items():
        setattr(group, name, number)
    return group


def warnings_on(group, keys=None, prompts=(), **measures):
    taken = {"num_samples": 60, "num_tokens": [10] * 60, "num_truncated": 0, "loss": 1.0}
    measured = {group.name: SimpleNamespace(**taken | measures)}
    return warnings_of([group], measured, None, arguments(**keys or {}), set(prompts))


HARMFUL = {"harmful_datasets": [{"path": "harmful"}]}
TEXTS = [{"text": "the cat"}] * 60


class TestWarnings:
    @pytest.mark.parametrize(
        ("group", "keys", "measures", "message"),
        [
            (plenty(), HARMFUL, {},
             "No group holds benign look-alikes of the harmful prompts.* over-refusal is not "
             "protected. List some in `look_alike_datasets`"),
            (plenty(), {}, {"num_samples": 31},
             "Group 'plenty' has 31 samples, fewer than 32: every refresh .* Add data, or raise "
             "`num_samples`.$"),
            (plenty(), {}, {"num_tokens": [5] * 51},
             "Group 'plenty' has 255 tokens in the loss, fewer than 256: its gradient says little. "
             "Add data, or take longer completions.$"),
            (plenty(), {}, {"num_truncated": 7},
             r"Group 'plenty': 7 of 60 samples are longer than `max_length` \(64\)"),
            (plenty(num_generated=60, num_cut=4), {}, {},
             r".*the model had not ended 4 of 60 completions within `max_new_tokens` \(12\)"),
            (group_of(TEXTS), {"generate_completions": True}, {},
             "Group 'group' holds plain texts without prompts, so nothing"),
        ],
        ids=["no look-alikes", "samples", "tokens", "truncated", "no end", "texts"],
    )  # fmt: skip
    def test_of(self, group, keys, measures, message):
        [warning] = warnings_on(group, keys, **measures)
        assert re.match(message, warning)

    @pytest.mark.parametrize(
        ("group", "keys", "measures"),
        [
            (plenty(), {}, {"num_samples": 32, "num_tokens": [256]}),
            (plenty(is_look_alike=True), HARMFUL, {}),
            (group_of(TEXTS), {}, {}),
        ],
        ids=["a good group", "look-alikes", "texts that nothing is to complete"],
    )
    def test_of_nothing_for(self, group, keys, measures):
        assert warnings_on(group, keys, **measures) == []

    def test_of_prompts_that_safety_training_has_too(self, entry):
        """But for case and spaces, and in any form."""
        asked = [row["prompt"][0]["content"] for row in plenty().rows[:2]]
        data = [
            {"prompt": f" {asked[0].upper()}", "completion": "no"},
            {"prompt": "other", "completion": "no"},
        ]
        entries = [GroupedDatasetConfig(**entry(data))]
        turns = [{"messages": [{"role": "system", "content": "s"}, *user(asked[1])]}]
        entries.append(GroupedDatasetConfig(**entry(turns), group="more"))
        prompts = known_prompts(entries)
        assert len(prompts) == 3
        assert num_known(plenty(), prompts) == 2
        [warning] = warnings_on(plenty(), prompts=prompts)
        assert warning.startswith("Group 'plenty': 2 of 60 prompts are prompts of safety training")
        assert warning.endswith("Take other prompts.")


def write_config(tmp_path, **keys):
    file = tmp_path / "set.yaml"
    file.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "out"), **keys}))
    return ["--config", str(file)]


def build(line):
    return capability.build_capability_set(*parse_capability_set(line))


@pytest.fixture(scope="module")
def line(entry, tmp_path_factory, base_model_path):
    """The command line of a set of two groups with answers and look-alikes without."""
    keys = {
        "model_name_or_path": base_model_path, "num_samples": 8, "max_new_tokens": 4,
        "max_length": 64, "device_map": "cpu",
        "capability_datasets": [
            entry(conversations(rows_of("add", 20)), group="skills"),
            entry(conversations(rows_of("reverse", 20)), group="skills"),
            entry([{"text": row["prompt"]} for row in rows_of("passive", 10)], group="texts"),
        ],
        "look_alike_datasets": [entry([{"prompt": r["prompt"]} for r in rows_of("howto", 9)])],
        "harmful_datasets": [entry(rows_of("refusal", 5))],
    }  # fmt: skip
    return write_config(tmp_path_factory.mktemp("set"), **keys)


@pytest.fixture(scope="module")
def built(line, tmp_path_factory):
    """The set that is built from it: its figures, its folder, and what was printed."""
    folder = tmp_path_factory.mktemp("built")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        figures = build([*line, "--output_dir", str(folder)])
    report = json.loads((folder / "report.json").read_text())
    text = (folder / "report.md").read_text()
    return SimpleNamespace(
        figures=figures, folder=folder, printed=printed.getvalue(), report=report, text=text
    )


def files_of(folder):
    return {path.stem: path.read_bytes() for path in sorted(folder.glob("*.jsonl"))}


def without_paths(figures):
    groups = {
        name: {key: value for key, value in group.items() if key != "path"}
        for name, group in figures["groups"].items()
    }
    return groups, figures["cosines"]


class TestScript:
    def test_the_written_groups_are_those_of_a_training(self, built, tmp_path, base_model_path):
        """Through the loader of scripts/train.py, from the very lines that are printed."""
        entries = built.printed[built.printed.index("capability_datasets:") :]
        names = list(built.figures["groups"])
        assert names == ["skills", "texts", "look_alikes"]
        WORLD.safety_sft().select(range(4)).to_json(tmp_path / "safety.jsonl")
        values = yaml.safe_load(entries) | {
            "model_name_or_path": base_model_path, "dataset_name": str(tmp_path / "safety.jsonl"),
            "output_dir": str(tmp_path / "run"), "use_cpu": True, "bf16": False,
            "report_to": "none", "preset": "paper", "max_length": 64,
        }  # fmt: skip
        (tmp_path / "train.yaml").write_text(yaml.safe_dump(values))
        run = parse_run(["--config", str(tmp_path / "train.yaml")])
        rows = run.train.capability_groups()
        written = files_of(built.folder)
        for name in names:
            assert rows[name].to_list() == list(map(json.loads, written[name].splitlines()))
        trainer, _ = train.prepare(run)
        sizes = {group.name: len(group.samples) for group in trainer.capability_groups}
        assert sizes == {name: len(rows[name]) for name in names}

    def test_the_same_seed_writes_the_same(self, line, built, tmp_path):
        again = build([*line, "--output_dir", str(tmp_path)])
        assert list(files_of(tmp_path)) == ["look_alikes", "skills", "texts"]
        assert files_of(tmp_path) == files_of(built.folder)
        assert without_paths(again) == without_paths(built.figures)

    def test_another_seed_writes_others_and_cosines_can_be_left_out(self, line, built, tmp_path):
        options = ["--output_dir", str(tmp_path), "--seed", "1", "--gradient_cosine", "false"]
        figures = build([*line, *options])
        assert files_of(tmp_path) != files_of(built.folder)
        assert figures["cosines"] == []
        assert figures["groups"]["skills"]["half_cosine"] is None
        assert figures["groups"]["skills"]["loss"] > 0
        assert "| skills - texts " not in (tmp_path / "report.md").read_text()

    def test_the_report_says_what_there_is(self, built):
        report, text = built.report, built.text
        assert {key: report[key] for key in built.figures} == json.loads(json.dumps(built.figures))
        assert report["settings"]["num_samples"] == 8
        assert "torch" in report["versions"]
        assert "| skills " in text and "| skills - texts " in text
        assert "**Warning:** Group 'skills' has 8 samples, fewer than 32" in text
        assert text.endswith("Seed 0.\n")
        skills = report["groups"]["skills"]
        assert skills["num_samples"] == 8 and skills["num_generated"] == 0
        assert report["groups"]["look_alikes"]["num_generated"] == 8
        assert len(report["cosines"]) == 3

    def test_gradients_may_be_those_of_a_new_adapter(self, line, built, tmp_path):
        """The same ones for the same seed; everything else is as without it."""
        options = ["--use_peft", "true", "--lora_target_modules", "all-linear"]
        options += ["--output_dir", str(tmp_path)]
        of_adapter, again = (build([*line, *options]) for _ in range(2))
        assert of_adapter == again
        assert of_adapter["cosines"] != built.figures["cosines"]
        for name, group in built.figures["groups"].items():
            assert of_adapter["groups"][name]["loss"] == group["loss"]

    def test_the_written_files_are_a_set_of_their_own_again(self, built, tmp_path):
        """Nothing changes in what is in the form already."""
        entries = [
            {"path": str(path), "group": path.stem} for path in sorted(built.folder.glob("*.jsonl"))
        ]
        groups = choose_rows(arguments(capability_datasets=entries), TOKENIZER)
        assert len(groups) == 3
        for group in groups:
            after = write_group(group, tmp_path).read_bytes().splitlines()
            assert sorted(after) == sorted(files_of(built.folder)[group.name].splitlines())


class TestKeys:
    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"num_sampels": 3},
             "Unknown key `num_sampels` in .*nearest known key is `num_samples`"),
            ({"num_samples": 1}, "`num_samples` must be at least 2, but got 1"),
            ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, but got 0"),
            ({"batch_size": 0}, "`batch_size` must be at least 1"),
            ({"generate_completions": "always"},
             "`generate_completions` must be 'missing', true or false, but got 'always'"),
            ({"capability_datasets": [{"path": "x", "group": "../x"}]},
             r"`group` names a file, so it must be made of .* but got '\.\./x'. Rename the group"),
            ({"look_alike_datasets": [{"path": "x", "group": "capability"}]},
             "The group 'capability' must stand in one list, but it is in `capability_datasets` and"
             " in `look_alike_datasets`"),
            ({"capability_datasets": [{"path": "x", "grp": "y"}]},
             "Unknown key `grp` in entry 1 of `capability_datasets`.*nearest known key is `group`"),
            ({"capability_datasets": []}, "There is nothing to build: `capability_datasets` and"),
            ({"model_name_or_path": None}, "`model_name_or_path` is not set. Set it to a name"),
            ({"load_in_4bit": True}, "Quantised weights have no gradients, but `gradient_cosine` is"
             " on. Set `use_peft: true`"),
        ],
    )  # fmt: skip
    def test_mistakes_are_named(self, keys, message, tmp_path):
        good = {"model_name_or_path": "toy", "capability_datasets": [{"path": "x"}]}
        with pytest.raises(ValueError, match=message):
            parse_capability_set(write_config(tmp_path, **good | keys))

    @pytest.mark.parametrize("value", [True, False, "missing"])
    def test_completions_may_be_a_boolean_or_a_word(self, value, tmp_path):
        keys = {"model_name_or_path": "toy", "capability_datasets": [{"path": "x"}]}
        line = write_config(tmp_path, **keys, generate_completions=value)
        assert parse_capability_set(line)[0].generate_completions == str(value).lower()

    def test_the_configuration_that_we_ship_is_valid(self):
        path = ROOT / "configs" / "capability_set.yaml"
        parsed, model = parse_capability_set(["--config", str(path)])
        assert model.model_name_or_path is not None
        assert [e.conversion for e in parsed.look_alike_datasets] == ["xstest_safe"]
        known = set(yaml.safe_load(path.read_text()))
        assert {"generate_completions", "gradient_cosine", "harmful_datasets"} <= known


def test_entries_for_training_survive_awkward_paths_and_names():
    paths = {"1": Path("a: b/{1}.jsonl"), "yes": Path('say "yes".jsonl')}
    entries = yaml.safe_load(training_entries(paths))["capability_datasets"]
    assert entries == [{"path": str(path), "group": name} for name, path in paths.items()]
