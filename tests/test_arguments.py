"""
The keys of a run: from YAML and the command line into the settings, and from entries to data.

What is refused stands in tests/test_bad_input.py, unless its words depend on more than the key.
"""

import bz2
import gzip
import json
import lzma
import os
import re
import zipfile
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset, config
from datasets.arrow_writer import ArrowWriter
from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig, get_dataset

from ogpsa_trl import GateConfig, OGPSAConfig
from ogpsa_trl.capability_set.set_keys import LookAlikeDatasetConfig
from ogpsa_trl.cli import renamed_keys
from ogpsa_trl.cli.capability import parse_capability_set
from ogpsa_trl.cli.command_line import expanded, load_mapping, split_config
from ogpsa_trl.cli.evaluate import parse_evaluation
from ogpsa_trl.cli.keys import KeyParser, unknown_key
from ogpsa_trl.cli.launch import separated
from ogpsa_trl.cli.train_keys import parse_run, training_options, training_parser
from ogpsa_trl.data.entries import CapabilityDatasetConfig, GroupedDatasetConfig, load_groups
from ogpsa_trl.evaluation.evaluation_keys import (
    EvaluationArguments,
    HarmfulDatasetConfig,
    OverRefusalDatasetConfig,
    PreferenceDatasetConfig,
)
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


def load(*entries):
    """The rows of one group of such entries."""
    [rows] = load_groups([CapabilityDatasetConfig(**entry) for entry in entries], "a list").values()
    return rows


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

    @pytest.mark.parametrize("line", [["--stage", "dpo"], ["--stage=dpo"]])
    def test_the_stage_of_the_line_decides_the_keys(self, parse, line):
        """`beta` is a key of DPO only, `packing` of SFT only."""
        assert parse({"packing": True}).training.packing
        assert parse({"stage": "sft", "beta": 0.2}, *line).training.beta == 0.2

    @pytest.mark.parametrize(("text", "value"), [("1e-6", 1e-6), ("1", 1)])
    def test_numbers_that_yaml_takes_for_text_are_numbers(self, parse, text, value):
        rate = parse(f"learning_rate: {text}").training.learning_rate
        assert rate == value
        assert not isinstance(rate, str)

    @pytest.mark.parametrize("text", ["null", "none"])
    def test_an_optional_setting_can_be_unset(self, parse, capability, text):
        run = parse(f"{yaml.safe_dump(capability)}\nrank: {text}")
        assert run.ogpsa.rank is None
        assert parse({"rank": 3} | capability, "--rank", "none").ogpsa.rank is None

    @pytest.mark.parametrize(
        ("preset", "stage"),
        [("paper", "dpo"), ("paper-theorem", "sft"), ("preserve", "sft"), ("replay", "dpo"),
         ("kl", "sft")],
    )  # fmt: skip
    def test_a_preset_fills_in_what_is_not_set(self, parse, capability, preset, stage):
        values = {"stage": stage, "scope": "parameter"} | capability
        expected = OGPSAConfig.from_preset(preset, stage=stage, rank=7, scope="parameter")
        assert parse(values | {"preset": preset}, "--rank", "7").ogpsa == expected

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


@pytest.fixture(scope="module")
def known():
    """The names of all keys, by stage."""
    return {stage: training_parser(stage).key_names() for stage in ("sft", "dpo")}


class TestUnknownKeys:
    @pytest.mark.parametrize("word", ["--num_sample=3", "--num-sample", "--num_sample"])
    def test_on_the_line(self, parse, word):
        with assert_refused(
            "Unknown key `num_sample` in the command line. The nearest known key is `num_samples`"
        ):
            parse(None, word, "3")

    def test_with_hyphens_in_the_file(self, parse):
        """argparse knows them on the line; in the file a key has one spelling."""
        with assert_refused(r"`refresh-interval` .* The nearest known key is `refresh_interval`"):
            parse({"refresh-interval": 3})

    def test_abbreviations_are_unknown(self, parse, capability):
        with assert_refused("Unknown key `refresh_i` in the command line"):
            parse(capability, "--refresh_i", "3")

    def test_of_the_other_stage(self, parse):
        with assert_refused(
            "`packing` in the command line is a key of the stage 'sft', but this run has the stage "
            "'dpo'. Remove it, or set `stage: sft`"
        ):
            parse({"stage": "dpo"}, "--packing", "1")

    @pytest.mark.parametrize(("key", "answer"), [
        ("torch_dtype", "write `dtype`"),
        ("warmup_ratio", "write `warmup_steps: SHARE`"),
        ("group_by_length", "write `train_sampling_strategy: group_by_length`"),
        ("max_prompt_length", "no such key any more. Prompt and completion are cut as one"),
        ("logging_dir", "no such key any more. TensorBoard reads .* TENSORBOARD_LOGGING_DIR"),
        ("tokenizer", "no such key any more. It is that of the model"),
        ("constraint", "no such key any more. 'inequality' had .* Remove the key"),
        ("compile_projection", "no such key any more. It saved .* Remove the key"),
    ])  # fmt: skip
    def test_that_were_renamed_or_removed_are_answered_with_that(self, known, key, answer):
        for stage in known:
            assert re.search(answer, unknown_key(key, "the file", known[stage]))

    def test_that_were_renamed_are_answered_where_they_stand(self, parse):
        with assert_refused(r"Unknown key `no_cuda` in .*run.yaml. .*write `use_cpu`"):
            parse({"no_cuda": "x"})
        with assert_refused(r"Unknown key `no_cuda` in the command line. .*write `use_cpu`"):
            parse(None, "--no-cuda", "x")

    def test_that_were_renamed_in_the_other_stage_are_not_named(self, known):
        assert "write `loss_weights: " in unknown_key("rpo_alpha", "the file", known["dpo"])
        assert "The nearest known key is" in unknown_key("rpo_alpha", "the file", known["sft"])

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
        options = training_options() | KeyParser((EvaluationArguments,), "").option_names()
        known = {option.removeprefix("--") for option in options}
        assert known.isdisjoint(renamed_keys.RENAMED.keys() | renamed_keys.REMOVED.keys())
        for successor in renamed_keys.RENAMED.values():
            for part in successor.split("` and `"):
                assert part.partition(":")[0] in known, part

    @pytest.mark.parametrize("successor", [s for s in renamed_keys.RENAMED.values() if ":" in s])
    def test_that_have_a_successor_with_a_value_have_one_that_is_allowed(self, parse, successor):
        text = "\n".join(successor.split("` and `"))
        for word, value in {"SHARE": "0.1", "NUMBER": "5", "ALPHA": "2.0"}.items():
            text = text.replace(word, value)
        stage = "dpo" if "loss_weights" in text else "sft"
        run = parse(f"stage: {stage}\neval_steps: 1\n{text}")
        values = vars(run.training) | vars(run.model)
        assert values[successor.partition(":")[0]] is not None

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

    def test_words_of_no_key(self, parse):
        with assert_refused("'-x' in the command line belongs to no key. Keys begin with `--`"):
            parse(None, "-x")


class TestValuesThatAreNotAllowed:
    @pytest.mark.parametrize(("key", "value"), [("scope", "whole"), ("ogpsa", "maybe")])
    def test_on_the_line(self, parse, capability, key, value):
        with assert_refused(f"{key}.*{value}"):
            parse(capability, f"--{key}", value)

    def test_another_stage(self, parse):
        for line in ([{"stage": ["dpo"]}], [{"stage": None}], [None, "--stage=ppo"]):
            with assert_refused("stage.*'sft'.*'dpo'"):
                parse(*line)

    def test_a_line_that_ends_before_the_name_of_the_file(self):
        with assert_refused("`--config` needs one file, but got '--config'"):
            parse_run(["--stage", "dpo", "--config"])

    @pytest.mark.parametrize("text", ["", "# nothing", "just words", "3"])
    def test_a_file_without_keys(self, tmp_path, text):
        (tmp_path / "run.yaml").write_text(text)
        with assert_refused(r"run.yaml' .* must hold keys with values \(`key: value`\), but holds"):
            load_mapping(str(tmp_path / "run.yaml"))


def test_ogpsa_can_be_turned_off(parse, capability):
    assert parse().train.capability_groups() is None
    assert parse({"rank": 3} | capability).train.capability_groups() is not None
    for line in (["--ogpsa", "false"], ["--ogpsa=no"], ["--no_ogpsa"]):
        assert parse({"rank": 3} | capability, *line).train.capability_groups() is None
    assert parse({"rank": 3, "ogpsa": False}).train.capability_groups() is None


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
        [(name, rows)] = run.train.gate_groups().items()
        assert (name, texts(rows)) == ("skills", texts(ROWS["skills"]))
        line = ["--max_capability_loss_increase", "none", "--gate_action", "warn"]
        assert parse(values | held_out, *line).gate == GateConfig(gate_interval=7)

    def test_is_not_there_without_data(self, parse, capability):
        assert parse(capability).train.gate_groups() is None

    def test_data_that_is_used_in_training_is_refused(self, parse, held_out):
        [entry] = held_out["gate_datasets"]
        used = {name: value for name, value in entry.items() if name != "group"}
        with assert_refused(
            r"entry 1 of `gate_datasets` must be held out, but the same data .*held_out.jsonl' \("
            r"split 'train'\)\) is an entry of `datasets`. Name another split"
        ):
            parse(held_out | {"datasets": [used]})
        other_rows = {"datasets": [used | {"split": "train[:2]"}]}
        assert parse({"gate_datasets": [entry | {"split": "train[2:]"}]} | other_rows)

    def test_its_choice_of_the_best_is_the_only_one(self, parse, held_out):
        values = {"gate_action": "best", "max_capability_loss_increase": 0.1}
        with assert_refused("`metric_for_best_model` is 'loss' and would mark another"):
            parse(values | held_out | {"metric_for_best_model": "loss"})


class TestHome:
    """`~` is the home folder in every value, as in a shell."""

    @pytest.fixture(autouse=True)
    def home(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        ROWS["skills"].to_json(tmp_path / "skills.jsonl")
        ROWS["skills"].to_json(tmp_path / "data" / "skills.jsonl")
        return str(tmp_path)

    @pytest.mark.parametrize("line", [["--run_name=~/x"], ["--run_name", "~/x"]])
    def test_is_the_same_on_the_line_and_in_the_file(self, parse, home, line):
        Path(home, "mine.yaml").write_text("use_cpu: true\noutput_dir: ~/out\n")
        run = parse_run(["--config=~/mine.yaml", "--model_name_or_path=~/toy", *line])
        names = (run.model.model_name_or_path, run.training.output_dir, run.training.run_name)
        assert names == (f"{home}/toy", f"{home}/out", f"{home}/x")

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
        assert load_mapping(str(file)) == expected

    @pytest.mark.parametrize("text", ["a~/b", "~ is text", "~5 steps", "~nobody-here/x"])
    def test_stands_for_itself_elsewhere(self, text):
        assert expanded(text) == text
        assert expanded("~") == os.environ["HOME"]

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
    def test_is_where_data_are_found(self, home, entry):
        Path(home, "run.yaml").write_text(yaml.safe_dump(entry))
        assert texts(load(load_mapping(f"{home}/run.yaml"))) == texts(ROWS["skills"])

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
    def test_are_read_by_their_path(self, tmp_path, suffix):
        file = Path(f"{tmp_path}/facts{suffix}")
        file.parent.mkdir(exist_ok=True)
        SUFFIXES[suffix](ROWS["skills"], file)
        assert texts(load({"path": str(file)})) == texts(ROWS["skills"])

    def test_are_read_in_the_lists_of_every_command(self, parse, tmp_path):
        file = str(tmp_path / "facts.tsv.gz")
        SUFFIXES[".tsv.gz"](ROWS["skills"], file)
        for entry_type in (
            GroupedDatasetConfig, LookAlikeDatasetConfig, HarmfulDatasetConfig,
            OverRefusalDatasetConfig, PreferenceDatasetConfig,
        ):  # fmt: skip
            entry = entry_type(file)
            assert texts(load_groups([entry], "a list")[entry.group]) == texts(ROWS["skills"])
        for values in ({"datasets": [{"path": file}]}, {"dataset_name": file}):
            assert texts(parse(values).safety_datasets()["train"]) == texts(ROWS["skills"])

    def test_are_read_as_a_stream(self, parse, tmp_path):
        ROWS["skills"].to_json(tmp_path / "facts.jsonl")
        name = {"dataset_name": str(tmp_path / "facts.jsonl"), "dataset_streaming": True}
        rows = parse(name | {"max_steps": 1}).safety_datasets()["train"]
        assert not isinstance(rows, Dataset)
        assert texts(rows) == texts(ROWS["skills"])

    def test_of_lines_are_texts(self, tmp_path):
        (tmp_path / "facts.txt").write_text("A is B .\nB is C .\n")
        rows = load({"path": str(tmp_path / "facts.txt")})
        assert rows.to_list() == [{"text": "A is B ."}, {"text": "B is C ."}]

    @pytest.mark.parametrize("name", ["facts", "facts.old"])
    def test_with_an_ending_that_says_nothing_need_a_builder(self, tmp_path, name):
        file = str(tmp_path / name)
        ROWS["skills"].to_json(file)
        with assert_refused(f"{name}' is a file, but its ending does not say .* `path: json`"):
            load({"path": file})
        assert texts(load({"path": "json", "data_files": file})) == texts(ROWS["skills"])

    def test_with_one_ending_of_several_that_says_it_need_none(self, tmp_path):
        ROWS["skills"].to_json(tmp_path / "facts.jsonl.old.1")
        assert texts(load({"path": str(tmp_path / "facts.jsonl.old.1")})) == texts(ROWS["skills"])

    @pytest.mark.parametrize("suffix", [".zip", ".jsonl.gz", ".jsonl.xz", ".parquet"])
    def test_that_are_damaged_are_named(self, tmp_path, suffix):
        file = tmp_path / f"facts{suffix}"
        SUFFIXES[suffix](ROWS["skills"], file)
        file.write_bytes(file.read_bytes()[:30])
        with assert_refused(f"facts{suffix}.* cannot be loaded"):
            load({"path": str(file)})

    @pytest.mark.parametrize("name", ["fact.jsonl.gz", "fact.tsv", "fact.parquet", "fact.arrow"])
    def test_of_any_ending_that_are_missing_are_named(self, tmp_path, monkeypatch, name):
        """And not looked for on the Hub, whose error does not speak of files."""
        monkeypatch.chdir(tmp_path)
        with assert_refused(f"no file 'data/{name}'.*`hf://datasets/data/{name}`"):
            load({"path": f"data/{name}"})

    def test_on_the_hub_may_have_the_name_of_a_file(self):
        with assert_refused("'hf://datasets/org/data.jsonl' .* cannot be loaded"):  # no network
            load({"path": "hf://datasets/org/data.jsonl"})

    def test_are_the_same_on_the_line(self, parse, capability):
        paths = [entry["path"] for entry in capability["capability_datasets"]]
        run = parse(capability, "--capability_datasets", *paths[:1])
        [(name, rows)] = run.train.capability_groups().items()
        assert (name, texts(rows)) == ("capability", texts(ROWS["skills"]))


class TestGroups:
    @pytest.fixture
    def entries(self, capability):
        return capability["capability_datasets"]

    def test_mix_their_entries_and_stay_apart(self, parse, entries):
        skills, language = (entry["path"] for entry in entries)
        entries = [
            {"path": skills, "group": "both"},
            {"path": language},
            {"path": language, "group": "both", "split": "train[:2]"},
        ]
        groups = parse({"capability_datasets": entries}).train.capability_groups()
        assert list(groups) == ["both", "capability"]
        assert texts(groups["both"]) == texts(ROWS["skills"]) + texts(ROWS["language"])[:2]
        assert texts(groups["capability"]) == texts(ROWS["language"])

    def test_mix_by_fraction(self, entries):
        first, second = ({"path": entry["path"]} for entry in entries)
        # No row is used twice: three quarters are at most the four rows that there are.
        rows = load(first | {"fraction": 0.75}, second | {"fraction": 0.25})
        assert texts(rows) == texts(ROWS["skills"]) + texts(ROWS["language"])[:1]
        with assert_refused(r"`fraction` .* of all entries of a mixture, but .*language.jsonl"):
            load(first | {"fraction": 0.75}, second)

    @pytest.mark.parametrize("shares", [(1, 1), (0.75, 0.25), (0.1, 0.7), (3, 1e-3)])
    def test_have_the_shares_that_trl_gives_them(self, entries, shares):
        paths = [entry["path"] for entry in entries]
        rows = load(*({"path": p, "fraction": f} for p, f in zip(paths, shares, strict=True)))
        of_trl = [
            DatasetConfig("json", data_files=p, fraction=f)
            for p, f in zip(paths, shares, strict=True)
        ]
        assert texts(rows) == texts(get_dataset(DatasetMixtureConfig(of_trl))["train"])

    def test_take_the_columns_asked_for(self, entries):
        assert load(entries[0] | {"columns": ["prompt"]}).column_names == ["prompt"]


def test_conversions_are_made_entry_by_entry_in_every_list(parse, tmp_path):
    Dataset.from_list([QUESTION]).to_json(tmp_path / "halueval.jsonl")
    entry = {"path": str(tmp_path / "halueval.jsonl"), "conversion": "halueval_qa"}
    converted = parse({"datasets": [entry]}).safety_datasets()["train"]
    assert converted[0]["completion"] == [{"role": "assistant", "content": "B"}]
    converted.to_json(tmp_path / "converted.jsonl")
    rows = load(entry, {"path": str(tmp_path / "converted.jsonl")})
    assert rows.to_list() == converted.to_list() * 2


# Other tests have the others: those of evaluations, benchmarks and capability sets.
OTHERS = ("evaluate", "benchmark", "capability_set")
CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.yaml") if not p.stem.endswith(OTHERS))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configurations_that_we_ship_are_valid(path, tmp_path):
    line = ["--use_cpu", "true", "--output_dir", str(tmp_path)]
    run = parse_run(["--config", str(path), *line])
    assert run.train.stage == ("dpo" if "dpo" in path.stem else "sft")
    assert run.train.capability_datasets
    assert run.script.dataset_name or run.datasets.datasets
