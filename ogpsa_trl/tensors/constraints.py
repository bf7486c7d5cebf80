"""
What a step may do to the capability losses: the small problems behind a projection.

To first order a displacement u of the parameters changes capability loss i by a_i . u, with a_i its
gradient. A step u is replaced by the nearest one that keeps a constraint on these changes, nearest
in the norm |u|^2 = sum u_j^2 / D_j of a metric D > 0 (the identity, or the optimizer's own):

    equality      A u = 0     no capability loss changes
    restoration   A u = -r    losses that have risen come down again (Rosen's gradient projection)

In both cases the answer is u - D B^T w, with B the stored basis rows and A = C B. So only K weights
have to be found, from the products B u and the Gram matrix H = B D B^T. It happens here, in float64
on the CPU.

Shapes: B blocks (one subspace each, see `matrices`), R capability gradients, K basis rows.
"""

import torch
from torch import Tensor

# Directions shorter than this share of the longest are rounding of float32 products.
_DEPENDENT = 1e-7


def equality_weights(products_BK: Tensor, gram_BKK: Tensor) -> Tensor:
    """Weights w with B (u - D B^T w) = 0, shape [B, K]: the nearest step along no gradient."""
    inverse_BKK, scale_BK = _inverse(gram_BKK)
    weights_BK = (inverse_BKK @ (scale_BK * products_BK.double())[..., None]).squeeze(-1)
    return scale_BK * weights_BK


def restoration_weights(
    decrease_R: Tensor, gram_BKK: Tensor, coordinates_BRK: Tensor
) -> tuple[Tensor, Tensor]:
    """
    Weights w of the shortest displacement -D B^T w that lowers each loss by `decrease_R`.

    One problem over all blocks, so that each restores where it is cheap: A D A^T is their sum.

    Returns:
        The weights, shape [B, K], and the squared length of the displacement in the metric.
    """
    coordinates_BRK = coordinates_BRK.double()
    gram_RR = (coordinates_BRK @ gram_BKK.double() @ coordinates_BRK.mT).sum(dim=0)
    inverse_RR, scale_R = _inverse(gram_RR)
    multipliers_R = scale_R * (inverse_RR @ (scale_R * decrease_R.double()))
    square = multipliers_R @ gram_RR @ multipliers_R
    return multipliers_R @ coordinates_BRK, square


def _inverse(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Pseudo-inverse of a Gram matrix whose rows are scaled to length one, and that scale."""
    gram = gram.double()
    lengths = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    scale = torch.where(lengths > 0, 1 / lengths, 0.0)
    scaled = scale[..., None] * gram * scale[..., None, :]
    return torch.linalg.pinv(scaled, rtol=_DEPENDENT, hermitian=True), scale
