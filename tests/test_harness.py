"""Tasks of lm-evaluation-harness, from files, without the Hub; and without the package."""

import json
import math
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import config
from transformers import RwkvConfig, RwkvForCausalLM

from ogpsa_trl.benchmark.toy_model import tiny_model
from ogpsa_trl.benchmark.toy_world import ToyWorld
from ogpsa_trl.cli.evaluate import parse_evaluation, run_evaluation
from ogpsa_trl.evaluation import harness
from ogpsa_trl.evaluation.likelihoods import completion_scores
from scripted import REFUSING, TOKENIZER, save, scripted_model

ROOT = Path(__file__).resolve().parent.parent
ROWS = ToyWorld(0).safety_preferences().select(range(12))

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval not installed")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What `load_dataset` makes of the files here does not stay in the user's cache."""
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
num_fewshot: 0
"""
CHOICE = f"""{COMMON}
doc_to_text: "{{{{prompt}}}}"
output_type: multiple_choice
doc_to_choice: "{{{{options}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
# A choice, right or wrong, a text, a generation with a metric of its own kind, and a group.
TASKS = {
    "right": f"task: right\n{CHOICE}\ndoc_to_target: 0",
    "wrong": f"task: wrong\n{CHOICE}\ndoc_to_target: 1",
    "text": f"""task: text\n{COMMON}
doc_to_text: ""
doc_to_target: "{{{{prompt}}}}"
output_type: loglikelihood_rolling
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
""",
    "answers": f"""task: answers\n{COMMON}
doc_to_text: "{{{{prompt}}}}"
doc_to_target: ""
output_type: generate_until
generation_kwargs: {{until: [<eos>], do_sample: false, max_gen_toks: 12}}
process_results: !function utils.says_sorry
metric_list:
- {{metric: sorry, aggregation: !function utils.most, higher_is_better: false}}
""",
    "both": "group: both\ntask: [right, wrong]",
}
# Its functions import the package `evaluate`, as tasks of the harness do.
UTILS = """
from evaluate import load
def says_sorry(doc, results): return {'sorry': 'sorry' in results[0]}
def most(items): return max(items)
"""


@pytest.fixture
def tasks(tmp_path):
    """A folder of tasks."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"prompt": row["prompt"], "options": [row["chosen"].strip(), row["rejected"].strip()]}
        for row in ROWS
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("ROWS", f"{folder}/rows.jsonl"))
    (folder / "utils.py").write_text(UTILS)
    return folder


@needs_harness
class TestScores:
    def test_of_choices_are_those_of_the_likelihoods(self, tasks):
        """Those of a group are over all samples of its tasks."""
        model = tiny_model(seed=5)
        scores = harness.harness_scores(model, TOKENIZER, ["right", "both"], include_path=tasks)
        assert list(scores) == ["right/acc", "both/acc"]
        right, both = scores["right/acc"], scores["both/acc"]
        assert (right.unit, right.higher_is_better) == ("share", True)
        chosen, rejected = (
            completion_scores(
                model, TOKENIZER, ROWS["prompt"], ROWS[side], append_eos=False
            ).log_probs
            for side in ("chosen", "rejected")
        )
        expected = (chosen > rejected).double().tolist()
        assert right.values.columns[0].tolist() == expected
        assert both.values.columns[0].tolist() == expected + [1 - value for value in expected]
        assert both.values.value == 0.5
        assert len(set(both.values.ids)) == 24

    def test_of_texts_are_ratios_of_sums(self, tasks):
        model = tiny_model(seed=5)
        scores = harness.harness_scores(model, TOKENIZER, ["text"], include_path=tasks)
        perplexity, bits = scores["text/word_perplexity"], scores["text/bits_per_byte"]
        assert (perplexity.higher_is_better, bits.higher_is_better) == (False, False)
        assert (perplexity.values.form, bits.values.form) == ("exp(ratio)", "ratio")
        # The harness puts the end of the text before it, and scores all of its tokens.
        texts = [f" {prompt}" for prompt in ROWS["prompt"]]
        num_characters = sum(map(len, ROWS["prompt"]))
        starts = ["<eos>"] * len(texts)
        found = completion_scores(model, TOKENIZER, starts, texts, append_eos=False)
        literal = -found.log_probs.sum().item() / math.log(2)
        assert bits.values.value * num_characters == pytest.approx(literal, rel=1e-4)
        num_words = sum(len(prompt.split()) for prompt in ROWS["prompt"])
        assert perplexity.values.value == pytest.approx(
            math.exp(literal * math.log(2) / num_words), rel=1e-3
        )

    def test_of_any_metric_are_the_items_with_their_function(self, tasks):
        scores = harness.harness_scores(
            scripted_model(REFUSING), TOKENIZER, ["answers"], include_path=tasks, limit=3
        )
        sorry = scores["answers/sorry"]
        assert (sorry.values.form, sorry.values.items) == ("aggregate", (True,) * 3)
        assert (sorry.values.value, sorry.higher_is_better) == (1.0, False)

    def test_of_a_model_that_mixes_up_rows_are_made_one_by_one(self, tasks, monkeypatch):
        config = RwkvConfig(vocab_size=len(TOKENIZER), hidden_size=16, num_hidden_layers=2)
        model, num_rows = RwkvForCausalLM(config), []
        generate = model.generate

        def counted(**inputs):
            num_rows.append(len(inputs["input_ids"]))
            return generate(**inputs)

        monkeypatch.setattr(model, "generate", counted)
        harness.harness_scores(model, TOKENIZER, ["answers"], include_path=tasks, limit=3)
        assert num_rows == [1, 1, 1]

    def test_leave_generators_and_tokenizer_alone(self, tasks):
        padding = TOKENIZER.padding_side
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        harness.harness_scores(tiny_model(), TOKENIZER, ["right"], include_path=tasks, limit=2)
        assert random.getstate() == states[0]
        assert np.random.get_state()[1].tolist() == states[1]
        assert torch.equal(torch.get_rng_state(), states[2])
        assert TOKENIZER.padding_side == padding

    def test_of_a_folder_that_is_missing_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="must name a folder of task files, but there is none"):
            harness.harness_scores(tiny_model(), TOKENIZER, ["x"], include_path=tmp_path / "no")

    @pytest.mark.slow
    def test_of_an_unknown_task_are_refused(self, tasks):
        """Slow: all the tasks that come with the harness are read for their names."""
        with pytest.raises(ValueError, match=r"no task 'rigth' .* known task is 'right'"):
            harness.harness_scores(tiny_model(), TOKENIZER, ["rigth"], include_path=tasks)


def test_tasks_need_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    line = ["--model_name_or_path", "toy", "--lm_eval_tasks", "arc_easy"]
    with pytest.raises(ValueError, match=r"not installed. Install it with `pip install 'ogpsa_trl"):
        parse_evaluation(line)


@pytest.fixture
def line(tasks, tmp_path):
    """The command line of an evaluation of two models."""
    for name, model in (("before", tiny_model()), ("after", scripted_model(REFUSING))):
        save(model, tmp_path / name)
    words = ["--model_name_or_path", tmp_path / "after", "--base_model_name_or_path"]
    words += [tmp_path / "before", "--lm_eval_include_path", tasks, "--num_bootstrap", "100"]
    return [*map(str, words), "--output_dir", str(tmp_path / "out")]


@needs_harness
def test_the_script_runs_tasks(line, tmp_path):
    run_evaluation(parse_evaluation([*line, "--lm_eval_tasks", "right"]))
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert content["measures"]["right/acc"]["after"] == {"value": 1.0, "interval": [1.0, 1.0]}
    assert "lm_eval" in content["versions"]


@needs_harness
@pytest.mark.slow
def test_the_script_runs_tasks_that_import_a_package_of_its_name(line, tmp_path):
    tasks = ["--lm_eval_tasks", "answers"]
    result = subprocess.run(
        [sys.executable, "-m", "ogpsa_trl.cli.main", "evaluate", *line, *tasks],
        capture_output=True, text=True, timeout=240, cwd=tmp_path, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert content["measures"]["answers/sorry"]["after"]["value"] == 1.0
    assert content["samples"]["answers/sorry"]["after"]["items"] == [True] * 12
    assert "answers/sorry" in result.stdout
