"""
What should capability data be: how many samples, with or without look-alikes, whose answers?

    OMP_NUM_THREADS=1 python benchmarks/capability_data.py --learning_rates 2e-4 4e-4

Trains the toy world's base model by `preserve` with each set of capability data, and measures what
it can do afterwards. All sets have two groups, `skills` (add, reverse, facts) and `language`
(passive, judge, howto), and every refresh draws 8 samples of each group, so they cost the same.
`howto` are the benign look-alikes of the harmful requests; `sort` is in no set.
"""

import argparse
import tempfile
from pathlib import Path

from datasets import Dataset

from ogpsa_trl.benchmark.methods import Cost, Method, Recipe, train
from ogpsa_trl.benchmark.testbeds import ToyTestbed
from ogpsa_trl.benchmark.toy_world import CAPABILITY_GROUPS
from ogpsa_trl.evaluation.equal_safety import Spread
from ogpsa_trl.evaluation.generation import greedy_answers
from ogpsa_trl.evaluation.json_files import in_words, package_versions, write_json
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
COLUMNS = ("capability", "howto", "sort", "p_refuse", "over_refusal")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[2e-4], help="of SFT")
    parser.add_argument("--max_steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of world and run")
    parser.add_argument("--output", type=Path, default=Path("runs/capability_data"))
    return parser.parse_args()


def capability_groups(arm: str, testbed: ToyTestbed) -> dict[str, Dataset]:
    """The capability data of an arm."""
    if arm == ARMS[0]:
        return {}
    size = int(arm.split()[0].strip(","))
    groups = testbed.world.capability_groups(size)
    if arm.endswith("completed by the model"):
        return {name: completed(rows, testbed) for name, rows in groups.items()}
    if "look-alikes" in arm:
        # Drawn in turn, half of them look-alikes.
        tasks = CAPABILITY_GROUPS["language"]
        rows = testbed.world.capability_groups(2 * size)["language"]
        is_howto = [tasks[i % len(tasks)] == "howto" for i in range(len(rows))]
        groups["language"] = rows.select([i for i, howto in enumerate(is_howto) if not howto])
        if arm.endswith("third group"):
            groups["look_alikes"] = rows.select([i for i, howto in enumerate(is_howto) if howto])
    return groups


def completed(rows: Dataset, testbed: ToyTestbed) -> Dataset:
    """The same prompts with what the base model itself answers."""
    answers = greedy_answers(*load_folder(testbed.base_model()), rows["prompt"], max_new_tokens=16)
    pairs = zip(rows["prompt"], answers, strict=True)
    return Dataset.from_list(
        [{"prompt": prompt, "completion": answer_to(prompt, a.text)} for prompt, a in pairs]
    )


def run(arm: str, seed: int, learning_rate: float, max_steps: int) -> dict[str, float]:
    """Train with one set; the measures of the model."""
    testbed = ToyTestbed(seed)
    groups = capability_groups(arm, testbed)
    method = Method({"preset": "preserve", "num_samples": 200} if groups else None)
    recipe = Recipe(
        "sft", testbed.config("sft"), testbed.training("sft"), groups, learning_rate, max_steps,
        seed,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        train(method, recipe, testbed.base_model(), Path(folder), Cost())
        return testbed.measure(Path(folder))


def main() -> None:
    args = arguments()
    results = []
    parts = [
        f"Seeds {args.seeds} (a world and base model each), mean +- standard deviation; "
        f"{args.max_steps} steps of AdamW, {in_words(package_versions())}"
    ]
    for rate in args.learning_rates:
        rows = []
        for arm in ARMS:
            print(f"Training: {arm}, learning rate {rate:g}", flush=True)
            runs = {seed: run(arm, seed, rate, args.max_steps) for seed in args.seeds}
            results += [
                {"arm": arm, "seed": seed, "learning_rate": rate, **found}
                for seed, found in runs.items()
            ]
            values = {name: [found[name] for found in runs.values()] for name in COLUMNS}
            cells = {name: f"{Spread.of(of_name):.3f}" for name, of_name in values.items()}
            rows.append({"capability data": arm} | cells)
        parts += [f"Learning rate {rate:g}:", markdown_table(rows)]
    text = "\n\n".join(parts) + "\n"
    print(text)
    write_json(args.output / "results.json", results)
    (args.output / "results.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
