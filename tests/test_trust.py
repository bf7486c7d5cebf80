"""What a run does with what it was given: no code, no shell, no file outside its folders."""

import ast
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import zipfile
from pathlib import Path

import matplotlib
import pytest
import torch
import yaml
from datasets import config
from trl import ModelConfig

import offline
from ogpsa_trl import CapabilityGate, GateConfig
from ogpsa_trl.cli import train
from ogpsa_trl.cli.evaluate import run_evaluation
from ogpsa_trl.cli.train_keys import parse_run
from ogpsa_trl.data.groups import named_groups
from ogpsa_trl.evaluation.evaluation_keys import EvaluationArguments
from ogpsa_trl.evaluation.models import load_model
from ogpsa_trl.method.saved_start import START_FILE_NAME
from ogpsa_trl.method.saved_state import FILE_NAME
from ogpsa_trl.training.whole_checkpoints import mark
from runs import capability_groups, make_trainer, safety_data, weights

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    p for d in ("ogpsa_trl", "scripts", "benchmarks") for p in (ROOT / d).rglob("*.py")
)
SETTINGS = sorted((ROOT / "configs").rglob("*.yaml"))

# Modules that make objects, and so run code, of a file.
UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

# Functions that run text, or read a file in a way that may.
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.spawnv",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.unsafe_load_all",
    "pandas.read_pickle", "pd.read_pickle", "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip


def is_true(node):
    return isinstance(node, ast.Constant) and node.value is True


def keywords_of(call):
    return {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}


def imported(node):
    """Modules that a statement imports; an exception of `pickle` makes no objects."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and [a.name for a in node.names] != ["UnpicklingError"]:
        return [node.module or ""]
    return []


def findings(source):
    """What is not to be trusted in a source file: a line and the reason, each."""
    found = []
    for node in ast.walk(ast.parse(source)):
        modules = [m for m in imported(node) if m.partition(".")[0] in UNPICKLERS]
        found += [(node.lineno, f"import of {module}") for module in modules]
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "trust_remote_code":
                    found += [(node.lineno, "trust_remote_code")] * is_true(value)
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), keywords_of(node)
        if name in FORBIDDEN:
            found.append((node.lineno, name))
        if name == "torch.load" and not is_true(keywords.get("weights_only")):
            found.append((node.lineno, "torch.load without weights_only=True"))
        for keyword in ("trust_remote_code", "allow_pickle", "shell"):
            if is_true(keywords.get(keyword)):
                found.append((node.lineno, keyword))
    return found


class TestSources:
    def test_nothing_makes_code_of_data(self):
        assert len(SOURCES) > 60
        found = {path.name: findings(path.read_text("utf-8")) for path in SOURCES}
        assert {name: lines for name, lines in found.items() if lines} == {}

    def test_no_configuration_that_we_ship_trusts_remote_code(self):
        assert not [path for path in SETTINGS if "trust_remote_code" in path.read_text("utf-8")]


class TouchesAFile:
    """A pickle that runs code when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write_run(folder, model, **values):
    """The YAML file of a run of few steps, with its data."""
    folder.mkdir(exist_ok=True)
    safety_data("sft").to_json(folder / "safety.jsonl")
    entries = []
    for name, rows in capability_groups().items():
        rows.to_json(folder / f"{name}.jsonl")
        entries.append({"path": str(folder / f"{name}.jsonl"), "group": name})
    values = {
        "model_name_or_path": model, "use_cpu": True, "bf16": False,
        "dataset_name": str(folder / "safety.jsonl"), "capability_datasets": entries,
        "max_steps": 2, "save_steps": 1, "num_samples": 6, "samples_per_refresh": 2,
        "per_device_train_batch_size": 4, "report_to": "none", "disable_tqdm": True,
        "gradient_checkpointing": False, "output_dir": str(folder / "out"), **values,
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "run.yaml")


@pytest.fixture
def run_file(base_model_path, tmp_path):
    return lambda **values: write_run(tmp_path, **{"model": base_model_path} | values)


def run(file):
    return train.run_training(parse_run(["--config", file]))


PICKLED = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")


@pytest.fixture(scope="module")
def out(base_model_path, tmp_path_factory):
    """The output of a run."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "HF_DATASETS_CACHE", str(folder / "cache"))
        assert run(write_run(folder, base_model_path)) == 0
    return folder / "out"


class TestCheckpoints:
    @pytest.mark.parametrize("name", [*PICKLED, FILE_NAME, START_FILE_NAME])
    def test_a_pickle_in_one_is_not_run(self, name, out, run_file, tmp_path):
        """
        transformers reads the first three with `weights_only`, and the fourth not at all; ours have
        to be safetensors files.
        """
        marker, checkpoint = tmp_path / "marker", tmp_path / "checkpoint-1"
        shutil.copytree(out / checkpoint.name, checkpoint)
        assert (checkpoint / name).exists()
        torch.save(TouchesAFile(marker), checkpoint / name)
        mark(checkpoint)  # the list of files would tell
        resume = run_file(resume_from_checkpoint=str(checkpoint), run_report=False)
        if name == "training_args.bin":
            assert run(resume) == 0
        else:
            is_ours = name in (FILE_NAME, START_FILE_NAME)
            message = f"{name} cannot be read" if is_ours else "something else than tensors"
            with pytest.raises(SystemExit, match=message):
                run(resume)
        assert not marker.exists()
        with (checkpoint / name).open("rb") as file:
            torch.load(file, weights_only=False)
        assert marker.exists(), "the pickle is meant to run code"

    def test_everything_else_that_is_written_is_text_or_safetensors(self, out):
        others = [p for p in out.rglob("*") if p.is_file() and p.name not in PICKLED]
        assert len(others) > 10
        for path in others:
            assert path.suffix in {".safetensors", ".json", ".jinja", ".md", ".html"}, path
            assert not zipfile.is_zipfile(path), path

    def test_weights_in_a_pickle_run_no_code(self, run_file, tmp_path, base_model_path):
        shutil.copytree(base_model_path, tmp_path / "model")
        (tmp_path / "model" / "model.safetensors").unlink()
        marker = tmp_path / "marker"
        torch.save(TouchesAFile(marker), tmp_path / "model" / "pytorch_model.bin")
        with pytest.raises(SystemExit, match="something else than tensors"):
            run(run_file(model=str(tmp_path / "model")))
        assert not marker.exists()


MODEL_CODE = """
from pathlib import Path
from transformers import LlamaForCausalLM
from trl import ModelConfig
Path({marker!r}).touch()
class OwnModel(LlamaForCausalLM):
    pass
"""


class TestRemoteCode:
    @pytest.fixture
    def model(self, tmp_path, base_model_path, monkeypatch):
        """A model that comes with code, which leaves a mark."""
        monkeypatch.setattr(
            "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m")
        )
        folder = tmp_path / "model"
        shutil.copytree(base_model_path, folder)
        marker = str(tmp_path / "marker")
        (folder / "own.py").write_text(MODEL_CODE.format(marker=marker))
        settings = json.loads((folder / "config.json").read_text())
        settings |= {"model_type": "own", "auto_map": {
            "AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel",
        }}  # fmt: skip
        (folder / "config.json").write_text(json.dumps(settings))
        return folder

    def test_is_not_run_unless_the_user_asks_for_it(self, model, run_file, tmp_path):
        with pytest.raises(SystemExit, match="trust_remote_code"):
            run(run_file(model=str(model)))
        assert not (tmp_path / "marker").exists()
        with pytest.raises((SystemExit, Exception)):  # it has no `OwnConfig`
            run(run_file(model=str(model), trust_remote_code=True))
        assert (tmp_path / "marker").exists()

    def test_the_evaluation_does_not_run_it_either(self, model, tmp_path):
        arguments = EvaluationArguments(
            model_name_or_path=str(model), output_dir=str(tmp_path / "out")
        )
        with pytest.raises(SystemExit, match="trust_remote_code"):
            run_evaluation(arguments)
        with pytest.raises(ValueError, match="trust_remote_code"):
            load_model(
                ModelConfig(str(model)), device_map="cpu",
                trust_remote_code=arguments.trust_remote_code,
            )  # fmt: skip
        assert not (tmp_path / "marker").exists()


WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class WrittenPaths:
    """Every file that Python opens for writing, makes, moves or removes, while it is on."""

    def __init__(self):
        self.paths, self.is_on = set(), False
        sys.addaudithook(self.see)  # for good

    def see(self, event, arguments):
        if not self.is_on:
            return
        path = None
        if event == "open":
            path = arguments[0] if (arguments[2] or 0) & WRITES else None
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod"):
            path = arguments[0]
        elif event in ("os.rename", "os.link", "os.symlink", "shutil.move", "shutil.copyfile"):
            path = arguments[1]
        if isinstance(path, str | bytes | Path):
            self.paths.add(os.path.realpath(os.fsdecode(path)))


def test_a_run_writes_into_its_output_and_the_caches_only(run_file, tmp_path, monkeypatch):
    file = run_file(gate_datasets=[{"path": str(tmp_path / "safety.jsonl"), "group": "gate"}])
    temporary, here = tmp_path / "tmp", tmp_path / "here"
    for folder in (temporary, here):
        folder.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    allowed = [str((tmp_path / name).resolve()) for name in ("out", "cache", "tmp")]
    # The picture of the report: matplotlib keeps the fonts that it finds.
    allowed += [os.path.realpath(matplotlib.get_cachedir()), matplotlib.get_configdir()]
    written = WrittenPaths()
    written.is_on = True
    assert run(file) == 0
    written.is_on = False
    assert any("checkpoint-2" in path for path in written.paths)
    assert any(path.endswith("report.html") for path in written.paths)
    assert [path for path in temporary.rglob("*") if path.is_file()] == []
    assert {p for p in written.paths if not p.startswith(("/dev/", "/proc/", *allowed))} == set()


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


NASTY = "../../x y;$(touch z)`touch z`'\"|<b>&"


class TestNamesFromData:
    def test_a_group_of_any_name_goes_through_a_run(self, tmp_path, base_model_path, monkeypatch):
        """Training, a gate, checkpoints, resuming, the model card: nothing of it becomes a path."""
        monkeypatch.chdir(tmp_path)
        rows = capability_groups()["skills"]
        before = files_in(tmp_path.parent)

        def make(max_steps):
            trainer = make_trainer(
                "sft", base_model_path, tmp_path / "a" / "b" / "out", max_steps=max_steps,
                save_strategy="steps", save_steps=1, capability={NASTY: rows},
            )  # fmt: skip
            gate = CapabilityGate(
                trainer,
                {NASTY: rows},
                GateConfig(gate_interval=1, max_capability_loss_increase=0.0),
            )
            trainer.add_callback(gate)
            return trainer, gate

        trainer, gate = make(2)
        trainer.train()
        resumed, _ = make(2)
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "b" / "out" / "checkpoint-1"))
        for name, tensor in weights(trainer).items():
            assert torch.equal(tensor, weights(resumed)[name])
        logged = {key for entry in trainer.state.log_history for key in entry}
        assert {f"ogpsa/capability_loss/{NASTY}", f"ogpsa/gate_loss/{NASTY}"} <= logged
        assert NASTY in gate.report("out")
        trainer.save_model()
        trainer.create_model_card()
        card = (tmp_path / "a" / "b" / "out" / "README.md").read_text()
        [row] = [line for line in card.splitlines() if "touch z" in line and line[0] == "|"]
        assert len(re.findall(r"(?<!\\)\|", row)) == 4  # it stays in its cell
        assert "<b>" not in row
        assert "../../x y;$(touch z)" in row
        assert "&lt;b&gt;" in row
        made = files_in(tmp_path.parent) - before
        assert all(name.startswith(f"{tmp_path.name}/a/b/out/") for name in made), made
        assert not any("touch" in name or "x y" in name for name in made)

    @pytest.mark.parametrize("name", ["two\nlines", "a\tb", "\x1b[2J", "a\u2028b", "\0"])
    def test_one_that_does_not_stand_on_one_line_is_refused(self, name):
        with pytest.raises(ValueError, match="name must be a text on one line"):
            named_groups({name: capability_groups()["skills"]})


class TestNetwork:
    @pytest.fixture(autouse=True)
    def expected(self, no_network):
        """Attempts are what this test is about."""
        yield
        offline.attempts.clear()

    def test_a_test_reaches_no_other_machine(self):
        for reach in (
            lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
            lambda: socket.getaddrinfo("example.org", 80),
        ):
            with pytest.raises(OSError, match="Tests do not reach other machines"):
                reach()
        assert len(offline.attempts) == 2
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname()).close()
        assert len(offline.attempts) == 2
