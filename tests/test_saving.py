"""A save that fails is named, and the last whole checkpoint stays the one to go on from."""

from pathlib import Path

import pytest

from ogpsa_trl.training.whole_checkpoints import SaveError, checkpoint_to_resume, saving
from runs import SaveAfter, capability_groups, make_trainer

pytestmark = pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="needs a device that is always full"
)

# Files of a checkpoint, and what is in the way of writing each: a device that is full, or a folder
# for those that get their name when they are written.
IN_THE_WAY = {
    "config.json": "full", "training_args.bin": "full", "optimizer.pt": "full",
    "scheduler.pt": "full", "rng_state.pth": "full", "trainer_state.json": "full",
    "model.safetensors": "folder", "ogpsa_start.safetensors": "folder",
    "ogpsa_subspace.safetensors": "folder",
}  # fmt: skip


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, base_model_path):
    """It has saved its first checkpoint, and keeps one only."""
    trainer = make_trainer(
        "sft", base_model_path, tmp_path_factory.mktemp("run"), capability=capability_groups(),
        save_total_limit=1, optim="adamw_torch",
    )  # fmt: skip
    trainer.add_callback(SaveAfter(1))
    trainer.train()
    return trainer


def save_without_room_for(trainer, name, in_the_way="full"):
    """Save another checkpoint, where a file of it cannot be written; returns its folder."""
    trainer.state.global_step += 1
    folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    folder.mkdir()
    if in_the_way == "full":
        (folder / name).symlink_to("/dev/full")
    else:
        (folder / name).mkdir()
    trainer._save_checkpoint(trainer.model, None)


def checkpoint(trainer, step):
    return str(Path(trainer.args.output_dir) / f"checkpoint-{step}")


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_a_full_disk_is_named_and_the_last_checkpoint_stays(name, trainer):
    with pytest.raises(SaveError) as error:
        save_without_room_for(trainer, name, IN_THE_WAY[name])
    last = checkpoint(trainer, 1)
    for words in (
        f"{checkpoint(trainer, trainer.state.global_step)!r} could not be saved (",
        "MiB are free", "Make room", "`resume_from_checkpoint: true`",
        f"The last whole one is {last!r}",
    ):  # fmt: skip
        assert words in str(error.value)
    assert checkpoint_to_resume(True, trainer.args.output_dir) == last


def test_a_tokenizer_that_cannot_be_written_leaves_the_last_checkpoint_too(trainer):
    """Its library raises an `Exception` of no kind, which stays what it is."""
    with pytest.raises(Exception, match=r"No space left on device \(os error 28\)"):
        save_without_room_for(trainer, "tokenizer.json")
    assert checkpoint_to_resume(True, trainer.args.output_dir) == checkpoint(trainer, 1)


def test_without_a_checkpoint_the_error_says_so(tmp_path):
    with (
        pytest.raises(SaveError, match="There is no whole one yet"),
        saving(tmp_path / "new", str(tmp_path / "not" / "there")),
    ):
        Path("/dev/full").write_text("model")
