"""
Errors that a user can mend end a script with one line; all others keep their traceback.

Until the first step nearly all that is raised on purpose is about what the run was given. Later
only a failed save, a loss of numbers and a row of a stream are for the user: a bug in a long run is
no wrong value.
"""

import contextlib
import sys
from collections.abc import Iterator
from pickle import UnpicklingError
from typing import Any

from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import TrainerCallback

from ogpsa_trl.data.row_values import RowError
from ogpsa_trl.training.whole_checkpoints import SaveError

# A value; a file or a host that is not there; a package that is not installed; weights that are
# damaged, or hold code; a chat template that refuses a conversation.
_OF_THE_USER = (
    ValueError, OSError, ImportError, SafetensorError, UnpicklingError, TemplateError,
)  # fmt: skip
_AT_ANY_TIME = (SaveError, FloatingPointError, RowError)

_NOT_LOADED = (
    "A file of weights or of a checkpoint holds something else than tensors and numbers, which "
    "could run code, and is not loaded. Use one that this project or transformers has written."
)


class FirstStep(TrainerCallback):
    """Knows whether a run has made a first step of its own."""

    def __init__(self) -> None:
        self.is_made = False

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.is_made = True


@contextlib.contextmanager
def user_errors(
    *, with_traceback: bool = False, first_step: FirstStep | None = None
) -> Iterator[None]:
    """
    End the script with `error: <message>` and status 1 where the user can mend what went wrong.

    Args:
        with_traceback: Raise them as they are.
        first_step: Knows whether it has been made. `None`: it has not.

    Raises:
        SystemExit: there was one.
    """
    try:
        yield
    except (*_OF_THE_USER, *_AT_ANY_TIME) as error:
        has_begun = first_step is not None and first_step.is_made
        if with_traceback or (has_begun and not isinstance(error, _AT_ANY_TIME)):
            raise
        # What torch says explains how to load the file all the same.
        message = _NOT_LOADED if isinstance(error, UnpicklingError) else error
        sys.exit(f"error: {message}")
