"""Named assertions about bases and projections, and a subspace without a trainer."""

import contextlib
from types import SimpleNamespace

import torch

from ogpsa_trl import OGPSAConfig
from ogpsa_trl.engines.torch_engines import TorchBackend
from ogpsa_trl.method.capability_gradients import capability_gradients
from ogpsa_trl.method.projection import copy_weights, project, project_update
from ogpsa_trl.method.subspace import CapabilitySubspace
from ogpsa_trl.tensors import gradient_rows, matrices, vectors

NUM_ENTRIES = 300


def random_rows(num_rows, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, NUM_ENTRIES, generator=generator).to(dtype)


def basis_of(rows_RN, rank=None, dtype=torch.float32):
    """The basis of the span of some rows as the package makes it, with its inverse Gram matrix."""
    rows_RN = rows_RN.to(dtype, copy=True)
    weights_KR = matrices.orthonormal_weights(gram_of(rows_RN)[None], rank, dtype)[0]
    basis_KN = gradient_rows.combine_(weights_KR, rows_RN)
    return basis_KN, matrices.inverse_gram(gram_of(basis_KN)[None])[0].float()


def projected(vector_N, basis_KN, inverse_KK):
    """The vector without its component in the span of the basis, as the package removes it."""
    result_N = vector_N.clone()
    with_rows_K = products_of(basis_KN, vector_N).with_rows_PK[0]
    vectors.subtract_(result_N, basis_KN, inverse_KK @ with_rows_K)
    return result_N


def products_of(basis_KN, vector_N, metric=None):
    """The products of one vector with a basis and with itself, as the package computes them."""
    table_PX = vectors.products(basis_KN, vector_N, metric)[None]
    return vectors.Products.from_table(table_PX, len(basis_KN))


def gram_of(rows_RN):
    """The Gram matrix of some rows, as the package computes it."""
    return matrices.symmetric(gradient_rows.gram(rows_RN), len(rows_RN))


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


def basis_error(basis_KN):
    """Largest entry of B B^T - 1; rows of zeros are directions that are not there."""
    gram = basis_KN.double() @ basis_KN.double().T
    error = gram - torch.diag((gram.diagonal() > 0.5).double())
    return max(error.abs().flatten().tolist(), default=0.0)


def subspace_error(subspace):
    """The largest error of its bases."""
    rows = [rows.double() for rows in subspace.basis if rows is not None]
    if subspace.config.scope == "model" and rows:
        rows = [torch.cat(rows, dim=1)]
    return max(map(basis_error, rows), default=0.0)


def assert_orthogonal(vector_N, rows_RN, relative_to, atol):
    """No row has a component along the vector, measured as a cosine with the original vector."""
    lengths = rows_RN.double().norm(dim=1).clamp_min(1e-300)
    cosines = (rows_RN.double() @ vector_N.double()) / lengths / relative_to.double().norm()
    assert cosines.abs().max() <= atol


SIZES = (7, 5, 4)
ZEROS = [torch.zeros(size) for size in SIZES]
ONES = [torch.ones(size) for size in SIZES]


# Gradients are found in the basis to the digits of float32.
EXACT = {"capability_loss": "nll", "basis_dtype": "float32"}


def small_subspace(optimizer=torch.optim.AdamW, rates=(1e-2, 1e-2, 1e-2), config=None, **options):
    """A subspace of three small parameters, all zero, in the engine of one process."""
    model = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(size)) for size in SIZES)
    groups = [{"params": [p], "lr": rate} for p, rate in zip(model, rates, strict=True)]
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), process_index=0, num_processes=1,
        reduce=lambda value, reduction: value, backward=lambda loss: loss.backward(),
        no_sync=lambda model: contextlib.nullcontext(),
    )  # fmt: skip
    backend = TorchBackend(accelerator, model, model, optimizer(groups, **options))
    return CapabilitySubspace(backend, config or OGPSAConfig(**EXACT))


def random_gradients(num_gradients=2, seed=0):
    """One row of each gradient for every parameter of a small subspace: [R, N] for each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(num_gradients, size, generator=generator) for size in SIZES]


ALONG = [gradient_RN[0] for gradient_RN in random_gradients(seed=9)]


def refresh(subspace, rows, rises=None, resting=()):
    """
    Refresh with these capability gradients: those of linear losses, of a group each. Groups whose
    turn it is not are named by their number.
    """
    parts = [
        SimpleNamespace(group=f"group {index}", num_tokens=1, batches_of=lambda i, n, r=row: [r])
        for index, row in enumerate(zip(*rows, strict=True))
    ]
    names = [part.group for part in parts]
    parts = [None if index in resting else part for index, part in enumerate(parts)]
    parameters = [parameter for _, parameter in subspace.backend.parameters]

    def loss(row):
        value = sum(map(torch.dot, row, parameters))
        return value - value.detach() + 10  # a loss below zero would count as one at its minimum

    old_rows, old_share = subspace.release_gradients(len(parts))
    gradients = capability_gradients(
        subspace.backend, parts, loss, old_rows,
        names=names, dtype=subspace.dtype, old_share=old_share,
    )  # fmt: skip
    return gradients, subspace.refresh(gradients, rises or [0.0] * len(parts))


def take_step(subspace, gradient):
    """A step of the optimizer, as training takes it; what was projected, and the update."""
    for (_, parameter), gradient_N in zip(subspace.backend.parameters, gradient, strict=True):
        parameter.grad = gradient_N.clone()
    before = copy_weights(subspace)
    projection = project(subspace) if subspace.config.target == "gradient" else None
    subspace.replay()
    subspace.backend.optimizer.step()
    if subspace.config.target == "update":
        projection = project_update(subspace, before)
    return projection, list(map(torch.sub, copy_weights(subspace), before))


def largest_cosine(vector, rows, scope):
    """Of one vector with the rows of gradients, over all parameters or over each."""
    if scope == "model":
        vector, rows = [torch.cat(vector)], [torch.cat(rows, dim=1)]
    cosines = []
    for vector_N, rows_RN in zip(vector, rows, strict=True):
        vector_N, rows_RN = vector_N.double(), rows_RN.double()
        lengths_R = rows_RN.norm(dim=1) * vector_N.norm()
        cosines += ((rows_RN @ vector_N).abs() / lengths_R.clamp_min(1e-30)).tolist()
    return max(cosines)
