"""One short stage on a real pretrained model and real data, which lie outside the project."""

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import config
from transformers import AutoModelForCausalLM, AutoTokenizer

from ogpsa_trl.benchmark import data, demo
from ogpsa_trl.benchmark.testbed import parse_benchmark
from ogpsa_trl.capability_set.set_report import group_rows
from ogpsa_trl.cli import capability
from ogpsa_trl.cli.capability import parse_capability_set
from ogpsa_trl.evaluation.json_files import write_rows
from ogpsa_trl.evaluation.likelihoods import completion_scores
from ogpsa_trl.evaluation.refusal import REFUSALS, is_refusal
from runs import nats_per_token

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
MAX_LENGTH = 256

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not DATA.is_dir(), reason="no data in ../shared/data"),
]


CHECKPOINT = DATA / "checkpoints" / "stories260K"


@pytest.fixture(scope="module")
def base():
    return (
        AutoModelForCausalLM.from_pretrained(CHECKPOINT),
        AutoTokenizer.from_pretrained(CHECKPOINT),
    )


@pytest.fixture(scope="module")
def rows(base):
    return data.split(DATA, base[1], MAX_LENGTH)


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    """The folder of the test bed as it is written."""
    output = tmp_path_factory.mktemp("stories")
    data.write_real("stories", DATA, str(CHECKPOINT), output)
    return output


def prompts_of(rows):
    return {json.dumps(row["prompt"]) for row in rows}


def literal_story_nll(model, tokenizer, stories):
    """Nats per token, one text at a time, with the end that training adds."""
    total, num_tokens = 0.0, 0
    for story in stories:
        ids = torch.tensor(tokenizer(story + tokenizer.eos_token)["input_ids"][:MAX_LENGTH])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        total -= logits.log_softmax(-1).gather(-1, ids[1:, None]).sum().item()
        num_tokens += len(ids) - 1
    return total / num_tokens


def test_nothing_that_is_held_out_is_trained_on(rows):
    trained_on = prompts_of(
        row
        for name in ("sft", "dpo", "instructions", "mathematics", "look-alikes")
        for row in rows[name]
    )
    for name in ("harmful", "other-harmful", "benign", "instructions", "mathematics", "pairs"):
        assert prompts_of(rows[f"held-out-{name}"]).isdisjoint(trained_on), name
    texts = [{row["text"] for row in rows[name]} for name in ("stories", "held-out-stories")]
    assert texts[0].isdisjoint(texts[1])
    assert not any(is_refusal(row["completion"][0]["content"]) for row in rows["look-alikes"])


def test_the_model_knows_stories_better_than_anything_else(rows, base):
    model, tokenizer = base
    stories = [row["text"] for row in rows["held-out-stories"]]
    # Nats a token. A wrong tokenizer or a wrong conversion of the weights gives twice as many.
    nats = literal_story_nll(model, tokenizer, stories)
    assert 1.4 < nats < 1.8
    prompts = [json.dumps(row["prompt"]) for row in rows["held-out-harmful"]]
    assert literal_story_nll(model, tokenizer, prompts) > 2 * nats


def test_a_stage_runs_through_the_training_script(rows, base, tmp_path):
    """The groups are cut to a few samples, all of which the first refresh must have seen."""
    model, tokenizer = base
    few = {name: rows[name][:12] for name in ("stories", "instructions")}
    data.write_real("stories", DATA, str(CHECKPOINT), tmp_path)
    for name, members in few.items():
        write_rows(tmp_path / "data" / f"{name}.jsonl", members)
    write_rows(tmp_path / "data" / "look-alikes.jsonl", few["instructions"][:1])
    few["instructions"].append(few["instructions"][0])
    config = tmp_path / "sft.yaml"
    options = {
        "output_dir": tmp_path / "sft",
        "preset": "paper",
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
    }
    words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    demo.train(config, words, tmp_path / "log.txt", num_threads=1)

    state = tmp_path / "sft" / "checkpoint-2" / "trainer_state.json"
    first, second, *_ = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    requests, answers = (
        [row[column] for row in few["instructions"]] for column in ("prompt", "completion")
    )
    scores = completion_scores(model, tokenizer, requests, answers, max_length=MAX_LENGTH)
    # Float32 forward passes of different shapes and another attention kernel.
    close = {"rel": 1e-3}
    assert first["ogpsa/capability_loss/instructions"] == pytest.approx(
        -nats_per_token(scores), **close
    )
    stories = [row["text"] for row in few["stories"]]
    assert first["ogpsa/capability_loss/stories"] == pytest.approx(
        literal_story_nll(model, tokenizer, stories), **close
    )
    assert first["ogpsa/rank"] == 2  # one direction a group in every tensor
    assert all(0 < entry["ogpsa/removed_fraction"] < 1 for entry in (first, second))

    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    changes = [
        (after - before).abs().max().item()
        for after, before in zip(trained.parameters(), model.parameters(), strict=True)
    ]
    # AdamW moves an entry by at most about the learning rate in a step.
    assert 0 < max(changes) < 2 * 2e-3  # of configs/stories_sft.yaml
    assert not any(math.isnan(change) for change in changes)


def test_the_measures_of_the_test_bed_are_literal_ones(rows, base, bed):
    """By other code: TRL's preparation of the data for one, samples one by one for another."""
    model, tokenizer = base
    found = parse_benchmark(["--config", str(bed / "benchmark.yaml")]).measure(CHECKPOINT, 0)
    values = found.values
    close = {"rel": 1e-3}  # float32 forward passes of different shapes
    stories = [row["text"] for row in rows["held-out-stories"]]
    assert values["nll/stories"] == pytest.approx(
        literal_story_nll(model, tokenizer, stories), **close
    )
    for group, name in (("advbench", "harmful"), ("xstest", "benign")):
        prompts = [row["prompt"] for row in rows[f"held-out-{name}"]]
        asked = [row["prompt"] for row in found.answers if row["measure"].endswith(group)]
        assert all(prompt in prompts for prompt in asked)
        each = [prompt for prompt in asked for _ in REFUSALS]
        answers = [[{"role": "assistant", "content": refusal}] for refusal in REFUSALS]
        scores = completion_scores(model, tokenizer, each, answers * len(asked))
        measure = "refusal_ll" if name == "harmful" else "over_refusal_ll"
        expected = nats_per_token(scores)
        assert values[f"{measure}/{group}"] == pytest.approx(expected, **close)
    assert values["drift/instructions"] == values["distance"] == 0
    # It was trained on stories only: in some of them somebody is sorry.
    assert values["refusal_rate/advbench"] < 0.1


def test_the_example_of_a_capability_set_is_what_the_documentation_shows(tmp_path, monkeypatch):
    """But for what the model writes itself: on another machine one word may be another."""
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    text = (ROOT / "configs" / "capability_set.yaml").read_text(encoding="utf-8")
    file = tmp_path / "set.yaml"
    file.write_text(text.replace("../shared/data", str(DATA)), encoding="utf-8")
    line = ["--config", str(file), "--output_dir", str(tmp_path / "out"), "--device_map", "cpu"]
    figures = capability.build_capability_set(*parse_capability_set(line))
    rows = group_rows(figures)
    columns = list(rows[0])
    document = (ROOT / "docs" / "capability_data.md").read_text(encoding="utf-8")
    shown = {
        cells[1]: [float(cell) for cell in cells[2:-1]]
        for cells in ([c.strip() for c in line.split("|")] for line in document.splitlines())
        if len(cells) == len(columns) + 2 and cells[1] in figures["groups"]
    }
    assert set(shown) == {"stories", "maths", "requests", "look_alikes"}
    for row in rows[:2]:
        expected = pytest.approx(shown[row["group"]], abs=2e-3)  # three digits are shown
        assert [row[column] for column in columns[1:]] == expected
    for row in rows[2:]:
        assert row["loss"] == pytest.approx(shown[row["group"]][-2], abs=0.2)
        assert row["generated"] == 100
    assert any("'requests' and 'look_alikes' are redundant" in w for w in figures["warnings"])
    assert "over-refusal" not in " ".join(figures["warnings"])


@pytest.mark.parametrize(("model", "right"), [("gpt4", 0.95), ("llama2orig", 0.90),
                                              ("mistralinstruct", 0.86)])  # fmt: skip
def test_keywords_judge_as_well_as_their_documentation_says(model, right):
    path = DATA / "safety" / "xstest_completions_human_labelled.jsonl"
    answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    answers = [answer for answer in answers if answer["model"] == model]
    refused = [answer["human_label"] != "1_full_compliance" for answer in answers]
    judged = [is_refusal(answer["completion"]) for answer in answers]
    agreement = sum(a == b for a, b in zip(judged, refused, strict=True)) / len(answers)
    assert agreement == pytest.approx(right, abs=0.005)
    seen = sum(a and b for a, b in zip(judged, refused, strict=True)) / sum(refused)
    assert (seen < 0.2) == (model == "mistralinstruct")
