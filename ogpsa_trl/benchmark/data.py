"""
The data of the test beds, and the files that describe them.

    ogpsa benchmark data toy [--seeds 0 1 2]
    ogpsa benchmark data stories [--data ../shared/data]
    ogpsa benchmark data smollm2 --model FOLDER [--data ../shared/data]

writes data, and the files of training, evaluation and benchmark with their paths, into --output.
Then `ogpsa benchmark --config OUTPUT/benchmark.yaml` compares methods. Real data are not part of
the project: they are read from the folder that --data names.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ogpsa_trl.benchmark.toy_pretrain import base_model_folder
from ogpsa_trl.benchmark.toy_world import REFUSAL, ToyWorld
from ogpsa_trl.cli.command_line import load_mapping
from ogpsa_trl.data.files import find_config
from ogpsa_trl.evaluation.json_files import write_rows
from ogpsa_trl.evaluation.refusal import REFUSALS, is_refusal

Row = dict[str, Any]

TEST_BEDS = ("toy", "stories", "smollm2")
KINDS = ("sft", "dpo", "evaluate", "benchmark")  # of files of a test bed

FILES = {
    "harmful": "safety/advbench.jsonl",
    "other-harmful": "safety/harmbench_standard.jsonl",
    "benign": "safety/xstest_prompts.jsonl",
    "answered": "safety/xstest_gpt4_sft.jsonl",
    "pairs": "safety/hh_harmless_pairs_train.jsonl",
    "held-out-pairs": "safety/hh_harmless_pairs_test.jsonl",
    "stories": "general/tinystories.jsonl",
    "instructions": "general/self_instruct_seed.jsonl",
    "mathematics": "general/gsm8k_train.jsonl",
    "held-out-mathematics": "general/gsm8k_test.jsonl",
    "ifeval": "general/ifeval.jsonl",
    "arc": "general/arc_easy.jsonl",
    "truthfulqa": "general/truthfulqa_mc.jsonl",
}
SPLIT_SEED = 0  # the split is the same for all seeds of training
NUM_HELD_OUT = 100  # of each kind; of the benign prompts half
NUM_QUESTIONS = {"ifeval": 100, "arc": 60, "truthfulqa": 60}
PROMPT_SHARE = 0.75  # of `max_length`, at most, so that an answer has room

# Tasks of lm-evaluation-harness, on files, with prompts as the harness has them.
TASKS = {
    "ifeval": """\
output_type: generate_until
doc_to_text: prompt
doc_to_target: 0
generation_kwargs: {until: [], do_sample: false, temperature: 0.0, max_gen_toks: 256}
process_results: !function functions.process_results
metric_list:
  - {metric: prompt_level_strict_acc, aggregation: mean}
  - {metric: inst_level_strict_acc, aggregation: !function functions.agg_inst_level_acc}
  - {metric: prompt_level_loose_acc, aggregation: mean}
  - {metric: inst_level_loose_acc, aggregation: !function functions.agg_inst_level_acc}
""",
    "arc": """\
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices.label.index(answerKey)}}"
doc_to_choice: "{{choices.text}}"
metric_list: [{metric: acc}]
""",
    "truthfulqa": """\
output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: 0
doc_to_choice: "{{mc1_targets.choices}}"
metric_list: [{metric: acc}]
""",
}
FUNCTIONS = (
    "from lm_eval.tasks.ifeval.utils import agg_inst_level_acc, process_results  # noqa: F401\n"
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "ogpsa benchmark data",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("test_bed", choices=TEST_BEDS)
    add("--data", type=Path, default=Path("../shared/data"), help="folder of the real data")
    add("--model", help="model to start from; unset: that of the test bed's own files")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of toy worlds")
    add("--output", type=Path, help="folder to write into; unset: runs/TEST_BED")
    args = parser.parse_args(argv)
    output = args.output or Path("runs") / args.test_bed
    if args.test_bed == "toy":
        write_toy(args.seeds, output)
    else:
        try:
            write_real(args.test_bed, args.data, args.model, output)
        except OSError as error:
            sys.exit(f"error: {error}")
    file = output / "benchmark.yaml"
    print(f"Data and files: {output}. Compare methods: ogpsa benchmark --config {file}")


def write_toy(seeds: Sequence[int], output: Path) -> None:
    """Write the worlds of seeds, each with a base model of its own, and the test bed's files."""
    for seed in seeds:
        folder = output / f"seed-{seed}"
        world = ToyWorld(seed)
        write_world(world, folder)
        (folder / "model").unlink(missing_ok=True)
        (folder / "model").symlink_to(base_model_folder(seed).resolve())
    write_files("toy", output, {}, kinds=("benchmark",))


def write_world(world: ToyWorld, folder: Path) -> None:
    """Write the data of a world, and the files of its training and evaluation."""
    sets = {"sft": world.safety_sft(), "dpo": world.safety_preferences()}
    for name, dataset in {**sets, **world.capability_groups()}.items():
        write_rows(folder / f"{name}.jsonl", dataset)
    for name, dataset in world.evaluation_sets().items():
        rows: list[Any] = dataset.to_list()
        if rows[0]["completion"] == REFUSAL:
            # Prompts that are to be refused go in as users' messages, which end without the arrow.
            rows = [_conversation(row["prompt"].removesuffix(" =>")) for row in rows]
        write_rows(folder / f"held-out-{name}.jsonl", rows)
    write_files("toy", folder, {"runs/toy/seed-0": folder.as_posix()}, kinds=KINDS[:3])


def write_real(test_bed: str, data: Path, model: str | None, output: Path) -> None:
    """
    Split the real data for a test bed, and write it with the files.

    Raises:
        OSError: a file of the data or the model is missing.
    """
    own = load_mapping(str(find_config(f"{test_bed}_benchmark")))["model_name_or_path"]
    tokenizer = AutoTokenizer.from_pretrained(model or own)
    max_length = load_mapping(str(find_config(f"{test_bed}_sft")))["max_length"]
    for name, rows in split(data, tokenizer, max_length).items():
        write_rows(output / "data" / f"{name}.jsonl", rows)
    tasks = output / "tasks"
    tasks.mkdir(parents=True, exist_ok=True)
    (tasks / "functions.py").write_text(FUNCTIONS, encoding="utf-8")
    for name, task in TASKS.items():
        file = (output / "data" / f"{name}.jsonl").resolve().as_posix()
        text = (
            f"task: held_out_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: "
            f"{json.dumps(file)}}}}}\ntest_split: test\nnum_fewshot: 0\n{task}"
            "metadata: {version: 1.0}\n"
        )
        (tasks / f"{name}.yaml").write_text(text, encoding="utf-8")
    write_files(test_bed, output, {own: model} if model else {})


def write_files(
    test_bed: str,
    output: Path,
    replaced: Mapping[str, str],
    kinds: Sequence[str] = KINDS,
) -> None:
    """Write files of a test bed with the paths of this output."""
    new = {**replaced, f"runs/{test_bed}": output.as_posix()}
    for kind in kinds:
        text = find_config(f"{test_bed}_{kind}").read_text(encoding="utf-8")
        # At once: what is put in may hold what is to be replaced.
        text = re.sub("|".join(map(re.escape, new)), lambda found: new[found[0]], text)
        (output / f"{kind}.yaml").write_text(text, encoding="utf-8")


def split(data: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, list[Row]]:
    """
    Read the real data and split them, always in the same way.

    Args:
        data: Folder of the data.
        tokenizer: Says which samples are short enough.
        max_length: Tokens of a sample.

    Returns:
        By file: training (`sft`: refusals, `dpo`: pairs), capability groups (`stories`,
        `instructions`, `mathematics`, and `look-alikes`: answers to half of the benign prompts that
        look harmful), what is held out (`held-out-...`), and the questions of tasks.

    Raises:
        FileNotFoundError: a file of the data is missing.
    """
    for name in FILES.values():
        if not (data / name).is_file():
            raise FileNotFoundError(
                f"The test bed needs data that are not part of the project, but there is no {name} "
                f"in {data}. Name the folder that holds them with --data."
            )
    rng = random.Random(SPLIT_SEED)
    source = {name: _read_shuffled(data / file, rng) for name, file in FILES.items()}

    def fits(messages: Sequence[dict[str, str]], share: float = 1.0) -> bool:
        encoded: Any = tokenizer.apply_chat_template(list(messages), return_dict=True)
        return len(encoded["input_ids"]) <= share * max_length

    def short(rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if fits(row["prompt"], PROMPT_SHARE)]

    harmful = short([_conversation(row["prompt"]) for row in source["harmful"]])
    other = short([_conversation(row["prompt"]) for row in source["other-harmful"]])
    safe = [row["prompt"] for row in source["benign"] if row["label"] == "safe"]
    held_out, answered = safe[: len(safe) // 2], {*safe[len(safe) // 2 :]}
    instructions = short(
        [
            _conversation(f"{row['instruction']}\n{row['input']}".strip(), row["output"])
            for row in source["instructions"]
        ]
    )
    mathematics = {
        name: short([_conversation(row["question"], row["answer"]) for row in source[name]])
        for name in ("mathematics", "held-out-mathematics")
    }
    pairs = {
        name: [
            {key: row[key] for key in ("prompt", "chosen", "rejected")}
            for row in source[name]
            if all(fits(row["prompt"] + row[side]) for side in ("chosen", "rejected"))
        ]
        for name in ("pairs", "held-out-pairs")
    }
    stories = [{"text": row["text"]} for row in source["stories"]]
    return {
        "sft": [
            _conversation(row["prompt"][0]["content"], rng.choice(REFUSALS))
            for row in harmful[NUM_HELD_OUT:]
        ],
        "dpo": pairs["pairs"],
        "stories": stories[NUM_HELD_OUT:],
        "instructions": instructions[NUM_HELD_OUT // 2 :],
        "mathematics": mathematics["mathematics"],
        "look-alikes": [
            {key: row[key] for key in ("prompt", "completion")}
            for row in source["answered"]
            if row["prompt"][0]["content"] in answered
            and not is_refusal(row["completion"][0]["content"])
        ],
        "held-out-harmful": harmful[:NUM_HELD_OUT],
        "held-out-other-harmful": other[:NUM_HELD_OUT],
        "held-out-benign": [_conversation(prompt) for prompt in held_out],
        "held-out-stories": stories[:NUM_HELD_OUT],
        "held-out-instructions": instructions[: NUM_HELD_OUT // 2],
        "held-out-mathematics": mathematics["held-out-mathematics"][:NUM_HELD_OUT],
        "held-out-pairs": pairs["held-out-pairs"],
        **{name: source[name][:number] for name, number in NUM_QUESTIONS.items()},
    }


def _read_shuffled(path: Path, rng: random.Random) -> list[Row]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rng.shuffle(rows)
    return rows


def _conversation(prompt: str, completion: str = "") -> Row:
    answer = {"completion": [{"role": "assistant", "content": completion}]} if completion else {}
    return {"prompt": [{"role": "user", "content": prompt}], **answer}
