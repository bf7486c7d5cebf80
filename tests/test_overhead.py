"""The overhead benchmark: its measures on cases with known answers, and a run of it."""

import json

import pytest
import torch

from ogpsa_trl.benchmark import overhead
from ogpsa_trl.benchmark.overhead import Cell, row_of
from ogpsa_trl.benchmark.overhead_arms import host_hooks
from ogpsa_trl.benchmark.overhead_cell import CountedBytes, make_trainer, timings
from ogpsa_trl.training import step


def result(cell, **seconds):
    """Two turns: in the second the machine is twice as slow."""
    return {
        "cell": vars(cell) | {"repeats": 2},
        "parameters": 1_000_000,
        "processes": 1,
        "device": "CPU",
        "threads": 2,
        "seconds": {name: [value, 2 * value] for name, value in seconds.items()},
        "basis_bytes": 8_000_000,
        "bytes_moved": 56_000_000,
        "peak plain": 100_000_000,
        "peak ogpsa": 108_400_000,
    }


def test_a_row_holds_ratios_within_a_turn():
    """16 sequences a step; 32 in a refresh, whose passes cost plain training twice those of it."""
    cell = Cell(capability_samples=32)
    times = {"plain": 1.0, "ogpsa": 1.02, "hooks": 1.5, "refresh": 1.68, "projection": 0.02}
    times["basis"] = 0.08  # of the refresh
    row = row_of(result(cell, **times, **{"forward and backward": 0.8}))
    assert row["step / plain"] == pytest.approx(1.02)
    assert row["projection / plain"] == pytest.approx(1.02)
    assert row["run, K = 1"] == pytest.approx(2.7)
    assert row["refresh / plain passes"] == pytest.approx(1.68 / 1.6)
    assert row["official hooks / plain"] == pytest.approx(1.5)
    assert row["memory / basis"] == pytest.approx(1.05)
    # The basis twice, two reads of the gradient and a write: 16 + 12 million bytes.
    assert row["moved / needed"] == pytest.approx(2)
    # A refresh of 400 samples in 30 steps: 20 s and the basis, beside 20 s of plain passes.
    assert row["run, K = 30"] == pytest.approx((30 * 1.02 + 20.08) / (30 + 20))


def test_counted_bytes_are_those_of_operands_and_results():
    values = torch.ones(100)
    with CountedBytes() as counted:
        doubled = values * 2
        doubled.view(10, 10)[0].add_(1)
    assert counted.total == 2 * 400 + 2 * 40


def test_hooks_project_the_gradient_of_every_pass(tmp_path):
    """What is left of a parameter's gradient has nothing in its rows: the published form."""
    cell = Cell(size="1M", tokens=256, capability_samples=4, scope="parameter")
    trainer = make_trainer(cell, str(tmp_path), num_steps=1)
    trainer.train()
    trainer.refresh_subspace()
    ids = torch.arange(10, 42).view(2, 16)
    with host_hooks(trainer):
        for row in ids:  # two passes
            trainer.model(input_ids=row[None], labels=row[None]).loss.backward()
    for (_, parameter), rows in zip(
        trainer.subspace.backend.parameters, trainer.subspace.basis, strict=True
    ):
        products = rows @ parameter.grad.view(-1)
        assert products.abs().max() < 1e-5 * parameter.grad.norm()


def test_every_arm_is_timed_in_every_turn(tmp_path):
    cell = Cell(size="1M", tokens=256, capability_samples=4, repeats=2)
    project = step.project
    measured = timings(cell, str(tmp_path))
    assert step.project is project
    assert all(len(seconds) == 2 for seconds in measured["seconds"].values())
    assert all(value > 0 for seconds in measured["seconds"].values() for value in seconds)
    assert measured["basis_bytes"] == 2 * 4 * measured["parameters"]
    assert measured["bytes_moved"] > 2 * measured["basis_bytes"]


@pytest.mark.slow
def test_the_benchmark_runs_end_to_end(tmp_path):
    words = ["--sizes", "1M", "--tokens", "256", "--capability_samples", "4"]
    words += ["--targets", "update", "--repeats", "1", "--output", str(tmp_path)]
    overhead.main(words)
    found = json.loads((tmp_path / "results.json").read_text())
    assert [cell["cell"]["target"] for cell in found["cells"]] == ["update"]
    assert found["imports"]["ratio"] > 0
    assert (tmp_path / "overhead.png").read_bytes().startswith(b"\x89PNG")
    assert "1M, rank 2, update" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--repeats", "0"], "--repeats must be at least 1, but got 0"),
        (["--tokens", "100"], "--tokens must be at least 256"),
        (["--sizes", "3M"], "invalid choice: '3M'"),
        (["--ranks", "64"], "`gradients_per_group` must be at most `num_samples`"),
        (["--metrics", "optimizer"], "`metric` 'optimizer' is for updates"),
    ],
)
def test_bad_options_are_named(words, message, capsys):
    with pytest.raises(SystemExit):
        overhead.main(words)
    assert message in capsys.readouterr().err
