"""The step that is taken is the nearest one that keeps the constraint, against scipy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, minimize

from ogpsa_trl.tensors import matrices
from ogpsa_trl.tensors.constraints import equality_weights, restoration_weights

NUM_ENTRIES = 7
DECREASE = torch.tensor([0.5, 0.0, 0.02]).double()
a_few = settings(max_examples=20, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)


def problem(seed, dependent=False):
    """Capability gradients A, a metric D and a step u, in one block."""
    generator = torch.Generator().manual_seed(seed)
    gradients_RN = torch.randn(3, NUM_ENTRIES, generator=generator).double()
    gradients_RN *= torch.tensor([1.0, 30.0, 0.1])[:, None]
    if dependent:
        gradients_RN[-1] = gradients_RN[0] - 2 * gradients_RN[1]
    metric_N = torch.rand(NUM_ENTRIES, generator=generator).double() * 10 + 0.1
    step_N = torch.randn(NUM_ENTRIES, generator=generator).double()
    return gradients_RN, metric_N, step_N


def in_the_basis(gradients_RN, metric_N, step_N):
    """Basis B, products B u, Gram matrix B D B^T and coordinates C of the gradients, one block."""
    weights_KR = matrices.orthonormal_weights((gradients_RN @ gradients_RN.T)[None])[0]
    basis_KN = weights_KR @ gradients_RN
    gram_KK = basis_KN @ (metric_N[:, None] * basis_KN.T)
    return basis_KN, (basis_KN @ step_N)[None], gram_KK[None], (gradients_RN @ basis_KN.T)[None]


def assert_nearest(taken_N, gradients_RN, metric_N, step_N, change):
    """
    It is scipy's answer: argmin sum (v - u)^2 / D with A v = change.

    In x = v / sqrt(D) and with rows of length one: what SLSQP finds depends on neither, but whether
    its line search can tell the last digits apart does.
    """
    root = metric_N.sqrt().numpy()
    start = step_N.numpy() / root
    rows = gradients_RN.numpy() * root
    lengths = np.linalg.norm(rows, axis=1)
    wanted = np.asarray(change) / lengths
    result = minimize(
        lambda x: 0.5 * ((x - start) ** 2).sum(), start, jac=lambda x: x - start, method="SLSQP",
        constraints=[LinearConstraint(rows / lengths[:, None], wanted, wanted)],
        options={"maxiter": 500, "ftol": 1e-12},
    )  # fmt: skip
    assert result.success
    torch.testing.assert_close(taken_N, torch.from_numpy(root * result.x), atol=1e-8, rtol=1e-8)


@a_few
@given(seed=seeds, dependent=st.booleans(), is_restored=st.booleans())
def test_the_nearest_step_is_taken_that_changes_no_loss_or_restores_it(
    seed, dependent, is_restored
):
    gradients_RN, metric_N, step_N = problem(seed, dependent)
    decrease_R = torch.tensor([0.5, 0.1, 0.3 if dependent else 0.02]).double() * is_restored
    basis_KN, products_BK, gram_BKK, coordinates = in_the_basis(gradients_RN, metric_N, step_N)
    restoring_BK, square = restoration_weights(decrease_R, gram_BKK, coordinates)
    weights_K = (equality_weights(products_BK, gram_BKK) + restoring_BK)[0]
    taken_N = step_N - metric_N * (weights_K @ basis_KN)
    rank = len(basis_KN)
    assert_nearest(taken_N, gradients_RN[:rank], metric_N, step_N, -decrease_R[:rank])
    error_R = gradients_RN @ taken_N + decrease_R
    assert error_R.abs().max() < 1e-8 * gradients_RN.norm() * step_N.norm()
    displacement_N = metric_N * (restoring_BK[0] @ basis_KN)
    torch.testing.assert_close(square, (displacement_N**2 / metric_N).sum())


@a_few
@given(seed=seeds)
def test_restoration_of_blocks_is_that_of_the_whole_model(seed):
    """Two parameters with a subspace each: the displacement is the one of their union."""
    gradients_RN, metric_N, step_N = problem(seed)
    blocks = [slice(0, 4), slice(4, NUM_ENTRIES)]
    parts = [in_the_basis(gradients_RN[:, b], metric_N[b], step_N[b]) for b in blocks]
    assert all(len(part[0]) == 3 for part in parts)
    gram_BKK, coordinates = (torch.cat([part[i] for part in parts]) for i in (2, 3))
    weights_BK, _ = restoration_weights(DECREASE, gram_BKK, coordinates)
    taken_N = torch.cat(
        [metric_N[b] * (w @ part[0]) for b, w, part in zip(blocks, weights_BK, parts, strict=True)]
    )
    assert_nearest(taken_N, gradients_RN, metric_N, torch.zeros_like(step_N), DECREASE)


def test_order_and_scale_of_the_gradients_change_nothing():
    gradients_RN, metric_N, step_N = problem(5)
    steps = []
    for order, scale_R in ([0, 1, 2], [1.0, 1.0, 1.0]), ([2, 0, 1], [1e4, 1e-4, 3.0]):
        scale_R = torch.tensor(scale_R).double()
        rows = gradients_RN[order] * scale_R[:, None]
        basis_KN, products_BK, gram_BKK, coordinates = in_the_basis(rows, metric_N, step_N)
        restoring_BK, _ = restoration_weights(DECREASE[order] * scale_R, gram_BKK, coordinates)
        weights_BK = equality_weights(products_BK, gram_BKK) + restoring_BK
        steps.append(step_N - metric_N * (weights_BK[0] @ basis_KN))
    torch.testing.assert_close(*steps, atol=1e-7, rtol=1e-6)


def test_directions_that_are_not_there_get_no_weight():
    """A block with fewer directions than the others has rows of zeros."""
    gram_BKK = torch.diag(torch.tensor([2.0, 0.0]))[None]
    products_BK, coordinates = torch.tensor([[3.0, 0.0]]), torch.tensor([[[1.0, 0.0]]])
    assert equality_weights(products_BK, gram_BKK)[0] == pytest.approx([1.5, 0.0])
    weights_BK, _ = restoration_weights(torch.tensor([1.0]), gram_BKK, coordinates)
    assert weights_BK[0] == pytest.approx([0.5, 0.0])
