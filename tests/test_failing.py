"""A process that fails ends the others, with its reason; none waits for an answer for long."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from failing_worker import REASON
from ogpsa_trl.cli import train
from ogpsa_trl.cli.train_keys import parse_run

TESTS = Path(__file__).parent
# A launch takes some ten seconds on an idle core, most of it imports. A process that waits for the
# others in a collective call does so for half an hour, the `ddp_timeout` of the trainer.
LONGEST = 240

pytestmark = pytest.mark.timeout(LONGEST + 60)


def launch(engine, place, model_path, output_dir):
    """The output of a launch on two processes that fails."""
    launcher = subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
            str(TESTS / "failing_worker.py"), engine, place, model_path, str(output_dir),
        ],
        env=os.environ | {
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu",
        },
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        _, errors = launcher.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        launcher.terminate()  # so that it ends its processes too
        launcher.communicate()
        raise
    assert launcher.returncode != 0
    return errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "place"),
    [
        ("ddp", "refresh"),
        ("ddp", "start"),
        ("fsdp2", "refresh"),
        ("zero2", "refresh"),
        ("zero3", "step"),
    ],
)
def test_one_failing_process_ends_the_launch_and_says_why(engine, place, base_model_path, tmp_path):
    """The launcher names it as the first, though the others fail too when it is gone."""
    _, _, summary = launch(engine, place, base_model_path, tmp_path).rpartition("Root Cause")
    assert "rank      : 1 " in summary
    is_empty = "Capability group 'skills' must have at least one sample"
    assert (is_empty if place == "start" else REASON) in summary


@pytest.mark.slow
def test_a_killed_process_ends_the_launch(base_model_path, tmp_path):
    """It leaves no reason; the launcher names the signal beside what the others say of it."""
    output = launch("ddp", "killed", base_model_path, tmp_path)
    assert "Signal 9 (SIGKILL) received" in output


# What the last process has, and what all of them say.
ALONE = {
    "samples": "the same capability group 'skills', but process 0 has 6 samples with the checksum",
    "group": "the same names of capability groups, but process 0 has ['skills', 'language'] and",
    "setting": "the same `refresh_interval`, but process 0 has 1 and process 1 has 2.",
    "basis": "checkpoint-1/ogpsa_subspace*.safetensors is damaged: ",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "place"),
    [
        ("fsdp2", "samples"),
        ("ddp", "group"),
        ("zero2", "setting"),
        ("fsdp2", "basis"),
        ("zero2", "basis"),
    ],
)
def test_what_one_process_has_alone_is_an_error_on_all(engine, place, base_model_path, tmp_path):
    """Without it they would train on different subspaces, or wait for each other."""
    traces, _, summary = launch(engine, place, base_model_path, tmp_path).partition("FAILED")
    assert ALONE[place] in summary
    message = re.escape(ALONE[place])
    for process_index in range(2):
        assert re.search(rf"rank{process_index}\]: ValueError: .*{message}", traces)


def test_the_script_tells_its_launcher_the_reason(config, tmp_path, monkeypatch):
    """torchrun gives every process a file for it, and shows that of the first to fail."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    run = parse_run(["--config", config("sft"), "--output_dir", str(tmp_path / "out")])
    run.script.dataset_train_split = "tarin"
    message = "`dataset_train_split` must be one of the splits 'train'"
    with pytest.raises(SystemExit, match=message):
        train.run_training(run)
    assert message in str(json.loads((tmp_path / "error.json").read_text()))
