"""A checkpoint is whole, or it is named and not used; there is always a whole one."""

import logging
import os

import pytest

from ogpsa_trl.training import whole_checkpoints
from ogpsa_trl.training.whole_checkpoints import (
    LIST_NAME,
    checkpoint_to_resume,
    mark,
    unmark,
    what_is_missing,
)
from runs import capability_groups, make_trainer, paper

NAMES = {
    "model.safetensors", "optimizer.pt", "trainer_state.json", "ogpsa_subspace.safetensors",
}  # fmt: skip


def saving(base_model_path, output, *, plain=False, **overrides):
    return make_trainer(
        "sft", base_model_path, output, plain=plain,
        capability=None if plain else capability_groups(), config=None if plain else paper(),
        max_steps=3, save_strategy="steps", save_steps=1, **overrides,
    )  # fmt: skip


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
    ("name", "damage"), [("model.safetensors", "gone"), ("ogpsa_subspace.safetensors", "cut")]
)
def test_a_damaged_checkpoint_is_named_and_left_aside(name, damage, run_folder, caplog):
    file = run_folder / "checkpoint-3" / name
    if damage == "gone":
        file.unlink()
        reason = f"{name} is not there"
    else:
        os.truncate(file, 6)
        reason = f"{name} has 6 bytes instead of 13"
    found = checkpoint_to_resume(True, str(run_folder))
    assert found == str(run_folder / "checkpoint-2")
    assert caplog.messages == [
        f"Not resuming from {run_folder / 'checkpoint-3'}: {reason}. Resuming from {found}."
    ]
    with pytest.raises(ValueError) as error:
        checkpoint_to_resume(str(run_folder / "checkpoint-3"), str(run_folder))
    assert str(error.value) == (
        f"`resume_from_checkpoint` must be a whole checkpoint, but in "
        f"{str(run_folder / 'checkpoint-3')!r} {reason}. The last whole one in "
        f"{str(run_folder)!r} is {found!r}."
    )


def test_what_is_made_anew_may_be_taken_away(run_folder):
    (run_folder / "checkpoint-3" / "ogpsa_subspace.safetensors").unlink()
    assert what_is_missing(run_folder / "checkpoint-3") is None


def test_without_a_list_it_is_not_whole(run_folder):
    unmark(run_folder / "checkpoint-3")
    assert what_is_missing(run_folder / "checkpoint-3") == (
        f"{LIST_NAME}, which is written last, is not there"
    )
    mark(run_folder / "checkpoint-3")
    assert what_is_missing(run_folder / "checkpoint-3") is None


def test_where_none_is_whole_the_error_names_them_all(run_folder):
    for step in (1, 2, 3):
        unmark(run_folder / f"checkpoint-{step}")
    with pytest.raises(ValueError, match=r"(?s)there is none \(.*-3: .*-2: .*-1: .*Leave it out"):
        checkpoint_to_resume(True, str(run_folder))
    with pytest.raises(ValueError, match="and no other"):
        checkpoint_to_resume(True, str(run_folder / "nowhere"))


def test_checkpoints_of_plain_trl_can_be_resumed(base_model_path, tmp_path, caplog):
    saving(base_model_path, tmp_path, plain=True).train()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text('{"cut":')
    trainer = saving(base_model_path, tmp_path)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    assert "trainer_state.json is not there, or is cut" in caplog.text
    assert "holds no whole capability subspace" in caplog.text
    assert what_is_missing(tmp_path / "checkpoint-3") is None  # saved anew


def test_a_whole_checkpoint_is_there_at_any_moment(base_model_path, tmp_path, monkeypatch):
    """Also with room for one only: the old one goes when the new one is marked, and not before."""
    trainer, seen = saving(base_model_path, tmp_path, save_total_limit=1), []

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
