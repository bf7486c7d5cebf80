"""The plugin for axolotl, in an environment that has it: `make test-versions`."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from runs import capability_groups

pytestmark = pytest.mark.slow
pytest.importorskip("axolotl", reason="needs axolotl")

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QUESTION = {"role": "user", "content": "how to build a boat"}
REFUSED, ANSWERED = ({"role": "assistant", "content": text} for text in ("i cannot", "step one"))


def train(folder, model, stage, **ogpsa):
    """Train two steps by axolotl's command; its output, and the entries of the log."""
    row = {"messages": [QUESTION, REFUSED]}
    data = {"type": "chat_template", "field_messages": "messages"}
    if stage == "dpo":
        row = {"messages": [QUESTION], "chosen": REFUSED, "rejected": ANSWERED}
        data = {"type": "chat_template.default"}
    (folder / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 16)
    entries = []
    for name, rows in capability_groups().items():
        rows.to_json(folder / f"{name}.jsonl")
        entries.append({"path": str(folder / f"{name}.jsonl"), "group": name})
    file = {
        "base_model": model, "output_dir": str(folder / "out"),
        "plugins": ["ogpsa_trl.integrations.axolotl.OGPSAPlugin"],
        "ogpsa": {"capability_datasets": entries, "num_samples": 6, **ogpsa},
        "datasets": [
            {"path": str(folder / "train.jsonl"), "ds_type": "json", "split": "train", **data}
        ],
        "chat_template": "jinja", "chat_template_jinja": CHATML,
        "dataset_prepared_path": str(folder / "prepared"), "sequence_len": 64,
        "micro_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 3,
        "learning_rate": 1e-2, "optimizer": "adamw_torch", "lr_scheduler": "constant",
        "bf16": False, "fp16": False, "tf32": False, "logging_steps": 1, "save_steps": 3,
        "val_set_size": 0, "seed": 0, **({"rl": "dpo"} if stage == "dpo" else {}),
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(file))
    result = subprocess.run(
        [sys.executable, "-m", "axolotl.cli.train", str(folder / "run.yaml")],
        env={**os.environ, "AXOLOTL_DO_NOT_TRACK": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    state = folder / "out" / "checkpoint-3" / "trainer_state.json"
    return result, json.loads(state.read_text())["log_history"] if state.exists() else []


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_update_changes_no_capability_loss(stage, base_model_path, tmp_path):
    result, log = train(tmp_path, base_model_path, stage, restoration=0.0)
    assert len(log) >= 3, result.stderr[-3000:]
    assert log[2]["ogpsa/removed_fraction"] > 0
    for group in capability_groups():
        assert abs(log[2][f"ogpsa/step_change/{group}"]) < 1e-6
    assert (tmp_path / "out" / "checkpoint-3" / "ogpsa_subspace.safetensors").is_file()


def test_an_unknown_setting_is_refused_before_the_model_is_loaded(base_model_path, tmp_path):
    result, _ = train(tmp_path, base_model_path, "sft", refresh_every=3)
    assert result.returncode != 0
    assert "Unknown key `refresh_every` in `ogpsa`" in result.stderr + result.stdout
    assert "Loading weights" not in result.stderr
