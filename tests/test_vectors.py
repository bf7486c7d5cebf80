"""Vectors in blocks and as differences: always the same projection."""

import pytest
import torch

from laws import NUM_ENTRIES, basis_of, projected, random_rows
from ogpsa_trl.tensors import blocks, vectors


def test_a_workspace_gives_vectors_of_the_length_asked_for():
    workspace = blocks.Workspace()
    for number, size in [(3, 100), (5, 50), (5, 80), (2, 120), (4, 120)]:
        taken = workspace.take(number, torch.zeros(size, dtype=torch.bfloat16))
        assert [len(vector) for vector in taken] == [size] * number
        assert {vector.dtype for vector in taken} == {torch.float32}
        assert len({vector.data_ptr() for vector in taken}) == number


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_metric", [False, True])
def test_a_difference_is_projected_as_the_vector_it_stands_for(dtype, has_metric, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 70)
    basis_KN, _ = basis_of(random_rows(3))
    new_N, old_N = random_rows(2, seed=1, dtype=dtype).clone()
    difference = vectors.Difference(new_N, old_N)
    whole_N, old_before_N = new_N.float() - old_N.float(), old_N.clone()
    metric = vectors.AdamMetric(random_rows(1, seed=2)[0] ** 2, torch.tensor(1.0))
    metric = metric if has_metric else None

    numbers = vectors.products(basis_KN, difference, metric)
    # Sums begin elsewhere where memory is aligned otherwise.
    torch.testing.assert_close(numbers, vectors.products(basis_KN, whole_N, metric))
    expected_N = new_N.float()
    for vector_N in (difference, expected_N):
        vectors.subtract_(vector_N, basis_KN, torch.ones(3), metric)
    assert torch.equal(new_N, expected_N.to(dtype))
    assert torch.equal(old_N, old_before_N)
    difference.zero_()
    assert torch.equal(new_N, old_before_N)


def test_a_small_correction_of_a_weight_is_rounded_once():
    """Each row's part may be too small for the digits of the weight; their sum is not."""
    weights_N, rows_KN = torch.ones(NUM_ENTRIES), torch.full((8, NUM_ENTRIES), 2.5e-8)
    difference = vectors.Difference(weights_N, torch.ones(NUM_ENTRIES))
    vectors.subtract_(difference, rows_KN, torch.ones(8))
    assert torch.equal(weights_N, (1 - rows_KN.double().sum(dim=0)).float())


def test_blocks_do_not_change_the_result(monkeypatch):
    rows_RN, vector_N = random_rows(3), random_rows(1, seed=1)[0]
    whole_N = projected(vector_N, *basis_of(rows_RN))
    monkeypatch.setattr(blocks, "BLOCK", 7)
    in_blocks_N = projected(vector_N, *basis_of(rows_RN))
    assert (whole_N - in_blocks_N).abs().max() < 1e-5
