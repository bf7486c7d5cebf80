"""The keys of a run: YAML and command line, and that no misspelt or useless key is ignored."""

import bz2
import functools
import gzip
import json
import lzma
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset, config
from datasets.arrow_writer import ArrowWriter
from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig, get_dataset

from ogpsa_trl import GateConfig, OGPSAConfig, renamed_keys
from ogpsa_trl.capability_set.arguments import LookAlikeDatasetConfig, parse_capability_set
from ogpsa_trl.command_line import parse_run, training_options
from ogpsa_trl.evaluation.arguments import (
    EvaluationArguments,
    HarmfulDatasetConfig,
    OverRefusalDatasetConfig,
    PreferenceDatasetConfig,
    parse_evaluation,
)
from ogpsa_trl.launch import separated
from ogpsa_trl.mixture import GroupedDatasetConfig, load_groups
from ogpsa_trl.parsing import FlatParser, config_values, split_config
from runs import WORLD

ROOT = Path(__file__).parent.parent
ROWS = WORLD.capability_groups(4)
QUESTION = {"knowledge": "A is B .", "question": "what is A ?", "right_answer": "B"}


def to_arrow(rows, path):
    with ArrowWriter(path=str(path), features=rows.features) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()


def to_tsv(rows, path):
    rows.to_csv(path, sep="\t")


def to_zip(rows, path):
    rows.to_json(f"{path}.jsonl")
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(f"{path}.jsonl", "rows.jsonl")


def packed(write, module):
    def write_packed(rows, path):
        write(rows, f"{path}.unpacked")
        with module.open(path, "wb") as file:
            file.write(Path(f"{path}.unpacked").read_bytes())

    return write_packed


# Some of what `datasets` reads, each another way of writing the same rows.
SUFFIXES = {
    ".json": Dataset.to_json, ".jsonl": Dataset.to_json, ".ndjson": Dataset.to_json,
    ".JSONL": Dataset.to_json, ".v1.2.jsonl": Dataset.to_json, ".csv": Dataset.to_csv,
    ".tsv": to_tsv, ".parquet": Dataset.to_parquet, ".gpq": Dataset.to_parquet, ".arrow": to_arrow,
    ".jsonl.gz": packed(Dataset.to_json, gzip), ".json.gz": packed(Dataset.to_json, gzip),
    ".jsonl.bz2": packed(Dataset.to_json, bz2), ".jsonl.xz": packed(Dataset.to_json, lzma),
    ".csv.gz": packed(Dataset.to_csv, gzip), ".tsv.gz": packed(to_tsv, gzip),
    ".jsonl.zip": to_zip, ".zip": to_zip,
    # A pattern, for `datasets`, and a name that it passes over in a folder.
    " [1] *?.jsonl": Dataset.to_json, "/.hidden.jsonl": Dataset.to_json,
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What `load_dataset` makes of the files here does not stay in the user's cache."""
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def parse(tmp_path):
    """Parse YAML (as text or as a mapping) with what every run needs, and a command line."""

    def parse_with(values=None, *line):
        text = values if isinstance(values, str) else yaml.safe_dump(values) if values else ""
        required = {"model_name_or_path": "toy", "output_dir": str(tmp_path), "use_cpu": True}
        if isinstance(values, dict):
            required = {key: value for key, value in required.items() if key not in values}
        file = tmp_path / "run.yaml"
        file.write_text(f"{yaml.safe_dump(required) if required else ''}\n{text}")
        return parse_run(["--config", str(file), *line])

    return parse_with


@pytest.fixture
def capability(tmp_path):
    """Two entries of capability data, as files."""
    entries = []
    for name, rows in ROWS.items():
        rows.to_json(tmp_path / f"{name}.jsonl")
        entries.append({"path": str(tmp_path / f"{name}.jsonl"), "group": name})
    return {"capability_datasets": entries}


def assert_refused(message):
    return pytest.raises(ValueError, match=message)


def texts(rows):
    return [(row["prompt"], row["completion"]) for row in rows]


class TestValues:
    def test_keys_of_every_kind_come_from_one_flat_file(self, parse, capability):
        run = parse({
            "stage": "dpo", "learning_rate": 0.5, "beta": 0.2, "lora_r": 3, "streaming": True,
            "datasets": [{"path": "org/a"}], "max_steps": 3, "dataset_test_split": "held_out",
            "refresh_interval": 5, "rank": 2, **capability,
        })  # fmt: skip
        assert run.train.stage == "dpo"
        assert (run.training.learning_rate, run.training.beta) == (0.5, 0.2)
        assert run.model.model_name_or_path == "toy"
        assert (run.model.lora_r, run.datasets.streaming) == (3, True)
        assert run.script.dataset_test_split == "held_out"
        assert run.ogpsa == OGPSAConfig(refresh_interval=5, rank=2)
        assert [entry.group for entry in run.train.capability_datasets] == list(ROWS)

    def test_the_line_wins(self, parse, capability):
        values = {"refresh_interval": 5, "num_samples": 7, "learning_rate": 0.5} | capability
        run = parse(values, "--refresh_interval", "9", "--learning-rate=0.25")
        assert (run.ogpsa.refresh_interval, run.ogpsa.num_samples) == (9, 7)
        assert run.training.learning_rate == 0.25

    def test_a_file_is_not_needed(self, tmp_path):
        line = ["--model_name_or_path", "toy", "--output_dir", str(tmp_path), "--use_cpu"]
        run = parse_run([*line, "--capability_datasets", "org/a", "org/b"])
        assert [entry.path for entry in run.train.capability_datasets] == ["org/a", "org/b"]
        assert run.ogpsa == OGPSAConfig()

    def test_the_file_may_be_named_with_an_equals_sign(self, parse, tmp_path, capability):
        parse(capability)
        assert parse_run([f"--config={tmp_path / 'run.yaml'}"]).model.model_name_or_path == "toy"

    @pytest.mark.parametrize("line", [[], ["--stage", "dpo"], ["--stage=dpo"]])
    def test_the_stage_of_the_line_decides_the_keys(self, parse, line):
        """`beta` is a key of DPO only, `packing` of SFT only."""
        if line:
            assert parse({"stage": "sft", "beta": 0.2}, *line).training.beta == 0.2
        else:
            assert parse({"packing": True}).training.packing

    @pytest.mark.parametrize(("text", "value"), [("1e-6", 1e-6), ("'3e-4'", 3e-4), ("1", 1)])
    def test_numbers_that_yaml_takes_for_text_are_numbers(self, parse, text, value):
        rate = parse(f"learning_rate: {text}").training.learning_rate
        assert rate == value
        assert not isinstance(rate, str)

    @pytest.mark.parametrize("text", ["null", "", "none", "~"])
    def test_an_optional_setting_can_be_unset(self, parse, capability, text):
        run = parse(f"{yaml.safe_dump(capability)}\nrank: {text}")
        assert run.ogpsa.rank is None
        assert parse({"rank": 3} | capability, "--rank", "none").ogpsa.rank is None

    @pytest.mark.parametrize("stage", ["sft", "dpo"])
    @pytest.mark.parametrize("preset", ["paper", "paper-theorem", "preserve", "replay", "kl"])
    def test_a_preset_fills_in_what_is_not_set(self, parse, capability, preset, stage):
        values = {"preset": preset, "stage": stage} | capability
        from_preset = functools.partial(OGPSAConfig.from_preset, preset, stage=stage)
        assert parse(values).ogpsa == from_preset()
        assert parse(values | {"refresh_interval": 7}).ogpsa == from_preset(refresh_interval=7)
        assert parse(values, "--refresh_interval", "7").ogpsa == from_preset(refresh_interval=7)

    @pytest.mark.parametrize("line", [["--preset", "paper"], ["--preset=paper"]])
    def test_the_preset_of_the_line_wins(self, parse, capability, line):
        run = parse({"preset": "kl"} | capability, *line)
        assert run.ogpsa == OGPSAConfig.from_preset("paper")

    def test_losses_of_dpo_may_be_combined(self, parse):
        values = {"stage": "dpo", "loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2]}
        training = parse(values).training
        assert training.loss_type == ["sigmoid", "bco_pair"]
        assert training.loss_weights == [0.8, 0.2]
        assert parse({"stage": "dpo", "loss_type": "ipo"}).training.loss_type == ["ipo"]
        line = ["--loss_type", "hinge", "sft"]
        assert parse({"stage": "dpo"}, *line).training.loss_type == ["hinge", "sft"]

    def test_variables_of_the_environment_are_set(self, parse, monkeypatch):
        monkeypatch.setenv("OGPSA_TEST", "before")
        parse({"env": {"OGPSA_TEST": 3}})
        assert os.environ["OGPSA_TEST"] == "3"

    @pytest.mark.parametrize("key", ["datasets", "capability_datasets"])
    def test_a_list_without_entries_is_as_if_left_out(self, parse, key):
        """A key with all its entries commented out."""
        run = parse(f"{key}:\n# - path: facts.json")
        assert run.train.capability_groups() is None
        assert not run.datasets.datasets

    @pytest.mark.parametrize("stage", ["sft", "dpo"])
    def test_help_lists_every_key(self, stage, capsys):
        with pytest.raises(SystemExit) as stop:
            parse_run(["--stage", stage, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        keys = ["stage", "capability_datasets", "refresh_interval", "learning_rate", "lora_r"]
        for key in [*keys, {"sft": "packing", "dpo": "beta"}[stage]]:
            assert f"--{key}" in text


class TestUnknownKeys:
    def test_in_the_file(self, parse, tmp_path):
        with assert_refused(
            f"Unknown key `refresh_intervall` in {tmp_path}/run.yaml. "
            "The nearest known key is `refresh_interval`"
        ):
            parse({"refresh_intervall": 3})

    @pytest.mark.parametrize("word", ["--num_sample=3", "--num-sample", "--num_sample"])
    def test_on_the_line(self, parse, word):
        with assert_refused(
            "Unknown key `num_sample` in the command line. The nearest known key is `num_samples`"
        ):
            parse(None, word, "3")

    def test_with_hyphens_in_the_file(self, parse):
        """argparse knows them on the line; in the file a key has one spelling."""
        with assert_refused("`refresh-interval` .* The nearest known key is `refresh_interval`"):
            parse({"refresh-interval": 3})

    def test_abbreviations_are_unknown(self, parse, capability):
        with assert_refused("Unknown key `refresh_i` in the command line"):
            parse(capability, "--refresh_i", "3")

    @pytest.mark.parametrize("key", ["datasets", "capability_datasets"])
    def test_in_an_entry(self, parse, key):
        with assert_refused(
            f"Unknown key `colums` in entry 2 of `{key}`. The nearest known key is `columns`"
        ):
            parse({key: [{"path": "org/a"}, {"path": "org/b", "colums": ["text"]}]})

    def test_group_belongs_to_capability_data_only(self, parse):
        with assert_refused("Unknown key `group` in entry 1 of `datasets`"):
            parse({"datasets": [{"path": "org/a", "group": "facts"}]})

    @pytest.mark.parametrize(
        ("stage", "other", "key"), [("sft", "dpo", "beta"), ("dpo", "sft", "packing")]
    )
    def test_of_the_other_stage(self, parse, stage, other, key, tmp_path):
        message = (
            f"is a key of the stage '{other}', but this run has the stage '{stage}'. Remove it, or "
            f"set `stage: {other}`"
        )
        with assert_refused(f"`{key}` in {tmp_path}/run.yaml {message}"):
            parse({"stage": stage, key: 1})
        with assert_refused(f"`{key}` in the command line {message}"):
            parse({"stage": stage}, f"--{key}", "1")

    @pytest.mark.parametrize(("key", "answer"), [
        ("torch_dtype", "write `dtype`"),
        ("evaluation_strategy", "write `eval_strategy`"),
        ("no_cuda", "write `use_cpu`"),
        ("max_seq_length", "write `max_length`"),
        ("warmup_ratio", "write `warmup_steps: SHARE`"),
        ("group_by_length", "write `train_sampling_strategy: group_by_length`"),
        ("push_to_hub_model_id", "write `hub_model_id`"),
        ("max_prompt_length", "no such key any more. Prompt and completion are cut as one"),
        ("overwrite_output_dir", "no such key any more. Nothing that is in the folder"),
        ("logging_dir", "no such key any more. TensorBoard reads .* TENSORBOARD_LOGGING_DIR"),
        ("tokenizer", "no such key any more. It is that of the model"),
        ("constraint", "no such key any more. 'inequality' had .* Remove the key"),
        ("compile_projection", "no such key any more. It saved .* Remove the key"),
    ])  # fmt: skip
    @pytest.mark.parametrize("stage", ["sft", "dpo"])
    def test_that_were_renamed_or_removed_are_answered_with_that(self, parse, stage, key, answer):
        with assert_refused(f"Unknown key `{key}` in .*run.yaml. .*{answer}"):
            parse({"stage": stage, key: "x"})
        with assert_refused(f"Unknown key `{key}` in the command line. .*{answer}"):
            parse({"stage": stage}, f"--{key.replace('_', '-')}", "x")

    def test_that_were_renamed_in_the_other_stage_are_not_named(self, parse):
        with assert_refused("Unknown key `rpo_alpha` .* write `loss_weights: "):
            parse({"stage": "dpo", "rpo_alpha": 1.0})
        with assert_refused("Unknown key `rpo_alpha` .* The nearest known key is"):
            parse({"stage": "sft", "rpo_alpha": 1.0})

    def test_that_were_renamed_are_answered_by_every_command(self):
        line = ["--torch_dtype", "bfloat16"]
        launcher = launch_command_parser()
        for parse in (
            parse_evaluation,
            parse_capability_set,
            lambda line: separated(line, launcher),
        ):
            with assert_refused("Unknown key `torch_dtype` .* write `dtype`"):
                parse(line)
        with assert_refused("Unknown key `tokenizer` .* write `tokenizer_name_or_path`"):
            parse_evaluation(["--tokenizer", "x"])
        with assert_refused("Unknown key `warmup_ratio` .* The nearest known key is"):
            parse_evaluation(["--warmup_ratio", "0.1"])

    def test_that_have_a_successor_are_not_known_and_the_successor_is(self):
        """In the installed versions; any other would be sent from one unknown key to the next."""
        options = training_options() | FlatParser((EvaluationArguments,), "").option_names()
        known = {option.removeprefix("--") for option in options}
        assert known.isdisjoint(renamed_keys._SUCCESSORS.keys() | renamed_keys._GONE.keys())
        for successor in renamed_keys._SUCCESSORS.values():
            for part in successor.split("` and `"):
                assert part.partition(":")[0] in known, part

    @pytest.mark.parametrize("key", renamed_keys._SUCCESSORS)
    def test_that_have_a_successor_with_a_value_have_one_that_is_allowed(self, parse, key):
        successor = renamed_keys._SUCCESSORS[key]
        if ":" not in successor:
            return
        text = "\n".join(successor.split("` and `"))
        for word, value in {"SHARE": "0.1", "NUMBER": "5", "ALPHA": "2.0"}.items():
            text = text.replace(word, value)
        stage = "dpo" if "loss_weights" in text else "sft"
        parse(f"stage: {stage}\neval_steps: 1\n{text}")

    def test_come_before_values_that_are_not_allowed(self, parse):
        """A misspelt key may be why: without `use_cpu` TRL's defaults need a GPU."""
        with assert_refused("Unknown key `use_cpuu` .* The nearest known key is `use_cpu`"):
            parse({"use_cpuu": True, "use_cpu": False})

    @pytest.mark.parametrize("key", ["help", "config", "no_ogpsa"])
    def test_options_of_the_line_are_unknown_in_the_file(self, parse, key):
        with assert_refused(f"Unknown key `{key}` in"):
            parse({key: True})

    @pytest.mark.parametrize("key", [3, True, None])
    def test_that_are_no_text(self, parse, key):
        """YAML takes `on` for True."""
        with assert_refused(f"key {key!r}|key `{key}`"):
            parse({key: 1})

    @pytest.mark.parametrize("word", ["facts.json", "-x"])
    def test_words_of_no_key(self, parse, word):
        with assert_refused(
            f"'{word}' in the command line belongs to no key. Keys begin with `--`"
        ):
            parse(None, word)


class TestValuesThatAreNotAllowed:
    """The message names the key and the value, and is a `ValueError`, as `parse_run` promises."""

    @pytest.mark.parametrize("value", ["abc", 2.5, 0, True, [3]])
    def test_an_interval_that_is_no_count(self, parse, capability, value):
        with assert_refused(f"refresh_interval.* {value!r}".replace("[", r"\[")):
            parse({"refresh_interval": value} | capability)

    def test_a_choice_that_is_none(self, parse, capability):
        with assert_refused("scope.*'whole'"):
            parse({"scope": "whole"} | capability)

    @pytest.mark.parametrize(
        "line",
        [
            ["--refresh_interval", "abc"],
            ["--scope", "whole"],
            ["--learning_rate", "fast"],
            ["--ogpsa", "maybe"],
        ],
    )
    def test_on_the_line(self, parse, capability, line):
        key, value = line
        with assert_refused(f"{key.strip('-')}.*{value}"):
            parse(capability, *line)

    def test_a_key_without_its_value(self, parse, capability):
        with assert_refused("refresh_interval"):
            parse(capability, "--refresh_interval")

    @pytest.mark.parametrize("key", ["learning_rate", "lora_r", "use_cpu"])
    def test_keys_of_trl(self, parse, key):
        with assert_refused(f"{key}.*abc"):
            parse({key: "abc"})

    @pytest.mark.parametrize("value", ["ppo", None, ["dpo"], 3])
    def test_another_stage(self, parse, value):
        with assert_refused("`stage` must be 'sft' or 'dpo', but got"):
            parse({"stage": value})

    def test_another_stage_on_the_line(self, parse):
        with assert_refused("`stage` must be 'sft' or 'dpo', but got 'ppo'"):
            parse(None, "--stage=ppo")

    @pytest.mark.parametrize("key", ["datasets", "capability_datasets"])
    @pytest.mark.parametrize("value", [{"path": "org/a"}, "org/a", {"facts": [{"path": "org/a"}]}])
    def test_entries_that_are_no_list(self, parse, key, value):
        with assert_refused(rf"`{key}` must be a list \(every entry begins with `-`\), but got"):
            parse({key: value})

    @pytest.mark.parametrize("key", ["datasets", "capability_datasets"])
    @pytest.mark.parametrize("entry", ["org/a", None, {"name": "main"}, {}, {"path": None}])
    def test_an_entry_without_a_path(self, parse, key, entry):
        with assert_refused(f"entry 2 of `{key}` must have a `path` .*, but is"):
            parse({key: [{"path": "org/a"}, entry]})

    def test_an_environment_that_is_no_mapping(self, parse):
        with assert_refused("`env`"):
            parse({"env": "OGPSA_TEST=3"})


class TestFiles:
    def assert_refused(self, message, tmp_path, text):
        (tmp_path / "run.yaml").write_text(text)
        with assert_refused(message):
            parse_run(["--config", str(tmp_path / "run.yaml")])

    def test_no_file(self, tmp_path):
        with assert_refused(
            f"`--config` must name a YAML file, but there is none at '{tmp_path}/a.yaml'"
        ):
            parse_run(["--config", f"{tmp_path}/a.yaml"])

    def test_a_folder(self, tmp_path):
        with assert_refused(f"`--config` must name a YAML file, but there is none at '{tmp_path}'"):
            parse_run(["--config", str(tmp_path)])

    def test_no_name_of_a_file(self):
        with assert_refused("`--config` needs a file, but none follows it"):
            parse_run(["--stage", "dpo", "--config"])

    @pytest.mark.parametrize("text", ["", "# nothing", "- a\n- b", "just words", "3"])
    def test_no_mapping(self, tmp_path, text):
        self.assert_refused(
            r"run.yaml' must hold keys with values \(`key: value`\), but holds", tmp_path, text
        )

    @pytest.mark.parametrize("text", ["a: [", "a: b: c", "a:\n\t- b", "'a"])
    def test_no_yaml(self, tmp_path, text):
        self.assert_refused("run.yaml' is not valid YAML: ", tmp_path, text)


class TestWhatARunNeeds:
    def test_settings_of_ogpsa_need_data(self, parse, capability):
        with assert_refused(
            "`rank` is a setting of OGPSA, but there is no capability data to use it on. Add "
            "`capability_datasets`, or set `ogpsa: false` to train plain TRL"
        ):
            parse({"rank": 3})
        assert parse({"rank": 3} | capability).ogpsa.rank == 3
        assert parse({"rank": 3, "ogpsa": False}).train.capability_groups() is None

    def test_a_model(self, tmp_path):
        with assert_refused(
            "needs a model, but `model_name_or_path` is not set. Set it to a name on the"
        ):
            parse_run(["--output_dir", str(tmp_path), "--use_cpu"])

    def test_training_data(self, parse):
        with assert_refused("neither `datasets` nor `dataset_name` is set. Set `dataset_name` to"):
            parse().safety_datasets()

    def test_no_capability_data_for_plain_trl(self, parse):
        assert parse().train.capability_groups() is None

    @pytest.mark.parametrize("line", [["--ogpsa", "false"], ["--ogpsa=no"], ["--no_ogpsa"]])
    def test_the_line_turns_ogpsa_off(self, parse, capability, line):
        assert parse(capability).train.capability_groups() is not None
        assert parse(capability, *line).train.capability_groups() is None
        assert parse({"ogpsa": False} | capability).train.capability_groups() is None


class TestGate:
    @pytest.fixture
    def held_out(self, tmp_path):
        """Rows that are in no other list."""
        ROWS["skills"].to_json(tmp_path / "held_out.jsonl")
        entry = {"path": str(tmp_path / "held_out.jsonl"), "group": "skills"}
        return {"gate_datasets": [entry]}

    @pytest.mark.parametrize("ogpsa", [True, False])
    def test_its_data_and_settings_come_from_the_same_file(
        self, parse, capability, held_out, ogpsa
    ):
        values = {"gate_interval": 7, "max_capability_loss_increase": 0.1, "gate_action": "stop"}
        run = parse(values | capability | held_out | {"ogpsa": ogpsa})
        assert run.gate == GateConfig(**values)
        groups = run.train.gate_groups()
        assert {name: texts(rows) for name, rows in groups.items()} == {
            "skills": texts(ROWS["skills"])
        }
        line = ["--max_capability_loss_increase", "none", "--gate_action", "warn"]
        run = parse(values | held_out, *line)
        assert run.gate == GateConfig(gate_interval=7)

    def test_is_not_there_without_data(self, parse, capability):
        assert parse(capability).train.gate_groups() is None

    @pytest.mark.parametrize(
        ("key", "value"),
        [("max_capability_loss_increase", 0.1), ("gate_interval", 7), ("gate_num_samples", 9)],
    )
    def test_settings_need_data(self, parse, capability, key, value):
        with assert_refused(
            rf"`{key}` \({value}\) is a setting of the capability gate, but there is no data to "
            f"measure. Add `gate_datasets`, .* or leave `{key}` out"
        ):
            parse(capability | {key: value})

    @pytest.mark.parametrize("key", ["capability_datasets", "datasets"])
    def test_data_that_is_used_in_training_is_refused(self, parse, held_out, key):
        [entry] = held_out["gate_datasets"]
        used = {name: value for name, value in entry.items() if name != "group"}
        with assert_refused(
            f"entry 1 of `gate_datasets` must be held out, but the same data .*held_out.jsonl'?, "
            rf"split 'train'\) is an entry of `{key}`. Name another split"
        ):
            parse(held_out | {key: [used]})
        other_rows = {key: [used | {"split": "train[:2]"}]}
        assert parse({"gate_datasets": [entry | {"split": "train[2:]"}]} | other_rows)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"gate_action": "stop"}, "`gate_action` 'stop' needs a tolerance"),
            ({"max_capability_loss_increase": -1}, "number of at least 0, but got -1"),
            ({"max_capability_loss_increase": "much"}, "max_capability_loss_increase.*much"),
            (
                {
                    "gate_action": "best", "max_capability_loss_increase": 0.1,
                    "metric_for_best_model": "loss",
                },
                "`metric_for_best_model` is 'loss' and would mark another",
            ),
        ],
    )  # fmt: skip
    def test_values_that_are_not_allowed(self, parse, held_out, values, message):
        with assert_refused(message):
            parse(values | held_out)

    def test_unknown_keys_of_its_entries_are_errors(self, parse):
        with assert_refused("Unknown key `colums` in entry 1 of `gate_datasets`"):
            parse({"gate_datasets": [{"path": "org/a", "colums": ["text"]}]})


class TestHome:
    """`~` is the home folder in every value, as in a shell."""

    @pytest.fixture(autouse=True)
    def home(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        ROWS["skills"].to_json(tmp_path / "skills.jsonl")
        ROWS["skills"].to_json(tmp_path / "data" / "skills.jsonl")
        return str(tmp_path)

    @pytest.mark.parametrize("is_in_line", [False, True])
    @pytest.mark.parametrize(
        ("part", "key"),
        [
            ("model", "model_name_or_path"), ("training", "output_dir"), ("training", "run_name"),
            ("training", "resume_from_checkpoint"), ("training", "chat_template_path"),
            ("script", "dataset_name"),
        ],
    )  # fmt: skip
    def test_is_the_same_in_every_key(self, parse, home, part, key, is_in_line):
        lines = [["", f"--{key}=~/x"], ["", f"--{key}", "~/x"]] if is_in_line else [[f"{key}: ~/x"]]
        for text, *line in lines:
            text = text if key == "output_dir" and not line else f"{text}\noutput_dir: out"
            run = parse_run([*self.file(home, f"use_cpu: true\n{text}"), *self.model(key), *line])
            assert getattr(getattr(run, part), key) == f"{home}/x"

    @staticmethod
    def file(home, text):
        Path(home, "run.yaml").write_text(text)
        return ["--config=~/run.yaml"]

    @staticmethod
    def model(key):
        return [] if key == "model_name_or_path" else ["--model_name_or_path", "toy"]

    def test_is_the_same_at_any_depth(self, home):
        """What takes a mapping may hold paths: arguments of the model, files by their split."""
        values = {
            "deepspeed": "~/ds.json", "fsdp_config": "~/fsdp.json",
            "model_init_kwargs": {"cache_dir": "~/cache", "list": ["~/a", 1, None]},
            "env": {"HF_HOME": "~/hf"},
            "datasets": [{"path": "~/a.jsonl", "data_files": {"train": "~/b"}, "data_dir": "~"}],
        }  # fmt: skip
        file = Path(home, "run.yaml")
        file.write_text(yaml.safe_dump(values))
        expected = json.loads(json.dumps(values).replace("~", home))
        assert config_values(["--config", str(file)]) == expected

    @pytest.mark.parametrize("text", ["a~/b", "~ is text", "~5 steps", "~", "~nobody-here/x"])
    def test_stands_for_itself_elsewhere(self, parse, text):
        expected = text if text != "~" else os.environ["HOME"]
        assert parse({"run_name": text}).training.run_name == expected

    @pytest.mark.parametrize(
        "entry",
        [
            {"path": "~/skills.jsonl"},
            {"path": "json", "data_files": "~/skills.jsonl"},
            {"path": "json", "data_files": ["~/skills.jsonl"]},
            {"path": "json", "data_files": {"train": "~/skills.jsonl"}},
            {"path": "json", "data_dir": "~/data"},
            {"path": "~/data"},
        ],
    )
    @pytest.mark.parametrize("key", ["datasets", "capability_datasets", "gate_datasets"])
    def test_is_where_data_are_found(self, parse, key, entry):
        run = parse({key: [entry]})
        if key == "datasets":
            rows = run.safety_datasets()["train"]
        else:
            groups = run.train.capability_groups if key[0] == "c" else run.train.gate_groups
            [rows] = groups().values()
        assert texts(rows) == texts(ROWS["skills"])

    def test_is_the_same_for_the_other_commands(self, home):
        model = ["--model_name_or_path=~/toy", "--output_dir", "~/out"]
        evaluation = parse_evaluation([
            *model, "--base_model_name_or_path", "~/base", "--tokenizer_name_or_path=~/tokens",
            "--capability_datasets", "~/skills.jsonl",
        ])  # fmt: skip
        names = (
            evaluation.model_name_or_path, evaluation.base_model_name_or_path,
            evaluation.tokenizer_name_or_path, evaluation.output_dir,
            evaluation.capability_datasets[0].data_files,
        )  # fmt: skip
        ends = ("toy", "base", "tokens", "out", "skills.jsonl")
        assert names == tuple(f"{home}/{end}" for end in ends)
        arguments, config = parse_capability_set([*model, "--capability_datasets=~/skills.jsonl"])
        names = (
            config.model_name_or_path, arguments.output_dir,
            arguments.capability_datasets[0].data_files,
        )  # fmt: skip
        assert names == tuple(f"{home}/{end}" for end in ("toy", "out", "skills.jsonl"))

    def test_is_the_same_among_the_options_of_the_launch(self, home):
        engine = Path(home, "engine.yaml")
        engine.write_text("distributed_type: 'NO'\n")
        line = ["--accelerate_config=~/engine.yaml", "--log_dir=~/logs", "--dataset_name=~/x"]
        launch, training = separated(split_config(line), launch_command_parser())
        assert launch == ["--config_file", str(engine), "--log_dir", f"{home}/logs"]
        assert training == [f"--dataset_name={home}/x"]


class TestDataFiles:
    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_are_read_by_their_path(self, parse, tmp_path, suffix):
        file = Path(f"{tmp_path}/facts{suffix}")
        file.parent.mkdir(exist_ok=True)
        SUFFIXES[suffix](ROWS["skills"], file)
        entries = [{"path": str(file)}]
        run = parse({"datasets": entries, "capability_datasets": entries})
        assert texts(run.safety_datasets()["train"]) == texts(ROWS["skills"])
        assert texts(run.train.capability_groups()["capability"]) == texts(ROWS["skills"])
        by_name = parse({"dataset_name": str(file)})
        assert texts(by_name.safety_datasets()["train"]) == texts(ROWS["skills"])

    def test_are_read_as_a_stream(self, parse, tmp_path):
        ROWS["skills"].to_json(tmp_path / "facts.jsonl")
        name = {"dataset_name": str(tmp_path / "facts.jsonl"), "dataset_streaming": True}
        rows = parse(name | {"max_steps": 1}).safety_datasets()["train"]
        assert not isinstance(rows, Dataset)
        assert texts(rows) == texts(ROWS["skills"])

    @pytest.mark.parametrize("key", ["dataset_name", "datasets", "capability_datasets"])
    def test_that_are_missing_are_named(self, parse, tmp_path, monkeypatch, key):
        """And not looked for on the Hub, whose error does not speak of files."""
        monkeypatch.chdir(tmp_path)
        missing = "data/fact.jsonl"
        with assert_refused(f"no file .*{missing}"):
            run = parse({key: missing if key == "dataset_name" else [{"path": missing}]})
            run.train.capability_groups()
            run.safety_datasets()

    @pytest.mark.parametrize("entry_type", [
        GroupedDatasetConfig, LookAlikeDatasetConfig, HarmfulDatasetConfig,
        OverRefusalDatasetConfig, PreferenceDatasetConfig,
    ])  # fmt: skip
    def test_are_read_in_the_lists_of_every_command(self, tmp_path, entry_type):
        SUFFIXES[".tsv.gz"](ROWS["skills"], tmp_path / "facts.tsv.gz")
        entry = entry_type(str(tmp_path / "facts.tsv.gz"))
        assert texts(load_groups([entry], "a list")[entry.group]) == texts(ROWS["skills"])

    def test_of_lines_are_texts(self, parse, tmp_path):
        (tmp_path / "facts.txt").write_text("A is B .\nB is C .\n")
        entries = [{"path": str(tmp_path / "facts.txt")}]
        [rows] = parse({"capability_datasets": entries}).train.capability_groups().values()
        assert rows.to_list() == [{"text": "A is B ."}, {"text": "B is C ."}]

    @pytest.mark.parametrize("key", ["dataset_name", "datasets", "capability_datasets"])
    @pytest.mark.parametrize("name", ["facts", "facts.old", "facts.jsonl.old.1"])
    def test_with_an_ending_that_says_nothing_need_a_builder(self, parse, tmp_path, key, name):
        file = tmp_path / name
        ROWS["skills"].to_json(file)
        if name == "facts.jsonl.old.1":  # one ending of several is enough
            entries = [{"path": str(file)}]
        else:
            with assert_refused(f"{name}' is a file, but its ending does not say .* `path: json`"):
                run = parse({key: str(file) if key == "dataset_name" else [{"path": str(file)}]})
                run.train.capability_groups()
                run.safety_datasets()
            entries = [{"path": "json", "data_files": str(file)}]
        assert texts(parse({"datasets": entries}).safety_datasets()["train"])

    @pytest.mark.parametrize("suffix", [".zip", ".jsonl.zip", ".jsonl.gz", ".jsonl.xz", ".parquet"])
    def test_that_are_damaged_are_named(self, parse, tmp_path, suffix):
        file = tmp_path / f"facts{suffix}"
        SUFFIXES[suffix](ROWS["skills"], file)
        file.write_bytes(file.read_bytes()[:30])
        with assert_refused(f"facts{suffix}.* cannot be loaded"):
            parse({"datasets": [{"path": str(file)}]}).safety_datasets()

    @pytest.mark.parametrize("name", ["fact.jsonl.gz", "fact.tsv", "fact.parquet", "fact.arrow"])
    def test_of_any_ending_that_are_missing_are_named(self, parse, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        with assert_refused(f"no file 'data/{name}'.*`hf://datasets/data/{name}`"):
            parse({"datasets": [{"path": f"data/{name}"}]}).safety_datasets()

    def test_on_the_hub_may_have_the_name_of_a_file(self, parse):
        run = parse({"datasets": [{"path": "hf://datasets/org/data.jsonl"}]})
        with assert_refused("'hf://datasets/org/data.jsonl' .* cannot be loaded"):  # no network
            run.safety_datasets()

    def test_may_be_given_to_a_builder_as_trl_does(self, parse, capability):
        entry = capability["capability_datasets"][0]
        run = parse({"capability_datasets": [{"path": "json", "data_files": entry["path"]}]})
        assert texts(run.train.capability_groups()["capability"]) == texts(ROWS["skills"])

    def test_are_the_same_on_the_line(self, parse, capability):
        paths = [entry["path"] for entry in capability["capability_datasets"]]
        run = parse(capability, "--capability_datasets", *paths[:1])
        groups = run.train.capability_groups()
        assert {name: texts(rows) for name, rows in groups.items()} == {
            "capability": texts(ROWS["skills"])
        }


class TestGroups:
    def test_stay_apart(self, parse, capability):
        groups = parse(capability).train.capability_groups()
        assert {name: texts(rows) for name, rows in groups.items()} == {
            name: texts(rows) for name, rows in ROWS.items()
        }

    def test_mix_their_entries(self, parse, capability):
        skills, language = (entry["path"] for entry in capability["capability_datasets"])
        entries = [
            {"path": skills, "group": "both"},
            {"path": language},
            {"path": language, "group": "both", "split": "train[:2]"},
        ]
        groups = parse({"capability_datasets": entries}).train.capability_groups()
        assert list(groups) == ["both", "capability"]
        assert texts(groups["both"]) == texts(ROWS["skills"]) + texts(ROWS["language"])[:2]
        assert texts(groups["capability"]) == texts(ROWS["language"])

    def test_mix_by_fraction_within_a_group(self, parse, capability):
        first, second = capability["capability_datasets"]
        entries = [first | {"fraction": 0.75}, second | {"fraction": 0.25, "group": "skills"}]
        [rows] = parse({"capability_datasets": entries}).train.capability_groups().values()
        # No row is used twice: three quarters are at most the four rows that there are.
        assert texts(rows) == texts(ROWS["skills"]) + texts(ROWS["language"])[:1]

    @pytest.mark.parametrize("shares", [(1, 1), (0.75, 0.25), (0.1, 0.7), (3, 1e-3)])
    def test_have_the_shares_that_trl_gives_them(self, parse, capability, shares):
        paths = [entry["path"] for entry in capability["capability_datasets"]]
        entries = [{"path": p, "fraction": f} for p, f in zip(paths, shares, strict=True)]
        [rows] = parse({"capability_datasets": entries}).train.capability_groups().values()
        of_trl = [
            DatasetConfig("json", data_files=e["path"], fraction=e["fraction"]) for e in entries
        ]
        assert texts(rows) == texts(get_dataset(DatasetMixtureConfig(of_trl))["train"])

    def test_with_a_share_need_one_for_all(self, parse, capability):
        first, second = capability["capability_datasets"]
        entries = [first | {"fraction": 0.75, "group": "a"}, second | {"group": "a"}]
        with assert_refused("`fraction` .* of all entries of a mixture, but .*language.jsonl"):
            parse({"capability_datasets": entries}).train.capability_groups()

    def test_take_the_columns_asked_for(self, parse, capability):
        entry = capability["capability_datasets"][0] | {"columns": ["prompt"]}
        [rows] = parse({"capability_datasets": [entry]}).train.capability_groups().values()
        assert rows.column_names == ["prompt"]


class TestConversions:
    @pytest.fixture
    def entry(self, tmp_path):
        Dataset.from_list([QUESTION]).to_json(tmp_path / "halueval.jsonl")
        return {"path": str(tmp_path / "halueval.jsonl"), "conversion": "halueval_qa"}

    def test_make_a_format_of_trl_in_both_lists(self, parse, entry):
        run = parse({"datasets": [entry], "capability_datasets": [entry]})
        [rows] = run.train.capability_groups().values()
        assert rows.to_list() == run.safety_datasets()["train"].to_list()
        assert rows[0]["completion"] == [{"role": "assistant", "content": "B"}]

    def test_are_made_entry_by_entry(self, parse, entry, tmp_path):
        converted = parse({"datasets": [entry]}).safety_datasets()["train"]
        converted.to_json(tmp_path / "converted.jsonl")
        mixture = [entry, {"path": str(tmp_path / "converted.jsonl")}]
        [rows] = parse({"capability_datasets": mixture}).train.capability_groups().values()
        assert rows.to_list() == converted.to_list() * 2

    def test_of_another_name_are_refused(self, parse, entry):
        with assert_refused(
            "`conversion` must be one of .*halueval_qa.*, but got 'halueval'. Leave it out"
        ):
            parse({"datasets": [entry | {"conversion": "halueval"}]})

    def test_do_not_go_with_fractions(self, parse, entry):
        run = parse({"datasets": [entry | {"fraction": 0.5}]})
        with assert_refused(
            "`fraction` cannot be used in a mixture with a `conversion`, but it is 0.5"
        ):
            run.safety_datasets()


# tests/test_evaluate.py and tests/test_capability_set.py have the others.
OTHERS = {"evaluate", "stories_evaluate", "capability_set"}
CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.yaml") if p.stem not in OTHERS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configurations_that_we_ship_are_valid(path, tmp_path, capability):
    line = ["--use_cpu", "true", "--output_dir", str(tmp_path)]
    if path.stem.startswith("demo_"):  # scripts/demo.py fills in the model and the data it makes
        [file, _] = (entry["path"] for entry in capability["capability_datasets"])
        line += ["--model_name_or_path", "toy", "--dataset_name", file]
        line += ["--capability_datasets", file]
    run = parse_run(["--config", str(path), *line])
    assert run.train.stage == ("dpo" if "dpo" in path.stem else "sft")
    assert run.train.capability_datasets
    assert run.script.dataset_name or run.datasets.datasets


def test_the_training_script_says_in_one_line_what_is_wrong(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"model_name_or_path": "toy", "use_cpu": True, "lerning_rate": 1}))
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", str(file)],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode != 0
    # Optional packages that do not fit this machine may complain as they are imported.
    assert "Traceback" not in result.stderr
    assert result.stderr.endswith("\n") and result.stderr.splitlines()[-1] == (
        f"error: Unknown key `lerning_rate` in {file}. The nearest known key is `learning_rate`."
    )
    assert result.stdout == ""
