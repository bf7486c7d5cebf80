"""OGPSAConfig: the method's settings and their checks."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

Scope = Literal["parameter", "model"]
Target = Literal["gradient", "update"]
BasisDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class OGPSAConfig:
    """
    Settings of OGPSA, beside the `SFTConfig` or `DPOConfig` of a run.

    Every field stands under its own name in YAML and on the command line. The help text of a field
    gives its meaning, its range and where the default comes from: "paper" is arXiv 2602.07892,
    "official" is the authors' published code and command line.

    Raises:
        ValueError: a setting has the wrong type or lies outside its range; the message names rule,
            value and way out.
    """

    scope: Scope = field(
        default="parameter",
        metadata={
            "help": "'parameter': every parameter tensor has its own subspace (official). "
            "'model': one subspace over the whole parameter vector, the form that the "
            "paper's first-order guarantee is about (paper)."
        },
    )
    target: Target = field(
        default="gradient",
        metadata={
            "help": "What is projected. 'gradient': the accumulated gradient, before clipping "
            "(official)."
        },
    )
    refresh_interval: int = field(
        default=30,
        metadata={
            "help": "Optimizer steps between two estimates of the capability subspace, at least "
            "1. 30 is the official value for SFT; the official value for DPO is 5."
        },
    )
    num_samples: int = field(
        default=200,
        metadata={"help": "Samples taken from each capability group, at least 1 (official: 200)."},
    )
    gradients_per_group: int = field(
        default=1,
        metadata={
            "help": "Basis candidates per group: its samples are split into this many disjoint "
            "parts, each of which gives one mean gradient. At least 1; 1 is the mean "
            "gradient of the whole group (official)."
        },
    )
    rank: int | None = field(
        default=None,
        metadata={
            "help": "Directions kept, the strongest first (largest eigenvalues of the Gram matrix"
            " of the capability gradients). Unset: all independent directions (official)."
        },
    )
    capability_batch_size: int = field(
        default=4,
        metadata={
            "help": "Sequences per forward pass on one process during a refresh, at least 1. "
            "Costs memory and speed only: the result does not depend on it. 4 sequences "
            "are in flight in both official recipes."
        },
    )
    basis_dtype: BasisDtype = field(
        default="float32",
        metadata={
            "help": "Storage of the basis, 'float32' or 'bfloat16' (half the memory; what is "
            "removed is then the exact projection on the rounded directions)."
        },
    )

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for setting in fields(self):
            _check(setting.name, getattr(self, setting.name), hints[setting.name])
        if self.target == "update":
            raise ValueError(
                "`target` 'update' is not available in this version. Set `target: gradient`, "
                "which projects the accumulated gradient before the optimizer sees it."
            )
        if self.gradients_per_group > self.num_samples:
            raise ValueError(
                f"`gradients_per_group` must be at most `num_samples` ({self.num_samples}), "
                "because every part of a group needs a sample, but got "
                f"{self.gradients_per_group}. Lower it or raise `num_samples`."
            )


def _check(name: str, value: Any, hint: Any) -> None:
    """Check one setting: a choice, or an integer of at least 1, optional if the type says so."""
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value not in choices:
            raise ValueError(
                f"`{name}` must be one of {', '.join(map(repr, choices))}, but got {value!r}."
            )
        return
    optional = type(None) in get_args(hint)
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        unset = ", or leave it unset to keep all directions" if optional else ""
        raise ValueError(f"`{name}` must be an integer of at least 1{unset}, but got {value!r}.")
