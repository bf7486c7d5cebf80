"""
The method in axolotl's trainers, for SFT and DPO:

    plugins: [ogpsa_trl.integrations.axolotl.OGPSAPlugin]
    ogpsa:
      capability_datasets:
        - {path: instructions.jsonl, group: instructions}
      preset: preserve

`ogpsa` takes `capability_datasets` and `preset` as `ogpsa train` does, and the settings of
[`OGPSAConfig`]. All else is axolotl's.
"""

from dataclasses import fields
from typing import Any

from axolotl.core.trainers import (  # pyright: ignore[reportMissingImports]
    AxolotlDPOTrainer,
    AxolotlTrainer,
)
from axolotl.integrations.base import (  # pyright: ignore[reportMissingImports]
    BasePlugin,
    PluginManager,
)
from pydantic import BaseModel

from ogpsa_trl.cli.keys import check_entries, unknown_key
from ogpsa_trl.config import OGPSAConfig
from ogpsa_trl.data.entries import CapabilityDatasetConfig, entries_of, load_groups
from ogpsa_trl.training.mixin import OGPSAMixin


class OGPSAArgs(BaseModel):
    """What the plugin adds to axolotl's file."""

    ogpsa: dict[str, Any]


class OGPSAPlugin(BasePlugin):
    """Puts the method into axolotl's trainer of SFT or DPO."""

    def get_input_args(self) -> str:
        return f"{__name__}.OGPSAArgs"

    def register(self, cfg: Any) -> None:
        """
        Name the trainer by `trainer_cls`. One that a plugin returns itself is made without the
        model in DPO (axolotl 0.19).

        Args:
            cfg: axolotl's file as it stands.

        Raises:
            ValueError: `ogpsa` is missing or holds what is no setting; `rl` is of another kind.
        """
        _settings(cfg)
        trainer = OGPSAAxolotlDPOTrainer if cfg.get("rl") else OGPSAAxolotlTrainer
        cfg["trainer_cls"] = f"{__name__}.{trainer.__name__}"


def _settings(cfg: Any) -> tuple[list[CapabilityDatasetConfig], OGPSAConfig]:
    """The capability data and the settings that axolotl's file asks for."""
    stage, given = cfg.get("rl") or "sft", dict(cfg.get("ogpsa") or {})
    if stage not in ("sft", "dpo"):
        raise ValueError(
            f"OGPSA's plugin for axolotl trains SFT and DPO, but `rl` is {stage!r}. Leave the "
            "plugin out, or put `OGPSAMixin` before the trainer."
        )
    entries, preset = given.pop("capability_datasets", None), given.pop("preset", "preserve")
    if not entries:
        raise ValueError(
            "`ogpsa` must have `capability_datasets`, but there are none. Name the data to protect:"
            " `ogpsa: {capability_datasets: [{path: FILE, group: NAME}]}`."
        )
    check_entries("ogpsa.capability_datasets", entries, CapabilityDatasetConfig)
    known = [field.name for field in fields(OGPSAConfig)]
    for key in given:
        if key not in known:
            raise ValueError(unknown_key(key, "`ogpsa`", known))
    given.setdefault("capability_max_length", cfg.get("sequence_len"))
    config = OGPSAConfig.from_preset(preset, stage=stage, **given)
    return entries_of(CapabilityDatasetConfig, entries), config


class _FromFile(OGPSAMixin):
    """Capability data and settings are those of axolotl's file."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        entries, config = _settings(PluginManager.get_instance().cfg)
        groups = load_groups(entries, "`ogpsa.capability_datasets`")
        super().__init__(*args, capability_dataset=groups, ogpsa_config=config, **kwargs)


class OGPSAAxolotlTrainer(_FromFile, AxolotlTrainer):
    """axolotl's trainer of SFT."""


class OGPSAAxolotlDPOTrainer(_FromFile, AxolotlDPOTrainer):
    """axolotl's trainer of DPO."""
