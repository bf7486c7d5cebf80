"""The settings and metrics of a run, read back from the files of the trackers."""

import json
import os
import sqlite3
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback
from transformers.integrations.integration_utils import (
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from ogpsa_trl.training.callbacks import SettingsCallback, record_settings
from runs import capability_groups, gated, make_trainer
from tracked_run import GATE, SETTINGS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(base_model_path, tmp_path_factory):
    """The run, in a process of its own: trackers read the environment when they are imported."""
    folder = tmp_path_factory.mktemp("tracked")
    environment = {
        **os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "CUDA_VISIBLE_DEVICES": "",
        "HOME": str(folder), "TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard"),
        "TRACKIO_DIR": str(folder / "trackio"), "WANDB_DIR": str(folder), "WANDB_MODE": "offline",
        "WANDB_CONSOLE": "off", "WANDB_ERROR_REPORTING": "false",
    }  # fmt: skip
    command = [sys.executable, ROOT / "tests" / "tracked_run.py", base_model_path, folder / "run"]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def in_tensorboard(folder):
    """The configuration of the run, and its metrics by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [file] = (folder / "tensorboard").iterdir()
    events = EventAccumulator(str(file)).Reload()
    config = {}
    for name in ("ogpsa_config", "gate_config"):
        [text] = events.Tensors(f"{name}/text_summary")
        config |= json.loads(text.tensor_proto.string_val[0].decode().strip("`"))
    metrics = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            metrics.setdefault(event.step, {})[name] = event.value
    return config, metrics


def in_wandb(folder):
    """Its configuration only: how it keeps metrics is its own affair."""
    return json.loads((folder / "run" / "wandb_config.json").read_text()), None


def in_trackio(folder):
    [file] = (folder / "trackio").glob("*.db")
    database = sqlite3.connect(file)
    [[config]] = database.execute("SELECT config FROM configs")
    metrics = {}
    for [text] in database.execute("SELECT metrics FROM metrics"):
        row = json.loads(text)
        metrics.setdefault(row["train/global_step"], {}).update(row)
    return json.loads(config), metrics


def expected_settings():
    return asdict(SETTINGS) | {f"capability_samples/{name}": 6 for name in capability_groups()}


@pytest.mark.slow
@pytest.mark.parametrize("read", [in_tensorboard, in_wandb, in_trackio])
def test_a_run_is_tracked_with_settings_groups_gate_and_metrics(read, folder):
    config, metrics = read(folder)
    tokens = [config.pop(f"ogpsa/capability_tokens/{name}") for name in capability_groups()]
    assert all(number >= 12 for number in tokens)  # an answer and its end
    ours = {name: value for name, value in config.items() if name.startswith("ogpsa/")}
    expected = expected_settings() | asdict(GATE)
    assert ours == {f"ogpsa/{name}": value for name, value in expected.items()}

    log = json.loads((folder / "run" / "trainer_state.json").read_text())["log_history"]
    names = {name for entry in log for name in entry if name.startswith("ogpsa/")}
    assert names > {
        "ogpsa/removed_fraction",
        "ogpsa/drift/skills",
        "ogpsa/gate_increase/capability",
    }
    for entry in log if metrics is not None else []:
        found = {name: metrics[entry["step"]][f"train/{name}"] for name in names & entry.keys()}
        expected = {name: entry[name] for name in found}
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)  # TensorBoard: float32


def test_settings_reach_every_tracker(monkeypatch):
    found = {}

    def config(name):
        return SimpleNamespace(update=lambda settings, **_: found.update({name: settings}))

    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(config=config(name)))
    board, wandb, trackio = (
        object.__new__(kind) for kind in (TensorBoardCallback, WandbCallback, TrackioCallback)
    )
    board.tb_writer = SimpleNamespace(
        add_text=lambda title, text: found.update({title: json.loads(text.strip("`"))})
    )
    recorder = TrainerCallback()
    handler = SimpleNamespace(callbacks=[board, wandb, trackio, recorder])
    trainer = SimpleNamespace(callback_handler=handler, is_world_process_zero=lambda: False)
    record_settings(recorder, trainer, "a title", {"rank": 2})
    assert found == {}
    trainer.is_world_process_zero = lambda: True
    record_settings(recorder, trainer, "a title", {"rank": 2})
    assert found == {name: {"ogpsa/rank": 2} for name in ("a title", "wandb", "trackio")}


def test_a_tracker_that_comes_too_late_is_named(base_model_path, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    trainer = make_trainer(
        "sft", base_model_path, tmp_path, capability=capability_groups(), config=SETTINGS
    )
    gated(trainer, capability_groups(), GATE)
    trainer.add_callback(TensorBoardCallback)
    trainer.train()
    for title in ("ogpsa_config", "gate_config"):
        assert f"settings in '{title}' are missing in the configuration" in caplog.text
    assert "in TensorBoardCallback, which is set up later. Name trackers in `report_to`" in (
        caplog.text
    )
    [callback] = [c for c in trainer.callback_handler.callbacks if isinstance(c, SettingsCallback)]
    tokens = [callback.settings.pop(f"capability_tokens/{name}") for name in capability_groups()]
    assert all(number >= 12 for number in tokens)
    assert callback.settings == expected_settings()
