"""The Hub, the state of a trainer and the parser of transformers, as with any of its trainers."""

import json
import shutil
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, HfArgumentParser, trainer
from trl import SFTConfig

from ogpsa_trl import OGPSAConfig
from runs import ADAMW, SAVES, max_difference, weights

CONFIG = OGPSAConfig(num_samples=6)


class LocalHub:
    """Stands in for the Hub: a repository is a folder."""

    def __init__(self, folder):
        self.folder = folder

    def create_repo(self, name, **options):
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=name)

    def upload_folder(
        self, *, repo_id, folder_path, ignore_patterns=(), path_in_repo="", **options
    ):
        shutil.copytree(
            folder_path, self.folder / repo_id / (path_in_repo or ""), dirs_exist_ok=True,
            ignore=shutil.ignore_patterns(*ignore_patterns or ()),
        )  # fmt: skip
        finished = Future()
        finished.set_result(None)
        return finished


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = LocalHub(tmp_path / "hub")
    monkeypatch.setattr(trainer, "hf_api", lambda: hub)
    return hub


def test_what_is_pushed_is_the_trained_model_with_its_card(hub, train, tmp_path):
    trained = train(config=CONFIG, hub_model_id="ours/safe", folder=tmp_path / "run")
    trained.push_to_hub(dataset_name="refusals")
    pushed = hub.folder / "ours" / "safe"
    model = AutoModelForCausalLM.from_pretrained(pushed)
    assert max_difference(dict(model.named_parameters()), weights(trained)) == 0
    card = (pushed / "README.md").read_text()
    assert "OGPSA" in card and "| `restoration` |" in card and "refusals" in card
    assert not list(pushed.glob("ogpsa_*"))  # what only a resumed run needs


def test_a_checkpoint_on_the_hub_holds_what_a_resumed_run_needs(hub, train, tmp_path):
    train(
        config=CONFIG, folder=tmp_path / "run", push_to_hub=True,
        hub_strategy="checkpoint", hub_model_id="safe", **ADAMW | SAVES | {"max_steps": 2},
    )  # fmt: skip
    last = hub.folder / "safe" / "last-checkpoint"
    names = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert {"ogpsa_subspace.safetensors", "ogpsa_start.safetensors"} <= names
    assert names <= {path.name for path in last.iterdir()}


def test_the_state_of_a_trainer_says_the_settings(train, tmp_path):
    config = CONFIG
    train(config=config, **ADAMW | SAVES | {"max_steps": 1})
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["OGPSAConfig"]["args"]
    assert {name: saved[name] for name in asdict(config)} == asdict(config)
    assert saved["capability_samples/skills"] > 0


def test_settings_stand_beside_those_of_trl_in_a_parser(tmp_path):
    parser = HfArgumentParser((OGPSAConfig, SFTConfig))
    words = f"--output_dir {tmp_path} --refresh_interval 3 --target gradient --metric euclidean"
    words += " --restoration 0 --max_length 64 --bf16 false"
    config, args = parser.parse_args_into_dataclasses(words.split())
    expected = OGPSAConfig(
        refresh_interval=3, target="gradient", metric="euclidean", restoration=0.0
    )
    assert config == expected and args.max_length == 64
    file = Path(tmp_path / "run.yaml")
    file.write_text(f"output_dir: {tmp_path}\nrefresh_interval: 3\nbf16: false\n")
    config, _ = parser.parse_yaml_file(file)
    assert config == OGPSAConfig(refresh_interval=3)
