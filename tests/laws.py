"""Named assertions about bases and projections, applied by the tests to awkward inputs."""

import torch

from ogpsa_trl import blockwise, linalg

NUM_ENTRIES = 300


def random_rows(num_rows, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, NUM_ENTRIES, generator=generator).to(dtype)


def basis_of(rows_RN, rank=None, dtype=torch.float32):
    """The basis of the span of some rows as the package makes it, with its inverse Gram matrix."""
    rows_RN = rows_RN.to(dtype, copy=True)
    weights_KR = linalg.orthonormal_weights(gram_of(rows_RN)[None], rank, dtype)[0]
    basis_KN = blockwise.combine_(weights_KR, rows_RN)
    return basis_KN, linalg.inverse_gram(gram_of(basis_KN)[None])[0].float()


def projected(vector_N, basis_KN, inverse_KK):
    """The vector without its component in the span of the basis, as the package removes it."""
    result_N = vector_N.clone()
    with_rows_K = products_of(basis_KN, vector_N).with_rows_PK[0]
    blockwise.subtract_(result_N, basis_KN, inverse_KK @ with_rows_K)
    return result_N


def products_of(basis_KN, vector_N, metric=None):
    """The products of one vector with a basis and with itself, as the package computes them."""
    table_PX = blockwise.products(basis_KN, vector_N, metric)[None]
    return blockwise.Products.from_table(table_PX, len(basis_KN))


def gram_of(rows_RN):
    """The Gram matrix of some rows, as the package computes it."""
    return linalg.symmetric(blockwise.gram(rows_RN), len(rows_RN))


def literal_basis(rows_RN, rank=None, tolerance=1e-3):
    """Right singular vectors of the rows scaled to length one (independence), then of the rows.

    `tolerance` is relative to the largest singular value of the scaled rows: the square root of the
    package's tolerance, which is about squared lengths.
    """
    rows = rows_RN.double()
    lengths = rows.norm(dim=1, keepdim=True)
    scaled = torch.where(lengths > 0, rows / lengths, 0.0)
    _, values, directions = torch.linalg.svd(scaled, full_matrices=False)
    span = directions[values > tolerance]
    _, _, rotation = torch.linalg.svd(rows @ span.T, full_matrices=False)
    return (rotation @ span)[:rank]


def literal_projection(vector_N, basis_KN):
    vector, basis = vector_N.double(), basis_KN.double()
    return vector - basis.T @ (basis @ vector)


def assert_orthonormal(basis_KN, atol):
    """Rows are orthonormal, or zero where a direction was dropped."""
    gram = basis_KN.double() @ basis_KN.double().T
    expected = torch.diag((gram.diagonal() > 0.5).double())
    assert (gram - expected).abs().max() <= atol if len(gram) else True


def assert_orthogonal(vector_N, rows_RN, relative_to, atol):
    """No row has a component along the vector, measured as a cosine with the original vector."""
    lengths = rows_RN.double().norm(dim=1).clamp_min(1e-300)
    cosines = (rows_RN.double() @ vector_N.double()) / lengths / relative_to.double().norm()
    assert cosines.abs().max() <= atol


def assert_not_longer(after_N, before_N):
    assert after_N.double().norm() <= before_N.double().norm() * (1 + 1e-6)
