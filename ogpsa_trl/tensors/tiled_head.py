"""
Scores of positions, without the logits of the whole vocabulary for all of them at once.

Those may be larger than everything else of a pass: of 8 sequences of 1,024 tokens, with 152,000
words, they take 5 GB in float32, and are held several times. Here the head of the model scores its
positions tile by tile, and every tile is computed again in the backward pass. It does so inside the
model's own forward pass, in place of its output, so that whatever an engine does around the head
and the model (gathering shards, hooks on outputs) is done.

Shapes: T positions, V tokens of the vocabulary, H width, B rows, L length.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

Projection = Callable[[Tensor], Tensor]

# From the logits of some positions, shape [t, V], and which of the T they are, a score for each,
# shape [t], float32.
Score = Callable[[Tensor, slice], Tensor]

# Positions of a tile. A divergence takes up to 20 bytes for each logit of it, the backward pass
# included (measured): .8 GB with 152,000 words. In smaller tiles the products would wait for the
# head's weights, and their gradients would be added up more often; in bfloat16 with a relative
# error of .007 for 32 tiles, where the product of all has .003 (measured).
_TILE = 256


class TiledHead:
    """
    The head of a causal language model.

    A model may do more to logits than its head does: scale, cap, mask or cut them, or add a bias
    that is zero until it is trained. Known numbers in place of the logits show that, and what they
    go through. Such a model, or one that does not call its head with hidden states of shape
    [B, L, H], gives its logits as always, and only the scores are computed tile by tile.

    Args:
        find: Gives the module from hidden states to logits. Engines and adapters may replace it.
    """

    def __init__(self, find: Callable[[], nn.Module]) -> None:
        self._find = find
        # Whether the model's logits are what the head returns. None: not known yet.
        self.is_plain: bool | None = None

    def scores(self, logits: Callable[[], Tensor], is_scored_BL: Tensor, score: Score) -> Tensor:
        """
        Score positions of a batch, with their graph.

        Args:
            logits: A forward pass, which calls the head at most once and returns the model's
                logits. A collective call where the passes of the engine are; made twice in the
                first call of this method.
            is_scored_BL: The positions, bool. Rows of logits that are longer (prompt learning puts
                virtual tokens in front) end with these.
            score: The score. Without a graph it may be called for its effects.

        Returns:
            Shape [T], float32; no position is allowed.
        """
        if self.is_plain is None:
            self.is_plain = self._returns_what_the_head_does(logits)
        if not self.is_plain:
            return _in_tiles(lambda tile_TV: tile_TV, _select(logits(), is_scored_BL), score)
        exact: list[Tensor] = []

        def forward(project: Projection, hidden_BLH: Tensor) -> Tensor:
            scores_T = _in_tiles(project, _select(hidden_BLH, is_scored_BL), score)
            exact.append(scores_T.detach())
            return scores_T.view(1, -1, 1).clone()  # FSDP2 warns where a module returns a view

        with self._replaced(forward):
            scores_T = logits().flatten().float()
        # FSDP2 in bfloat16 rounds what a model returns: only the graph is taken from it.
        return scores_T + (exact[0] - scores_T.detach())

    @torch.no_grad()
    def _returns_what_the_head_does(self, logits: Callable[[], Tensor]) -> bool:
        sent: list[Tensor] = []
        copies = _Copies()

        def forward(project: Projection, hidden_BLH: Tensor) -> Tensor:
            if hidden_BLH.dim() != 3:
                return project(hidden_BLH)
            logits_V = project(hidden_BLH[:1, :1]).flatten()
            # Whole numbers that bfloat16 has too, one for each word.
            numbers_V = torch.arange(len(logits_V), device=logits_V.device) % 128 - 64
            sent.append(numbers_V.float().view(1, 1, -1))
            # Not before: the layers of the model may hold what no mode can follow.
            stack.enter_context(copies)
            return copies.first(sent[0].clone())

        with contextlib.ExitStack() as stack, self._replaced(forward):
            returned = logits()
        return bool(sent) and copies.holds(returned) and torch.equal(returned.float(), sent[0])

    @contextlib.contextmanager
    def _replaced(self, forward: Callable[[Projection, Tensor], Tensor]) -> Iterator[None]:
        """The head calls another `forward`, which is given its own."""
        head = self._find()
        project = head.forward
        own = head.__dict__.get("forward")  # libraries may have put theirs before the class's
        head.forward = functools.partial(forward, project)
        try:
            yield
        finally:
            del head.forward
            if own is not None:
                head.forward = own


class _Copies(TorchDispatchMode):
    """
    Knows which tensors are copies of a first one: views, casts, and what it was written into.

    What is computed with it is none, even where that changes nothing for now: a bias may be zero,
    and a scale one, until they are trained.
    """

    def __init__(self) -> None:
        super().__init__()
        # By the memory that they lie in. The tensors are kept, so that it is not used again.
        self._tensors: dict[int, Tensor] = {}

    def first(self, tensor: Tensor) -> Tensor:
        """The tensor that copies are of."""
        self._add(tensor)
        return tensor

    def holds(self, value: Any) -> bool:
        """Whether a value is a copy."""
        return type(value) is Tensor and _memory(value) in self._tensors

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Views need no rule: they lie in the same memory.
        result = func(*args, **(kwargs or {}))
        copied = [leaf for leaf in tree_leaves((args, kwargs)) if self.holds(leaf)]
        if func.overloadpacket is torch.ops.aten.copy_ and self.holds(args[1]):
            self._add(args[0])
        elif func._schema.is_mutable:  # perhaps not all of them are written to: no matter
            for tensor in copied:
                self._tensors.pop(_memory(tensor), None)
        elif copied and func.overloadpacket in _COPYING:
            self._add(result)
        return result

    def _add(self, tensor: Tensor) -> None:
        self._tensors[_memory(tensor)] = tensor


_COPYING = (torch.ops.aten._to_copy, torch.ops.aten.clone)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _select(values_BLX: Tensor, is_scored_BL: Tensor) -> Tensor:
    return values_BLX[:, -is_scored_BL.shape[1] :][is_scored_BL.to(values_BLX.device)]


def _in_tiles(project: Projection, inputs_TX: Tensor, score: Score) -> Tensor:
    """Scores of what `project` makes of the inputs."""

    def score_tile(tile_TX: Tensor, positions: slice) -> Tensor:
        return score(project(tile_TX), positions).float()

    scores = [
        checkpoint(
            score_tile, tile_TX, slice(start, start + len(tile_TX)),
            use_reentrant=False, preserve_rng_state=False,
        )
        for start, tile_TX in zip(
            range(0, max(len(inputs_TX), 1), _TILE), inputs_TX.split(_TILE), strict=True
        )
    ]  # fmt: skip
    return torch.cat(scores)
