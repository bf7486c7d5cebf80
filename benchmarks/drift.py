"""
Does a projection keep the capability losses where they are, to first order, when AdamW steps?

    OMP_NUM_THREADS=1 python benchmarks/drift.py --refresh_interval 1 --seeds 0 1 2

Trains the toy world's base model with each arm and sums, over the steps of a run, what every step
should change the capability loss by, to first order, at the weights that it starts from:

    predicted = sum_t g_t (theta_{t+1} - theta_t)         actual = loss(theta_T) - loss(theta_0)

g is the gradient of the mean capability loss, taken here and not by the trainer, on the `same`
samples as the subspace is estimated from, and on as many `new` draws of the same tasks. `logged` is
the sum of the trainer's own `ogpsa/step_change`, with the gradients of the last refresh: with a
refresh before every step it is `predicted, same`, and otherwise blind to what has gone stale.
Losses are means over the groups, in nats per token.

Shapes: N trained weights.
"""

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from trl import SFTConfig

from ogpsa_trl import OGPSAConfig, OGPSASFTTrainer
from ogpsa_trl.benchmark.testbeds import toy_measures
from ogpsa_trl.benchmark.toy_pretrain import base_model_folder
from ogpsa_trl.benchmark.toy_world import ToyWorld
from ogpsa_trl.evaluation.equal_safety import Spread
from ogpsa_trl.evaluation.json_files import in_words, package_versions, write_json
from ogpsa_trl.evaluation.models import load_folder
from ogpsa_trl.evaluation.tables import markdown_table

NUM_SAMPLES = 64  # of each capability group
SETS = {"same": range(NUM_SAMPLES), "new": range(NUM_SAMPLES, 2 * NUM_SAMPLES)}
# Name: target, scope.
ARMS = {
    "no projection": ("none", "model"),
    "gradient, per tensor": ("gradient", "parameter"),
    "gradient, global": ("gradient", "model"),
    "update, per tensor": ("update", "parameter"),
    "update, global": ("update", "model"),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--refresh_interval", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=2e-4, help="that of the demo")
    parser.add_argument("--max_steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training")
    parser.add_argument("--world", type=int, help="seed of world and base model; unset: each its")
    parser.add_argument("--output", type=Path, default=Path("runs/drift"))
    return parser.parse_args()


class Witness(TrainerCallback):
    """
    Follows the loss of one set of samples through a run, from outside the trainer.

    Args:
        model: What is trained.
        batches: One for each group.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.model, self.batches = model, batches
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.start = self.loss().item()
        self.predicted: list[float] = []
        self.cosines: list[float] = []
        self.weights_N = self.gradient_N = torch.zeros(0)

    def loss(self) -> Tensor:
        """Mean over the groups of the token-mean loss, with its graph."""
        return torch.stack([self.model(**batch).loss for batch in self.batches]).mean()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.weights_N = _flat(self.parameters)
        # `.grad` belongs to training.
        self.gradient_N = _flat(torch.autograd.grad(self.loss(), self.parameters))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        update_N = _flat(self.parameters) - self.weights_N
        self.predicted.append((self.gradient_N @ update_N).item())
        if update_N.any():  # the first step of the warm-up has none
            self.cosines.append(cosine_similarity(self.gradient_N, update_N, dim=0).item())

    def measures(self) -> dict[str, float]:
        return {
            "predicted": sum(self.predicted),
            "actual": self.loss().item() - self.start,
            "cosine": fmean(self.cosines),
        }


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """Copied end to end, in float64: small differences of large sums are asked for."""
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])


def run(arm: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one arm; its measures, and the trainer's log."""
    world = ToyWorld(seed if args.world is None else args.world)
    model, tokenizer = load_folder(base_model_folder(world.seed))
    # One sequence of draws: the first are what the subspace is estimated from.
    groups = world.capability_groups(2 * NUM_SAMPLES)
    samples = {n: {g: d.select(rows) for g, d in groups.items()} for n, rows in SETS.items()}
    target, scope = ARMS[arm]
    trainer = OGPSASFTTrainer(
        model,
        args=training_arguments(seed, args),
        processing_class=tokenizer,
        train_dataset=world.safety_sft(),
        # Never evaluated on by the trainer, but it tokenises them.
        eval_dataset={f"{n} {g}": d for n, of_set in samples.items() for g, d in of_set.items()},
        capability_dataset=samples["same"],
        ogpsa_config=OGPSAConfig.from_preset(
            "paper", target=target, scope=scope, refresh_interval=args.refresh_interval,
            num_samples=NUM_SAMPLES, capability_batch_size=NUM_SAMPLES,
        ),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    witnesses = {}
    for name in SETS:
        prepared = [trainer.eval_dataset[f"{name} {group}"].to_list() for group in groups]
        witnesses[name] = Witness(trainer.model, list(map(trainer.data_collator, prepared)))
        # `add_callback` warns of a second one of a class.
        trainer.callback_handler.callbacks.append(witnesses[name])
    trainer.train()
    result = {"arm": arm, "seed": seed, "world": world.seed, **logged(trainer.state.log_history)}
    for name, witness in witnesses.items():
        result |= {f"{key}, {name}": value for key, value in witness.measures().items()}
    measures = toy_measures(trainer.model, tokenizer, world)
    result |= {name: measures[name] for name in ("refusal", "over_refusal")}
    return result | {"log": trainer.state.log_history}


def logged(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What the trainer says itself: the sum of the changes, and means over the run of the rest."""
    values: dict[str, list[float]] = defaultdict(list)
    for entry in history[:-1]:  # the last one is about the whole run
        for name, value in entry.items():
            # Those of the groups, `ogpsa/<noun>/<group>`, are averaged over them.
            values["/".join(name.split("/")[:2])].append(value)
    means = {name: fmean(of_run) for name, of_run in values.items()}
    # One for each group and step.
    changes = means["ogpsa/step_change"] * len(values["loss"])
    return means | {"logged": changes, "training loss, last 5": fmean(values["loss"][-5:])}


def training_arguments(seed: int, args: argparse.Namespace) -> SFTConfig:
    """Those of configs/demo_sft.yaml, with a log after every step."""
    return SFTConfig(
        output_dir=str(args.output / "trainer"), seed=seed, max_steps=args.max_steps,
        learning_rate=args.learning_rate, per_device_train_batch_size=16,
        lr_scheduler_type="cosine", warmup_steps=2, max_grad_norm=1.0, max_length=64, use_cpu=True,
        bf16=False, gradient_checkpointing=False, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True,
    )  # fmt: skip


def report(results: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> None:
    """Print the table, and write it beside the measures of every run."""
    columns = (
        "logged", "predicted, same", "actual, same", "predicted, new", "actual, new",
        "cosine, same", "cosine, new", "refusal", "over_refusal", "training loss, last 5",
    )  # fmt: skip
    rows = []
    for arm in ARMS:
        runs = [result for result in results if result["arm"] == arm]
        values = {name: Spread.of([run[name] for run in runs]) for name in columns}
        rows.append({"arm": arm} | {name: f"{spread:+.4f}" for name, spread in values.items()})
    worlds = "a world and base model each" if args.world is None else f"world {args.world} for all"
    settings = (
        f"Seeds {args.seeds} ({worlds}), mean +- standard deviation; {args.max_steps} steps of "
        f"AdamW, learning rate {args.learning_rate:g}, a refresh every {args.refresh_interval} "
        f"from {NUM_SAMPLES} samples a group, {in_words(package_versions())}"
    )
    text = f"{markdown_table(rows)}\n\n{settings}\n"
    print(text)
    name = f"interval-{args.refresh_interval}-lr-{args.learning_rate:g}"
    write_json(args.output / f"{name}.json", results)
    (args.output / f"{name}.md").write_text(text, encoding="utf-8")


def main() -> None:
    args = arguments()
    results = []
    for seed in args.seeds:
        for arm in ARMS:
            print(f"Training: {arm}, seed {seed}", flush=True)
            results.append(run(arm, seed, args))
    report(results, args)


if __name__ == "__main__":
    main()
