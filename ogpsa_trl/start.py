"""
The starting point: what the model that training starts with makes of the capability samples.

Drift is counted from it, and with `capability_loss: kl` it is all that is kept of the starting
model: no second model is held, and it is the same for full training, for an adapter and under any
engine.

Shapes: S samples of all groups, T trained tokens of them, K tokens told apart, X outcomes (see
`divergence`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor

from ogpsa_trl.backends import GradientBackend
from ogpsa_trl.data import Batch, CapabilityGroup, Part, Sample
from ogpsa_trl.gradients import deterministic

# What is measured of one sample: the entries of `StartingPoint`, without the number of samples.
Measured = Mapping[str, Tensor]


@dataclass
class StartingPoint:
    """
    Attributes:
        samples: All samples, in the order of the tensors.
        losses: Their summed losses, in nats, shape [S], float64.
        tokens: With `kl`, the tokens told apart, shape [T, K], int32, on the CPU.
        log_probs: And their log-probabilities, shape [T, X], float32.
    """

    samples: list[Sample]
    losses: Tensor
    tokens: Tensor | None = None
    log_probs: Tensor | None = None

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

    def state_dict(self) -> dict[str, Tensor]:
        """All of it as tensors, with what tells other samples apart."""
        state = {"losses": self.losses, "fingerprints": _fingerprints(self.samples)}
        if self.tokens is not None and self.log_probs is not None:
            state |= {"tokens": self.tokens, "log_probs": self.log_probs}
        return state

    @classmethod
    def from_state(cls, samples: list[Sample], state: Mapping[str, Tensor]) -> "StartingPoint":
        """
        The starting point that `state_dict` gave.

        Raises:
            ValueError: it is of other samples.
        """
        expected = _fingerprints(samples)
        if not torch.equal(state["fingerprints"], expected):
            raise ValueError("It is of other capability samples.")
        return cls(samples, state["losses"], state.get("tokens"), state.get("log_probs"))

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
    with deterministic(backend.wrapped_model):
        for group in groups:
            whole = group.whole()
            for batch in whole.batches_of(backend.process_index, backend.num_processes):
                names = [sample.name for sample in batch.samples]
                values = [
                    {name: tensor.cpu() for name, tensor in entry.items()}
                    for entry in measure(batch)
                ]
                measured += zip(names, values, strict=True)
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
    return StartingPoint(samples, losses, **{name: torch.cat(v) for name, v in state.items()})


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
