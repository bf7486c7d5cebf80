"""
Does a test fail where the package is wrong? Thirty faults, put in one at a time.

    python benchmarks/mutants.py                     all of them, against `make test`
    python benchmarks/mutants.py sign basis          those whose names have one of these words
    python benchmarks/mutants.py --all               against `make test-all`

Every fault is put into a copy of the repository. The tests named beside it run first; only if they
all pass, and so miss it, the whole command runs. Results are kept in --output, so that a run that
was stopped goes on where it was.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("ogpsa_trl", "scripts", "configs", "tests", "docs", "benchmarks", "Makefile",
          "pyproject.toml", "constraints.txt", "README.md", "CONTRIBUTING.md", "CHANGELOG.md",
          "LICENSE")  # fmt: skip
ENGINES = "tests/test_engines.py"


class Mutant(NamedTuple):
    """
    A fault.

    Attributes:
        name: What is wrong.
        file: Where, in `ogpsa_trl/`.
        old: What stands there once.
        new: What stands there instead.
        tests: Those that should find it, as arguments of pytest.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = [
    # The mathematics.
    Mutant("restoration with the wrong sign", "method/projection.py",
           "weights_BK = weights_BK + restoring_BK", "weights_BK = weights_BK - restoring_BK",
           "tests/test_feedback.py"),
    Mutant("projection without the inverse of the stored rows' Gram matrix", "method/subspace.py",
           "lambda: matrices.inverse_gram(stored_BKK)",
           "lambda: torch.eye(stored_BKK.shape[-1]).double().expand_as(stored_BKK)",
           "tests/test_trainers.py"),
    Mutant("dependent gradients taken for independent", "tensors/matrices.py",
           "is_independent_BR = eigenvalues_BR > _DEPENDENT[dtype]",
           "is_independent_BR = eigenvalues_BR > 0", "tests/test_matrices.py"),
    Mutant("the setting `rank` ignored", "tensors/matrices.py",
           "rank if rank is not None else gram_BRR.shape[-1]", "gram_BRR.shape[-1]",
           "tests/test_matrices.py"),
    Mutant("groups weighted by their tokens", "method/capability_gradients.py",
           "size / num_tokens[name]", "size * len(num_tokens) / sum(num_tokens.values())",
           "tests/test_trainers.py"),
    Mutant("Adam's metric without its floor", "tensors/vectors.py",
           "out=out).add_(self.floor)", "out=out)",
           "tests/test_rates.py"),
    Mutant("the average of capability gradients adds the new one whole",
           "tensors/gradient_rows.py",
           "alpha=1 - old_share", "alpha=1.0", "tests/test_feedback.py"),
    Mutant("the average of the drift forgets", "method/loss_history.py",
           "drift_R = share * old_drift + (1 - share) * self.rises", "drift_R = self.rises",
           "tests/test_feedback.py"),
    Mutant("restoration over one step instead of the interval", "method/loss_history.py",
           "1 / int(self.interval) if", "1.0 if", "tests/test_feedback.py"),
    Mutant("restoration goes on after the interval", "method/loss_history.py",
           "if self.num_steps < self.interval else 0.0", "if True else 0.0",
           "tests/test_feedback.py"),
    Mutant("the divergence with a first-order term", "tensors/divergence.py",
           "(growth_TX - probs_TX * rises_TX)", "growth_TX", "tests/test_divergence.py"),
    Mutant("drift counted from zero", "method/capability_loss.py",
           "[loss - start for loss, start in", "[loss for loss, start in",
           "tests/test_start.py tests/test_feedback.py"),
    # Learning rates by group, and parameters that have no direction yet.
    Mutant("the learning rate of a group left out of the metric", "method/projection.py",
           "weights_PK = rates_P[:, None] * weights_PK", "pass", "tests/test_rates.py"),
    Mutant("parameters moved that the optimizer did not move", "method/products.py",
           "rates_P = torch.where(squares_P > 0, rates_P, 0.0)", "pass", "tests/test_rates.py"),
    Mutant("a held parameter moves", "method/projection.py",
           "            vector_N.zero_()\n", "            pass\n", "tests/test_update.py"),
    # Several processes.
    Mutant("products not summed over the shards", "method/products.py",
           "table_PX = subspace.backend.sum_over_shards(table_PX)", "pass", f"{ENGINES} -k fsdp2"),
    Mutant("Gram matrices not summed over the shards", "method/subspace.py",
           "self.backend.same_on_all(self.backend.sum_over_shards(triangle_PX))",
           "self.backend.same_on_all(triangle_PX)", f"{ENGINES} -k fsdp2"),
    Mutant("replicas decide a step for themselves", "method/projection.py",
           "weights_BK = backend.same_on_all(weights_BK)", "pass", f"{ENGINES} -k ddp"),
    Mutant("every process makes eigenvectors of its own", "engines/backend.py",
           "values = [make() if self.process_index == 0 else None]", "return make()",
           f"{ENGINES} -k fsdp2"),
    Mutant("a capability gradient divided by the number of processes",
           "method/capability_gradients.py",
           "loss * (backend.num_processes / part.num_tokens)", "loss / part.num_tokens",
           f"{ENGINES} -k ddp"),
    Mutant("corrected weights not brought to the model", "method/projection.py",
           "subspace.backend.publish_weights()", "pass", f"{ENGINES} -k zero3"),
    Mutant("processes may hold other data", "engines/supported.py",
           "            if other != first:", "            if False:",
           "tests/test_engine_errors.py"),
    # What a refresh and a resumed run leave behind.
    Mutant("dropout in capability passes", "method/capability_gradients.py",
           "module.training = is_quantised or (has_graph and bool(is_checkpointed))", "pass",
           "tests/test_trainers.py"),
    Mutant("random states not put back", "engines/backend.py",
           "            torch.set_rng_state(cpu_state)\n", "            pass\n",
           "tests/test_trainers.py"),
    Mutant("the basis not saved", "method/subspace.py",
           'for name, rows_KN in rows if rows_KN is not None}', 'for name, rows_KN in []}',
           "tests/test_checkpoint.py"),
    Mutant("older checkpoints deleted before the new one is whole",
           "training/whole_checkpoints.py",
           "with without_deletion():", "with contextlib.nullcontext():",
           "tests/test_completeness.py"),
    # Checks.
    Mutant("an infinite gradient reaches the optimizer", "training/step.py",
           "self.count_gradient(is_finite=math.isfinite(length))", "pass",
           "tests/test_trainers.py"),
    Mutant("divergences in bfloat16 made under autocast", "engines/torch_engines.py",
           "stack.enter_context(_without_autocast(self.model))", "pass",
           "tests/test_precision.py"),
    Mutant("a gate that a loss of NaN passes", "training/gate.py",
           "return not self.last.largest_increase <= tolerance",
           "return self.last.largest_increase > tolerance", "tests/test_gate.py"),
    Mutant("only the first row of a data set is looked at", "data/rows.py",
           "itertools.islice(rows_of(dataset, columns), num_rows)",
           "itertools.islice(rows_of(dataset, columns), 1)",
           "tests/test_rows.py tests/test_bad_input.py"),
]  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="words of the names; none: all")
    parser.add_argument("--all", action="store_true", help="against `make test-all`")
    parser.add_argument("--output", type=Path, default=Path("runs/mutants.json"))
    return parser.parse_args()


def copy_with(mutant: Mutant, folder: Path) -> None:
    """
    Copy the repository, with the fault in it.

    Raises:
        ValueError: what it changes does not stand there just once.
    """
    for name in COPIED:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(path, folder / name)
    path = folder / "ogpsa_trl" / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise ValueError(
            f"{mutant.name!r}: {mutant.old!r} stands {text.count(mutant.old)} times in "
            f"{mutant.file}, not once. Correct the list of mutants."
        )
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def failing(command: list[str], folder: Path) -> str | None:
    """The first test that fails; `None`: all pass."""
    environment = {
        **os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode == 0:
        return None
    lines = (result.stdout + result.stderr).splitlines()
    return next((line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1])


def commands(mutant: Mutant, *, is_all: bool) -> list[list[str]]:
    """The tests of the mutant, then what the Makefile runs; each stops at the first failure."""
    pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no"]
    near = [*pytest, "--timeout", "1200", *mutant.tests.split()]
    side_by_side = ["-n", "auto", "--dist", "loadfile"]
    return [near, [*pytest, *side_by_side, *(["-m", "not gpu"] if is_all else [])]]


def main() -> None:
    args = arguments()
    chosen = [m for m in MUTANTS if not args.names or any(word in m.name for word in args.names)]
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    for mutant in chosen:
        if mutant.name in results:
            continue
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            copy_with(mutant, Path(folder))
            found = (failing(c, Path(folder)) for c in commands(mutant, is_all=args.all))
            by = next((test for test in found if test is not None), None)
        results[mutant.name] = {"by": by, "seconds": round(time.monotonic() - start)}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1))
        print(f"{'killed' if by else 'MISSED'}  {mutant.name}: {by}", flush=True)
    killed = sum(results[mutant.name]["by"] is not None for mutant in chosen)
    print(f"{killed} of {len(chosen)} killed")


if __name__ == "__main__":
    main()
