"""Killed at any moment, a run that is resumed ends as the one that never stopped, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# In the third save: when the model is written, the basis too, all but the list, all but deletion.
INSIDE = ("refresh", "model file", "subspace file", "mark", "deletion")


def run(cases, model, output):
    """The results of the driver, which kills and resumes every case until it reaches its end."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    process = subprocess.run(
        [sys.executable, str(TESTS / "kill_driver.py"), model, str(output), json.dumps(cases)],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    results = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    assert len(results) == len(cases)
    return results


def case(stage="sft", target="update", processes=1, **more):
    return {"stage": stage, "target": target, "processes": processes, **more}


def assert_bitwise(results):
    for result in results:
        assert result["same"], result
    assert sum(result["kills"] for result in results) >= len(results) / 2


def test_a_kill_inside_a_refresh_or_a_save_loses_nothing(base_model_path, tmp_path):
    """What was being saved is named and left aside; after the list only deletion is left."""
    skipped = {"refresh": 0, "mark": 1, "deletion": 0}
    results = run([case(inside=place) for place in skipped], base_model_path, tmp_path)
    assert_bitwise(results)
    assert all(result["kills"] == 1 for result in results)
    assert {result["inside"]: result["skipped"] for result in results} == skipped


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [1, 2])
def test_kills_at_random_moments_lose_nothing(processes, base_model_path, tmp_path):
    """Of two processes one is killed, or both, each at its own moment."""
    cases = [
        case(stage, target, processes, repeat=repeat, both=repeat % 2 == 1)
        for stage in ("sft", "dpo")
        for target in ("gradient", "update")
        for repeat in range(5)
    ]
    cases += [
        case(stage, target, processes, inside=place)
        for stage, target in (("sft", "gradient"), ("dpo", "update"))
        for place in INSIDE
    ]
    results = run(cases, base_model_path, tmp_path)
    assert_bitwise(results)
    assert sum(result["kills"] for result in results) >= 20
