"""Train with SFT or DPO: `accelerate launch scripts/train.py --config configs/sft.yaml`."""

import sys

from ogpsa_trl.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
