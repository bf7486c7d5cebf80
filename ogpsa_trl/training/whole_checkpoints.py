"""
Whether a checkpoint is whole: a list of its files, written after all of them.

A run that is killed while it saves leaves a folder that looks like a checkpoint. The list is made
when all processes have written and all files have reached the disk, under another name that is then
changed, so it is there and right, or not there.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import Trainer
from transformers import trainer as trainer_module
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    rotate_checkpoints,
    sort_checkpoints,
)

from ogpsa_trl.data.files import replace_text, sync

logger = logging.getLogger(__name__)

_trainer_module: Any = trainer_module

_OURS = "ogpsa_"
LIST_NAME = f"{_OURS}checkpoint.json"

# What the trainer writes last. A checkpoint without anything of OGPSA that has it is one of TRL's.
_STATE_NAME = "trainer_state.json"


class SaveError(OSError):
    """Files could not be written. The message says which, and what is left."""


@contextlib.contextmanager
def saving(folder: Path, output_dir: str) -> Iterator[None]:
    """
    Say what a save that fails means for the run.

    Args:
        folder: What is written: a checkpoint, or a model.
        output_dir: Folder of the run, with its checkpoints.

    Raises:
        SaveError: it could not be written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # the last one is torch's
        try:
            last = f"The last whole one is {checkpoint_to_resume(True, output_dir)!r}."
        except ValueError:
            last = "There is no whole one yet."
        parents = [Path(output_dir).absolute(), *Path(output_dir).absolute().parents]
        free = shutil.disk_usage(next(path for path in parents if path.is_dir())).free
        raise SaveError(
            f"{str(folder)!r} could not be saved ({error}); {free // 2**20} MiB are free. Make "
            "room, or see to the permissions, and go on from a checkpoint with "
            f"`resume_from_checkpoint: true`. {last}"
        ) from error


def save_whole(
    trainer: Trainer,
    save: Callable[[Any, Any], None],
    push: Callable[[str], None],
    model: Any,
    trial: Any,
) -> None:
    """
    Mark a checkpoint as whole when all processes have written it, and only then push it and delete
    older ones: at any moment there is a whole one.

    Args:
        trainer: The trainer.
        save: How it saves a checkpoint.
        push: How it pushes a folder to the Hub.
        model: What `save` takes.
        trial: And the trial of a search.

    Raises:
        SaveError: it cannot be written.
    """
    args: Any = trainer.args
    run_dir = trainer._get_output_dir(trial)
    folder = Path(run_dir) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
    with saving(folder, run_dir):
        if args.should_save:
            unmark(folder)
        trainer.accelerator.wait_for_everyone()
        with without_deletion():
            save(model, trial)
        trainer.accelerator.wait_for_everyone()
        if args.should_save:
            mark(folder)
            if args.push_to_hub:
                push(str(folder))
            rotate_checkpoints(
                run_dir,
                args.save_total_limit,
                best_model_checkpoint=trainer.state.best_model_checkpoint,
                use_mtime=True,
            )


def unmark(folder: Path) -> None:
    """Before a checkpoint is written: what stands in its folder is no checkpoint any more."""
    (folder / LIST_NAME).unlink(missing_ok=True)
    if folder.is_dir():
        sync(folder)


def mark(folder: Path) -> None:
    """
    After all of a checkpoint is written: bring it to the disk, and list it.

    Raises:
        OSError: the disk does not take it. There is no list then.
    """
    files = _files(folder)
    for path in files:
        sync(path)
    for path in {path.parent for path in files}:
        sync(path)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    replace_text(folder / LIST_NAME, json.dumps({"files": sizes}, indent=1))


@contextlib.contextmanager
def without_deletion() -> Iterator[None]:
    """
    Let the trainer delete no checkpoint within the block: it would before the new one is marked.

    `Trainer._save_checkpoint` calls `rotate_checkpoints` of its own module, as its last act, and
    has no hook before it; `save_total_limit` cannot be changed, as it is saved with the checkpoint.
    """
    rotate = _trainer_module.rotate_checkpoints
    _trainer_module.rotate_checkpoints = lambda **_: None
    try:
        yield
    finally:
        _trainer_module.rotate_checkpoints = rotate


def what_is_missing(folder: Path) -> str | None:
    """Why a folder is no whole checkpoint, in words; `None`: it is one."""
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / LIST_NAME).exists():
        if any(path.name.startswith(_OURS) for path in folder.iterdir()):
            return f"{LIST_NAME}, which is written last, is not there"
        if sort_checkpoints(str(folder), PREFIX_CHECKPOINT_DIR):  # it has the state of the run too
            return "there are checkpoints, and it is none itself"
        return None if _is_json(folder / _STATE_NAME) else f"{_STATE_NAME} is not there, or is cut"
    sizes = json.loads((folder / LIST_NAME).read_text(encoding="utf-8"))["files"]
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            if path.name.startswith(_OURS):  # taken away on purpose: it is made anew
                continue
            return f"{name} is not there"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def checkpoint_to_resume(wanted: str | bool, output_dir: str) -> str:
    """
    The checkpoint to go on from; of those that are newer and not whole a warning says why.

    Args:
        wanted: A folder, or `True` for the last whole checkpoint in `output_dir`.
        output_dir: The run's output folder.

    Raises:
        ValueError: it is not whole, or there is none that is.
    """
    checkpoints = [Path(path) for path in sort_checkpoints(output_dir, PREFIX_CHECKPOINT_DIR)]
    checkpoints.reverse()  # the last one first
    if isinstance(wanted, str):
        reason = what_is_missing(Path(wanted))
        if reason is None:
            return wanted
        others = (path for path in checkpoints if what_is_missing(path) is None)
        raise ValueError(
            f"`resume_from_checkpoint` must be a whole checkpoint, but in {wanted!r} {reason}. "
            f"The last whole one in {output_dir!r} is {str(next(others, None))!r}."
        )
    skipped = []
    for path in checkpoints:
        reason = what_is_missing(path)
        if reason is None:
            for line in skipped:
                logger.warning("Not resuming from %s. Resuming from %s.", line, path)
            return str(path)
        skipped.append(f"{path}: {reason}")
    raise ValueError(
        f"`resume_from_checkpoint: true` needs a whole checkpoint in `output_dir` {output_dir!r}, "
        f"but there is none ({'; '.join(skipped) or 'and no other'}). Leave it out to start anew."
    )


def _files(folder: Path) -> list[Path]:
    # The last is one of transformers (`enable_jit_checkpoint`), there while the trainer saves.
    listed = {LIST_NAME, f"{LIST_NAME}.unfinished", "checkpoint-is-incomplete.txt"}
    return [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in listed]


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
