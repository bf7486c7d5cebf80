"""
Scores of positions, without the logits of the whole vocabulary for all of them at once.

Those may be larger than everything else of a pass: of 8 sequences of 1,024 tokens, with 152,000
words, they take 5 GB in float32, and are held several times. Here the head of the model scores its
positions tile by tile, and every tile is computed again in the backward pass. It does so inside the
model's own forward pass, in place of its output, so that whatever an engine does around the head
and the model (gathering shards, casting, hooks on outputs) is done.

Shapes: T positions, V tokens of the vocabulary, H width, B rows, L length.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# From the logits of some positions, shape [t, V], and their numbers, shape [t], a score for each,
# shape [t], float32.
Score = Callable[[Tensor, Tensor], Tensor]

# Positions of a tile. A divergence takes up to 20 bytes for each logit of it, the backward pass
# included (measured): .8 GB with 152,000 words. In smaller tiles the products would wait for the
# head's weights, and their gradients would be added up more often.
_TILE = 256
# What a model that changes the output of its head (a scale, a soft cap) would change.
_PROBE = 64.0


class TiledHead:
    """
    The head of a causal language model.

    A model may do more to logits than its head does. What comes of a known number shows that;
    such a model, or one that does not call its head, gives its logits as always, and only the
    scores are computed tile by tile.

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
            logits: A forward pass, which returns the model's logits. A collective call where the
                passes of the engine are; made twice in the first call of this method.
            is_scored_BL: The positions, bool. Rows of logits that are longer (prompt learning puts
                virtual tokens in front) end with these.
            score: The score. Without a graph it may be called for its effects.

        Returns:
            Shape [T], float32; no position is allowed.
        """
        if self.is_plain is None:
            none_BL = torch.zeros_like(is_scored_BL)
            with torch.no_grad(), self._scoring(none_BL, lambda tile_TV, _: tile_TV[:, 0]):
                self.is_plain = _has_probe(logits())
        if self.is_plain:
            with self._scoring(is_scored_BL, score):
                return logits()[0, :-1, 0]
        return _in_tiles(lambda tile_TV: tile_TV, _select(logits(), is_scored_BL), score)

    @contextlib.contextmanager
    def _scoring(self, is_scored_BL: Tensor, score: Score) -> Iterator[None]:
        """The head returns the scores, and behind them the probe, shape [1, T + 1, 1]."""
        head = self._find()
        project = head.forward
        own = head.__dict__.get("forward")  # libraries may have put theirs before the class's

        def forward(hidden_BLH: Tensor) -> Tensor:
            scores_T = _in_tiles(project, _select(hidden_BLH, is_scored_BL), score)
            return torch.cat([scores_T, scores_T.new_tensor([_PROBE])])[None, :, None]

        head.forward = forward
        try:
            yield
        finally:
            del head.forward
            if own is not None:
                head.forward = own


def _has_probe(output: Tensor) -> bool:
    return output.shape[-1] == 1 and output[0, -1, 0].item() == _PROBE


def _select(values_BLX: Tensor, is_scored_BL: Tensor) -> Tensor:
    return values_BLX[:, -is_scored_BL.shape[1] :][is_scored_BL.to(values_BLX.device)]


def _in_tiles(project: Callable[[Tensor], Tensor], inputs_TX: Tensor, score: Score) -> Tensor:
    """Scores of what `project` makes of the inputs."""

    def score_tile(tile_TX: Tensor, positions_T: Tensor) -> Tensor:
        return score(project(tile_TX), positions_T).float()

    positions = torch.arange(len(inputs_TX), device=inputs_TX.device).split(_TILE)
    return torch.cat(
        [
            checkpoint(score_tile, *tile, use_reentrant=False, preserve_rng_state=False)
            for tile in zip(inputs_TX.split(_TILE), positions, strict=True)
        ]
    )
