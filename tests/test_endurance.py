"""Over thousands of steps memory stays flat, the basis orthonormal and the log complete."""

import gc
import math
import os
from pathlib import Path

import pytest
import torch
from transformers import PrinterCallback, TrainerCallback

from engine_worker import ProjectionProbe
from ogpsa_trl import OGPSAConfig
from ogpsa_trl.benchmark.toy_model import tiny_model, toy_tokenizer
from runs import capability_groups, make_trainer, paper

NUM_STEPS = 2000
LOGGING_STEPS = 10
# By then allocators and caches have what they keep.
WARM_UP = 400

CONFIGS = {
    "gradient": paper(refresh_interval=2),
    "update": OGPSAConfig(refresh_interval=2, samples_per_refresh=3, restoration=0.0),
    "preserve": OGPSAConfig(refresh_interval=2, samples_per_refresh=3),
}
GROUPS = ("skills", "language")
REFRESH = {"rank", "refresh_seconds", "refresh_share", "basis_megabytes"} | {
    f"{name}/{group}"
    for name in ("capability_loss", "drift", "realised_change")
    for group in GROUPS
}
STEP = {"removed_fraction"} | {f"step_change/{group}" for group in GROUPS}
UPDATE = {"proposal_in_subspace"} | {f"predicted_change/{group}" for group in GROUPS}
METRICS = {
    "gradient": REFRESH | STEP | {"cosine", "gradient_in_subspace", "update_in_subspace"},
    "update": REFRESH | STEP | UPDATE,
    "preserve": REFRESH | STEP | UPDATE | {"restoration_ratio", "restoration_capped"},
}  # fmt: skip


def resident_megabytes():
    """Memory of this process that is in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def num_tensors():
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


class Watch(TrainerCallback):
    """Measures at every log, and memory every hundred steps."""

    def __init__(self, trainer):
        self.trainer, self.probe = trainer, ProjectionProbe(trainer)
        self.basis_errors, self.cosines = [], []
        self.megabytes, self.tensors = {}, {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % LOGGING_STEPS:
            return
        self.basis_errors.append(self.basis_error())
        self.cosines.append(self.probe.largest)
        self.probe.largest = 0.0
        if state.global_step % 100 == 0:
            self.tensors[state.global_step] = num_tensors()
            self.megabytes[state.global_step] = resident_megabytes()

    def basis_error(self):
        """Largest entry of B B^T - 1; rows of zeros are directions that are not there."""
        subspace = self.trainer.subspace
        grams = [rows.double() @ rows.double().T for rows in subspace.basis if rows is not None]
        if subspace.config.scope == "model":
            grams = [torch.stack(grams).sum(dim=0)]
        errors = [gram - torch.diag((gram.diagonal() > 0.5).double()) for gram in grams]
        return max(error.abs().max().item() for error in errors)


def largest(values, start, end):
    """Of the steps from `start` to `end`."""
    return max(values[start // LOGGING_STEPS : end // LOGGING_STEPS])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CONFIGS)
def test_two_thousand_steps(name, tmp_path, record_property):
    model = tiny_model(hidden_size=16, num_layers=1, ffn_size=32)
    trainer = make_trainer(
        "sft", model, tmp_path, capability=capability_groups(), config=CONFIGS[name],
        more={"processing_class": toy_tokenizer()}, max_steps=NUM_STEPS, optim="adamw_torch",
        learning_rate=1e-3, logging_steps=LOGGING_STEPS, dataloader_num_workers=0,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer.train()

    growth = watch.megabytes[NUM_STEPS] - watch.megabytes[WARM_UP]
    record_property("megabytes", watch.megabytes)
    record_property("tensors", watch.tensors)
    record_property("basis_error", max(watch.basis_errors))
    record_property("cosine", max(watch.cosines))
    # The log itself takes 160 entries of 20 numbers, 0.3 MB.
    assert growth < 4
    assert watch.tensors[NUM_STEPS] == watch.tensors[WARM_UP]

    # Rounding of the rows, of the first quarter and of the last alike.
    assert max(watch.basis_errors) < 1e-5
    first, last = largest(watch.basis_errors, 0, 500), largest(watch.basis_errors, 1500, 2000)
    assert last < 2 * first + 1e-6
    if not CONFIGS[name].restoration:  # that moves along the subspace
        assert max(watch.cosines) < 1e-4

    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == list(range(LOGGING_STEPS, NUM_STEPS + 1, 10))
    for entry in logs:
        ours = {key.removeprefix("ogpsa/") for key in entry if key.startswith("ogpsa/")}
        assert ours == METRICS[name], entry["step"]
        assert all(math.isfinite(value) for value in entry.values())
