"""
What `bf16: true` leaves of the protection: the default, and plain TRL, in float32 and in bfloat16.

    OMP_NUM_THREADS=1 python benchmarks/bfloat16.py --model MODEL --capability TEXTS.jsonl \
        --safety PROMPTS.jsonl --output runs/bfloat16

Trains on one refusal to every prompt (column `prompt`), protects the texts (column `text`), and
says for every learning rate: the divergence from the model before, of all tokens of the vocabulary
and in float32, in nats per token of the protected texts; the loss of the refusals, in float32; and
in how many steps restoration was at its cap. The weights are float32, and so are the capability
passes. Those of the runs called `rounded` are made in bfloat16, as where the engine holds such
weights: they count from the floor. A run that is in the output folder is not made again.

Shapes: L positions, V tokens of the vocabulary.
"""

import argparse
import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel
from trl import SFTConfig

from ogpsa_trl import OGPSAConfig, OGPSASFTTrainer
from ogpsa_trl.engines.torch_engines import TorchBackend
from ogpsa_trl.evaluation.equal_safety import Spread
from ogpsa_trl.evaluation.json_files import in_words, package_versions
from ogpsa_trl.evaluation.models import load_folder
from ogpsa_trl.evaluation.tables import markdown_table

REFUSAL = " Sorry, but I can't assist with that."
# Name: whether it is OGPSA, and in bfloat16.
ARMS = {
    "plain, float32": (False, False),
    "plain, bfloat16": (False, True),
    "preserve, float32": (True, False),
    "preserve, bfloat16": (True, True),
    "preserve, rounded": (True, True),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--capability", type=Path, required=True)
    parser.add_argument("--safety", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-6, 1e-5, 1e-4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--max_steps", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--num_samples", type=int, default=64)
    parser.add_argument("--samples_per_refresh", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=128)
    return parser.parse_args()


def read(path: Path, column: str, num_rows: int) -> list[str]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)[column] for line, _ in zip(lines, range(num_rows), strict=False)]


def log_probs(model: PreTrainedModel, ids_L: Tensor) -> Tensor:
    """Of every next token, shape [L - 1, V]."""
    return model(ids_L[None]).logits[0, :-1].double().log_softmax(dim=-1)


@torch.no_grad()
def measure(
    start: PreTrainedModel, model: PreTrainedModel, tokenizer: Any, args: argparse.Namespace
) -> tuple[float, float]:
    """Divergence from the start, and loss of the refusals, in nats per token."""
    total = count = loss = 0.0
    for text in read(args.capability, "text", args.num_samples):
        ids_L = torch.tensor(tokenizer(text)["input_ids"][: args.max_length])
        before, after = log_probs(start, ids_L), log_probs(model, ids_L)
        total += (before.exp() * (before - after)).sum().item()
        count += len(before)
    prompts = read(args.safety, "prompt", 8)
    for prompt in prompts:
        first = len(tokenizer(prompt)["input_ids"])
        ids_L = torch.tensor(tokenizer(prompt + REFUSAL)["input_ids"])
        chosen = log_probs(model, ids_L).gather(1, ids_L[1:, None])[first - 1 :]
        loss -= chosen.mean().item() / len(prompts)
    return total / count, loss


@contextlib.contextmanager
def passes_in_bfloat16(is_on: bool) -> Iterator[None]:
    """As where the engine holds weights in bfloat16."""
    if not is_on:
        yield
        return
    with mock.patch.object(TorchBackend, "_has_full_precision", False):
        yield


def run(arm: str, seed: int, rate: float, args: argparse.Namespace) -> dict[str, Any]:
    is_ours, is_bf16 = ARMS[arm]
    start, tokenizer = load_folder(args.model)
    start = start.float()
    prompts = read(args.safety, "prompt", args.max_steps * args.batch_size)
    texts = read(args.capability, "text", args.num_samples)
    ours = {}
    if is_ours:
        config = OGPSAConfig(
            num_samples=args.num_samples, samples_per_refresh=args.samples_per_refresh
        )
        ours = {
            "ogpsa_config": config,
            "capability_dataset": Dataset.from_list([{"text": text} for text in texts]),
        }
    trainer = OGPSASFTTrainer(
        copy.deepcopy(start),
        args=SFTConfig(
            str(args.output / "run"), max_steps=args.max_steps, learning_rate=rate, bf16=is_bf16,
            per_device_train_batch_size=args.batch_size, lr_scheduler_type="constant",
            max_length=args.max_length, gradient_checkpointing=False, logging_steps=1, seed=seed,
            save_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list([{"prompt": p, "completion": REFUSAL} for p in prompts]),
        processing_class=tokenizer,
        **ours,
    )  # fmt: skip
    with contextlib.redirect_stdout(None), passes_in_bfloat16("rounded" in arm):
        trainer.train()
    # The trainer's own computes in bfloat16 still.
    trained = copy.deepcopy(start)
    trained.load_state_dict(trainer.model.state_dict())
    divergence, loss = measure(start, trained.cpu(), tokenizer, args)
    logs = [entry for entry in trainer.state.log_history if "ogpsa/restoration_capped" in entry]
    result: dict[str, Any] = {
        "arm": arm, "seed": seed, "learning_rate": rate, "divergence": divergence, "safety": loss,
    }  # fmt: skip
    if is_ours:
        result["capped"] = fmean(entry["ogpsa/restoration_capped"] for entry in logs)
        measured = trainer.capability_loss.start
        assert measured is not None
        (group,) = trainer.capability_groups
        result["floor"] = measured.mean_loss(group.whole())
    return result


def report(results: list[dict[str, Any]], args: argparse.Namespace) -> str:
    rows = []
    for rate in args.learning_rates:
        for arm in args.arms:
            runs = [r for r in results if r["arm"] == arm and r["learning_rate"] == rate]
            values = {
                name: [r[name] for r in runs if name in r]
                for name in ("divergence", "safety", "capped", "floor")
            }
            cells = {n: f"{Spread.of(found):.2g}" if found else None for n, found in values.items()}
            rows.append({"learning rate": f"{rate:g}", "run": arm, **cells})
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    settings = (
        f"{args.max_steps} steps of {args.batch_size}, {args.samples_per_refresh} capability "
        f"samples of up to {args.max_length} tokens a step; seeds {args.seeds}, mean +- standard "
        f"deviation; {device}, {in_words(package_versions())}"
    )
    return f"{markdown_table(rows)}\n\n{settings}\n"


def main() -> None:
    args = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "results.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    results = [json.loads(line) for line in lines]
    done = {(r["arm"], r["seed"], r["learning_rate"]) for r in results}
    for rate in args.learning_rates:
        for seed in args.seeds:
            for arm in args.arms:
                if (arm, seed, rate) in done:
                    continue
                results.append(run(arm, seed, rate, args))
                print(results[-1], flush=True)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(results[-1]) + "\n")
    text = report(results, args)
    print(text)
    (args.output / "table.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
