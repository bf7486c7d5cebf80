"""The laws of the projection, on random and on awkward inputs."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from laws import (
    NUM_ENTRIES,
    assert_orthogonal,
    basis_error,
    basis_of,
    gram_of,
    literal_basis,
    literal_projection,
    products_of,
    projected,
    random_rows,
)
from ogpsa_trl.tensors import gradient_rows, matrices, vectors

ROWS = random_rows(4)
AWKWARD = {
    "one": ROWS[:1],
    "several": ROWS,
    "zero": torch.zeros(2, NUM_ENTRIES),
    "one zero": torch.stack([ROWS[0], torch.zeros(NUM_ENTRIES)]),
    "parallel": torch.stack([ROWS[0], 3 * ROWS[0], ROWS[1]]),
    "opposite": torch.stack([ROWS[0], -ROWS[0]]),
    "nearly parallel": torch.stack([ROWS[0], ROWS[0] + 1e-2 * ROWS[1]]),
    "huge": ROWS * 1e12,
    "tiny": ROWS * 1e-12,
    "very different lengths": ROWS * torch.tensor([1e6, 1.0, 1e-3, 1e-6])[:, None],
    "bfloat16": ROWS.bfloat16(),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_projection_obeys_its_laws(name):
    rows_RN = AWKWARD[name]
    basis_KN, inverse_KK = basis_of(rows_RN)
    vector_N = random_rows(1, seed=1)[0] + rows_RN.float().sum(dim=0)
    once_N = projected(vector_N, basis_KN, inverse_KK)

    # Squared sine 1e-4 from a float32 Gram matrix: three digits are left to the rows themselves.
    # The inverse Gram matrix of the stored rows gives the projection its digits back.
    assert basis_error(basis_KN) <= (5e-3 if name == "nearly parallel" else 1e-5)
    assert_orthogonal(once_N, rows_RN, relative_to=vector_N, atol=1e-6)
    assert once_N.norm() <= vector_N.norm() * (1 + 1e-6)
    twice_N = projected(once_N, basis_KN, inverse_KK)
    assert (twice_N - once_N).norm() <= 1e-6 * vector_N.norm()


@pytest.mark.parametrize("rank", [None, 1, 2, 50])
@pytest.mark.parametrize("name", AWKWARD)
def test_basis_is_the_singular_value_decomposition_of_the_stacked_gradients(name, rank):
    """The strongest directions of it, or all that are there."""
    basis_KN, _ = basis_of(AWKWARD[name], rank)
    kept_KN = basis_KN[basis_KN.norm(dim=1) > 0].double()
    literal_KN = literal_basis(AWKWARD[name], rank)
    assert len(kept_KN) == len(literal_KN)
    # Directions have no sign, so compare the projectors.
    difference = kept_KN.T @ kept_KN - literal_KN.T @ literal_KN
    assert not len(kept_KN) or difference.abs().max() <= 1e-4


@pytest.mark.parametrize("exponent", [-30, -20, -19, -18, -17, -16, -15, -10, 0])
def test_a_direction_is_right_or_not_there_however_short_the_gradient(exponent):
    """Squares that float32 loses, whole or in part, are not taken for a length."""
    rows_RN = random_rows(2) * torch.tensor([1.0, 10.0**exponent])[:, None]
    gram_BRR = gram_of(rows_RN)[None].double()
    gram_BRR = matrices.without_short_rows(gram_BRR, torch.tensor([NUM_ENTRIES]).double())
    basis_KN = gradient_rows.combine_(matrices.orthonormal_weights(gram_BRR)[0], rows_RN.clone())
    assert len(basis_KN) == (2 if exponent >= -15 else 1)
    assert basis_error(basis_KN) <= 1e-5


def test_rows_rounded_to_bfloat16_still_give_an_exact_projection():
    """What is removed is the span of the rows as stored, so no component along them is left."""
    basis_KN, inverse_KK = basis_of(ROWS, dtype=torch.bfloat16)
    vector_N = random_rows(1, seed=1)[0] + basis_KN.float().sum(dim=0)
    once_N = projected(vector_N, basis_KN, inverse_KK)
    assert basis_KN.dtype == torch.bfloat16
    assert_orthogonal(once_N, basis_KN, relative_to=vector_N, atol=1e-6)


def test_bfloat16_vectors_are_projected_to_their_own_rounding():
    basis_KN, inverse_KK = basis_of(random_rows(2))
    vector_N = random_rows(1, seed=1, dtype=torch.bfloat16)[0]
    once_N = projected(vector_N, basis_KN, inverse_KK)
    assert torch.equal(once_N, literal_projection(vector_N, basis_KN).bfloat16())


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(
    num_rows=st.integers(1, 6),
    num_independent=st.integers(1, 6),
    exponents=st.lists(st.integers(-6, 6), min_size=6, max_size=6),
    num_shards=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_sharding_and_scaling_do_not_change_the_projection(
    num_rows, num_independent, exponents, num_shards, seed
):
    """Scalar products of shards add up; the length of a gradient says nothing of its span."""
    mixing = random_rows(num_rows, seed)[:, :num_independent]
    rows_RN = mixing @ random_rows(num_independent, seed + 1)
    vector_N = random_rows(1, seed + 2)[0] + rows_RN.sum(dim=0)
    expected_N = literal_projection(vector_N, literal_basis(rows_RN))

    scaled_RN = rows_RN * 10.0 ** torch.tensor(exponents[:num_rows])[:, None]
    shards = scaled_RN.tensor_split(num_shards, dim=1)
    weights_KR = matrices.orthonormal_weights(sum(gram_of(s) for s in shards)[None])[0]
    basis = [gradient_rows.combine_(weights_KR, shard.clone()) for shard in shards]
    inverse_KK = matrices.inverse_gram(sum(gram_of(b) for b in basis)[None])[0].float()
    pieces = [piece.clone() for piece in vector_N.tensor_split(num_shards)]
    products = [products_of(b, p).with_rows_PK[0] for b, p in zip(basis, pieces, strict=True)]
    weights_K = inverse_KK @ sum(products)
    for rows, piece in zip(basis, pieces, strict=True):
        vectors.subtract_(piece, rows, weights_K)

    assert (torch.cat(pieces) - expected_N).norm() <= 1e-3 * vector_N.norm()
    assert torch.cat(pieces).norm() <= vector_N.norm() * (1 + 1e-6)
