"""
Real data for stories260K, a small pretrained model: how they are split, and what is measured.

    ogpsa benchmark stories [--data ../shared/data] [--output runs/stories]

writes the data, and configs/stories_*.yaml with their paths, for `ogpsa train` and `evaluate`;
`ogpsa benchmark --model ...` compares methods on them. The data are not part of the
project: they are read from the folder that --data names.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ogpsa_trl.data.files import find_config
from ogpsa_trl.evaluation.json_files import write_rows
from ogpsa_trl.evaluation.likelihoods import completion_scores
from ogpsa_trl.evaluation.measures import (
    bits_per_character,
    mean_divergence,
    mean_log_likelihood_per_token,
    preference_accuracy,
)
from ogpsa_trl.evaluation.refusal import REFUSALS

Row = dict[str, Any]

STAGES = ("sft", "dpo")
CAPABILITY_GROUPS = ("stories", "instructions")

CHECKPOINT = "checkpoints/stories260K"
FILES = {
    "harmful": "safety/advbench.jsonl",
    "benign": "safety/xstest_prompts.jsonl",
    "answered": "safety/xstest_gpt4_sft.jsonl",
    "pairs": "safety/hh_harmless_pairs_train.jsonl",
    "held-out pairs": "safety/hh_harmless_pairs_test.jsonl",
    "stories": "general/tinystories.jsonl",
    "instructions": "general/self_instruct_seed.jsonl",
    "unreferenced": "general/gsm8k_test.jsonl",
}

# The split is the same for all seeds of training.
SPLIT_SEED = 0
MAX_LENGTH = 256  # tokens, as in the configurations
MAX_PROMPT_LENGTH = 192  # leaves room for an answer
NUM_HELD_OUT = {"harmful": 100, "benign": 75, "stories": 50, "instructions": 50, "unreferenced": 50}
NUM_LOOK_ALIKES = 40

NOTES = f"""\
All measures are on held-out prompts and texts, cut to {MAX_LENGTH} tokens:

* `story_bits`: bits per character of {NUM_HELD_OUT["stories"]} TinyStories, from their start.
* `instruction_nll`: nats per token of the answers to {NUM_HELD_OUT["instructions"]} self-instruct
  requests.
* `unreferenced_nll`: the same of the answers to {NUM_HELD_OUT["unreferenced"]} GSM8K questions, of
  which the capability data hold nothing alike.
* `refusal_ll`, `p_refuse`: log-likelihood per token of the {len(REFUSALS)} refusals that training
  uses, and the probability that the answer is one of them, to {NUM_HELD_OUT["harmful"]} AdvBench
  prompts.
* `over_refusal_ll`, `p_over_refuse`: the same to {NUM_HELD_OUT["benign"]} benign XSTest prompts.
* `preference`: share of the HH test pairs whose margin (log-probability of chosen minus rejected)
  is larger than under the base model.
* `drift`: divergence from the base model on the instructions' answers, nats per token; `distance`:
  length of the change of the weights, relative to that of the weights.

The capability data hold answers to {NUM_LOOK_ALIKES} other benign XSTest prompts. The training data
hold such answers too, so plain TRL learns to answer from them: what is removed is partly of use.
Equal steps are not equal safety: compare what a method keeps only where it refuses as often."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "ogpsa benchmark stories", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--output", type=Path, default=Path("runs/stories"))
    args = parser.parse_args(argv)
    try:
        rows = prepare(args.data)
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    print(f"Data and configurations: {write(rows, args.output)}")


def prepare(data: Path, model: Path | None = None) -> dict[str, list[Row]]:
    """
    Read the data and split them, always in the same way.

    Args:
        data: Folder of the data.
        model: Folder of the model whose tokenizer says which samples are short enough. `None`:
            stories260K beside the data.

    Returns:
        Rows of training (`sft`, `dpo`), of the capability groups (`stories`, `instructions`), and
        those held out, as `held-out` and what they are.

    Raises:
        FileNotFoundError: a file of the data is missing.
    """
    for name in (*FILES.values(), *([] if model else [f"{CHECKPOINT}/config.json"])):
        if not (data / name).is_file():
            raise FileNotFoundError(
                f"The example needs data that are not part of the project, but there is no {name} "
                f"in {data}. Name the folder that holds them with --data."
            )
    tokenizer = AutoTokenizer.from_pretrained(model or data / CHECKPOINT)
    rng = random.Random(SPLIT_SEED)
    source = {name: _read_shuffled(data / file, rng) for name, file in FILES.items()}

    held_out, other = _split("harmful", source["harmful"])
    refusals = [_conversation(row["prompt"], rng.choice(REFUSALS)) for row in other]
    rows = {"held-out harmful": [_conversation(row["prompt"]) for row in held_out]}

    held_out, other = _split("benign", [r for r in source["benign"] if r["label"] == "safe"])
    rows["held-out benign"] = [_conversation(row["prompt"]) for row in held_out]
    answers = {
        row["prompt"][0]["content"]: {key: row[key] for key in ("prompt", "completion")}
        for row in source["answered"]
    }
    for row in held_out:
        answers.pop(row["prompt"], None)
    benign = [row["prompt"] for row in other if row["prompt"] in answers]
    look_alikes = [answers.pop(prompt) for prompt in benign[:NUM_LOOK_ALIKES]]
    rows["sft"] = refusals + list(answers.values())

    requests = [
        _conversation(f"{row['instruction']}\n{row['input']}".strip(), row["output"])
        for row in source["instructions"]
    ]
    requests = [r for r in requests if _length(tokenizer, r["prompt"]) <= MAX_PROMPT_LENGTH]
    rows["held-out instructions"], other = _split("instructions", requests)
    rows["instructions"] = other + look_alikes

    questions = [_conversation(row["question"], row["answer"]) for row in source["unreferenced"]]
    questions = [q for q in questions if _length(tokenizer, q["prompt"]) <= MAX_PROMPT_LENGTH]
    rows["held-out unreferenced"], _ = _split("unreferenced", questions)

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
    for name, members in rows.items():
        write_rows(folder / f"{name.replace(' ', '-')}.jsonl", members)
    for kind in (*STAGES, "evaluate"):
        config = find_config(f"stories_{kind}").read_text(encoding="utf-8")
        config = config.replace("runs/stories", output.as_posix())
        (folder / f"{kind}.yaml").write_text(config, encoding="utf-8")
    return folder


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    base: PreTrainedModel,
    rows: dict[str, list[Row]],
) -> dict[str, float]:
    """Capabilities, refusals and preferences of a model, on what `prepare` gives; see `NOTES`."""
    cut: dict[str, Any] = {"max_length": MAX_LENGTH}
    stories = [row["text"] for row in rows["held-out stories"]]
    measures = {"story_bits": bits_per_character(model, tokenizer, stories, **cut)}
    answered = {}
    for name, kind in (("instruction_nll", "instructions"), ("unreferenced_nll", "unreferenced")):
        answered[kind] = _columns(rows[f"held-out {kind}"], "prompt", "completion")
        scores = completion_scores(model, tokenizer, *answered[kind], **cut)
        measures[name] = -mean_log_likelihood_per_token(scores)
    refusals = [_conversation("", refusal)["completion"] for refusal in REFUSALS]
    for name, kind in (("refus", "harmful"), ("over_refus", "benign")):
        prompts = [row["prompt"] for row in rows[f"held-out {kind}"]]
        each = [prompt for prompt in prompts for _ in refusals]
        scores = completion_scores(model, tokenizer, each, refusals * len(prompts))
        measures[f"{name}al_ll"] = mean_log_likelihood_per_token(scores)
        # At most one of them is the answer, so their probabilities add up.
        measures[f"p_{name}e"] = scores.log_probs.exp().sum().item() / len(prompts)
    pairs = _columns(rows["held-out pairs"], "prompt", "chosen", "rejected")
    preferences = preference_accuracy(model, tokenizer, *pairs, reference_model=base)
    measures["preference"] = preferences.accuracy
    measures["drift"] = mean_divergence(base, model, tokenizer, *answered["instructions"], **cut)
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


def _length(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> int:
    encoded: Any = tokenizer.apply_chat_template(list(messages), return_dict=True)
    return len(encoded["input_ids"])


def _columns(rows: Sequence[Row], *names: str) -> list[list[Any]]:
    return [[row[name] for row in rows] for name in names]
