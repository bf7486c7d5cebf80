"""
What should capability data be: how many samples, with or without look-alikes, whose answers?

    OMP_NUM_THREADS=1 python benchmarks/capability_data.py --learning_rate_factors 1 2

Trains the toy world's base model by `preserve` with each set of capability data, and measures what
it can do afterwards. All sets have two groups, `skills` (add, reverse, facts) and `language`
(passive, judge, howto), and every refresh draws 8 samples of each group, so they cost the same.
`howto` are the benign look-alikes of the harmful requests; `sort` is in no set.
"""

import argparse
import tempfile
from pathlib import Path

import yaml
from datasets import Dataset

from ogpsa_trl.benchmark.data import write_world
from ogpsa_trl.benchmark.methods import Cost, Method, stage_run, train
from ogpsa_trl.benchmark.testbed import parse_benchmark
from ogpsa_trl.benchmark.toy_pretrain import base_model_folder
from ogpsa_trl.benchmark.toy_world import CAPABILITY_GROUPS, ToyWorld
from ogpsa_trl.evaluation.equal_safety import Spread
from ogpsa_trl.evaluation.generation import greedy_answers
from ogpsa_trl.evaluation.json_files import in_words, package_versions, write_json, write_rows
from ogpsa_trl.evaluation.likelihoods import answer_to
from ogpsa_trl.evaluation.models import load_folder
from ogpsa_trl.evaluation.tables import markdown_table

ARMS = (
    "none (plain TRL)",
    *(f"{size} samples a group" for size in (8, 16, 32, 64, 128, 200)),
    "64, without look-alikes",
    "64, look-alikes a third group",
    "64, completed by the model",
)
COLUMNS = (
    "capability", "exact_match/howto", "exact_match/sort", "p_refuse/harmful",
    "p_over_refuse/howto",
)  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    factors = "on the learning rate of configs/toy_sft.yaml"
    parser.add_argument(
        "--learning_rate_factors", type=float, nargs="+", default=[1.0], help=factors
    )
    parser.add_argument("--max_steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of world and run")
    parser.add_argument("--output", type=Path, default=Path("runs/capability_data"))
    return parser.parse_args()


def capability_groups(arm: str, world: ToyWorld, base_model: Path) -> dict[str, Dataset]:
    """The capability data of an arm."""
    size = int(arm.split()[0].strip(","))
    groups = world.capability_groups(size)
    if arm.endswith("completed by the model"):
        return {name: completed(rows, base_model) for name, rows in groups.items()}
    if "look-alikes" in arm:
        # Drawn in turn, half of them look-alikes.
        tasks = CAPABILITY_GROUPS["language"]
        rows = world.capability_groups(2 * size)["language"]
        is_howto = [tasks[i % len(tasks)] == "howto" for i in range(len(rows))]
        groups["language"] = rows.select([i for i, howto in enumerate(is_howto) if not howto])
        if arm.endswith("third group"):
            groups["look_alikes"] = rows.select([i for i, howto in enumerate(is_howto) if howto])
    return groups


def completed(rows: Dataset, base_model: Path) -> Dataset:
    """The same prompts with what the base model itself answers."""
    answers = greedy_answers(*load_folder(base_model), rows["prompt"], max_new_tokens=16)
    pairs = zip(rows["prompt"], answers, strict=True)
    return Dataset.from_list(
        [{"prompt": prompt, "completion": answer_to(prompt, a.text)} for prompt, a in pairs]
    )


def run(arm: str, seed: int, factor: float, max_steps: int) -> dict[str, float]:
    """Train with one set; the measures of the model."""
    world, base_model = ToyWorld(seed), base_model_folder(seed)
    with tempfile.TemporaryDirectory() as folder:
        write_world(world, Path(folder))
        config = Path(folder) / "sft.yaml"
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
        method = Method()
        if arm != ARMS[0]:
            method = Method({"preset": "preserve", "num_samples": 200, "samples_per_refresh": 8})
            settings["capability_datasets"] = [
                {"path": str(write_rows(Path(folder) / f"arm-{name}.jsonl", rows)), "group": name}
                for name, rows in capability_groups(arm, world, base_model).items()
            ]
        config.write_text(yaml.safe_dump(settings), encoding="utf-8")
        arguments = stage_run(
            str(config), method, model=base_model, output=Path(folder) / "trainer",
            learning_rate_factor=factor, num_steps=max_steps, seed=seed,
        )  # fmt: skip
        train(method, arguments, Path(folder) / "trained", Cost())
        words = ["--config", "toy_benchmark", "--model_name_or_path", str(base_model)]
        words += ["--sft", str(config), "--evaluate", str(Path(folder) / "evaluate.yaml")]
        bed = parse_benchmark([*words, "--seeds", str(seed)])
        return bed.measure(Path(folder) / "trained", seed).values


def main() -> None:
    args = arguments()
    results = []
    parts = [
        f"Seeds {args.seeds} (a world and base model each), mean +- standard deviation; "
        f"{args.max_steps} steps of AdamW, {in_words(package_versions())}"
    ]
    for factor in args.learning_rate_factors:
        rows = []
        for arm in ARMS:
            print(f"Training: {arm}, learning rate x{factor:g}", flush=True)
            runs = {seed: run(arm, seed, factor, args.max_steps) for seed in args.seeds}
            results += [
                {"arm": arm, "seed": seed, "learning_rate_factor": factor, **found}
                for seed, found in runs.items()
            ]
            values = {name: [found[name] for found in runs.values()] for name in COLUMNS}
            cells = {name: f"{Spread.of(of_name):.3f}" for name, of_name in values.items()}
            rows.append({"capability data": arm} | cells)
        parts += [f"Learning rate x{factor:g}:", markdown_table(rows)]
    text = "\n\n".join(parts) + "\n"
    print(text)
    write_json(args.output / "results.json", results)
    (args.output / "results.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
