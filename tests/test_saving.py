"""A save that fails is named, and the last whole checkpoint stays the one to go on from."""

from pathlib import Path

import pytest

from ogpsa_trl.completeness import SaveError, checkpoint_to_resume, saving
from runs import capability_groups, make_trainer

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


@pytest.fixture
def train_without_room_for(tmp_path, base_model_path):
    """Trains where a file of the second of two checkpoints cannot be written."""

    def train(name, in_the_way="full"):
        trainer = make_trainer(
            "sft", base_model_path, tmp_path, capability=capability_groups(), max_steps=4,
            save_strategy="steps", save_steps=2, save_total_limit=1, optim="adamw_torch",
        )  # fmt: skip
        save_model = trainer.save_model

        def save_into_a_full_folder(output_dir=None, **kwargs):
            folder = Path(output_dir)
            if folder.name == "checkpoint-4":
                folder.mkdir()
                if in_the_way == "full":
                    (folder / name).symlink_to("/dev/full")
                else:
                    (folder / name).mkdir()
            return save_model(output_dir, **kwargs)

        trainer.save_model = save_into_a_full_folder
        trainer.train()

    return train


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_a_full_disk_is_named_and_the_last_checkpoint_stays(name, tmp_path, train_without_room_for):
    with pytest.raises(SaveError) as error:
        train_without_room_for(name, IN_THE_WAY[name])
    last = str(tmp_path / "checkpoint-2")
    for words in (
        f"{str(tmp_path / 'checkpoint-4')!r} could not be saved (", "MiB are free", "Make room",
        "`resume_from_checkpoint: true`", f"The last whole one is {last!r}",
    ):  # fmt: skip
        assert words in str(error.value)
    assert checkpoint_to_resume(True, str(tmp_path)) == last


def test_a_tokenizer_that_cannot_be_written_leaves_the_last_checkpoint_too(
    tmp_path, train_without_room_for
):
    """Its library raises an `Exception` of no kind, which stays what it is."""
    with pytest.raises(Exception, match=r"No space left on device \(os error 28\)"):
        train_without_room_for("tokenizer.json")
    assert checkpoint_to_resume(True, str(tmp_path)) == str(tmp_path / "checkpoint-2")


def test_without_a_checkpoint_the_error_says_so(tmp_path):
    with (
        pytest.raises(SaveError, match="There is no whole one yet"),
        saving(tmp_path / "new", str(tmp_path / "not" / "there")),
    ):
        Path("/dev/full").write_text("model")
