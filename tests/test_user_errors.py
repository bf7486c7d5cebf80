"""Which errors end a script with one line: those that a user can mend, and no others."""

import pytest

from ogpsa_trl.cli.user_errors import FirstStep, user_errors
from ogpsa_trl.training.whole_checkpoints import SaveError


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, ImportError])
def test_what_can_be_mended_ends_a_script_with_one_line(kind):
    with pytest.raises(SystemExit) as stop, user_errors():
        raise kind("`key` must be 1, but is 2.")
    assert stop.value.code == "error: `key` must be 1, but is 2."


@pytest.mark.parametrize("bug", [lambda: {}["key"], lambda: None.key, lambda: len(3)])
def test_a_bug_keeps_its_traceback(bug):
    with pytest.raises((KeyError, AttributeError, TypeError)), user_errors():
        bug()


def test_once_training_has_begun_only_saves_and_numbers_end_it_with_one_line():
    made = FirstStep()
    made.on_step_end()
    for kind in (SaveError, FloatingPointError):
        with pytest.raises(SystemExit, match="error: Step 3"), user_errors(first_step=made):
            raise kind("Step 3")
    for kind in (ValueError, OSError, RuntimeError):
        with pytest.raises(kind), user_errors(first_step=made):
            raise kind


def test_a_traceback_can_be_asked_for():
    with pytest.raises(ValueError, match="wrong"), user_errors(with_traceback=True):
        raise ValueError("wrong")
