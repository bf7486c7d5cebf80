"""Vectors in blocks, as differences, and compiled: always the same projection."""

import os
import re
import subprocess
import sys

import pytest
import torch

from laws import NUM_ENTRIES, basis_of, counted_programs, projected, random_rows
from ogpsa_trl import blockwise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_metric", [False, True])
def test_a_difference_is_projected_as_the_vector_it_stands_for(dtype, has_metric, monkeypatch):
    monkeypatch.setattr(blockwise, "_BLOCK", 70)
    basis_KN, _ = basis_of(random_rows(3))
    new_N, old_N = random_rows(2, seed=1, dtype=dtype).clone()
    difference = blockwise.Difference(new_N, old_N)
    whole_N, old_before_N = new_N.float() - old_N.float(), old_N.clone()
    metric = blockwise.AdamMetric(random_rows(1, seed=2)[0] ** 2, torch.tensor(1.0))
    metric = metric if has_metric else None

    numbers = blockwise.products(basis_KN, difference, metric)
    # Sums begin elsewhere where memory is aligned otherwise.
    torch.testing.assert_close(numbers, blockwise.products(basis_KN, whole_N, metric))
    expected_N = new_N.float()
    for vector_N in (difference, expected_N):
        blockwise.subtract_(vector_N, basis_KN, torch.ones(3), metric)
    assert torch.equal(new_N, expected_N.to(dtype))
    assert torch.equal(old_N, old_before_N)
    difference.zero_()
    assert torch.equal(new_N, old_before_N)


def test_a_small_correction_of_a_weight_is_rounded_once():
    """Each row's part may be too small for the digits of the weight; their sum is not."""
    weights_N, rows_KN = torch.ones(NUM_ENTRIES), torch.full((8, NUM_ENTRIES), 2.5e-8)
    blockwise.subtract_(
        blockwise.Difference(weights_N, torch.ones(NUM_ENTRIES)), rows_KN, torch.ones(8)
    )
    exact_N = 1 - rows_KN.double().sum(dim=0)
    assert torch.equal(weights_N, exact_N.float())


def test_blocks_do_not_change_the_result(monkeypatch):
    rows_RN, vector_N = random_rows(3), random_rows(1, seed=1)[0]
    whole_N = projected(vector_N, *basis_of(rows_RN))
    monkeypatch.setattr(blockwise, "_BLOCK", 7)
    in_blocks_N = projected(vector_N, *basis_of(rows_RN))
    assert (whole_N - in_blocks_N).abs().max() < 1e-5


class TestCompiled:
    @pytest.mark.parametrize("row_dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("kind", ["gradient", "bfloat16 gradient", "update", "with metric"])
    def test_it_is_the_same_projection(self, kind, row_dtype, monkeypatch):
        monkeypatch.setattr(blockwise, "_FEWEST_COMPILED_ENTRIES", NUM_ENTRIES)
        basis_KN, _ = basis_of(random_rows(2), dtype=row_dtype)
        new_N, old_N, moment_N = random_rows(3, seed=1)
        metric = blockwise.AdamMetric(moment_N**2, torch.tensor(1.0)) if "metric" in kind else None

        def project(*, is_compiled):
            target_N = new_N.bfloat16() if "bfloat16" in kind else new_N.clone()
            vector_N = target_N if "gradient" in kind else blockwise.Difference(target_N, old_N)
            products = blockwise.products(basis_KN, vector_N, metric, is_compiled=is_compiled)
            weights_K = torch.tensor([0.5, -2.0])
            blockwise.subtract_(vector_N, basis_KN, weights_K, metric, is_compiled=is_compiled)
            return products, target_N

        with counted_programs() as programs:
            compiled = project(is_compiled=True)
        assert programs() == 2
        torch.testing.assert_close(compiled, project(is_compiled=False))

    def test_one_program_serves_weights_of_all_sizes(self):
        with counted_programs() as programs, torch.no_grad():
            for shape in [(256, 256), (300, 301), (1024, 1024), (7, 100_003)]:
                weight = torch.nn.Parameter(torch.ones(shape))
                new_N = weight.detach().view(-1)
                vector_N = blockwise.Difference(new_N, new_N.clone())
                rows_KN = torch.ones(2, len(new_N))
                blockwise.products(rows_KN, vector_N, is_compiled=True)
                blockwise.subtract_(vector_N, rows_KN, torch.ones(2), is_compiled=True)
                assert torch.equal(weight, -torch.ones(shape))
        assert programs() == 2

    @pytest.mark.parametrize(("num_rows", "num_entries"), [(0, 2**16), (2, 2**16 - 1), (9, 2**16)])
    def test_where_it_would_not_be_faster_nothing_is_compiled(self, num_rows, num_entries):
        rows_KN, vector_N = torch.ones(num_rows, num_entries), torch.ones(num_entries)
        with counted_programs() as programs:
            blockwise.products(rows_KN, vector_N, is_compiled=True)
            blockwise.subtract_(vector_N, rows_KN, torch.ones(num_rows), is_compiled=True)
        assert programs() == 0
        assert vector_N[0] == 1 - num_rows


def test_without_a_compiler_the_error_says_what_to_do(tmp_path):
    """In a process of its own: this one may have found a compiler already."""
    code = (
        "import torch; from ogpsa_trl import blockwise\n"
        "try: blockwise.check_compiler(torch.device('cpu'))\n"
        "except ValueError as error: print(error)"
    )
    environment = os.environ | {"CXX": "no-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(
        "`compile_projection` is on, but `torch.compile` does not work for 'cpu' here: .*No "
        r"working C\+\+ compiler found.*'no-compiler'.*\. Set `compile_projection: false`, or "
        r"install what it needs: a C\+\+ compiler \(`g\+\+`\) on a CPU, Triton on a GPU\.\n",
        process.stdout,
    )
