"""OGPSA for TRL: safety post-training that leaves general capabilities alone."""

from ogpsa_trl.callback import SubspaceCallback
from ogpsa_trl.config import GateConfig, OGPSAConfig
from ogpsa_trl.gate import CapabilityGate
from ogpsa_trl.trainers import (
    OGPSADPOTrainer,
    OGPSAGRPOTrainer,
    OGPSAKTOTrainer,
    OGPSAMixin,
    OGPSARLOOTrainer,
    OGPSASFTTrainer,
)

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
