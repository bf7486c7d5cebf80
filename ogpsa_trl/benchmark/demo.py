"""
Show OGPSA on a small world of its own: no downloads, minutes on two CPU cores.

    make demo          or          ogpsa demo [--seed 0] [--output runs/demo]

Pretrains a tiny base model (once, then cached), trains it with plain TRL and with OGPSA, SFT and
then DPO, and prints what each of them can do before and after.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from ogpsa_trl.benchmark.comparison import StageRun, compare, console, report
from ogpsa_trl.benchmark.toy_pretrain import base_model_folder
from ogpsa_trl.benchmark.toy_world import ToyWorld
from ogpsa_trl.data.files import find_config
from ogpsa_trl.evaluation.measures import completion_scores, exact_match, mean_probability

NOTES = """\
Capability measures are exact matches on held-out prompts; `sort` is in no capability group.
`refusal` is the mean probability of a refusal to held-out harmful requests, `refusal_ood` to
requests with verbs that safety training never saw, `over_refusal` to benign look-alikes.
One seed of a toy world: it shows how to use the library, not how good the method is."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("ogpsa demo", description=__doc__, allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=0, help="seed of the world and of training")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    args = parser.parse_args(argv)

    world = ToyWorld(args.seed)
    output = args.output / f"seed-{args.seed}"  # finished runs are kept: not those of another seed
    console.print("Base model of the toy world (about two minutes, once):")
    base_model = base_model_folder(args.seed)
    data = write_data(world, output / "data")
    seed = ["--seed", str(args.seed)]
    stages = [
        StageRun("SFT", data / "sft.yaml", seed),
        StageRun("DPO", data / "dpo.yaml", seed),
    ]
    results = compare(base_model, stages, lambda model, _: measure(model, world), output)
    report(
        [results],
        output,
        title="OGPSA on the toy world",
        lower_is_better=["over_refusal"],
        notes=NOTES,
    )


def write_data(world: ToyWorld, folder: Path) -> Path:
    """Write the world's data as JSON lines, and the configurations with their paths filled in."""
    folder.mkdir(parents=True, exist_ok=True)
    sets = {"sft": world.safety_sft(), "dpo": world.safety_preferences()}
    groups = world.capability_groups()
    for name, dataset in {**sets, **groups}.items():
        dataset.to_json(folder / f"{name}.jsonl")
    entries = "".join(
        f"  - {{path: {folder / f'{group}.jsonl'}, group: {group}}}\n" for group in groups
    )
    for stage in sets:
        config = (find_config(f"demo_{stage}")).read_text(encoding="utf-8")
        config += f"\ndataset_name: {folder / f'{stage}.jsonl'}\ncapability_datasets:\n{entries}"
        (folder / f"{stage}.yaml").write_text(config, encoding="utf-8")
    return folder


def measure(folder: Path, world: ToyWorld) -> dict[str, float]:
    """Exact match per task, and the probability of a refusal per kind of request."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    measures = {}
    for name, dataset in world.evaluation_sets().items():
        scores = completion_scores(model, tokenizer, dataset["prompt"], dataset["completion"])
        is_refusal = "refusal" in name
        measures[name] = mean_probability(scores) if is_refusal else exact_match(scores)
    return measures
