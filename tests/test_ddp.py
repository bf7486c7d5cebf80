"""Two processes under DDP (gloo, CPU) take the steps of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddp_worker import CELLS, name_of, run
from runs import logged, max_difference, weights

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def two_processes(base_model_path, tmp_path_factory):
    """One launch for all cells: processes spend most of their time importing."""
    folder = tmp_path_factory.mktemp("ddp")
    # A rank that fails leaves its peer waiting; `torchrun` ends both, the timeout is for the rest.
    result = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
            str(HERE / "ddp_worker.py"), base_model_path, str(folder),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=HERE.parent, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.parametrize("cell", CELLS, ids=name_of)
def test_two_processes_take_the_steps_of_one(cell, two_processes, base_model_path, tmp_path):
    one = run(cell, base_model_path, tmp_path, num_processes=1)
    two = torch.load(two_processes / name_of(cell) / "result.pt", weights_only=True)
    # Sums over samples are rounded in another order: 1e-7 of a gradient of size 1, times the
    # learning rate; AdamW divides by the root of the second moment, at most 1 / epsilon.
    assert max_difference(weights(one), two["weights"]) < 2e-6
    for ours, theirs in zip(logged(one), two["log"], strict=True):
        for key in ours:
            if key.startswith("ogpsa/"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-6), key


@pytest.mark.parametrize("cell", CELLS, ids=name_of)
def test_resume_on_two_processes_is_bitwise(cell, two_processes):
    result = torch.load(two_processes / name_of(cell) / "result.pt", weights_only=True)
    assert max_difference(result["weights"], result["resumed"]) == 0
