"""Tables and figures of results."""

import subprocess
import sys

import pytest

from ogpsa_trl.evaluation import figures
from ogpsa_trl.evaluation.figures import comparison_figure
from ogpsa_trl.evaluation.tables import markdown_table
from scripted import saved_figures

RUNS = {
    "untuned": {"p_refuse": 0.21, "general": 0.99, "bits per character": 1.4},
    "SFT": {"p_refuse": 0.97, "general": 0.8, "bits per character": 2.3},
    "OGPSA": {"p_refuse": 0.95, "general": 0.97},
}


def test_a_table_holds_every_value_and_numbers_stand_on_the_right():
    rows = [{"a": "long name", "b": 1}, {"a": None, "b": 20.5}, {"a": "P(x|y)\nz"}]
    assert markdown_table(rows, ["a", "b"]).split("\n") == [
        "| a         |      b |",
        "|:----------|-------:|",
        "| long name |      1 |",
        "| -         | 20.500 |",
        "| P(x\\|y) z |      - |",  # text cannot break a table
    ]
    assert markdown_table(rows[:2], digits=1, style="simple").split("\n") == [
        "a             b",
        "---------  ----",
        "long name     1",
        "-          20.5",
    ]


def test_a_table_needs_a_column_but_no_rows():
    assert markdown_table([], ["run"]).split("\n") == ["| run   |", "|-------|"]
    with pytest.raises(ValueError, match="`columns` must name at least one column, but got none"):
        markdown_table([{"a": 1}], [])


def test_a_figure_has_a_panel_per_measure_with_a_bar_and_a_number_per_run(tmp_path, monkeypatch):
    drawn = saved_figures(monkeypatch)
    path = comparison_figure(
        RUNS, tmp_path / "new" / "runs.png", lower_is_better=["bits per character"]
    )
    assert path.read_bytes().startswith(b"\x89PNG")
    [figure] = drawn
    panels = {panel.get_title(loc="left"): panel for panel in figure.axes if panel.get_visible()}
    assert list(panels) == ["p_refuse", "general", "bits per character"]
    for measure, panel in panels.items():
        known = [run[measure] for run in RUNS.values() if measure in run]
        assert [bar.get_width() for bar in panel.patches] == known
        labels = [text.get_text() for text in panel.texts]
        expected = [f"{run[measure]:.3f}" if measure in run else "-" for run in RUNS.values()]
        assert labels[: len(RUNS)] == expected
        is_lower_better = "downarrow" in labels[-1]
        assert is_lower_better == (measure == "bits per character")
        assert [tick.label1.get_text() for tick in panel.yaxis.get_major_ticks()] == list(RUNS)
        bottom, top = panel.get_ylim()
        assert bottom > top  # the first run comes first
    assert panels["general"].get_xlim() == (0, 1)


def test_no_two_runs_of_eight_look_alike(tmp_path, monkeypatch):
    runs = {f"run {i}": {"general": 0.5} for i in range(8)}
    drawn = saved_figures(monkeypatch)
    comparison_figure(runs, tmp_path / "runs.png")
    [panel] = drawn[0].axes
    assert len({bar.get_facecolor() for bar in panel.patches}) == 8


def test_a_figure_needs_measures_and_knows_their_names(tmp_path):
    with pytest.raises(ValueError, match=r"must have at least one, but got \[\]"):
        comparison_figure({}, tmp_path / "runs.png")
    with pytest.raises(ValueError, match=r"got \['loss'\] and the measures \['p_refuse'"):
        comparison_figure(RUNS, tmp_path / "runs.png", lower_is_better=["loss"])


def test_only_drawing_needs_matplotlib():
    # On its own and in a new process: other tests have imported matplotlib into this one.
    run = f"runpy.run_path({figures.__file__!r})"
    code = f"import runpy, sys; {run}; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
