"""OGPSAConfig: its defaults, its checks, and that it lives with TRL's keys in one flat file."""

import math
import subprocess
import sys
from dataclasses import MISSING, FrozenInstanceError, asdict, fields
from pathlib import Path
from typing import get_args

import pytest
from trl import (
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    ModelConfig,
    RLOOConfig,
    ScriptArguments,
    SFTConfig,
)
from trl.scripts.utils import DatasetMixtureConfig

from ogpsa_trl import OGPSAConfig
from ogpsa_trl import config as config_module
from ogpsa_trl.cli.train_arguments import TrainArguments

CHOICES = {
    "scope": ("parameter", "model"),
    "target": ("gradient", "update", "none"),
    "metric": ("euclidean", "optimizer"),
    "capability_loss": ("nll", "kl"),
    "basis_dtype": ("float32", "bfloat16"),
}
NUMBERS = (
    "restoration",
    "restoration_cap",
    "capability_ema",
    "capability_weight",
)
COUNTS = (
    "refresh_interval", "num_samples", "gradients_per_group", "kl_tokens", "capability_batch_size",
)  # fmt: skip
OPTIONAL_NUMBER = "capability_token_share"
OPTIONAL_COUNTS = ("samples_per_refresh", "rank", "capability_max_length")


def assert_refused(message, **settings):
    """The error says exactly this, from its first word to its last."""
    with pytest.raises(ValueError) as error:
        OGPSAConfig(**settings)
    assert str(error.value) == message


PAPER = {
    "scope": "parameter",
    "target": "gradient",
    "metric": "euclidean",
    "capability_loss": "nll",
    "kl_tokens": 64,
    "refresh_interval": 30,
    "num_samples": 200,
    "capability_token_share": None,
    "samples_per_refresh": None,
    "gradients_per_group": 1,
    "rank": None,
    "capability_batch_size": 4,
    "capability_max_length": None,
    "restoration": 0.0,
    "restoration_cap": 1.0,
    "capability_ema": 0.0,
    "capability_weight": 0.0,
    "basis_dtype": "float32",
}
DRAWN = {
    "capability_loss": "kl", "refresh_interval": 1, "capability_token_share": 0.25,
    "scope": "model",
}  # fmt: skip
PRESETS = {
    "paper": PAPER,
    "paper-theorem": PAPER | {"scope": "model"},
    "preserve": PAPER | DRAWN | {
        "target": "update", "metric": "optimizer", "restoration": 1.0, "capability_ema": 0.5,
        "basis_dtype": "bfloat16",
    },
    "replay": PAPER | {
        "scope": "model", "refresh_interval": 2, "samples_per_refresh": 16,
        "capability_weight": 1.0,
    },
    "kl": PAPER | DRAWN | {"target": "none", "capability_weight": 1.0},
}  # fmt: skip


class TestPresets:
    @pytest.mark.parametrize("name", PRESETS)
    def test_each_is_these_settings(self, name):
        """In DPO the authors refresh every 5 steps, in SFT every 30; the other forms are one."""
        assert asdict(OGPSAConfig.from_preset(name)) == PRESETS[name]
        of_dpo = {"refresh_interval": 5} if "paper" in name else {}
        assert asdict(OGPSAConfig.from_preset(name, stage="dpo")) == PRESETS[name] | of_dpo

    def test_the_defaults_are_preserve(self):
        assert OGPSAConfig() == OGPSAConfig.from_preset("preserve")

    def test_settings_replace_those_of_the_preset(self):
        config = OGPSAConfig.from_preset("paper", scope="model", refresh_interval=7)
        assert config == OGPSAConfig.from_preset("paper-theorem", refresh_interval=7)

    def test_every_preset_is_tested_here(self):
        assert set(get_args(config_module.Preset)) == set(PRESETS)

    @pytest.mark.parametrize("name", ["papers", None, ["paper"]])
    def test_another_name_is_refused(self, name):
        choices = ", ".join(map(repr, PRESETS))
        with pytest.raises(ValueError) as error:
            OGPSAConfig.from_preset(name)
        assert str(error.value) == f"`preset` must be one of {choices}, but got {name!r}."

    def test_another_stage_is_refused(self):
        with pytest.raises(ValueError, match="`stage` must be one of 'sft', 'dpo', but got 'ppo'"):
            OGPSAConfig.from_preset("paper", stage="ppo")


def test_every_setting_is_tested_here():
    tested = {*CHOICES, *COUNTS, *OPTIONAL_COUNTS, *NUMBERS, OPTIONAL_NUMBER}
    assert {f.name for f in fields(OGPSAConfig)} == tested


def wrong_values():
    """Of every setting: the words for what it must be, and values that are something else."""
    for name, choices in CHOICES.items():
        words = f"one of {', '.join(map(repr, choices))}"
        yield name, words, ["whole", None, 1, ["parameter"], {"a": 1}]
    for name in COUNTS:
        words = "an integer of at least 1"
        yield name, words, [0, -1, 1.0, "3", None, True, [1], math.inf]
    for name in OPTIONAL_COUNTS:
        yield name, "an integer of at least 1, or unset", [0, 1.0, "none", True, [1]]
    yield OPTIONAL_NUMBER, "a number of at least 0, or unset", [-0.1, "1", True, math.nan]
    for name in NUMBERS:
        yield name, "a number of at least 0", [-0.1, "1", None, True, [1], math.inf, math.nan]


@pytest.mark.parametrize(("name", "words", "values"), list(wrong_values()))
def test_a_value_is_of_its_kind(name, words, values):
    for value in values:
        assert_refused(f"`{name}` must be {words}, but got {value!r}.", **{name: value})


PRESET = "or begin with a preset of that target, such as `preset: paper`."
TOGETHER = [
    ({"target": "gradient"}, "`metric` 'optimizer' is for updates, but `target` is 'gradient'. Set "
     f"`target: update`, or `metric: euclidean`; {PRESET}"),
    ({"target": "none", "metric": "euclidean"}, "`restoration` 1.0 is for updates, but `target` is "
     f"'none'. Set `target: update`, or `restoration: 0`; {PRESET}"),
    ({"capability_weight": 0.5}, "`capability_weight` (0.5) adds what `target: update` removes "
     "from the step. Set `capability_weight: 0`, or begin with `preset: replay` or `preset: kl`."),
    ({"capability_token_share": 0}, "`capability_token_share` must be above 0, but got 0. To train "
     "without capability data leave out `capability_datasets`, or set `ogpsa: false`."),
    ({"restoration_cap": 0},
     "`restoration_cap` must be above 0, but got 0. Set `restoration: 0` for none."),
    *(({"capability_ema": value}, "`capability_ema` must be below 1, for new gradients to count, "
       f"but got {value!r}. Values from 0 to 0.7 were tried.") for value in (1, 1.5)),
    *(({name: 3, "gradients_per_group": 4}, f"`gradients_per_group` must be at most `{name}` (3), "
       f"a sample for every part, but got 4. Lower it or raise `{name}`.")
      for name in ("num_samples", "samples_per_refresh")),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), TOGETHER)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    assert_refused(message, **settings)


def test_settings_that_go_together_are_accepted():
    for preset, settings in [
        ("preserve", {"metric": "optimizer", "target": "update", "restoration": 1}),
        ("replay", {"capability_weight": 2}),
        ("preserve", {"gradients_per_group": 3, "num_samples": 3}),
    ]:
        config = OGPSAConfig.from_preset(preset, **settings)
        assert settings.items() <= asdict(config).items()


def test_every_choice_and_the_smallest_count_are_accepted():
    for name in ("scope", "capability_loss", "basis_dtype"):
        for choice in CHOICES[name]:
            assert getattr(OGPSAConfig(**{name: choice}), name) == choice
    for name in (*COUNTS, *OPTIONAL_COUNTS):
        assert getattr(OGPSAConfig(**{name: 1}), name) == 1


def test_settings_are_frozen():
    config = OGPSAConfig()
    for setting in fields(config):
        with pytest.raises(FrozenInstanceError):
            setattr(config, setting.name, getattr(config, setting.name))


def test_settings_are_passed_by_name():
    with pytest.raises(TypeError, match="positional"):
        OGPSAConfig("model")


@pytest.mark.parametrize("setting", fields(OGPSAConfig), ids=lambda setting: setting.name)
def test_every_setting_has_a_default_and_a_help_text_with_every_choice(setting):
    text = setting.metadata["help"]
    assert setting.default is not MISSING
    assert text.endswith(".")
    # The only choice of `target` that is not available is not offered.
    offered = [choice for choice in CHOICES.get(setting.name, ()) if choice != "update"]
    assert all(f"'{choice}'" in text for choice in offered)
    # argparse formats help texts with `%`, so a bare one breaks `--help`.
    assert "%" not in text


def test_no_name_is_taken_in_the_flat_file():
    ours = {setting.name for setting in fields(OGPSAConfig)}
    for other in (
        SFTConfig, DPOConfig, KTOConfig, GRPOConfig, RLOOConfig, ModelConfig, ScriptArguments,
        DatasetMixtureConfig, TrainArguments,
    ):  # fmt: skip
        assert ours.isdisjoint(setting.name for setting in fields(other)), other


LOAD_ALONE = """
import importlib.util, sys
before = set(sys.modules)
spec = importlib.util.spec_from_file_location("config_alone", sys.argv[1])
module = sys.modules["config_alone"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.OGPSAConfig(rank=2)
imported = {name.partition(".")[0] for name in set(sys.modules) - before}
sys.exit(", ".join(imported - set(sys.stdlib_module_names) - {"config_alone"}) or None)
"""


def test_the_settings_need_the_standard_library_only():
    """The file is loaded by its path: importing the package brings in TRL."""
    # -S hides all installed packages: an import of one fails.
    command = [sys.executable, "-I", "-S", "-c", LOAD_ALONE, str(Path(config_module.__file__))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
