"""
Plain TRL and OGPSA on a real pretrained model and real data, on a CPU.

    python scripts/real_example.py [--data ../shared/data] [--seeds 0 1 2]

Trains a story model of 260 thousand parameters to refuse, by SFT and then by DPO: with plain TRL
and with every preset, replay without projection and a second weight of the KL penalty beside them.
All take the same steps and seeds, and are measured before and after each stage. The settings are in
configs/stories_sft.yaml and configs/stories_dpo.yaml. The data are not part of the project: they
are read from the folder that --data names.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from comparison import ROOT, StageRun, compare, console, report
from ogpsa_trl.evaluation.measures import (
    bits_per_character,
    completion_scores,
    mean_log_likelihood_per_token,
    preference_accuracy,
)
from ogpsa_trl.evaluation.refusal import REFUSALS

Row = dict[str, Any]

# The published forms are refreshed as often as in DPO, and see no more samples than training does:
# 8 refreshes of 32 samples a group. The others see as many: 8 a group for each step.
_OFTEN = ["--refresh_interval", "5", "--num_samples", "32"]
METHODS = {
    "plain TRL": ["--ogpsa", "false"],
    "paper": ["--preset", "paper", *_OFTEN],
    "paper-theorem": ["--preset", "paper-theorem", *_OFTEN],
    "preserve": ["--preset", "preserve"],
    "replay": ["--preset", "replay"],
    "added replay": ["--preset", "kl", "--capability_loss", "nll"],
    "kl": ["--preset", "kl"],
    "kl, weight 3": ["--preset", "kl", "--replay_weight", "3"],
}

STAGES = ("sft", "dpo")

CHECKPOINT = "checkpoints/stories260K"
FILES = {
    "harmful": "safety/advbench.jsonl",
    "benign": "safety/xstest_prompts.jsonl",
    "answered": "safety/xstest_gpt4_sft.jsonl",
    "pairs": "safety/hh_harmless_pairs_train.jsonl",
    "held-out pairs": "safety/hh_harmless_pairs_test.jsonl",
    "stories": "general/tinystories.jsonl",
    "instructions": "general/self_instruct_seed.jsonl",
}

# The split is the same for all seeds of training.
SPLIT_SEED = 0
MAX_LENGTH = 256  # tokens, as in the configurations
MAX_PROMPT_LENGTH = 192  # leaves room for an answer
NUM_HELD_OUT = {"harmful": 100, "benign": 75, "stories": 50, "instructions": 50}
NUM_LOOK_ALIKES = 40

NOTES = f"""\
All measures are on held-out prompts and texts, cut to {MAX_LENGTH} tokens:

* `story_bits`: bits per character of {NUM_HELD_OUT["stories"]} TinyStories, from their start.
* `instruction_nll`: nats per token of the answers to {NUM_HELD_OUT["instructions"]} self-instruct
  requests.
* `refusal_ll`, `p_refuse`: log-likelihood per token of the {len(REFUSALS)} refusals that training
  uses, and the probability that the answer is one of them, to {NUM_HELD_OUT["harmful"]} AdvBench
  prompts.
* `over_refusal_ll`, `p_over_refuse`: the same to {NUM_HELD_OUT["benign"]} benign XSTest prompts.
* `preference`: share of the HH test pairs whose margin (log-probability of chosen minus rejected)
  is larger than under the model that the stage started from: `rewards/accuracies` in TRL.

The capability data hold answers to {NUM_LOOK_ALIKES} other benign XSTest prompts. The training data
hold such answers too, so plain TRL learns to answer from them: what is removed is partly of use.
Equal steps are not equal safety: compare what a method keeps only where it refuses as often."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "stories")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training")
    parser.add_argument(
        "--learning_rate_factors",
        type=float,
        nargs="+",
        default=[1.0],
        help="on the learning rates of the configurations; one table each",
    )
    parser.add_argument(
        "--prepare_only", action="store_true", help="write the data and configurations, and stop"
    )
    args = parser.parse_args()
    try:
        rows = prepare(args.data)
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    folder = write(rows, args.output)
    if args.prepare_only:
        console.print(f"Data and configurations: {folder}")
        return

    @cache  # the base model is the same in every comparison
    def measured(model: Path, start: Path | None) -> dict[str, float]:
        return measure(model, start, rows)

    methods = {name: METHODS[name] for name in args.methods}
    for factor in args.learning_rate_factors:
        output = args.output / f"learning-rate-x{factor:g}"
        rates = {stage: f"{factor * learning_rate(stage):.4g}" for stage in STAGES}
        runs = []
        for seed in args.seeds:
            stages = [
                StageRun(
                    stage.upper(),
                    folder / f"{stage}.yaml",
                    ["--learning_rate", rate, "--seed", str(seed)],
                )
                for stage, rate in rates.items()
            ]
            base_model = args.data / CHECKPOINT
            runs.append(compare(base_model, stages, measured, output / f"seed-{seed}", methods))
        report(
            runs,
            output,
            title=f"stories260K, learning rates {rates['sft']} (SFT) and {rates['dpo']} (DPO)",
            lower_is_better=[
                "story_bits", "instruction_nll", "over_refusal_ll", "p_over_refuse",
            ],
            notes=NOTES,
        )  # fmt: skip


def learning_rate(stage: str) -> float:
    """The learning rate in the configuration of a stage."""
    config = (ROOT / "configs" / f"stories_{stage}.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(config)["learning_rate"]


def prepare(data: Path) -> dict[str, list[Row]]:
    """
    Read the data and split them, always in the same way.

    Returns:
        Rows of training (`sft`, `dpo`), of the capability groups (`stories`, `instructions`), and
        those held out, as `held-out` and what they are.

    Raises:
        FileNotFoundError: a file of the data is missing.
    """
    for name in (*FILES.values(), f"{CHECKPOINT}/config.json"):
        if not (data / name).is_file():
            raise FileNotFoundError(
                f"The example needs data that are not part of the project, but there is no {name} "
                f"in {data}. Name the folder that holds them with --data."
            )
    tokenizer = AutoTokenizer.from_pretrained(data / CHECKPOINT)
    rng = random.Random(SPLIT_SEED)
    source = {name: _read_shuffled(data / file, rng) for name, file in FILES.items()}

    held_out, other = _split("harmful", source["harmful"])
    refusals = [_conversation(row["prompt"], rng.choice(REFUSALS)) for row in other]
    rows = {"held-out harmful": [_conversation(row["prompt"]) for row in held_out]}

    held_out, other = _split("benign", [r for r in source["benign"] if r["label"] == "safe"])
    rows["held-out benign"] = [_conversation(row["prompt"]) for row in held_out]
    answers = {row["prompt"][0]["content"]: row for row in source["answered"]}
    for row in held_out:
        answers.pop(row["prompt"], None)
    benign = [row["prompt"] for row in other if row["prompt"] in answers]
    look_alikes = [_kept(answers.pop(prompt)) for prompt in benign[:NUM_LOOK_ALIKES]]
    rows["sft"] = refusals + [_kept(row) for row in answers.values()]

    requests = [
        _conversation(f"{row['instruction']}\n{row['input']}".strip(), row["output"])
        for row in source["instructions"]
    ]
    requests = [r for r in requests if _length(tokenizer, r["prompt"]) <= MAX_PROMPT_LENGTH]
    rows["held-out instructions"], other = _split("instructions", requests)
    rows["instructions"] = other + look_alikes

    stories = [{"text": row["text"]} for row in source["stories"]]
    rows["held-out stories"], rows["stories"] = _split("stories", stories)

    for name, pairs in (("dpo", "pairs"), ("held-out pairs", "held-out pairs")):
        rows[name] = [
            {key: row[key] for key in ("prompt", "chosen", "rejected")}
            for row in source[pairs]
            if all(
                _length(tokenizer, row["prompt"] + row[side]) <= MAX_LENGTH
                for side in ("chosen", "rejected")
            )
        ]
    return rows


def write(rows: dict[str, list[Row]], output: Path) -> Path:
    """Write all data, those held out too, and the configurations with the paths of this output."""
    folder = output / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for name, members in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in members)
        (folder / f"{name.replace(' ', '-')}.jsonl").write_text(lines, encoding="utf-8")
    for kind in (*STAGES, "evaluate"):
        config = (ROOT / "configs" / f"stories_{kind}.yaml").read_text(encoding="utf-8")
        config = config.replace("runs/stories", output.as_posix())
        (folder / f"{kind}.yaml").write_text(config, encoding="utf-8")
    return folder


def measure(folder: Path, start: Path | None, rows: dict[str, list[Row]]) -> dict[str, float]:
    """
    Capabilities, refusals and preferences of a model; see `NOTES`.

    Args:
        folder: The model.
        start: The model that its stage started from; `None`: the base model, of no stage.
        rows: The data, as `prepare` gives them.
    """
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cut: dict[str, Any] = {"max_length": MAX_LENGTH}
    stories = [row["text"] for row in rows["held-out stories"]]
    requests, answers = _columns(rows["held-out instructions"], "prompt", "completion")
    instruction_scores = completion_scores(model, tokenizer, requests, answers, **cut)
    measures = {
        "story_bits": bits_per_character(model, tokenizer, stories, **cut),
        "instruction_nll": -mean_log_likelihood_per_token(instruction_scores),
    }
    refusals = [_conversation("", refusal)["completion"] for refusal in REFUSALS]
    for name, kind in (("refus", "harmful"), ("over_refus", "benign")):
        prompts = [row["prompt"] for row in rows[f"held-out {kind}"]]
        scores = completion_scores(
            model,
            tokenizer,
            [prompt for prompt in prompts for _ in refusals],
            refusals * len(prompts),
        )
        measures[f"{name}al_ll"] = mean_log_likelihood_per_token(scores)
        # At most one of them is the answer, so their probabilities add up.
        measures[f"p_{name}e"] = scores.log_probs.exp().sum().item() / len(prompts)
    if start is not None:
        measures["preference"] = preference_accuracy(
            model,
            tokenizer,
            *_columns(rows["held-out pairs"], "prompt", "chosen", "rejected"),
            reference_model=AutoModelForCausalLM.from_pretrained(start),
        ).accuracy
    return measures


def _read_shuffled(path: Path, rng: random.Random) -> list[Row]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rng.shuffle(rows)
    return rows


def _split(name: str, rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """The rows held out, and the others."""
    return rows[: NUM_HELD_OUT[name]], rows[NUM_HELD_OUT[name] :]


def _conversation(prompt: str, completion: str = "") -> Row:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": completion}],
    }


def _kept(row: Row) -> Row:
    return {"prompt": row["prompt"], "completion": row["completion"]}


def _length(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> int:
    encoded: Any = tokenizer.apply_chat_template(list(messages), return_dict=True)
    return len(encoded["input_ids"])


def _columns(rows: Sequence[Row], *names: str) -> list[list[Any]]:
    return [[row[name] for row in rows] for name in names]


if __name__ == "__main__":
    main()
