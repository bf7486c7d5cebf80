"""The settings of the method, `OGPSAConfig`, and of the capability gate, `GateConfig`."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

Scope = Literal["parameter", "model"]
Target = Literal["gradient", "update", "none"]
Metric = Literal["euclidean", "optimizer"]
CapabilityLoss = Literal["nll", "kl"]
BasisDtype = Literal["float32", "bfloat16"]
Preset = Literal["paper", "paper-theorem", "preserve", "replay", "kl"]
GateAction = Literal["warn", "stop", "best"]

_PAPER = {
    "scope": "parameter", "target": "gradient", "metric": "euclidean", "capability_loss": "nll",
    "refresh_interval": 30, "capability_token_share": None, "restoration": 0.0,
    "capability_ema": 0.0, "basis_dtype": "float32",
}  # fmt: skip
# What a preset sets. The others, and `preserve`, are the defaults of the fields.
_PRESETS: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    "paper-theorem": {**_PAPER, "scope": "model"},
    "preserve": {},
    "replay": {
        **_PAPER, "scope": "model", "capability_weight": 1.0, "refresh_interval": 2,
        "samples_per_refresh": 16,
    },
    "kl": {
        "target": "none", "metric": "euclidean", "restoration": 0.0, "capability_ema": 0.0,
        "capability_weight": 1.0, "basis_dtype": "float32",
    },
}  # fmt: skip
# What is different in DPO.
_PRESETS_DPO = {name: {"refresh_interval": 5} for name in ("paper", "paper-theorem")}


def setting(default: Any, text: str) -> Any:
    """The field of a dataclass with its default, or what makes it, and its help text."""
    metadata = {"help": text}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class OGPSAConfig:
    """
    Settings of OGPSA, beside the `SFTConfig` or `DPOConfig` of a run.

    Every field stands under its own name in YAML and on the command line. The help text of a field
    gives its meaning, its range and where values come from: "paper" is arXiv 2602.07892, "official"
    is the authors' published code and command line. The defaults are those of the preset
    `preserve`, because under AdamW and at equal safety it kept more than the published form, which
    in part kept less than plain tuning (docs/benchmark.md).

    Raises:
        ValueError: a setting has the wrong type or lies outside its range; the message names rule,
            value and way out.
    """

    scope: Scope = setting(
        "model",
        "'parameter': every parameter tensor has its own subspace (official). 'model': one "
        "subspace over the whole parameter vector, the form that the paper's first-order "
        "guarantee is about (paper).",
    )
    target: Target = setting(
        "update",
        "What is projected. 'gradient': the accumulated gradient, before clipping (official). "
        "'update': what the optimizer did to the weights, with momentum, preconditioner, clipping "
        "and weight decay, so that the first-order guarantee holds for any optimizer; costs a "
        "copy of the trained weights during the optimizer's step. 'none': nothing; with "
        "`capability_weight` the run is replay, or a KL penalty.",
    )
    metric: Metric = setting(
        "optimizer",
        "How the distance between two steps is measured. 'euclidean': all weights alike, an "
        "orthogonal projection (official). 'optimizer', with `target: update`: each weight by "
        "Adam's second moment; with SGD, which has none, as 'euclidean'. Other optimizers are an "
        "error.",
    )
    capability_loss: CapabilityLoss = setting(
        "kl",
        "The loss on the capability data. 'nll': negative log-likelihood of their text "
        "(official). 'kl': divergence of the model from the one that training starts with, on the "
        "same tokens; it stays positive as long as the models differ.",
    )
    kl_tokens: int = setting(
        64,
        "With `capability_loss: kl`: how many tokens are distinguished at each position, the most "
        "likely ones of the starting model, at least 1. All others count as one. Their "
        "probabilities are stored, 8 bytes each.",
    )
    refresh_interval: int = setting(
        1,
        "Optimizer steps between two estimates of the capability subspace, at least 1 (official: "
        "30 for SFT, 5 for DPO).",
    )
    num_samples: int = setting(
        200,
        "Samples taken from each capability group, at least 1 (official: 200).",
    )
    capability_token_share: float | None = setting(
        0.25,
        "What capability data may cost: capability tokens for each training token, above 0. The "
        "share buys samples of each group for each refresh, at most 8 (measured: more do not "
        "help). Where it buys fewer, every second turn of a group reads more, up to the 8th token "
        "of answers (measured). Where it buys less than one of each group, groups take turns. "
        "Unset, without `samples_per_refresh`: all samples at each refresh (official).",
    )
    samples_per_refresh: int | None = setting(
        None,
        "In place of `capability_token_share`: how many samples of each group a refresh reads, at "
        "least 1; all if there are fewer.",
    )
    gradients_per_group: int = setting(
        1,
        "Basis candidates per group: its samples are split into this many disjoint parts, each of "
        "which gives one mean gradient. At least 1; 1 is the mean gradient of the whole group "
        "(official).",
    )
    rank: int | None = setting(
        None,
        "Directions kept, the strongest first (largest eigenvalues of the Gram matrix of the "
        "capability gradients). Unset: all independent directions (official).",
    )
    capability_batch_size: int = setting(
        4,
        "Sequences per forward pass on one process during a refresh, at least 1. Costs memory and "
        "speed only: the result does not depend on it. 4 sequences are in flight in both official "
        "recipes.",
    )
    capability_max_length: int | None = setting(
        None,
        "Tokens kept of each capability sample, at least 1. Unset: the `max_length` of the "
        "trainer where it has one (SFT, DPO, KTO; official: 2048), otherwise all.",
    )
    restoration: float = setting(
        1.0,
        "With `target: update`: share of the rise of each capability loss above its value at the "
        "start of training that is taken back until the next refresh, at least 0. 0 is off "
        "(official); 1 takes back all that is known.",
    )
    restoration_cap: float = setting(
        1.0,
        "Largest length of that correction, relative to the rest of the update, above 0. "
        "Measured: at 0.5 it bound on most steps.",
    )
    capability_ema: float = setting(
        0.5,
        "Share of the old capability gradients (and rises of their losses) kept in a refresh, at "
        "least 0 and below 1. 0 is off (official).",
    )
    capability_weight: float = setting(
        0.0,
        "Adds this multiple of the mean capability gradient of a refresh to the gradient of the "
        "step after it, at least 0. 0 is off (paper). With `target: none` and `refresh_interval: "
        "1` it is replay of the capability data (`nll`) or a KL penalty (`kl`). Not with "
        "`target: update`, which would take it out of the step again.",
    )
    basis_dtype: BasisDtype = setting(
        "bfloat16",
        "How the basis is stored: 'float32', or 'bfloat16' in half the memory. The projection on "
        "the rounded directions is exact.",
    )

    @classmethod
    def from_preset(cls, name: Preset, *, stage: str = "sft", **settings: Any) -> "OGPSAConfig":
        """
        The settings of a preset, with some of them replaced.

        Args:
            name: `preserve`: the constrained update with restoration, the defaults. `paper`: the
                published form. `paper-theorem`: the same with one subspace. `replay`: the projected
                gradient and the capability gradient, for SFT. `kl`: a penalty on the divergence
                from the starting model, without projection.
            stage: `sft` or `dpo`: the official refresh interval differs.
            settings: Fields to replace.

        Raises:
            ValueError: there is no such preset or stage, or a setting is not allowed.
        """
        return cls(**preset_settings(name, stage) | settings)

    def __post_init__(self) -> None:
        _check_fields(self)
        for name, off in (("metric", "euclidean"), ("restoration", 0)):
            if self.target != "update" and getattr(self, name) != off:
                raise ValueError(
                    f"`{name}` {getattr(self, name)!r} is for updates, but `target` is "
                    f"{self.target!r}. Set `target: update`, or `{name}: {off}`; or begin with a "
                    "preset of that target, such as `preset: paper`."
                )
        if self.capability_weight and self.target == "update":
            raise ValueError(
                f"`capability_weight` ({self.capability_weight!r}) adds what `target: update` "
                "removes from the step. Set `capability_weight: 0`, or begin with `preset: replay` "
                "or `preset: kl`."
            )
        if self.capability_token_share == 0:
            raise ValueError(
                "`capability_token_share` must be above 0, but got 0. To train without capability "
                "data leave out `capability_datasets`, or set `ogpsa: false`."
            )
        if self.restoration_cap == 0:
            raise ValueError(
                "`restoration_cap` must be above 0, but got 0. Set `restoration: 0` for none."
            )
        if self.capability_ema >= 1:
            raise ValueError(
                "`capability_ema` must be below 1, for new gradients to count, but got "
                f"{self.capability_ema!r}. Values from 0 to 0.7 were tried."
            )
        for name in ("num_samples", "samples_per_refresh"):
            most = getattr(self, name)
            if most is not None and self.gradients_per_group > most:
                raise ValueError(
                    f"`gradients_per_group` must be at most `{name}` ({most}), a sample for every "
                    f"part, but got {self.gradients_per_group}. Lower it or raise `{name}`."
                )


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """
    Settings of [`CapabilityGate`], each under its own name in YAML and on the command line.

    Raises:
        ValueError: a setting has the wrong type or lies outside its range, or an action has no
            tolerance to act on.
    """

    max_capability_loss_increase: float | None = setting(
        None,
        "Tolerance of the gate, in nats per token, at least 0: how far the held-out loss of any "
        "gate group may be above its value before training. Unset: losses are measured and logged "
        "only. Values depend on the data: log a run first.",
    )
    gate_action: GateAction = setting(
        "warn",
        "What the gate does once the tolerance is passed. 'warn': a warning. 'stop': ends "
        "training. 'best': trains on, marks the latest checkpoint within the tolerance as the "
        "best one, which `save_total_limit` keeps, and loads it at the end if the last weights "
        "are past the tolerance.",
    )
    gate_interval: int = setting(
        50,
        "Optimizer steps between two measurements of the gate, at least 1. It also measures "
        "before the first step, before a checkpoint is saved and after the last step. Default: "
        "with 64 samples of two groups and 16 training samples a step, forward passes of about a "
        "twentieth of the time of training.",
    )
    gate_num_samples: int = setting(
        64,
        "Samples measured of each gate group, at least 1, the same in every measurement; all if "
        "there are fewer. Default: see `gate_interval`.",
    )
    gate_batch_size: int = setting(
        4,
        "Sequences per forward pass of the gate on one process, at least 1. Costs memory and "
        "speed only: the result does not depend on it. Default: that of `capability_batch_size`.",
    )

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.gate_action != "warn" and self.max_capability_loss_increase is None:
            raise ValueError(
                f"`gate_action` {self.gate_action!r} needs a tolerance, but "
                "`max_capability_loss_increase` is not set. Set it, in nats per token, or "
                "`gate_action: warn`."
            )


def preset_settings(name: str, stage: str = "sft") -> dict[str, Any]:
    """What a preset sets in a stage, by field. `ValueError`: there is no such preset or stage."""
    _check("preset", name, Preset)
    _check("stage", stage, Literal["sft", "dpo"])
    return {**_PRESETS[name], **(_PRESETS_DPO.get(name, {}) if stage == "dpo" else {})}


def _check_fields(config: OGPSAConfig | GateConfig) -> None:
    for name, hint in get_type_hints(type(config)).items():
        _check(name, getattr(config, name), hint)


def _check(name: str, value: Any, hint: Any) -> None:
    """Check one setting: a choice, a number, or a count of at least 1; or unset."""
    kinds = get_args(hint) or (hint,)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if get_origin(hint) is Literal:
        words, fits = f"one of {', '.join(map(repr, kinds))}", value in kinds
    elif float in kinds:
        words, fits = "a number of at least 0", is_number and 0 <= value < math.inf
    else:
        words, fits = "an integer of at least 1", type(value) is int and value >= 1
    if type(None) in kinds:
        words, fits = f"{words}, or unset", fits or value is None
    if not fits:
        raise ValueError(f"`{name}` must be {words}, but got {value!r}.")
