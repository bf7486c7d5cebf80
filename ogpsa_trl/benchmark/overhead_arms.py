"""What takes turns in a cell of the overhead benchmark: plain TRL, OGPSA, the published hooks."""

# K basis rows, N entries of a parameter

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import TrainerCallback

from ogpsa_trl import OGPSASFTTrainer
from ogpsa_trl.training import step


class Arms(TrainerCallback):
    """
    Gives every optimizer step to an arm in turn, and times them all.

        plain    TRL's own step; its forward and backward passes are timed apart
        ogpsa    with a projection, without a refresh
        hooks    plain, with the basis moved in from the host for every parameter and pass

    A refresh is made and timed before each round. The step after it is not counted, nor is the
    first round: both find the memory in another state. The arms take turns in going first.

    Args:
        trainer: The trainer; the callback is added to it.
        names: The arms of a round.
    """

    def __init__(self, trainer: OGPSASFTTrainer, names: Sequence[str]) -> None:
        self.trainer = trainer
        self.names = list(names)
        self.groups = trainer.capability_groups
        measured = (*names, "refresh", "basis", "forward and backward", "projection")
        self.seconds: dict[str, list[float]] = {name: [] for name in measured}
        self.steps_per_round = len(names) + 1
        self.stack = contextlib.ExitStack()  # of a step
        self.clocks = contextlib.ExitStack()  # of the run
        self.spent: dict[str, float] = defaultdict(
            float
        )  # seconds, since they were last set to zero
        self.is_counting = True
        self.arm = ""
        self.start = 0.0
        self._clock(trainer, "training_step", "forward and backward")
        trainer.add_callback(self)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        round_, place = divmod(state.global_step, self.steps_per_round)
        if state.global_step == 0:
            for name in ("project", "copy_weights", "project_update"):
                self._clock(step, name, "projection")
            for name in ("release_gradients", "refresh"):
                self._clock(self.trainer.subspace, name, "basis")
        self.is_counting = round_ > 0
        self.arm = self.names[(round_ + place) % len(self.names)]
        if place == 0:
            self.trainer.capability_groups = self.groups
            self.spent.clear()
            start = now()
            self.trainer.refresh_subspace()
            self._add("refresh", now() - start)
            self._add("basis", self.spent["basis"])
            self.is_counting = False
        self.trainer.capability_groups = self.groups if self.arm == "ogpsa" else []
        self.trainer.subspace.is_fresh = True
        if self.arm == "hooks":
            self.stack.enter_context(host_hooks(self.trainer))
        self.spent.clear()
        self.start = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self._add(self.arm, now() - self.start)
        self.stack.close()
        apart = {"plain": "forward and backward", "ogpsa": "projection"}.get(self.arm)
        if apart:
            self._add(apart, self.spent[apart])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.clocks.close()

    def _add(self, name: str, seconds: float) -> None:
        if self.is_counting:
            self.seconds[name].append(seconds)

    def _clock(self, owner: Any, name: str, what: str) -> None:
        """Put a clock around a method, or a function of a module, for the run."""
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = now()
            result = method(*args, **kwargs)
            self.spent[what] += now() - start
            return result

        self.clocks.enter_context(mock.patch.object(owner, name, timed))


@contextlib.contextmanager
def host_hooks(trainer: OGPSASFTTrainer) -> Iterator[None]:
    """
    What the published code does: whole rows of the basis on the host, moved to the device for
    every parameter in every backward pass, and the gradient of that pass projected.
    """
    handles = []
    pairs = zip(trainer.subspace.backend.parameters, trainer.subspace.basis, strict=True)
    for (_, parameter), rows_KN in pairs:
        if rows_KN is None:
            continue
        host_KN = rows_KN.cpu().pin_memory() if rows_KN.is_cuda else rows_KN.clone()

        def project(gradient: Tensor, host_KN: Tensor = host_KN) -> Tensor:
            rows_KN = host_KN.to(gradient.device)
            flat_N = gradient.reshape(-1)
            return (flat_N - rows_KN.T @ (rows_KN @ flat_N)).view_as(gradient)

        handles.append(parameter.register_hook(project))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def now() -> float:
    """Seconds, after all that the device was asked to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
