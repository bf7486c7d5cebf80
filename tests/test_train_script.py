"""scripts/train.py as a user runs it: a YAML file, SFT, then DPO from its output."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ogpsa_trl.cli import train
from runs import capability_groups, contradicted, max_difference

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(*options, num_processes=1, status=0):
    launcher = ["-m", "accelerate.commands.launch", "--config_file"]
    launcher.append(str(ROOT / "configs" / "accelerate" / "single.yaml"))
    if num_processes > 1:  # `accelerate launch --cpu` runs one process
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        launcher.append(str(num_processes))
    result = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "scripts" / "train.py"), *options],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert result.returncode == status, result.stderr[-3000:]
    return result


def weights_in(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def log_in(folder):
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    return state["log_history"]


def test_sft_then_dpo(config, tmp_path, caplog, capsys):
    caplog.set_level(logging.INFO, "ogpsa_trl")  # what `main` sets, and caplog takes back
    first, second = tmp_path / "first", tmp_path / "second"
    assert train.main(["--config", config("sft"), "--output_dir", str(first)]) == 0
    assert "Capability group 'language': seed 3 chooses the rows" in caplog.text
    assert "'refresh_interval': 3" in caplog.text
    assert f"The report of the run is in {first / 'report.html'}." in caplog.text
    assert "Optimizer steps</dt><dd>4 of 4<" in (first / "report.html").read_text()
    settings = json.loads((first / "run_settings.json").read_text())["arguments"]
    assert [entry["group"] for entry in settings["capability_datasets"]] == [*capability_groups()]

    dpo = ["--config", config("dpo", run_report=False), "--output_dir", str(second)]
    dpo += ["--model_name_or_path", str(first), "--refresh_interval", "2"]
    assert train.main(dpo) == 0
    assert not (second / "report.html").exists()
    assert f"Model, tokenizer and model card are in {second}" in capsys.readouterr().out

    # Before the first step nothing is known of a divergence, so it is followed by another refresh.
    for folder, method, refreshes in ((first, "SFT", [1, 2, 4]), (second, "DPO", [1, 2, 3])):
        card = (folder / "README.md").read_text()
        assert f"OGPSA ({method})" in card
        assert re.search(r"\| skills \| [1-6] \|", card)  # as many as the run drew
        assert (folder / "trainer_state.json").exists()
        entries = log_in(folder)
        assert [entry["step"] for entry in entries if "ogpsa/rank" in entry] == refreshes
        assert len(AutoTokenizer.from_pretrained(folder)) > 100
    assert max_difference(weights_in(first), weights_in(second)) > 0


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_package_that_is_missing_for_the_report_is_said(package, tmp_path, caplog, monkeypatch):
    state = {"log_history": [{"loss": 1.0, "step": 1}], "global_step": 1, "max_steps": 1}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    monkeypatch.setitem(sys.modules, package, None)
    train.report(str(tmp_path))
    assert not (tmp_path / "report.html").exists()
    assert f"No report of the run: '{package}' is not installed. Run `pip install" in caplog.text


@pytest.mark.slow
def test_a_run_resumed_from_the_line_is_the_run_that_never_stopped(config, tmp_path):
    line = ["--config", config("sft"), "--output_dir", str(tmp_path / "run")]
    launch(*line)
    straight = weights_in(tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoint-4").iterdir():
        path.unlink()
    (tmp_path / "run" / "checkpoint-4").rmdir()
    launch(*line, "--resume_from_checkpoint", "true")
    assert max_difference(weights_in(tmp_path / "run"), straight) == 0


@pytest.mark.slow
def test_two_processes_train_what_one_does(config, tmp_path):
    for num_processes in (1, 2):
        batch = ["--per_device_train_batch_size", str(4 // num_processes)]
        folder = ["--output_dir", str(tmp_path / str(num_processes))]
        launch("--config", config("dpo"), *batch, *folder, num_processes=num_processes)
    one, two = (weights_in(tmp_path / str(number)) for number in (1, 2))
    assert all(tensor.dtype == torch.float32 for tensor in one.values())
    # AdamW with its default epsilon turns rounding of tiny gradients into steps of 1e-2 at most;
    # over four steps only few entries are that small.
    changed = torch.cat([(one[name] - two[name]).abs().flatten() for name in one])
    assert (changed > 1e-4).double().mean() < 1e-3


class TestGate:
    """The exit status is the verdict; whatever it is, the model is saved and complete."""

    def line(self, config, tmp_path, *, ogpsa, **overrides):
        """Without clipping and schedule the loss of the gate's data rises in every step."""
        contradicted().to_json(tmp_path / "answers.jsonl")
        entry = {"path": str(tmp_path / "answers.jsonl"), "group": "answers"}
        values = {
            "ogpsa": ogpsa, "gate_datasets": [entry], "gate_interval": 1, "gate_num_samples": 8,
            "max_capability_loss_increase": 0.0, "optim": "sgd", "learning_rate": 0.3,
            "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "seed": 7, **overrides,
        }  # fmt: skip
        return ["--config", config("sft", **values), "--output_dir", str(tmp_path / "run")]

    def assert_failed(self, stderr, tmp_path, num_steps):
        [line] = [line for line in stderr.splitlines() if "gate is not passed" in line]
        assert line.startswith("error: The capability gate is not passed: the held-out loss of")
        assert "more than `max_capability_loss_increase` (0.0)" in line
        assert f"Training made {num_steps} of 4 steps" in stderr
        assert f"The model is in {tmp_path / 'run'}, but should not" in stderr
        assert weights_in(tmp_path / "run")
        assert len(AutoTokenizer.from_pretrained(tmp_path / "run")) > 100
        assert (tmp_path / "run" / "README.md").exists()

    @pytest.mark.parametrize(
        ("ogpsa", "action", "num_steps"), [(False, "stop", 1), (True, "warn", 4)]
    )
    def test_past_the_tolerance_it_is_1(
        self, ogpsa, action, num_steps, config, tmp_path, capfd, caplog
    ):
        caplog.set_level(logging.INFO, "ogpsa_trl")  # what `main` sets, and caplog takes back
        more = {"preset": "paper"} if ogpsa else {"refresh_interval": 1, "num_samples": 200}
        line = self.line(config, tmp_path, ogpsa=ogpsa, gate_action=action, **more)
        assert train.main(line) == 1
        self.assert_failed(capfd.readouterr().err, tmp_path, num_steps)
        state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
        has_basis = any("ogpsa/rank" in entry for entry in state["log_history"])
        assert has_basis == ogpsa == ("OGPSA" in (tmp_path / "run" / "README.md").read_text())

    @pytest.mark.slow
    def test_within_the_tolerance_it_is_0(self, config, tmp_path):
        """The second step is past it: with `best` the checkpoint of the first is loaded."""
        line = self.line(
            config, tmp_path, ogpsa=False, gate_action="best", save_steps=1,
            max_capability_loss_increase=0.04,
        )  # fmt: skip
        assert "gate is not passed" not in launch(*line).stderr
        entries = [e for e in log_in(tmp_path / "run") if "ogpsa/gate_loss/answers" in e]
        assert [entry["step"] for entry in entries] == [0, 1, 2, 3, 4]
        increases = [entry["ogpsa/gate_largest_increase"] for entry in entries]
        assert increases[1] < 0.04 < increases[2]
        best = weights_in(tmp_path / "run" / "checkpoint-1")
        assert max_difference(weights_in(tmp_path / "run"), best) == 0

    @pytest.mark.slow
    def test_two_processes_fail_as_one(self, config, tmp_path):
        line = self.line(
            config, tmp_path, ogpsa=False, gate_action="stop", per_device_train_batch_size=2
        )
        self.assert_failed(launch(*line, num_processes=2, status=1).stderr, tmp_path, 1)
