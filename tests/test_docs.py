"""The documents: their examples run, their keys are known, the tests and files they name exist."""

import ast
import pkgutil
import re
import runpy
from functools import partial
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ogpsa_trl.benchmark.toy_model import toy_tokenizer
from ogpsa_trl.cli.train_keys import training_parser
from runs import WORLD

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
}


def blocks(language):
    """Every example in a language, of which there are some, by its document and number."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    found = {
        f"{name}-{number}": text
        for name, document in DOCUMENTS.items()
        for number, text in enumerate(pattern.findall(document))
    }
    assert found
    return found


@pytest.fixture
def names(base_model_path):
    """What the examples take for granted."""
    tokenizer = toy_tokenizer()
    refusals = WORLD.safety_sft().select(range(8))
    groups = WORLD.capability_groups(6)
    ids = [tokenizer(row["prompt"] + row["completion"])["input_ids"] for row in refusals]
    return {
        "model": AutoModelForCausalLM.from_pretrained(base_model_path),
        "tokenizer": tokenizer,
        "refusals": refusals,
        "instructions": groups["skills"],
        "facts": groups["language"],
        "tokens": Dataset.from_list([{"input_ids": row, "labels": row} for row in ids]),
        "collator": DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id),
    }


@pytest.mark.parametrize("name", blocks("python"))
def test_an_example_in_python_runs(name, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("trl.SFTConfig", "trl.GRPOConfig", "transformers.TrainingArguments"):
        original = pkgutil.resolve_name(place)
        here = partial(original, use_cpu=True, bf16=False, report_to="none")
        monkeypatch.setattr(place, here)
    exec(compile(blocks("python")[name], name, "exec"), names)
    assert names["trainer"].state.global_step == 2


@pytest.mark.parametrize("name", blocks("python notest"))
def test_an_example_of_another_framework_is_python(name):
    assert ast.parse(blocks("python notest")[name]).body


@pytest.mark.parametrize("name", blocks("yaml"))
def test_the_keys_of_an_example_are_known(name):
    parsers = [training_parser("sft"), training_parser("dpo")]
    values = yaml.safe_load(blocks("yaml")[name])
    assert values
    assert any(set(values) <= set(parser.key_names()) for parser in parsers), sorted(values)


def test_the_reference_is_what_the_docstrings_say():
    made = runpy.run_path(str(ROOT / "docs" / "make_api.py"))["document"]()
    assert DOCUMENTS["docs/api.md"] == made, "run `make docs`"


def test_what_is_named_exists():
    """Tests, files, and what links lead to."""
    files = (ROOT / "tests").glob("test_*.py")
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    defined = set(re.findall(r"\b(?:def|class) ([Tt]est\w+)", text))
    paths = re.compile(r"\b(?:docs|tests|scripts|configs|benchmarks|ogpsa_trl)/[\w./-]+\.\w+")
    for name, document in DOCUMENTS.items():
        named = set(re.findall(r"`(test_\w+|Test[A-Z]\w+)`", document))
        assert named <= defined, (name, named - defined)
        for path in paths.findall(document):
            assert (ROOT / path).exists() or "*" in path, (name, path)
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", document):
            assert ((ROOT / name).parent / link).exists(), (name, link)


def test_the_documents_stay_short():
    words = {name: len(text.split()) for name, text in DOCUMENTS.items() if "docs/" in name}
    long = ("docs/api.md", "docs/benchmark.md")
    assert len(DOCUMENTS["README.md"].splitlines()) <= 120
    assert len(words) <= 9
    assert sum(words[name] for name in long) < 9000, words
    assert sum(number for name, number in words.items() if name not in long) < 10_000, words


def test_the_house_stays_one_that_can_be_drawn():
    """Few rooms, and none that is a warehouse: see CONTRIBUTING.md."""
    package = ROOT / "ogpsa_trl"
    rooms = {path.name for path in package.iterdir() if path.name != "__pycache__"}
    assert len(rooms) <= 14, rooms
    lengths = {path: len(path.read_text().splitlines()) for path in package.rglob("*.py")}
    assert {str(path): length for path, length in lengths.items() if length > 300} == {}


def test_every_fault_of_the_mutants_has_its_place():
    """So that benchmarks/mutants.py runs: what a fault replaces stands once in its file."""
    mutants = runpy.run_path(str(ROOT / "benchmarks" / "mutants.py"))["MUTANTS"]
    counts = {m.name: (ROOT / "ogpsa_trl" / m.file).read_text().count(m.old) for m in mutants}
    assert counts == dict.fromkeys(counts, 1)
