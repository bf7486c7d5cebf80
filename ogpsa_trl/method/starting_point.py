"""
The starting point: what the model that training starts with makes of the capability samples.

Drift is counted from it, and with `capability_loss: kl` it is all that is kept of the starting
model: no second model is held, and it is the same for full training, for an adapter and under any
engine.

In bfloat16 a divergence has a floor, far above that of a first step: what rounding makes of equal
models. It is measured beside the starting point, and counts as the loss at the start.

Shapes: S samples of all groups, T trained tokens of them, K tokens told apart, X outcomes (see
`divergence`).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from ogpsa_trl.data.groups import Batch, CapabilityGroup, Part, Sample
from ogpsa_trl.engines.backend import GradientBackend
from ogpsa_trl.method.capability_gradients import deterministic

# Names of the entries of a saved starting point that are tokens or masks of the samples.
_FEATURE = "features."

# What is measured of one sample: the entries of `StartingPoint`, without the number of samples.
Measured = Mapping[str, Tensor]


@dataclass
class StartingPoint:
    """
    Attributes:
        samples: All samples, in the order of the tensors.
        losses: Their summed losses, in nats, shape [S], float64; with `kl`, the floor of it.
        tokens: With `kl`, the tokens told apart, shape [T, K], int32, on the CPU.
        log_probs: And their log-probabilities, shape [T, X], float32.
        epsilon: Relative rounding of the passes that the floor is of, 0 for float32.
    """

    samples: list[Sample]
    losses: Tensor
    tokens: Tensor | None = None
    log_probs: Tensor | None = None
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        self._rows: dict[str, tuple[int, slice]] = {}
        start = 0
        for index, sample in enumerate(self.samples):
            self._rows[sample.name] = index, slice(start, start + sample.num_tokens)
            start += sample.num_tokens

    def mean_loss(self, part: Part) -> float:
        """Token-mean loss of a part at the start, in nats."""
        indices = [self._rows[sample.name][0] for sample in part.samples]
        return self.losses[indices].sum().item() / part.num_tokens

    def likely_tokens(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Tokens [T, K] and log-probabilities [T, X] of the samples of a batch."""
        assert self.tokens is not None and self.log_probs is not None
        rows = [self._rows[sample.name][1] for sample in batch.samples]
        return (
            torch.cat([self.tokens[:0], *(self.tokens[row] for row in rows)]),
            torch.cat([self.log_probs[:0], *(self.log_probs[row] for row in rows)]),
        )

    def groups_of(self, groups: Sequence[CapabilityGroup]) -> list[CapabilityGroup]:
        """The groups, with the samples that this starting point is of."""
        samples: dict[str, list[Sample]] = {}
        for sample in self.samples:
            samples.setdefault(sample.name.rpartition("/")[0], []).append(sample)
        return [replace(group, samples=samples[group.name]) for group in groups]

    def set_floor(self, group: CapabilityGroup, floor: float) -> None:
        """Count the loss of a group from a floor, in nats per token."""
        for sample in group.samples:
            self.losses[self._rows[sample.name][0]] = floor * sample.num_tokens

    def state_dict(self) -> dict[str, Tensor]:
        """All of it as tensors, with the samples and their tokens."""
        names = "\n".join(sample.name for sample in self.samples).encode()
        state = {
            "losses": self.losses,
            "epsilon": torch.tensor(self.epsilon, dtype=torch.float64),
            "names": torch.frombuffer(bytearray(names), dtype=torch.uint8),
            "num_tokens": torch.tensor([sample.num_tokens for sample in self.samples]),
            "lengths": torch.tensor([len(s.features["input_ids"]) for s in self.samples]),
        }
        for name in ("input_ids", "labels"):
            values = [value for sample in self.samples for value in sample.features[name]]
            state[f"{_FEATURE}{name}"] = torch.tensor(values, dtype=torch.int32)
        if self.tokens is not None and self.log_probs is not None:
            state |= {"tokens": self.tokens, "log_probs": self.log_probs}
        return state

    @classmethod
    def from_state(cls, samples: list[Sample], state: Mapping[str, Tensor]) -> "StartingPoint":
        """
        The starting point that `state_dict` gave, of the samples that it was measured on. Samples
        of the same names may have other tokens by now: a chat template may write the date.

        Args:
            samples: Those of this run.
            state: What `state_dict` gave. Those of older versions hold no tokens.

        Raises:
            ValueError: it is of other samples.
        """
        values = (state["losses"], state.get("tokens"), state.get("log_probs"))
        epsilon = float(state.get("epsilon", 0.0))
        if "fingerprints" in state:
            if not torch.equal(state["fingerprints"], _fingerprints(samples)):
                raise ValueError("It is of other capability samples.")
            return cls(samples, *values)
        names = bytes(state["names"].tolist()).decode().split("\n")
        groups = [
            {name.rpartition("/")[0] for name in found}
            for found in (names, [sample.name for sample in samples])
        ]
        if not {*names} <= {sample.name for sample in samples} or groups[0] != groups[1]:
            raise ValueError("It is of other capability groups, or of more samples.")
        lengths = state["lengths"].tolist()
        features: dict[str, Any] = {
            name.removeprefix(_FEATURE): [part.tolist() for part in tensor.split(lengths)]
            for name, tensor in state.items()
            if name.startswith(_FEATURE)
        }
        measured = [
            Sample(name, dict(zip(features, parts, strict=True)), num_tokens)
            for name, num_tokens, *parts in zip(
                names, state["num_tokens"].tolist(), *features.values(), strict=True
            )
        ]
        return cls(measured, *values, epsilon)

    @classmethod
    def from_losses(
        cls, samples: list[Sample], parts: Sequence[Part], losses: Sequence[float]
    ) -> "StartingPoint":
        """Where every sample stands in one of the parts: their losses, spread over the samples."""
        spread = {
            sample.name: loss * sample.num_tokens
            for part, loss in zip(parts, losses, strict=True)
            for sample in part.samples
        }
        by_sample = [spread[sample.name] for sample in samples]
        return cls(samples, torch.tensor(by_sample, dtype=torch.float64))


@torch.no_grad()
def measure_start(
    backend: GradientBackend,
    groups: Sequence[CapabilityGroup],
    measure: Callable[[Batch], list[Measured]],
) -> StartingPoint:
    """
    Measure all samples at the current weights. A collective call: every process makes it.

    Args:
        backend: The engine.
        groups: The capability groups.
        measure: What is measured of every sample of a batch: its `losses`, a scalar; with `kl` its
            `tokens` and `log_probs` too.

    Raises:
        FloatingPointError: what is measured of a sample is not finite. On every process.
    """
    measured: list[tuple[str, Measured]] = []
    for group in groups:
        measured += measure_part(backend, group.whole(), measure)
    by_name = dict(backend.from_all_processes(measured))
    samples = all_samples(groups)
    entries = [by_name[sample.name] for sample in samples]
    for sample, entry in zip(samples, entries, strict=True):
        if not is_sound(entry):
            raise FloatingPointError(
                f"What the starting model makes of capability sample {sample.name!r} is not finite"
                ", so no rise can be counted from it. Take this sample out; if it is one of many, "
                "check the model."
            )
    state = {name: [entry[name] for entry in entries] for name in entries[0]}
    losses = torch.stack(state.pop("losses")).double()
    likely = {name: torch.cat(values) for name, values in state.items()}
    return StartingPoint(samples, losses, likely.get("tokens"), likely.get("log_probs"))


@torch.no_grad()
def measure_part(
    backend: GradientBackend, part: Part, measure: Callable[[Batch], list[Measured]]
) -> list[tuple[str, Measured]]:
    """What is measured of the samples of this process, by their names. A collective call."""
    measured: list[tuple[str, Measured]] = []
    with deterministic(backend.wrapped_model):
        for batch in part.batches_of(backend.process_index, backend.num_processes):
            names = [sample.name for sample in batch.samples]
            values = [
                {name: tensor.cpu() for name, tensor in entry.items()} for entry in measure(batch)
            ]
            measured += zip(names, values, strict=True)
    return measured


@contextlib.contextmanager
def passes_looked_at(backend: GradientBackend) -> Iterator[Callable[[], float]]:
    """
    Forward passes of which the relative rounding is to be known.

    Args:
        backend: The engine.

    Returns:
        Gives it afterwards, 0 for float32: that of the engine, or of bfloat16 where what reaches
        the head shows that something else has put the model into autocast.
    """
    is_rounded = [False]

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:  # noqa: ARG001
        for hidden in inputs[:1]:
            is_autocast = torch.is_autocast_enabled(hidden.device.type)
            is_rounded[0] |= is_autocast or hidden.dtype != torch.float32

    head: Any = backend.model.get_output_embeddings  # pyright: ignore[reportCallIssue]
    hook = head().register_forward_pre_hook(look)
    try:
        yield lambda: max(
            backend.epsilon, torch.finfo(torch.bfloat16).eps if is_rounded[0] else 0.0
        )
    finally:
        hook.remove()


@contextlib.contextmanager
def moved_embeddings(
    backend: GradientBackend, epsilon: float, generator: torch.Generator
) -> Iterator[None]:
    """
    Forward passes whose embeddings are moved by up to one rounding.

    Args:
        backend: The engine.
        epsilon: The relative rounding.
        generator: Of the moves.
    """

    def move(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:  # noqa: ARG001
        noise = torch.rand(output.shape, generator=generator, device=output.device) * 2 - 1
        return (output.float() * (1 + epsilon * noise)).to(output.dtype)

    embeddings: Any = backend.model.get_input_embeddings  # pyright: ignore[reportCallIssue]
    hook = embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        hook.remove()


def all_samples(groups: Sequence[CapabilityGroup]) -> list[Sample]:
    """The samples of all groups, in the order that a starting point has."""
    return [sample for group in groups for sample in group.samples]


def is_sound(state: Mapping[str, Tensor]) -> bool:
    """Whether a starting point is finite, but for logarithms of a probability of zero."""
    return not any(
        values.isnan().any() or (name == "losses" and values.isinf().any())
        for name, values in state.items()
    )


def content(samples: Sequence[Sample]) -> str:
    """Says how many samples there are, and a number that other texts or tokens would change."""
    checksum = crc32(str(_fingerprints(samples).tolist()).encode())
    return f"{len(samples)} samples with the checksum {checksum:08x}"


def _fingerprints(samples: Sequence[Sample]) -> Tensor:
    """A number for every sample that another text, or other trained tokens, would change."""
    texts = [f"{sample.num_tokens} {list(sample.features['input_ids'])}" for sample in samples]
    return torch.tensor([crc32(text.encode()) for text in texts])
