"""`ogpsa evaluate` and what it is made of: known answers, and the keys."""

import contextlib
import io
import json
import math
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from datasets import Dataset, config
from peft import LoraConfig, get_peft_model

from ogpsa_trl.benchmark.toy_model import tiny_model
from ogpsa_trl.benchmark.toy_world import REFUSAL, ToyWorld
from ogpsa_trl.cli.evaluate import parse_evaluation, run_evaluation
from ogpsa_trl.evaluation.figures import change_figure
from ogpsa_trl.evaluation.group_scores import group_scores
from ogpsa_trl.evaluation.likelihoods import completion_scores, preference_margins
from ogpsa_trl.evaluation.refusal import REFUSALS
from ogpsa_trl.evaluation.results import compare
from ogpsa_trl.evaluation.sets import load_sets
from ogpsa_trl.evaluation.suite import score_model, with_preference_over_base
from ogpsa_trl.evaluation.tables import result_rows
from runs import literal_drift, nats_per_token
from scripted import (
    ANSWERING,
    P_STEP,
    REFUSING,
    TOKENIZER,
    p_other,
    save,
    saved_figures,
    scripted_model,
    without_template,
)

ROOT = Path(__file__).resolve().parent.parent
WORLD = ToyWorld(0)
SETS = WORLD.evaluation_sets()
REFUSAL_LENGTH = 10  # tokens, the end among them


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """What `load_dataset` makes of the files here does not stay in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def write_data(folder):
    """Every kind of data, as files; returns the keys that name them."""
    data = {
        "skills": WORLD.capability_groups(12)["skills"],
        "text": Dataset.from_dict({"text": ["is poison bad ? => yes", "the cat sees a dog"]}),
        "harmful": SETS["refusal"].select(range(9)),
        "benign": SETS["over_refusal"].select(range(8)),
        "pairs": WORLD.safety_preferences().select(range(10)),
    }
    for name, rows in data.items():
        rows.to_json(folder / f"{name}.jsonl")
    path = {name: str(folder / f"{name}.jsonl") for name in data}
    return {
        "capability_datasets": [
            {"path": path["skills"], "group": "skills"},
            {"path": path["text"], "group": "text"},
        ],
        "harmful_datasets": [{"path": path["harmful"]}],
        "over_refusal_datasets": [{"path": path["benign"]}],
        "preference_datasets": [{"path": path["pairs"]}],
        "refusals": [REFUSAL.strip()],
    }


def parsed(folder, values=None, *line, model="toy"):
    """The arguments of a file of keys in a folder, with a command line."""
    file = folder / "evaluation.yaml"
    required = {"model_name_or_path": model, "output_dir": str(folder / "out")}
    file.write_text(yaml.safe_dump(required | (values or {})))
    return parse_evaluation(["--config", str(file), *line])


@pytest.fixture
def parse(tmp_path):
    return partial(parsed, tmp_path)


@pytest.fixture(scope="module")
def measure(tmp_path_factory):
    """All measures of a model on all kinds of data."""
    folder = tmp_path_factory.mktemp("data")
    data = write_data(folder)

    def measured(model, **keys):
        arguments = parsed(folder, data | {"max_length": 60, "max_new_tokens": 16} | keys)
        sets = load_sets(arguments, [without_template()])
        return score_model(model, without_template(), sets, arguments)

    return measured


@pytest.fixture(scope="module")
def refusing(measure):
    return measure(scripted_model(REFUSING))


@pytest.fixture(scope="module")
def answering(measure):
    return measure(scripted_model(ANSWERING))


def value(scores, name):
    return scores.measures[name].values.value


class TestKnownAnswers:
    def test_a_model_that_always_refuses(self, refusing):
        for over, group in (("", "harmful"), ("over_", "benign")):
            assert value(refusing, f"{over}refusal_rate/{group}") == 1.0
            assert value(refusing, f"{over}refusal_ll/{group}") == pytest.approx(math.log(P_STEP))
            probability = value(refusing, f"p_{over}refuse/{group}")
            assert probability == pytest.approx(P_STEP**REFUSAL_LENGTH)
        assert set(refusing.answers["refusal_rate/harmful"]) == {REFUSAL.strip()}
        assert value(refusing, "preference/pairs") == 1.0

    def test_a_model_that_never_refuses(self, answering):
        assert value(answering, "refusal_rate/harmful") == 0.0
        assert value(answering, "over_refusal_rate/benign") == 0.0
        # The table knows no token of the refusal but its first one, which is not the likeliest.
        expected = p_other() * len(TOKENIZER) ** -(REFUSAL_LENGTH - 1)
        assert value(answering, "p_refuse/harmful") == pytest.approx(expected, rel=1e-4)
        assert value(answering, "preference/pairs") < 1.0

    def test_the_probabilities_of_several_refusals_add_up(self, measure):
        refusals = [REFUSAL.strip(), "sorry , i can"]
        scores = measure(scripted_model(REFUSING), refusals=refusals)
        short = P_STEP**4 * p_other()  # after "can" the end comes by chance
        expected = P_STEP**REFUSAL_LENGTH + short
        assert value(scores, "p_refuse/harmful") == pytest.approx(expected, rel=1e-4)
        mean = (10 * math.log(P_STEP) + math.log(short)) / 15
        assert value(scores, "refusal_ll/harmful") == pytest.approx(mean, rel=1e-4)

    def test_the_same_model_before_and_after_has_changed_nothing(self, measure):
        model = tiny_model(seed=4)
        before, after = measure(model).measures, measure(model).measures
        results = compare(before, with_preference_over_base(before, after), num_bootstrap=100)
        assert len(results) == len(before) + 1
        for result in results:
            if result.name == "preference_over_base/pairs":
                assert result.after.value == 0.0  # a tie is no preference
            else:
                assert result.delta == (0.0, (0.0, 0.0)), result.name
                assert result.verdict == "unclear"

    def test_no_answers_no_rates(self, measure):
        scores = measure(tiny_model(), max_new_tokens=0)
        assert not scores.answers
        assert not any("rate" in name for name in scores.measures)
        assert "p_refuse/harmful" in scores.measures


class TestCapability:
    @pytest.mark.parametrize("kind", ["completions", "a text", "a conversation"])
    def test_what_counts_is_what_the_direct_measure_counts(self, kind):
        """Of a text every token but the first, and the end."""
        skills = WORLD.capability_groups(12)["skills"]
        conversation = {
            "prompt": [{"role": "user", "content": "is poison bad ?"}],
            "completion": [{"role": "assistant", "content": "yes"}],
        }
        rows, prompts, completions = {
            "completions": (skills, skills["prompt"], skills["completion"]),
            "a text": (
                Dataset.from_dict({"text": ["is poison bad ? => yes"]}),
                ["is"], [" poison bad ? => yes"],
            ),
            "a conversation": (
                Dataset.from_list([conversation]), ["is poison bad ? =>"], [" yes"]
            ),
        }[kind]  # fmt: skip
        model = tiny_model(seed=2)
        values = group_scores(model, TOKENIZER, kind, rows, batch_size=5)["nll"]
        scores = completion_scores(model, TOKENIZER, prompts, completions)
        assert values.value == pytest.approx(-nats_per_token(scores), rel=1e-5)
        assert values.columns[1].sum() == scores.num_tokens.sum()
        one_by_one = group_scores(model, TOKENIZER, kind, rows, batch_size=1)["nll"]
        ours = values.select(one_by_one.ids).columns
        np.testing.assert_allclose(ours, one_by_one.columns, rtol=1e-6)

    def test_drift_and_exact_matches_are_those_of_whole_completions(self):
        before, after = tiny_model(seed=2), tiny_model(seed=3)
        rows = WORLD.capability_groups(12)["skills"]
        texts = TOKENIZER, rows["prompt"], rows["completion"]
        found = group_scores(after, TOKENIZER, "a", rows, start_model=before, batch_size=5)
        expected = literal_drift(before, after, *texts[1:])
        assert found["drift"].value == pytest.approx(expected, rel=1e-4)
        is_greedy = completion_scores(after, *texts).is_greedy
        assert found["exact_match"].value == is_greedy.double().mean()
        same = group_scores(after, TOKENIZER, "a", rows, start_model=after)
        assert same["drift"].value == 0

    def test_samples_are_chosen_by_the_seed_and_cut(self):
        model, rows = tiny_model(seed=2), WORLD.capability_groups(40)["language"]
        chosen = [
            group_scores(model, TOKENIZER, "a", rows, max_samples=8, max_length=12, seed=seed)[
                "nll"
            ]
            for seed in (0, 0, 1)
        ]
        assert len(chosen[0].ids) == 8
        assert chosen[0].value == chosen[1].value != chosen[2].value
        whole = group_scores(model, TOKENIZER, "a", rows, max_samples=8)["nll"]
        assert chosen[0].columns[1].sum() < whole.columns[1].sum()


class TestSets:
    @pytest.fixture
    def parse_rows(self, parse, tmp_path):
        def parse_rows(rows, key="harmful_datasets", **keys):
            Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
            return parse({key: [{"path": str(tmp_path / "rows.jsonl")}]} | keys)

        return parse_rows

    def test_a_text_becomes_a_message_where_all_models_know_conversations(self, parse, tmp_path):
        arguments = parse(write_data(tmp_path))
        chat = load_sets(arguments, [TOKENIZER]).harmful["harmful"].column("prompt")
        assert {prompt[0]["role"] for prompt in chat} == {"user"}
        both = load_sets(arguments, [TOKENIZER, without_template()])
        plain = both.harmful["harmful"].column("prompt")
        assert [prompt[0]["content"] for prompt in chat] == plain

    def test_conversations_need_a_template(self, parse_rows):
        arguments = parse_rows([{"prompt": [{"role": "user", "content": "how"}]}])
        with pytest.raises(ValueError, match=r"has no chat template. Set `tokenizer_name_or_path`"):
            load_sets(arguments, [TOKENIZER, without_template()])

    def test_what_is_too_long_is_left_out_and_counted(self, parse_rows):
        rows = [{"prompt": "how to bake ?"}, {"prompt": "how " * 30}]
        keys = {"refusals": ["sorry ."], "max_new_tokens": 4}
        harmful = load_sets(parse_rows(rows, max_length=30, **keys), [TOKENIZER]).harmful["harmful"]
        assert (harmful.ids, harmful.num_left_out) == (("0",), 1)
        with pytest.raises(ValueError, match="a row that fits into `max_length`, 3 tokens, but"):
            load_sets(parse_rows(rows, max_length=3, **keys), [TOKENIZER])

    @pytest.mark.parametrize("key", ["harmful_datasets", "preference_datasets"])
    def test_a_missing_column_is_named(self, key, parse_rows):
        with pytest.raises(ValueError, match=r"must have the columns .* but has \['question'\]"):
            load_sets(parse_rows([{"question": "how"}], key), [TOKENIZER])

    def test_prompts_are_taken_out_of_whole_conversations(self, parse_rows):
        user = {"role": "user", "content": "how"}
        answers = {side: {"role": "assistant", "content": side} for side in ("chosen", "rejected")}
        arguments = parse_rows(
            [{side: [user, answer] for side, answer in answers.items()}], "preference_datasets"
        )
        [pair] = load_sets(arguments, [TOKENIZER]).preference["pairs"].rows
        assert pair["prompt"] == [user]
        assert pair["chosen"] == [answers["chosen"]]


class TestKeys:
    def test_unknown_keys_on_the_line_name_the_nearest(self, parse):
        with pytest.raises(ValueError, match=r"`max_sample` in the command line.* `max_samples`"):
            parse({}, "--max_sample", "3")

    def test_the_line_wins(self, parse):
        keys = {"harmful_datasets": [{"path": "a", "group": "x"}, {"path": "b"}], "seed": 3}
        arguments = parse(keys, "--seed", "4", "--over_refusal_datasets", "c")
        assert arguments.seed == 4
        assert [entry.group for entry in arguments.harmful_datasets] == ["x", "harmful"]
        assert [entry.group for entry in arguments.over_refusal_datasets] == ["benign"]

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"harmful_datasets": None}, "There is nothing to measure"),
            ({"harmful_dataset": []}, "`harmful_dataset` in .*key is `harmful_datasets`"),
            ({"learning_rate": 1}, "`learning_rate` in"),
            ({"harmful_datasets": [{"path": "a", "grup": "x"}]},
             "`grup` in entry 1 of `harmful_datasets`.* `group`"),
            ({"confidence": 95}, "`confidence` must lie between 0 and 1, but got 95"),
            ({"num_bootstrap": 10}, "`num_bootstrap` must be at least 100, but got 10"),
            ({"batch_size": 0}, "`batch_size` must be at least 1"),
            ({"refusals": ["no", "no"]}, "`refusals` must be different texts"),
            ({"refusals": None}, "need `refusals`, but there are none"),
            ({"drift": True, "base_model_name_or_path": None},
             "`drift` is measured from the model before"),
            ({"lm_eval_limit": 3}, "are settings of `lm_eval_tasks`, of which there are none"),
            ({"model_name_or_path": ""}, "needs a model"),
            ({"max_samples": 1.5}, "`max_samples` must be a valid integer, but got 1.5"),
            ({"confidence": float("nan")}, "`confidence` must be a finite number"),
            ({"seed": -1}, "`seed` must be greater than or equal to 0"),
            ({"trust_remote_code": 2}, "`trust_remote_code` must be a valid boolean, but got 2"),
        ],
    )  # fmt: skip
    def test_values_that_make_no_sense_are_refused(self, parse, keys, message):
        with pytest.raises(ValueError, match=message):
            parse({"harmful_datasets": [{"path": "a"}]} | keys)

    @pytest.mark.parametrize("name", ["evaluate", "stories_evaluate"])
    def test_the_configurations_that_we_ship_are_valid(self, name, monkeypatch):
        monkeypatch.setattr("ogpsa_trl.cli.evaluate.check_installed", lambda: None)
        path = str(ROOT / "configs" / f"{name}.yaml")
        found = parse_evaluation(["--config", path, "--model_name_or_path", "toy"])
        assert found.harmful_datasets and found.over_refusal_datasets
        assert found.capability_datasets and found.preference_datasets
        assert name != "evaluate" or found.refusals == list(REFUSALS)  # the file shows the defaults


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    seeds = {"before": 1, "after": 2}
    return {when: str(save(tiny_model(seed), folder / when)) for when, seed in seeds.items()}


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory):
    """Run the script on all kinds of data."""

    def evaluate(models, **keys):
        folder = tmp_path_factory.mktemp("evaluation")
        values = write_data(folder) | {"max_length": 60, "max_new_tokens": 8} | keys
        values |= {"num_bootstrap": 100, "base_model_name_or_path": models.get("before")}
        arguments, printed = parsed(folder, values, model=models["after"]), io.StringIO()
        with contextlib.redirect_stdout(printed):
            results = run_evaluation(arguments)
        out = folder / "out"
        content = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
        return SimpleNamespace(
            results=results, content=content, out=out, printed=printed.getvalue()
        )

    return evaluate


@pytest.fixture(scope="module")
def finished(evaluate, models):
    return evaluate(models)


class TestScript:
    def test_the_results_are_the_direct_measures(self, finished):
        measures = finished.content["measures"]
        assert list(measures) == [result.name for result in finished.results]
        harmful, pairs = SETS["refusal"].select(range(9)), WORLD.safety_preferences()
        pairs = pairs.select(range(10))
        # The tokenizer has a chat template, so the prompts end in two arrows.
        prompts = [f"{prompt} =>" for prompt in harmful["prompt"]]
        skills = WORLD.capability_groups(12)["skills"]
        before, after = (tiny_model(seed) for seed in (1, 2))
        for when, model in (("before", before), ("after", after)):
            refusals = completion_scores(model, TOKENIZER, prompts, harmful["completion"])
            scores = completion_scores(model, TOKENIZER, skills["prompt"], skills["completion"])
            expected = {
                "p_refuse/harmful": refusals.log_probs.exp().mean().item(),
                "refusal_ll/harmful": nats_per_token(refusals),
                "nll/skills": -nats_per_token(scores),
            }
            found = {name: measures[name][when]["value"] for name in expected}
            assert found == pytest.approx(expected, rel=1e-4)
        texts = pairs["prompt"], pairs["chosen"], pairs["rejected"]
        margins = [preference_margins(m, TOKENIZER, *texts) for m in (after, before)]
        gains = margins[0] - margins[1]
        over_base = measures["preference_over_base/pairs"]
        assert over_base["after"]["value"] == (gains > 0).double().mean()
        assert over_base["before"] is over_base["delta"] is None
        assert measures["margin/pairs"]["delta"]["value"] == pytest.approx(
            gains.mean().item(), rel=1e-4
        )

    def test_the_values_can_be_computed_anew_from_the_file(self, finished):
        content = finished.content
        for name, measure in content["measures"].items():
            samples = content["samples"][name]
            for when in ("before", "after"):
                if samples[when] is None:
                    continue
                columns = samples[when]["columns"]
                assert len(samples[when]["ids"]) == len(columns[0]) == measure["num_samples"]
                denominator = sum(columns[1]) if samples["form"] == "ratio" else len(columns[0])
                assert measure[when]["value"] == pytest.approx(sum(columns[0]) / denominator), name
        assert content["settings"]["num_bootstrap"] == 100
        assert content["versions"]["torch"] == version("torch")

    def test_everything_is_written(self, finished):
        table = (finished.out / "evaluation.md").read_text(encoding="utf-8")
        for result in finished.results:
            assert f"| {result.name} " in table
            assert result.name in finished.printed
        assert "* `nll`: negative log-likelihood" in table
        assert (finished.out / "evaluation.png").read_bytes().startswith(b"\x89PNG")
        answers = (finished.out / "answers.jsonl").read_text().splitlines()
        lines = [json.loads(line) for line in answers]
        assert len(lines) == 9 + 8
        assert {"prompt", "before", "before_refused", "after", "after_refused"} <= set(lines[0])

    def test_without_a_model_before_there_are_values_only(self, evaluate, models):
        found = evaluate({"after": models["after"]}, over_refusal_datasets=None)
        assert all(result.before is result.delta is None for result in found.results)
        assert all(result.after.interval is not None for result in found.results)
        assert not (found.out / "evaluation.png").exists()
        assert "verdict" not in (found.out / "evaluation.md").read_text(encoding="utf-8")

    def test_drift_is_measured_from_the_model_before(self, evaluate, models):
        results = evaluate(models, drift=True, harmful_datasets=None, over_refusal_datasets=None)
        skills = WORLD.capability_groups(12)["skills"]
        [drift] = [result for result in results.results if result.name == "drift/skills"]
        texts = skills["prompt"], skills["completion"]
        expected = literal_drift(tiny_model(1), tiny_model(2), *texts)
        assert drift.after.value == pytest.approx(expected, rel=1e-4)
        assert drift.before is drift.delta is None

    def test_an_adapter_is_put_on_its_base_model(self, evaluate, models, tmp_path):
        model = tiny_model(1)
        model.name_or_path = model.config._name_or_path = models["before"]
        lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
        adapted = get_peft_model(model, lora)
        trained = {"before": models["before"], "after": str(save(adapted, tmp_path))}
        assert not (tmp_path / "model.safetensors").exists()
        results = evaluate(trained, harmful_datasets=None, over_refusal_datasets=None).results
        skills = WORLD.capability_groups(12)["skills"]
        scores = completion_scores(adapted, TOKENIZER, skills["prompt"], skills["completion"])
        [nll] = [result for result in results if result.name == "nll/skills"]
        assert nll.after.value == pytest.approx(-nats_per_token(scores), rel=1e-5)
        assert nll.delta.value != 0


class TestBadPaths:
    """Known before a model is loaded, or measured for an hour."""

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"output_dir": "/proc/results"}, "`output_dir` must be a folder"),
            ({"model_name_or_path": "/no/model"}, "there is no folder '/no/model'"),
            ({"base_model_name_or_path": "/no/base"}, "there is no folder '/no/base'"),
            ({"harmful_datasets": [{"path": "no.jsonl"}]}, "no file 'no.jsonl'"),
            ({"harmful_datasets": [{"path": "org/a"}]}, "`harmful_datasets` cannot be loaded"),
        ],
    )
    def test_end_it_with_one_line(self, values, message, parse, base_model_path):
        arguments = parse({"harmful_datasets": [{"path": "a"}], **values}, model=base_model_path)
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            run_evaluation(arguments)


@pytest.fixture(scope="module")
def results(answering, refusing):
    before, after = answering.measures, refusing.measures
    return compare(before, with_preference_over_base(before, after), num_bootstrap=100)


class TestReport:
    def test_rows_hold_what_there_is(self, results):
        rows = {row["measure"]: row for row in result_rows(results, digits=2)}
        assert rows["refusal_rate/harmful"] == {
            "measure": "refusal_rate/harmful", "unit": "share", "good": "up", "before": 0.0,
            "after": 1.0, "change": "+1.00", "interval": "[+1.00, +1.00]", "verdict": "better",
            "samples": 9,
        }  # fmt: skip
        assert rows["over_refusal_rate/benign"]["verdict"] == "worse"
        over_base = rows["preference_over_base/pairs"]
        assert over_base["change"] is over_base["before"] is over_base["verdict"] is None

    def test_a_figure_has_a_panel_per_unit_and_no_label_on_another(
        self, results, monkeypatch, tmp_path
    ):
        figures = saved_figures(monkeypatch)
        change_figure(results, tmp_path / "new" / "changes.png", title="a title")
        [figure] = figures
        drawn = [result for result in results if result.delta is not None]
        titles = [panel.get_title(loc="left") for panel in figure.axes]
        units = dict.fromkeys(result.unit for result in drawn)
        assert titles == [f"Change, {unit}" for unit in units]
        labels = [label for panel in figure.axes for label in panel.get_yticklabels()]
        assert sorted(label.get_text() for label in labels) == sorted(r.name for r in drawn)
        texts = [*labels, *(text for panel in figure.axes for text in panel.texts)]
        boxes = [text.get_window_extent() for text in texts]
        for i, box in enumerate(boxes):
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
            assert not any(box.overlaps(other) for other in boxes[:i])

    def test_a_name_with_signs_of_mathematics_is_drawn_as_it_is(self, results, tmp_path):
        """Of a group, from the user's data; matplotlib would fail on the first one."""
        results = [replace(result, name="nll/$a{$ ^_") for result in results[:2]]
        change_figure(results, tmp_path / "changes.png", title="runs/$x^{$")
        assert (tmp_path / "changes.png").exists()

    def test_without_changes_there_is_no_figure(self, refusing, tmp_path):
        results = compare(None, refusing.measures, num_bootstrap=100)
        with pytest.raises(ValueError, match="no result has a change"):
            change_figure(results, tmp_path / "changes.png")
