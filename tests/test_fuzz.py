"""The parser of keys, given anything: it parses, or says in one screen what is wrong."""

import os
from dataclasses import is_dataclass
from enum import Enum
from types import UnionType
from typing import Union, get_args, get_origin, get_type_hints
from unittest.mock import patch

import pytest
import yaml
from accelerate.state import AcceleratorState
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ogpsa_trl.cli.train_arguments import RunArguments
from ogpsa_trl.cli.train_keys import parse_run, training_parser
from ogpsa_trl.cli.user_errors import user_errors
from ogpsa_trl.data.entries import CapabilityDatasetConfig

HINTS = training_parser("sft").hints | training_parser("dpo").hints
HINTS["env"] = dict[str, str]
LISTS = {key for key in HINTS if key.endswith("datasets")}

TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.dates()
    | st.sampled_from(["no", "1e-6", "true", "auto", "all", "sft", "dpo", "{", "[", "~", "-1"])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | SCALARS, inner, max_size=3),
    max_leaves=5,
)
ENTRIES = st.fixed_dictionaries(
    {"path": TEXTS},
    optional=dict.fromkeys(get_type_hints(CapabilityDatasetConfig).keys() - {"path"}, VALUES),
)


def of_type(hint):
    """Values of a type, as YAML writes them; of a mapping the names are never right."""
    args = get_args(hint)
    if get_origin(hint) is list:
        return st.lists(of_type(args[0]), max_size=3)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return st.sampled_from([member.value for member in hint])
    if get_origin(hint) in (Union, UnionType):
        return st.one_of(map(of_type, args))
    if dict in (hint, get_origin(hint)) or is_dataclass(hint):
        return st.dictionaries(TEXTS, SCALARS, max_size=2)
    return st.from_type(hint)


def keys_with_values(key):
    """A key with a value that mostly has its type, so that more than the types is looked at."""
    right = st.lists(ENTRIES, max_size=2) if key in LISTS else of_type(HINTS[key])
    return st.tuples(st.just(key), right | right | VALUES)


RUNS = st.lists(
    st.sampled_from(sorted(HINTS)).flatmap(keys_with_values) | st.tuples(TEXTS, VALUES), max_size=3
).map(dict)
WORKING = {"model_name_or_path": "toy", "output_dir": "out", "use_cpu": True, "bf16": False}

CONTENTS = st.binary(max_size=50) | TEXTS.map(str.encode)
LINES = st.lists(st.sampled_from(sorted(HINTS)).map("--{}".format) | TEXTS, max_size=4)

every_health = {"deadline": None, "suppress_health_check": list(HealthCheck)}
few = settings(max_examples=30, derandomize=True, **every_health)
many = settings(max_examples=200, **every_health)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path, monkeypatch):
    """Of settings that transformers puts into the environment, or into a state of the process."""
    monkeypatch.chdir(tmp_path)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def parse(line):
    """
    Parse as the script does.

    Returns:
        The run, or the message that the script ends with.
    """
    try:
        with patch.dict(os.environ), user_errors():
            return parse_run(line)
    except SystemExit as stop:
        return stop.code


def assert_runs_or_says_why(line):
    outcome = parse(line)
    if not isinstance(outcome, RunArguments):
        assert outcome.startswith("error: ")
        assert sum(1 + len(row) // 80 for row in outcome.splitlines()) <= 24
    assert not os.listdir(), "parsing writes nothing"


def write(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(content)
    return str(path)


@few
@given(run=RUNS)
def test_any_keys_with_any_values(run, tmp_path_factory):
    content = yaml.safe_dump({**WORKING, **run}, allow_unicode=True)
    assert_runs_or_says_why(["--config", write(tmp_path_factory, content.encode())])


@few
@given(content=CONTENTS)
@example(content=b"a: &a [*a]")
@example(content=b"? [1]\n: 2")
@example(content=b"!!python/name:os.system ''")
def test_any_file(content, tmp_path_factory):
    assert_runs_or_says_why(["--config", write(tmp_path_factory, content)])


@few
@given(words=LINES)
def test_any_command_line(words, tmp_path_factory):
    file = write(tmp_path_factory, yaml.safe_dump(WORKING).encode())
    words = [word for word in words if word not in ("-h", "--help")]
    assert_runs_or_says_why(["--config", file, *words])


@pytest.mark.slow
@many
@given(run=RUNS, content=CONTENTS, words=LINES)
def test_many_of_them(run, content, words, tmp_path_factory):
    test_any_keys_with_any_values.hypothesis.inner_test(run, tmp_path_factory)
    test_any_file.hypothesis.inner_test(content, tmp_path_factory)
    test_any_command_line.hypothesis.inner_test(words, tmp_path_factory)
