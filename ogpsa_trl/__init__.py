"""OGPSA for TRL: safety post-training that leaves general capabilities alone."""

from typing import TYPE_CHECKING, Any

__all__ = [
    "CapabilityGate",
    "GateConfig",
    "OGPSAConfig",
    "OGPSADPOTrainer",
    "OGPSAGRPOTrainer",
    "OGPSAKTOTrainer",
    "OGPSAMixin",
    "OGPSARLOOTrainer",
    "OGPSASFTTrainer",
    "SubspaceCallback",
    "__version__",
]

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ogpsa_trl.config import GateConfig, OGPSAConfig
    from ogpsa_trl.training.callbacks import SubspaceCallback
    from ogpsa_trl.training.gate import CapabilityGate
    from ogpsa_trl.training.mixin import OGPSAMixin
    from ogpsa_trl.training.trainers import (
        OGPSADPOTrainer,
        OGPSAGRPOTrainer,
        OGPSAKTOTrainer,
        OGPSARLOOTrainer,
        OGPSASFTTrainer,
    )
else:
    import importlib

    _MODULES = {
        "CapabilityGate": "training.gate",
        "GateConfig": "config",
        "OGPSAConfig": "config",
        "OGPSADPOTrainer": "training.trainers",
        "OGPSAGRPOTrainer": "training.trainers",
        "OGPSAKTOTrainer": "training.trainers",
        "OGPSAMixin": "training.mixin",
        "OGPSARLOOTrainer": "training.trainers",
        "OGPSASFTTrainer": "training.trainers",
        "SubspaceCallback": "training.callbacks",
    }

    def __getattr__(name: str) -> Any:
        """Import a public name when it is first used: what needs no trainer needs no TRL."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
