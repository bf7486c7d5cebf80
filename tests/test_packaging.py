"""What is installed: the public names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ogpsa_trl

ROOT = Path(__file__).resolve().parent.parent


def run(*command, cwd, **environment):
    """A command without our own path; its output."""
    others = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [*map(str, command)], cwd=cwd, env=others | environment,
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


class TestPublicNames:
    def test_are_all_there(self):
        for name in ogpsa_trl.__all__:
            assert getattr(ogpsa_trl, name) is not None

    def test_are_those_of_their_modules(self):
        for name, module in ogpsa_trl._MODULES.items():
            assert getattr(ogpsa_trl, name).__module__ == f"ogpsa_trl.{module}"
        assert {"__version__", *ogpsa_trl._MODULES} == set(ogpsa_trl.__all__)

    def test_an_unknown_one_is_an_error(self):
        with pytest.raises(AttributeError, match="'ogpsa_trl' has no attribute 'OGPSATrainer'"):
            _ = ogpsa_trl.OGPSATrainer
        with pytest.raises(ImportError, match="cannot import name 'OGPSATrainer'"):
            exec("from ogpsa_trl import OGPSATrainer")

    def test_are_imported_when_they_are_used(self, tmp_path):
        code = "import sys; from ogpsa_trl import GateConfig; print('torch' in sys.modules)"
        assert run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT)) == "False\n"
