"""Over thousands of steps memory stays flat, the basis orthonormal and the log complete."""

import gc
import math
import os
from pathlib import Path

import pytest
import torch
from transformers import PrinterCallback, TrainerCallback

from engine_worker import ProjectionProbe
from laws import subspace_error
from ogpsa_trl import OGPSAConfig
from ogpsa_trl.benchmark.toy_model import tiny_model, toy_tokenizer
from runs import ADAMW, paper

NUM_STEPS = 2000
LOGGING_STEPS = 10
# By then allocators and caches have what they keep.
WARM_UP = 400

CONFIGS = {
    "gradient": paper(refresh_interval=2),
    "update": OGPSAConfig(
        refresh_interval=2, samples_per_refresh=3, restoration=0.0, basis_dtype="float32"
    ),
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


class Watch(TrainerCallback):
    """Measures at every log, and memory every hundred steps."""

    def __init__(self, trainer):
        self.trainer, self.probe = trainer, ProjectionProbe(trainer)
        self.basis_errors, self.cosines = [], []
        self.megabytes, self.tensors = {}, {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % LOGGING_STEPS:
            return
        self.basis_errors.append(subspace_error(self.trainer.subspace))
        self.cosines.append(self.probe.largest)
        self.probe.largest = 0.0
        if state.global_step % 100 == 0:
            gc.collect()
            things = gc.get_objects()
            self.tensors[state.global_step] = sum(isinstance(t, torch.Tensor) for t in things)
            pages = int(Path("/proc/self/statm").read_text().split()[1])  # resident
            self.megabytes[state.global_step] = pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CONFIGS)
def test_two_thousand_steps(name, make):
    model = tiny_model(hidden_size=16, num_layers=1, ffn_size=32)
    trainer = make(
        model=model, config=CONFIGS[name], more={"processing_class": toy_tokenizer()},
        logging_steps=LOGGING_STEPS, **ADAMW | {"max_steps": NUM_STEPS},
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer.train()

    growth = watch.megabytes[NUM_STEPS] - watch.megabytes[WARM_UP]
    # The log itself takes 160 entries of 20 numbers, 0.3 MB.
    assert growth < 4
    assert watch.tensors[NUM_STEPS] == watch.tensors[WARM_UP]

    # Rounding of the rows, of the first quarter and of the last alike.
    assert max(watch.basis_errors) < (
        1e-5 if CONFIGS[name].basis_dtype == "float32" else torch.finfo(torch.bfloat16).eps
    )
    quarter = len(watch.basis_errors) // 4
    first, last = max(watch.basis_errors[:quarter]), max(watch.basis_errors[-quarter:])
    assert last < 2 * first + 1e-6
    if not CONFIGS[name].restoration:  # that moves along the subspace
        assert max(watch.cosines) < 1e-4

    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == list(range(LOGGING_STEPS, NUM_STEPS + 1, 10))
    for entry in logs:
        ours = {key.removeprefix("ogpsa/") for key in entry if key.startswith("ogpsa/")}
        assert ours == METRICS[name], entry["step"]
        assert all(math.isfinite(value) for value in entry.values())
