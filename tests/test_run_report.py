"""The report of a run: what is on the page, and that it is what the log holds."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pytest

from ogpsa_trl import GateConfig, OGPSAConfig
from ogpsa_trl.cli import report as report_command
from ogpsa_trl.evaluation.intervals import mean_of
from ogpsa_trl.evaluation.results import Measured, compare
from ogpsa_trl.run_report import save_run_settings, write_report
from ogpsa_trl.run_report.charts import MOST_POINTS, Chart, Line, drawn, style, svg
from ogpsa_trl.run_report.log import RunLog, Series
from runs import capability_groups, contradicted, gated, make_trainer, safety_data

HOSTILE = "<script>alert('$1$')</script> & \"_language\""
CONFIGS = {
    "sft": OGPSAConfig(num_samples=6, samples_per_refresh=3, refresh_interval=2),
    "dpo": OGPSAConfig.from_preset("paper-theorem", num_samples=6, refresh_interval=3),
    "plain": None,
}
GATE = GateConfig(gate_num_samples=4, gate_interval=2, max_capability_loss_increase=10.0)
VOID = {"meta", "path", "rect", "use", "br"}


class Page(HTMLParser):
    """The elements of a page, its text, its tables, and the labels and pictures of its charts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.styles = [], [], [], []
        self.tables, self.charts = [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "path" and "figure" in self.open and "li" not in self.open:
            list(self.charts.values())[-1]["paths"].append(dict(attributes))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            self.styles.append(data)
            return
        self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data
        elif self.open[-2:] == ["figcaption", "h3"]:
            self.charts[data] = {"labels": [], "paths": []}
        elif self.open[-1:] == ["li"]:
            list(self.charts.values())[-1]["labels"].append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def rows(self, heading):
        """The rows of the table with this first column, by their first cell and their columns."""
        [table] = [table for table in self.tables if table[0][0] == heading]
        return {row[0]: dict(zip(table[0][1:], row[1:], strict=True)) for row in table[1:]}


def page(folder, **options):
    return Page(write_report(folder, **options).read_text())


def make_run(kind, model, folder):
    """A trained run with everything that the report reads."""
    stage = "sft" if kind == "plain" else kind
    skills, language = capability_groups().values()
    groups = None if kind == "plain" else {"skills": skills, HOSTILE: language}
    trainer = make_trainer(
        stage, model, folder, capability=groups, config=CONFIGS[kind],
        more={"eval_dataset": safety_data(stage, 4)}, max_steps=5, eval_strategy="steps",
        eval_steps=2, optim="adamw_torch", learning_rate=1e-2,
        save_strategy="steps" if kind == "sft" else "no", save_steps=2,
    )  # fmt: skip
    gate = gated(trainer, {"held out": contradicted(), HOSTILE: contradicted(6)}, GATE)
    save_run_settings(trainer, gate, {"dataset_name": HOSTILE})
    trainer.train()
    trainer.save_state()
    return trainer


class Run(NamedTuple):
    folder: Path
    log: list
    page: Page


@pytest.fixture(scope="module")
def runs(base_model_path, tmp_path_factory):
    """A run of each kind."""

    def run(folder):
        log = make_run(folder.name, base_model_path, folder).state.log_history
        return Run(folder, log, page(folder))

    folder = tmp_path_factory.mktemp("runs")
    return {kind: run(folder / kind) for kind in CONFIGS}


@pytest.fixture(params=CONFIGS)
def run(request, runs):
    return runs[request.param]


def values_of(log, name):
    return [entry[name] for entry in log if name in entry]


def write_state(folder, log, **state):
    folder.mkdir(parents=True, exist_ok=True)
    content = {"log_history": log, "global_step": log[-1]["step"] if log else 0, "max_steps": 10}
    (folder / "trainer_state.json").write_text(json.dumps(content | state))
    return folder


class TestPage:
    def test_it_needs_nothing_else(self, run):
        shown = run.page
        assert not {tag for tag, _ in shown.tags} & {"script", "link", "img", "iframe", "object"}
        for _, attributes in shown.tags:
            for name, value in attributes.items():
                assert not name.startswith("on")
                assert "//" not in value
                if name.endswith("href") or name == "src":
                    assert value.startswith("#")
                assert all(word.startswith("#") for word in re.findall(r"url\((.*?)\)", value))
        assert not re.search(r"url\(|@import|//", "".join(shown.styles))

    def test_every_reference_has_its_one_element(self, run):
        attributes = [attributes for _, attributes in run.page.tags]
        ids = [found["id"] for found in attributes if "id" in found]
        assert len(set(ids)) == len(ids)
        values = "\n".join(value for found in attributes for value in found.values())
        references = re.findall(r"^#(.+)$|url\(#(.+?)\)", values, re.MULTILINE)
        assert {a or b for a, b in references} <= set(ids)

    def test_every_logged_group_is_in_charts_and_tables(self, run):
        _, log, shown = run
        names = [name for entry in log for name in entry]
        for metric, chart, column in (
            ("capability_loss", "Capability loss", "capability group"),
            ("gate_loss", "Held-out capability loss", "gate group"),
        ):
            prefix = f"ogpsa/{metric}/"
            groups = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
            if groups:
                assert groups == set(shown.rows(column))
                assert groups <= set(shown.charts[chart]["labels"])
            else:
                assert chart not in shown.charts
                assert column not in shown.text

    def test_groups_stand_in_the_order_of_the_settings(self, runs):
        """Not in that of a saved log, which is the alphabet's."""
        for kind in ("sft", "dpo"):
            shown = runs[kind].page
            assert shown.charts["Capability loss"]["labels"] == ["skills", HOSTILE]
            assert list(shown.rows("capability group")) == ["skills", HOSTILE]
            assert list(shown.rows("gate group")) == ["held out", HOSTILE]

    def test_tables_hold_what_the_log_holds(self, run):
        _, log, shown = run
        for name, row in shown.rows("metric").items():
            is_ours = any(f"ogpsa/{name}" in entry for entry in log)
            values = values_of(log, f"ogpsa/{name}" if is_ours else name)
            expected = [values[0], values[-1], min(values), max(values)]
            cells = [row[column] for column in ("first", "last", "lowest", "largest")]
            assert cells == [f"{value:.4g}" for value in expected]
        for heading, loss, rise in (
            ("capability group", "capability_loss", "drift"),
            ("gate group", "gate_loss", "gate_increase"),
        ):
            if heading not in shown.text:
                continue
            for name, row in shown.rows(heading).items():
                losses = values_of(log, f"ogpsa/{loss}/{name}")
                assert row["loss, first"] == f"{losses[0]:.4g}"
                assert row["loss, last"] == f"{losses[-1]:.4g}"
                rises = values_of(log, f"ogpsa/{rise}/{name}")
                [last, largest] = [row[column] for column in row if column.split(", ")[0] in rise]
                assert (last, largest) == (f"{rises[-1]:.4g}", f"{max(rises):.4g}")

    def test_lines_are_the_log(self, run):
        """Places in the picture are an affine function of steps and values."""
        log, charts = run.log, run.page.charts
        assert {"Training loss", "Held-out capability loss"} <= charts.keys()
        for title, names in (
            ("Training loss", ["loss", "eval_loss"]),
            ("Capability loss", ["ogpsa/capability_loss/skills"]),
            ("What is taken out", ["ogpsa/removed_fraction"]),
            ("Time of a refresh", ["ogpsa/refresh_seconds"]),
        ):
            for index, name in enumerate(names if title in charts else []):
                points = [(e["step"], e[name]) for e in log if name in e]
                [line] = [
                    path["d"] for path in charts[title]["paths"]
                    if f"stroke: var(--line-{index}); stroke-width" in path["style"]
                ]  # fmt: skip
                places = np.array([part.split()[-2:] for part in line.split("\n") if part], float)
                assert_affine(places[:, 0], [step for step, _ in points])
                assert_affine(-places[:, 1], [value for _, value in points])

    def test_names_from_data_are_text(self, run):
        shown = run.page
        assert "<script" not in (run.folder / "report.html").read_text()
        assert shown.rows("gate group").keys() == {"held out", HOSTILE}
        assert shown.text.count(HOSTILE) >= 3  # chart, table, settings

    def test_it_says_what_the_run_is(self, runs):
        kinds = {kind: run.page.text for kind, run in runs.items()}
        assert "SFTTrainer with OGPSA" in kinds["sft"]
        assert "DPOTrainer with OGPSA" in kinds["dpo"]
        assert "SFTTrainer, without OGPSA" in kinds["plain"]
        for text in kinds.values():
            assert "Optimizer steps 5 of 5" in text
            assert "torch" in text
            assert "learning_rate 0.01" in text
            assert "cut off" not in text
        assert "capability_loss kl" in kinds["sft"]
        assert "refresh_interval 3" in kinds["dpo"]
        assert "refresh_interval" not in kinds["plain"]

    def test_charts_are_those_that_the_log_has_values_for(self, runs):
        charts = {kind: list(run.page.charts) for kind, run in runs.items()}
        assert charts["plain"] == ["Training loss", "Held-out capability loss"]
        # A divergence is its own drift, so there is one chart of both.
        assert charts["sft"] == [
            "Training loss", "Capability loss", "Held-out capability loss", "What is taken out",
            "In the capability subspace", "Restoration", "Time of a refresh",
        ]  # fmt: skip
        assert charts["dpo"] == [
            "Training loss", "Preference accuracy", "Capability loss",
            "Drift of the capability loss", "Held-out capability loss", "What is taken out",
            "In the capability subspace", "Cosine of safety and capability gradient",
            "Time of a refresh",
        ]  # fmt: skip


def assert_affine(places, values):
    assert len(places) == len(values)
    slope, offset = np.polyfit(values, places, 1)
    assert slope > 0
    # Places have six digits after the point, in a picture of some hundred units.
    assert np.abs(slope * np.array(values) + offset - places).max() < 1e-3


class TestRunsThatWereCutOff:
    def test_the_last_checkpoint_is_reported(self, runs, tmp_path):
        for name in ("checkpoint-2", "checkpoint-4", "run_settings.json"):
            copy = shutil.copytree if name.startswith("checkpoint") else shutil.copy
            copy(runs["sft"].folder / name, tmp_path / name)
        shown = page(tmp_path)
        assert "The run was cut off, or is still going on: this is the log of checkpoint-4." in (
            shown.text
        )
        assert "Optimizer steps 4 of 5" in shown.text
        assert shown.rows("capability group").keys() == {"skills", HOSTILE}
        assert "capability_loss kl" in shown.text
        assert "capability_loss kl" in page(tmp_path / "checkpoint-2").text  # settings lie above

    def test_checkpoints_count_by_number(self, tmp_path):
        for step in (9, 10):
            write_state(tmp_path / f"checkpoint-{step}", [{"loss": 1.0, "step": step}])
        assert RunLog.read(tmp_path).step == 10


class TestNotes:
    def test_a_gate_that_is_not_passed(self, tmp_path):
        settings = {"gate": {"max_capability_loss_increase": 0.1}, "num_processes": 1}
        for increase, is_shown in ((0.2, True), (0.1, False), (math.nan, True)):
            write_state(tmp_path, [{"ogpsa/gate_largest_increase": increase, "step": 10}])
            (tmp_path / "run_settings.json").write_text(json.dumps(settings))
            text = page(tmp_path).text
            assert ("The capability gate is not passed" in text) == is_shown
        assert "the largest increase is nan nats per token, the tolerance 0.1." in text

    @pytest.mark.parametrize(
        ("log", "note"),
        [
            ([{"loss": 1.0, "step": 10}], "The folder holds no settings"),
            (
                [{"loss": 1.0, "step": 3}, {"train_runtime": 100.0, "step": 3}],
                "Training was stopped after 3 of 10 steps.",
            ),
            (
                [{"ogpsa/kept_gradients": 1, "step": step} for step in (4, 9)],
                "gradients were not finite, so that older ones were kept, up to the steps 4, 9.",
            ),
            (
                [{"ogpsa/lost_gradients": 1, "step": step} for step in (4, 9)],
                "gradients were not finite, and counted as zero, up to the steps 4, 9.",
            ),
            ([], "Nothing that could be drawn was logged."),
        ],
    )
    def test_what_is_missing_or_went_wrong_is_said(self, log, note, tmp_path):
        text = page(write_state(tmp_path, log)).text
        assert note in text
        assert "stopped" not in note or "cut off" not in text


class TestLog:
    def test_a_mean_over_steps_weighs_a_value_by_the_steps_it_is_the_mean_of(self, tmp_path):
        """Logs of 2, 6 and 2 steps; the last entry again holds what was left: none."""
        values = [(2, 1.0), (8, 0.5), (10, 0.0), (10, 7.0)]
        log = [{"ogpsa/restoration_capped": value, "step": step} for step, value in values]
        log.insert(1, {"ogpsa/gate_loss/x": 3.0, "step": 5})
        write_state(tmp_path, log)
        assert RunLog.read(tmp_path).mean_over_steps("ogpsa/restoration_capped") == 0.5
        assert RunLog.read(tmp_path).mean_over_steps("loss") is None
        assert "the cap binds in 50 % of the steps" in page(tmp_path).text

    def test_a_loss_that_is_no_number_is_a_gap_and_stands_in_the_table(self, tmp_path):
        values = [3.0, math.nan, 2.0, 1.0]
        write_state(tmp_path, [{"loss": v, "step": i + 1} for i, v in enumerate(values)])
        shown = page(tmp_path)
        assert shown.rows("metric")["loss"] == {
            "first": "3", "last": "1", "lowest": "nan", "largest": "nan"
        }  # fmt: skip
        [line] = [
            p["d"]
            for p in shown.charts["Training loss"]["paths"]
            if "--line-0); stroke-w" in p["style"]
        ]
        assert line.count("M") == 2

    def test_texts_and_truth_values_are_no_metrics(self, tmp_path):
        write_state(tmp_path, [{"loss": 1.0, "eval_loss": "low", "eval_x_loss": True, "step": 1}])
        assert RunLog.read(tmp_path).names == ["loss"]

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            (None, "must hold a `trainer_state.json`, or a checkpoint"),
            ('{"log_history": [', r"must be JSON, but is not \(Expecting value"),
            ('{"log_history": []}', "state of a trainer, but has no global_step, max_s"),
        ],
    )
    def test_a_folder_without_a_log_is_refused(self, state, message, tmp_path):
        if state is not None:
            (tmp_path / "trainer_state.json").write_text(state)
        with pytest.raises(ValueError, match=message):
            write_report(tmp_path)


class TestCharts:
    def test_long_lines_are_means_of_neighbours(self):
        steps = list(range(1, 2 * MOST_POINTS + 2))
        thin = drawn(Series(steps, [float(step) for step in steps]))
        assert len(thin.steps) <= MOST_POINTS
        assert thin.steps[:2] == [3, 6]
        assert thin.values[:2] == [2.0, 5.0]
        assert thin.steps[-1] == steps[-1]
        short = Series(steps[:MOST_POINTS], steps[:MOST_POINTS])
        assert drawn(short) is short

    def test_no_two_of_eighteen_lines_look_alike(self):
        assert len({style(index) for index in range(18)}) == 18

    def test_settings_of_the_users_own_are_neither_used_nor_changed(self):
        chart = Chart("x", "y", [Line("z", Series([1, 2], [3.0, 4.0]))])
        expected = svg(chart, "name")
        with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "text.usetex": True}):
            before = dict(matplotlib.rcParams)
            assert svg(chart, "name") == expected
            assert dict(matplotlib.rcParams) == before


class TestEvaluation:
    def results(self):
        values = {"nll/<b>": [0.1, 0.2, 0.15, 0.3], "p_refuse/x": [0.5, 0.6, 0.4, 0.7]}
        before = {n: Measured("share", n[0] == "p", mean_of("abcd", v)) for n, v in values.items()}
        after = {
            n: Measured("share", n[0] == "p", mean_of("abcd", [x + 0.1 + x**2 / 9 for x in v]))
            for n, v in values.items()
        }
        one = {"lonely/x": Measured("nats", None, mean_of("a", [0.5]))}
        return compare(before, {**after, **one}, num_bootstrap=50)

    def write(self, file):
        content = {
            "settings": {
                "base_model_name_or_path": "start<i>", "model_name_or_path": "end",
                "confidence": 0.95,
            },
            "measures": {result.name: result.to_json() for result in self.results()},
            "notes": ["a note & more"],
        }  # fmt: skip
        file.write_text(json.dumps(content))
        return content

    @pytest.mark.parametrize("is_named", [False, True])
    def test_the_table_is_that_of_the_evaluation(self, is_named, tmp_path):
        write_state(tmp_path, [{"loss": 1.0, "step": 10}])
        assert "Before and after" not in page(tmp_path).text
        file = tmp_path / ("other.json" if is_named else "evaluation.json")
        content = self.write(file)
        shown = page(tmp_path, evaluation=file if is_named else None)
        rows = shown.rows("measure")
        assert rows.keys() == content["measures"].keys()
        for name, measure in content["measures"].items():
            assert rows[name]["after"] == f"{measure['after']['value']:.4g}"
            if measure["before"] is None:
                assert rows[name]["before"] == rows[name]["change"] == rows[name]["verdict"] == "-"
                continue
            assert rows[name]["before"] == f"{measure['before']['value']:.4g}"
            assert rows[name]["change"] == f"{measure['delta']['value']:+.4f}"
            assert rows[name]["verdict"] == measure["verdict"]
        assert "Before: start<i>. After: end. Intervals: 95 %" in shown.text
        assert "a note & more" in shown.text

    def test_another_file_is_refused(self, tmp_path):
        write_state(tmp_path, [{"loss": 1.0, "step": 10}])
        (tmp_path / "evaluation.json").write_text("[]")
        with pytest.raises(ValueError, match=r"must be the `evaluation.json` that `ogpsa evalu"):
            write_report(tmp_path)


class TestSettings:
    def test_they_make_the_configurations_again(self, runs):
        for kind, config in CONFIGS.items():
            saved = json.loads((runs[kind].folder / "run_settings.json").read_text())
            assert GateConfig(**saved["gate"]) == GATE
            if config is None:
                assert saved["ogpsa"] is None
                assert saved["capability_groups"] == {}
            else:
                assert OGPSAConfig(**saved["ogpsa"]) == config
                assert saved["capability_groups"].keys() == {"skills", HOSTILE}
            assert saved["training"]["max_steps"] == 5

    def test_one_process_writes_them_without_tokens_of_the_hub(
        self, base_model_path, tmp_path, monkeypatch
    ):
        trainer = make_trainer("sft", base_model_path, tmp_path, hub_token="hf_secret")
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "is_world_process_zero", lambda: False)
            save_run_settings(trainer)
        assert not (tmp_path / "run_settings.json").exists()
        save_run_settings(trainer)
        assert "hf_secret" not in (tmp_path / "run_settings.json").read_text()


def test_the_script_writes_the_same_page_where_it_is_told(runs, tmp_path):
    folder, there = runs["sft"].folder, tmp_path / "there.html"
    report_command.main([str(folder), "--output", str(there)])
    assert there.read_bytes() == (folder / "report.html").read_bytes()
