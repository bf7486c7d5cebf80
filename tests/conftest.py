"""No network, no telemetry, one thread: the models of the tests are too small to share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import speed  # before the libraries  # isort: skip
import pytest
import torch
import yaml

import offline

torch.set_num_threads(1)
offline.install()


def pytest_collection_finish():
    speed.leave_libraries_out_of_garbage_collection()


@pytest.fixture(autouse=True)
def no_network():
    """A test that would reach another machine fails, also where a library goes on without it."""
    offline.attempts.clear()
    yield
    assert not offline.attempts, f"Tests do not reach other machines: {offline.attempts}"


@pytest.fixture(scope="session")
def base_model_path(tmp_path_factory):
    """An untrained model of the toy world with its tokenizer, as a folder on disk."""
    from ogpsa_trl.benchmark.toy_model import tiny_model, toy_tokenizer

    folder = tmp_path_factory.mktemp("model")
    tiny_model(seed=0).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make(base_model_path, tmp_path):
    """Make a trainer with capability data, in the folder of the test."""
    from runs import capability_groups, make_trainer

    def make(stage="sft", *, model=base_model_path, folder=tmp_path, **options):
        options = {"capability": capability_groups(), **options}
        return make_trainer(stage, model, folder, **options)

    return make


@pytest.fixture
def train(make):
    """Make one and train it; it then has `states`: the weights before and after every step."""
    from runs import WeightsCallback

    def train(*args, **options):
        trainer, watch = make(*args, **options), WeightsCallback()
        trainer.add_callback(watch)
        trainer.train()
        trainer.states = watch.states
        return trainer

    return train


@pytest.fixture
def config(base_model_path, tmp_path):
    """Write the configuration of a tiny training, of a stage; returns its path."""
    from runs import capability_groups, safety_data

    def write(stage, **overrides):
        safety_data(stage).to_json(tmp_path / f"{stage}.jsonl")
        entries = []
        for name, rows in capability_groups().items():
            rows.to_json(tmp_path / f"{name}.jsonl")
            entries.append({"path": str(tmp_path / f"{name}.jsonl"), "group": name})
        values = {
            "stage": stage, "model_name_or_path": base_model_path, "use_cpu": True, "bf16": False,
            "dataset_name": str(tmp_path / f"{stage}.jsonl"), "capability_datasets": entries,
            "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
            "refresh_interval": 3, "num_samples": 6, "save_steps": 2, "logging_steps": 1,
            "report_to": "none", "disable_tqdm": True, "seed": 3, **overrides,
        }  # fmt: skip
        path = tmp_path / f"{stage}.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    return write
