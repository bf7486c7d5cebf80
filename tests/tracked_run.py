"""A short gated run with every local tracker. Arguments: model, output folder."""

import json
import sys
from pathlib import Path

from ogpsa_trl import GateConfig, OGPSAConfig
from runs import capability_groups, contradicted, gated, make_trainer

SETTINGS = OGPSAConfig(num_samples=6, capability_token_share=None, refresh_interval=2)
GATE = GateConfig(gate_num_samples=4, max_capability_loss_increase=10.0)

if __name__ == "__main__":
    import wandb

    model, output = sys.argv[1:]
    trainer = make_trainer(
        "sft", model, output, capability=capability_groups(), config=SETTINGS, max_steps=3,
        report_to=["tensorboard", "wandb", "trackio"], run_name="tracked",
    )  # fmt: skip
    gated(trainer, contradicted(), GATE)
    trainer.train()
    trainer.save_state()
    Path(output, "wandb_config.json").write_text(json.dumps(dict(wandb.config)))
    wandb.finish()
