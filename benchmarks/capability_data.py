"""
What should capability data be: how many samples, with or without look-alikes, whose answers?

    OMP_NUM_THREADS=1 python benchmarks/capability_data.py --learning_rates 2e-4 4e-4

Trains the toy world's base model by `preserve` with each set of capability data, and measures what
it can do afterwards. All sets have two groups, `skills` (add, reverse, facts) and `language`
(passive, judge, howto), and every refresh draws 8 samples of each group, so they cost the same.
`howto` are the benign look-alikes of the harmful requests; `sort` is in no set.
"""

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import datasets
import transformers
from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig

from ogpsa_trl import OGPSAConfig, OGPSASFTTrainer
from ogpsa_trl.benchmark.toy_pretrain import base_model_folder
from ogpsa_trl.benchmark.toy_world import CAPABILITY_GROUPS, NUM_EVALUATION_SAMPLES, ToyWorld
from ogpsa_trl.evaluation.generation import greedy_answers
from ogpsa_trl.evaluation.measures import (
    answer_to,
    completion_scores,
    exact_match,
    mean_probability,
)
from ogpsa_trl.evaluation.tables import markdown_table

ROOT = Path(__file__).resolve().parent.parent
SIZES = (8, 16, 32, 64, 128, 200)
ARMS = (
    "none (plain TRL)",
    *(f"{size} samples a group" for size in SIZES),
    "64, without look-alikes",
    "64, look-alikes a third group",
    "64, completed by the model",
)
COLUMNS = ("capability", "howto", "sort", "p_refuse", "over_refusal")

console = Console(highlight=False, soft_wrap=True)
datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[2e-4], help="of SFT")
    parser.add_argument("--max_steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of world and run")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "capability_data")
    return parser.parse_args()


def capability_groups(
    arm: str, world: ToyWorld, model: PreTrainedModel, tokenizer: Any
) -> dict[str, Dataset] | None:
    """The capability data of an arm."""
    if arm == "none (plain TRL)":
        return None
    size = int(arm.split()[0].strip(","))
    groups = world.capability_groups(size)
    if arm.endswith("completed by the model"):
        return {name: completed(rows, model, tokenizer) for name, rows in groups.items()}
    if "look-alikes" in arm:
        # Drawn in turn, half of them look-alikes.
        tasks = CAPABILITY_GROUPS["language"]
        rows = world.capability_groups(2 * size)["language"]
        by_kind = {
            is_howto: rows.select(
                [i for i in range(len(rows)) if (tasks[i % len(tasks)] == "howto") == is_howto]
            )
            for is_howto in (False, True)
        }
        groups["language"] = by_kind[False]
        if arm.endswith("third group"):
            groups["look_alikes"] = by_kind[True]
    return groups


def completed(rows: Dataset, model: PreTrainedModel, tokenizer: Any) -> Dataset:
    """The same prompts with what the model itself answers."""
    answers = greedy_answers(model, tokenizer, rows["prompt"], max_new_tokens=16)
    pairs = zip(rows["prompt"], answers, strict=True)
    return Dataset.from_list(
        [{"prompt": prompt, "completion": answer_to(prompt, a.text)} for prompt, a in pairs]
    )


def run(arm: str, seed: int, learning_rate: float, args: argparse.Namespace) -> dict[str, Any]:
    """Train with one set; the measures of the model."""
    world, folder = ToyWorld(seed), base_model_folder(seed)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    groups = capability_groups(arm, world, model, tokenizer)
    trainer = OGPSASFTTrainer(
        model,
        args=SFTConfig(
            output_dir=str(args.output / "trainer"), seed=seed, max_steps=args.max_steps,
            learning_rate=learning_rate, per_device_train_batch_size=16,
            lr_scheduler_type="cosine", warmup_steps=2, max_grad_norm=1.0, max_length=64,
            use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no",
            report_to="none", disable_tqdm=True,
        ),
        processing_class=tokenizer,
        train_dataset=world.safety_sft(),
        capability_dataset=groups,
        ogpsa_config=None if groups is None else OGPSAConfig(capability_batch_size=64),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return {"arm": arm, "seed": seed, "learning_rate": learning_rate, **measure(trainer, world)}


def measure(trainer: OGPSASFTTrainer, world: ToyWorld) -> dict[str, float]:
    """Exact match of every task, and the probability of a refusal to both kinds of requests."""
    scores = {
        name: completion_scores(
            trainer.model, trainer.processing_class, rows["prompt"], rows["completion"]
        )
        for name, rows in world.evaluation_sets().items()
    }
    measures = {task: exact_match(scores[task]) for task in NUM_EVALUATION_SAMPLES}
    return {
        "capability": fmean(measures.values()),
        **measures,
        "p_refuse": mean_probability(scores["refusal"]),
        "over_refusal": mean_probability(scores["over_refusal"]),
    }


def report(results: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> None:
    """Print the tables, and write them beside the measures of every run."""
    packages = ("ogpsa_trl", "trl", "transformers", "torch")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    parts = [
        f"Seeds {args.seeds} (a world and base model each), mean +- standard deviation; "
        f"{args.max_steps} steps of AdamW, {platform.machine()} CPU, {versions}."
    ]
    for learning_rate in args.learning_rates:
        rows = []
        for arm in ARMS:
            runs = [
                result
                for result in results
                if (result["arm"], result["learning_rate"]) == (arm, learning_rate)
            ]
            values = {name: _cell([run[name] for run in runs]) for name in COLUMNS}
            rows.append({"capability data": arm} | values)
        parts.append(f"Learning rate {learning_rate:g}:")
        parts.append(markdown_table(rows, ["capability data", *COLUMNS]))
    text = "\n\n".join(parts) + "\n"
    console.print(text)
    (args.output / "results.md").write_text(text, encoding="utf-8")
    (args.output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


def _cell(values: Sequence[float]) -> str:
    spread = f" +- {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{spread}"


def main() -> None:
    args = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    results = []
    for learning_rate in args.learning_rates:
        for seed in args.seeds:
            for arm in ARMS:
                console.print(f"Training: {arm}, seed {seed}, learning rate {learning_rate:g}")
                results.append(run(arm, seed, learning_rate, args))
    report(results, args)


if __name__ == "__main__":
    main()
