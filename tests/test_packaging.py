"""What is installed: the public names, the wheel and what it finds, the citation."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import ogpsa_trl
from ogpsa_trl.cli.main import COMMANDS
from ogpsa_trl.training import setup

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


def pins(file):
    """The versions that a file of constraints names."""
    return dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / file).read_text(), re.MULTILINE))


class TestVersions:
    def test_warnings_begin_above_those_that_the_tests_are_run_on(self):
        pinned = pins("constraints.txt")
        for package, newest in setup._TESTED.items():
            assert pinned[package].startswith("{}.{}.".format(*newest)), package

    @pytest.mark.parametrize("newer", ["1.17.0", "1.17.0.dev0", "2.0rc1"])
    def test_a_newer_one_warns_once_and_is_not_refused(self, newer, monkeypatch, caplog):
        versions = {p: "{}.{}.9".format(*newest) for p, newest in setup._TESTED.items()}
        monkeypatch.setattr(setup.importlib.metadata, "version", (versions | {"trl": newer}).get)
        setup.warn_of_untested_versions.cache_clear()
        setup.warn_of_untested_versions()
        setup.warn_of_untested_versions()
        [record] = caplog.records
        assert record.message.startswith(f"trl {newer} is newer ")
        assert "(up to 1.16)" in record.message

    def test_lower_bounds_are_the_oldest_that_the_tests_are_run_on(self):
        oldest = pins("tests/environments/oldest.txt")
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for package in ("trl", "transformers", "accelerate", "peft", "datasets"):
            [bound] = [d for d in project["dependencies"] if re.match(rf"{package}\b", d)]
            assert oldest[package].startswith(re.search(r">=([\d.]+)", bound)[1]), package


class TestCitation:
    CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))

    def test_is_of_this_version(self):
        assert self.CITATION["version"] == ogpsa_trl.__version__
        assert self.CITATION["cff-version"] == "1.2.0"
        assert {"message", "title", "authors"} <= self.CITATION.keys()  # what the format asks for

    def test_refers_to_the_paper_as_the_readme_does(self):
        bibtex = (ROOT / "README.md").read_text(encoding="utf-8").partition("```bibtex")[2]
        entries = dict(re.findall(r"^ +(\w+) += \{+(.*?)\}+,$", bibtex, re.MULTILINE))
        [paper] = self.CITATION["references"]
        authors = [f"{a['given-names']} {a['family-names']}" for a in paper["authors"]]
        assert " and ".join(authors) == entries["author"]
        assert paper["title"] == entries["title"]
        assert str(paper["year"]) == entries["year"]
        assert paper["identifiers"][0]["value"] == f"arXiv:{entries['eprint']}"
        assert paper["url"] == entries["url"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A source distribution and a wheel, built without a network."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    [sdist], [wheel] = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A fresh environment with the wheel, which sees the packages of this one; its `bin`."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)  # without pip: that of this one installs
    [site_packages] = folder.glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install"]
    run(*pip, "--quiet", "--no-deps", "--no-index", built[1], cwd=folder)
    # After the wheel, or pip would find this project in there. Of a folder that a .pth file names,
    # no .pth files are read: an editable installation of this project is not seen.
    ours = {str(Path(module.__file__).parent.parent) for module in (yaml, pytest)}
    (site_packages / "packages_of_the_tests.pth").write_text("\n".join(ours))
    return folder / "bin"


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.slow
class TestWheel:
    def test_holds_the_package_its_configurations_and_nothing_else(self, built):
        names = names_in(built[1])
        others = {name for name in names if not re.match(r"ogpsa_trl(-[\d.]+\.dist-info)?/", name)}
        assert not others
        assert "ogpsa_trl/py.typed" in names
        ours = {
            f"ogpsa_trl/{path.relative_to(ROOT).as_posix()}"
            for path in (ROOT / "configs").rglob("*")
            if path.is_file()
        }
        assert ours == {n for n in names if n.startswith("ogpsa_trl/configs/")}
        unwanted = re.compile(r"(^|/)(tests?[_/]|shared/|runs/)|\.pyc$")
        assert not [name for name in names if unwanted.search(name)]

    def test_is_the_same_from_the_source_distribution(self, built, tmp_path):
        sdist, wheel = built
        with tarfile.open(sdist) as archive:
            archive.extractall(tmp_path, filter="data")
        [source] = tmp_path.iterdir()
        run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=source)
        [again] = tmp_path.glob("*.whl")
        assert names_in(again) == names_in(wheel)
        assert (source / "tests" / "runs.py").is_file()  # the tests can be run from it

    def test_gives_the_command_in_any_folder(self, installed, tmp_path):
        text = run(installed / "ogpsa", "--help", cwd=tmp_path)
        [folder] = [line for line in text.splitlines() if line.endswith("configs")]
        assert Path(folder).is_relative_to(installed.parent)
        assert (Path(folder) / "sft.yaml").is_file()
        assert run(installed / "ogpsa", "--version", cwd=tmp_path).split()[1] == (
            ogpsa_trl.__version__
        )
        text = run(installed / "ogpsa", "train", "--help", cwd=tmp_path)
        assert text.startswith("usage: ogpsa train ")
        assert "--refresh_interval" in text
        for command in set(COMMANDS) - {"train"}:
            assert "usage: " in run(installed / "ogpsa", command, "--help", cwd=tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_trains_from_an_empty_folder_with_an_engine_by_name(self, installed, config, tmp_path):
        """DeepSpeed, whose settings are a second file in the wheel."""
        empty = tmp_path / "empty"
        empty.mkdir()
        line = ["--config", config("sft"), "--accelerate_config", "zero2", "--num_processes", "1"]
        line += ["--max_steps", "1", "--output_dir", "out"]
        output = run(installed / "ogpsa", "train", *line, cwd=empty, CUDA_VISIBLE_DEVICES="")
        assert "Model, tokenizer and model card are in out." in output
        assert [path.name for path in empty.iterdir()] == ["out"]
