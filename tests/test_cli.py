"""The console command: what a word means, what is the launch's, and exit statuses."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import CalledProcessError

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from transformers import AutoModelForCausalLM

import ogpsa_trl
from ogpsa_trl.benchmark.toy_model import tiny_model, toy_tokenizer
from ogpsa_trl.benchmark.toy_pretrain import PHASES, _fingerprint
from ogpsa_trl.benchmark.toy_world import ToyWorld
from ogpsa_trl.cli import launch, main
from ogpsa_trl.cli.command_line import split_config
from ogpsa_trl.data.files import configs_folder, find_config
from runs import contradicted

ROOT = Path(__file__).resolve().parent.parent


def ogpsa(*words, cwd, **environment):
    """Run the command as the shell does, in a folder of its own."""
    return subprocess.run(
        [sys.executable, "-m", "ogpsa_trl.cli.main", *map(str, words)],
        capture_output=True, text=True, timeout=240, cwd=cwd, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | environment,
    )  # fmt: skip


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder to work in."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


class TestHelp:
    @pytest.mark.parametrize("line", [[], ["--help"], ["--version"], ["trian"]])
    def test_is_given_before_any_library_is_imported(self, line, tmp_path):
        code = (
            "import atexit, sys\n"
            "from ogpsa_trl.cli.main import main\n"
            "standard = sys.stdlib_module_names\n"
            "others = lambda: {n.partition('.')[0] for n in set(sys.modules) - before} - standard\n"
            "atexit.register(lambda: print('imported:', others()))\n"
            "main(sys.argv[1:])"
        )
        # What the environment itself imports when Python starts is not ours.
        code = "import sys; before = set(sys.modules)\n" + code
        result = subprocess.run(
            [sys.executable, "-c", code, *line], cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60, check=False,
        )  # fmt: skip
        assert "imported: {'ogpsa_trl'}" in result.stdout

    def of(self, line, capsys):
        with pytest.raises(SystemExit) as stop:
            main.main(line)
        assert stop.value.code == 0
        return capsys.readouterr().out

    def test_names_all_commands_and_the_folder_of_the_configurations(self, capsys):
        text = self.of(["--help"], capsys)
        assert all(f"\n  {name} " in text for name in main.COMMANDS)
        assert str(ROOT / "configs") in text
        assert self.of([], capsys) == self.of(["-h"], capsys) == text

    def test_of_a_training_explains_keys_their_sources_and_engines(self, capsys):
        text = self.of(["train", "--stage", "dpo", "--help"], capsys)
        assert text.startswith("usage: ogpsa train --config FILE [--key value ...]\n")
        for source, key in (
            ("ogpsa_trl.OGPSAConfig", "refresh_interval"), ("trl.DPOConfig", "beta"),
            ("transformers.TrainingArguments", "save_total_limit"), ("trl.ModelConfig", "lora_r"),
            ("ogpsa_trl.GateConfig", "gate_interval"),
        ):  # fmt: skip
            section = text.partition(f"\n{source}:\n")[2].partition("\n\n")[0]
            assert f"\n  --{key} " in f"\n{section}", (source, key)
        assert "ddp, fsdp2, hsdp, single, zero1, zero2," in " ".join(text.split())

    def test_of_a_script_is_its_own(self, capsys):
        text = self.of(["evaluate", "--help"], capsys)
        assert text.startswith("usage: ogpsa evaluate --config FILE [--key value ...]\n")
        assert "--lm_eval_tasks" in text

    def test_of_the_version_is_that_of_the_package(self, capsys):
        assert self.of(["--version"], capsys) == f"ogpsa_trl {ogpsa_trl.__version__}\n"


class TestCommands:
    @pytest.mark.parametrize(
        ("line", "module", "rest"),
        [
            (["train", "--config", "x"], "cli.launch", ["--config", "x"]),
            (["evaluate", "--config", "x"], "cli.evaluate", ["--config", "x"]),
            (["report", "runs/sft"], "cli.report", ["runs/sft"]),
            (["report", "~/sft", "--output=~/page.html"], "cli.report",
             ["/home/me/sft", "--output=/home/me/page.html"]),
            (["capability", "--config", "x"], "cli.capability", ["--config", "x"]),
            (["benchmark", "--steps", "2"], "benchmark.tradeoff", ["--steps", "2"]),
            (["benchmark", "tradeoff"], "benchmark.tradeoff", []),
            (["benchmark", "overhead", "--grid"], "benchmark.overhead", ["--grid"]),
            (["benchmark", "data", "toy"], "benchmark.data", ["toy"]),
            (["demo", "--seed", "1"], "benchmark.demo", ["--seed", "1"]),
        ],
    )  # fmt: skip
    def test_run_a_module_with_the_words_that_follow(self, line, module, rest, monkeypatch):
        monkeypatch.setenv("HOME", "/home/me")
        runs = []
        monkeypatch.setattr(f"ogpsa_trl.{module}.main", runs.append)
        assert main.main(line) == 0
        assert runs == [rest]

    def test_end_with_the_status_of_the_script(self):
        with pytest.raises(SystemExit) as stop:
            main.main(["evaluate", "--model_name_or_path", "toy", "--refusal", "no"])
        assert stop.value.code == (
            "error: Unknown key `refusal` in the command line. The nearest known key is `refusals`."
        )

    def test_that_are_unknown_are_one_line(self, capsys):
        with pytest.raises(SystemExit) as stop:
            main.main(["trian", "--config", "sft"])
        assert stop.value.code == 2
        assert capsys.readouterr().err == (
            "error: Unknown command 'trian'. The nearest known command is 'train'; there are train,"
            " capability, evaluate, benchmark, report, demo.\n"
        )

    @pytest.mark.parametrize(("command", "extra"), [("evaluate", "eval"), ("benchmark", "scripts")])
    def test_say_what_to_install(self, command, extra, monkeypatch):
        """Before they begin: the picture at the end of an evaluation needs it first."""
        monkeypatch.setattr(main, "find_spec", lambda name: None)
        with pytest.raises(SystemExit) as stop:
            main.main([command, "--help"])
        assert stop.value.code == (
            f"error: `ogpsa {command}` needs the package matplotlib, but it is not installed. "
            f"Install it with `pip install 'ogpsa_trl[{extra}]'`."
        )

    @pytest.mark.slow
    def test_a_benchmark_runs_in_new_processes_on_the_data_that_were_written(
        self, elsewhere, tmp_path
    ):
        """An untrained model in the place of the pretrained base model."""
        base = tmp_path / "cache" / f"toy-base-seed0-{_fingerprint(ToyWorld(0), PHASES)}"
        tiny_model().save_pretrained(base)
        toy_tokenizer().save_pretrained(base)
        line = ["--seeds", "0", "--steps", "2", "--processes", "1", "--methods", "naive"]
        line += ["--learning_rate_factors", "1"]
        for words in (
            ["data", "toy", "--seeds", "0"],
            ["--config", "runs/toy/benchmark.yaml", *line],
        ):
            result = ogpsa("benchmark", *words, cwd=elsewhere, OGPSA_CACHE=str(tmp_path / "cache"))
            assert result.returncode == 0, result.stderr[-3000:]
        assert (elsewhere / "runs/toy/results/results.json").is_file()


class TestConfigurations:
    def test_are_found_by_path_and_by_name(self, elsewhere):
        assert find_config("sft") == ROOT / "configs" / "sft.yaml"
        assert find_config("fsdp2", "accelerate").parent == ROOT / "configs" / "accelerate"
        (elsewhere / "sft").write_text("stage: sft")
        assert find_config("sft") == Path("sft")  # a file of one's own comes first
        assert find_config("sft.yaml") == Path("sft.yaml")  # not there: left for an error

    def test_by_name_become_paths_on_the_command_line(self, elsewhere):
        path = str(ROOT / "configs" / "dpo.yaml")
        assert split_config(["--config", "dpo", "--beta", "0.1"])[:2] == ["--config", path]
        assert split_config(["--config=dpo"]) == ["--config", path]
        assert split_config(["--config"]) == ["--config"]

    def test_lie_beside_the_scripts(self):
        assert configs_folder() == ROOT / "configs"


class TestLaunch:
    @pytest.mark.parametrize(
        ("line", "launched", "training"),
        [
            (["--config", "x", "--seed", "4", "--num_processes", "4"], ["--num_processes", "4"],
             ["--config", "x", "--seed", "4"]),
            (["--num-processes=2", "--lora_target_modules", "q", "v", "--multi_gpu", "--bf16"],
             ["--num-processes", "2", "--multi_gpu"],
             ["--lora_target_modules", "q", "v", "--bf16"]),
            (["--accelerate_config", "ddp"],
             ["--config_file", str(ROOT / "configs/accelerate/ddp.yaml")], []),
            # Known to both: the training's, as with `trl`.
            (["--gradient_accumulation_steps", "2", "--debug", "x"], [],
             ["--gradient_accumulation_steps", "2", "--debug", "x"]),
            # Of one stage only; the stage is looked at later.
            (["--beta", "0.1", "--packing", "--no_ogpsa"], [],
             ["--beta", "0.1", "--packing", "--no_ogpsa"]),
        ],
    )  # fmt: skip
    def test_options_are_told_from_keys(self, line, launched, training):
        assert launch.separated(line, launch_command_parser()) == (launched, training)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (["--num_proceses", "2"],
             "Unknown key `num_proceses` in the command line. The nearest known key is "
             "`num_processes`."),
            (["--lerning_rate", "1"],
             "Unknown key `lerning_rate` in the command line. The nearest known key is "
             "`learning_rate`."),
            (["--beta", "0.1"],
             "`beta` in the command line is a key of the stage 'dpo', but this run has the stage "
             "'sft'. Remove it, or set `stage: dpo`."),
            (["--num_processes"], "`--num_processes` needs a value, but none follows it."),
            (["--num_processes", "--seed", "3"],
             "`--num_processes` needs a value, but none follows it."),
            (["--accelerate_config", "zero4"],
             "`--accelerate_config` must be the path of a YAML file or one of the names ddp, fsdp2,"
             " hsdp, single, zero1, zero2, zero3, but got 'zero4'."),
            (["--config", "no.yaml"],
             "`--config` must name a YAML file, but 'no.yaml' cannot be read: No such file"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_is_one_line_before_anything_starts(
        self, line, message, monkeypatch, elsewhere
    ):
        monkeypatch.setattr(launch, "launch_command", lambda args: pytest.fail("launched"))
        with pytest.raises(SystemExit) as stop:
            main.main(["train", *line])
        assert stop.value.code.startswith(f"error: {message}")

    @pytest.mark.parametrize("name", ["ddp", "fsdp2", "hsdp", "single", "zero1", "zero2", "zero3"])
    def test_every_engine_is_found_from_any_folder(self, name, elsewhere):
        """What accelerate makes of it; the path of DeepSpeed's file stands in the file it reads."""
        launcher = launch_command_parser()
        line = ["--accelerate_config", name, "--num_processes", "4", "--main_process_port", "0"]
        options, _ = launch.separated(line, launcher)
        parsed, _, _ = _validate_launch_command(launcher.parse_args([*options, "train.py"]))
        assert parsed.num_processes == 4
        assert parsed.multi_gpu == (name == "ddp")
        assert parsed.use_fsdp == (name in ("fsdp2", "hsdp"))
        assert parsed.use_deepspeed == name.startswith("zero")
        if parsed.use_deepspeed:
            file = Path(parsed.deepspeed_config_file)
            assert file == ROOT / "configs" / "accelerate" / f"{name}.json"

    def test_the_paths_in_a_file_of_ones_own_are_left_alone(self, elsewhere):
        values = {"deepspeed_config": {"deepspeed_config_file": "mine.json"}}
        (elsewhere / "mine.yaml").write_text(yaml.safe_dump(values))
        options = launch.engine_options("mine.yaml")
        assert options == ["--config_file", str(elsewhere / "mine.yaml")]

    @pytest.mark.parametrize(
        ("error", "status"),
        [
            (None, 0),
            (CalledProcessError(1, "python"), 1),
            (CalledProcessError(-signal.SIGKILL, "python"), 137),
            (ChildFailedError("train.py", {1: ProcessFailure(1, 7, 3, "none")}), 3),
            (ChildFailedError("train.py", {1: ProcessFailure(1, 7, -signal.SIGKILL, "none")}), 137),
        ],
        ids=["well", "one failed", "one killed", "one of two failed", "one of two killed"],
    )
    def test_the_status_is_that_of_the_training(self, error, status, monkeypatch):
        def launched(args):
            assert (args.module, args.training_script) == (True, "ogpsa_trl.cli.train")
            assert args.training_script_args == ["--seed", "5"]
            if error is not None:
                raise error

        monkeypatch.setattr(launch, "launch_command", launched)
        assert main.main(["train", "--seed", "5"]) == status


@pytest.mark.slow
class TestTraining:
    """In processes of its own, from an empty folder."""

    @pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2"])
    def test_runs_on_two_processes_with_an_engine_by_name(self, engine, config, elsewhere):
        line = ["--accelerate_config", engine, "--num_processes", "2", "--output_dir", "out"]
        line += ["--per_device_train_batch_size", "2", "--max_steps", "2"]
        result = ogpsa("train", "--config", config("sft"), *line, cwd=elsewhere)
        assert result.returncode == 0, result.stderr[-3000:]
        assert "'refresh_interval': 3" in result.stderr  # with OGPSA
        assert "Model, tokenizer and model card are in out." in result.stdout
        assert AutoModelForCausalLM.from_pretrained(elsewhere / "out").num_parameters() > 0

    @pytest.mark.parametrize("processes", [1, 2])
    def test_a_gate_that_is_not_passed_gives_status_1(self, processes, config, elsewhere, tmp_path):
        contradicted().to_json(tmp_path / "answers.jsonl")
        values = {
            "ogpsa": False, "gate_interval": 1, "max_capability_loss_increase": 0.0,
            "gate_datasets": [{"path": str(tmp_path / "answers.jsonl"), "group": "answers"}],
            "gate_action": "stop", "optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.0,
            "refresh_interval": 1, "num_samples": 200,
        }  # fmt: skip
        engine = "single" if processes == 1 else "ddp"
        line = ["--accelerate_config", engine, "--num_processes", processes]
        line += ["--output_dir", "out", "--per_device_train_batch_size", 4 // processes]
        result = ogpsa("train", "--config", config("sft", **values), *line, cwd=elsewhere)
        assert result.returncode == 1
        assert result.stderr.count("error: The capability gate is not passed") == 1
        assert "Traceback" not in result.stderr
        assert (elsewhere / "out" / "model.safetensors").is_file()
