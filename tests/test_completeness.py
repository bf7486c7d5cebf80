"""A checkpoint is whole, or it is named and not used; there is always a whole one."""

import logging
import os
import re
from pathlib import Path

import pytest

from ogpsa_trl.method.saved_state import FILE_NAME
from ogpsa_trl.training import whole_checkpoints
from ogpsa_trl.training.whole_checkpoints import (
    LIST_NAME,
    checkpoint_to_resume,
    mark,
    unmark,
    what_is_missing,
)
from runs import SAVES, paper

NAMES = {"model.safetensors", "optimizer.pt", "trainer_state.json", FILE_NAME}


@pytest.fixture
def run_folder(tmp_path):
    """A run with three checkpoints, to be damaged."""
    for step in (1, 2, 3):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in NAMES:
            (folder / name).write_text("12 characters")
        mark(folder)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("model.safetensors", Path.unlink, "is not there"),
        (FILE_NAME, lambda path: os.truncate(path, 6), "has 6 bytes instead of 13"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_left_aside(name, damage, reason, run_folder, caplog):
    last, before = run_folder / "checkpoint-3", str(run_folder / "checkpoint-2")
    damage(last / name)
    assert checkpoint_to_resume(True, str(run_folder)) == before
    assert caplog.messages == [
        f"Not resuming from {last}: {name} {reason}. Resuming from {before}."
    ]
    with pytest.raises(ValueError, match=r"must be a whole checkpoint") as error:
        checkpoint_to_resume(str(last), str(run_folder))
    for piece in (repr(str(last)), f"{name} {reason}", f"last whole one .* is {before!r}"):
        assert re.search(piece, str(error.value))


def test_what_is_whole(run_folder):
    """Not without the list; but what is made anew may be taken away."""
    folder = run_folder / "checkpoint-3"
    unmark(folder)
    assert what_is_missing(folder) == f"{LIST_NAME}, which is written last, is not there"
    mark(folder)
    (folder / FILE_NAME).unlink()
    assert what_is_missing(folder) is None


def test_where_none_is_whole_the_error_names_them_all(run_folder):
    for step in (1, 2, 3):
        unmark(run_folder / f"checkpoint-{step}")
    with pytest.raises(ValueError, match=r"(?s)there is none \(.*-3: .*-2: .*-1: .*Leave it out"):
        checkpoint_to_resume(True, str(run_folder))
    with pytest.raises(ValueError, match="and no other"):
        checkpoint_to_resume(True, str(run_folder / "nowhere"))


def test_checkpoints_of_plain_trl_can_be_resumed(train, make, tmp_path, caplog):
    """What they do not hold is made anew at once, in the middle of an interval, and it is said."""
    train(plain=True, max_steps=3, **SAVES)
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text('{"cut":')
    config = paper(refresh_interval=100, samples_per_refresh=3)
    trainer = make(config=config, max_steps=4, **SAVES)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    checkpoint = tmp_path / "checkpoint-2"
    assert "trainer_state.json is not there, or is cut" in caplog.text
    assert f"{checkpoint} holds no whole capability subspace (no {FILE_NAME})" in caplog.text
    assert f"starting point of {checkpoint} cannot be used (there is none): drift" in caplog.text
    refreshed = [entry["step"] for entry in trainer.state.log_history if "ogpsa/rank" in entry]
    assert refreshed == [3]
    assert what_is_missing(tmp_path / "checkpoint-3") is None  # saved anew


def test_a_whole_checkpoint_is_there_at_any_moment(make, tmp_path, monkeypatch):
    """Also with room for one only: the old one goes when the new one is marked, and not before."""
    trainer, seen = make(max_steps=3, save_total_limit=1, **SAVES), []

    def look_and_mark(folder):
        seen.append([p.name for p in tmp_path.glob("checkpoint-*") if not what_is_missing(p)])
        mark(folder)

    monkeypatch.setattr(whole_checkpoints, "mark", look_and_mark)
    trainer.train()
    assert seen == [[], ["checkpoint-1"], ["checkpoint-2"]]
    (folder,) = tmp_path.glob("checkpoint-*")
    assert folder.name == "checkpoint-3"
    # Every file of it is listed.
    assert what_is_missing(folder) is None
    listed = {path.name for path in whole_checkpoints._files(folder)}
    assert {path.name for path in folder.rglob("*")} - listed == {LIST_NAME}
    assert listed >= NAMES
