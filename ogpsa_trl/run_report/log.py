"""What a run has left in its folder: its log and its settings."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ogpsa_trl.evaluation.json_files import read_json

RUN_SETTINGS = "run_settings.json"
_STATE = "trainer_state.json"


class Series(NamedTuple):
    """A metric over the run."""

    steps: Sequence[int]  # optimizer steps made when the value was logged
    values: Sequence[float]  # not all of them finite


@dataclass(frozen=True)
class RunLog:
    """The log and the settings of one run."""

    folder: Path
    state_file: Path  # what the log was read from
    state: Mapping[str, Any]  # content of `trainer_state.json`
    settings: Mapping[str, Any]  # content of `run_settings.json`; empty where there is none

    @classmethod
    def read(cls, folder: str | Path) -> "RunLog":
        """
        Read the folder of a run, or one of its checkpoints.

        A run that was cut off has no log but in its checkpoints: the last of them counts.

        Raises:
            ValueError: there is no log, or a file is not what it should be.
        """
        folder = Path(folder)
        files = [folder / _STATE] if (folder / _STATE).exists() else _of_checkpoints(folder)
        if not files:
            raise ValueError(
                f"{str(folder)!r} must hold a `{_STATE}`, or a checkpoint that does, but has "
                "none. Name the `output_dir` of a run; one that has not come to its first "
                "checkpoint has no log yet."
            )
        state = read_json(files[-1])
        missing = {"log_history", "global_step", "max_steps"} - set(state)
        if missing:
            raise ValueError(
                f"{str(files[-1])!r} must be the state of a trainer, but has no "
                f"{', '.join(sorted(missing))}. Name the `output_dir` of a run."
            )
        settings = [path / RUN_SETTINGS for path in (folder, folder.parent)]
        found = next((path for path in settings if path.exists()), None)
        return cls(folder, files[-1], state, read_json(found) if found else {})

    @cached_property
    def entries(self) -> list[dict[str, Any]]:
        """The entries of the log."""
        return self.state["log_history"]

    @cached_property
    def names(self) -> list[str]:
        """The numbers that were logged, in the order of their first entries."""
        names = dict.fromkeys(
            name for entry in self.entries for name, value in entry.items() if _is_number(value)
        )
        return [name for name in names if name not in ("step", "epoch")]

    @property
    def step(self) -> int:
        """Optimizer steps made."""
        return self.state["global_step"]

    @property
    def max_steps(self) -> int:
        """Optimizer steps that were to be made."""
        return self.state["max_steps"]

    @property
    def summary(self) -> Mapping[str, Any]:
        """What the trainer logs when it comes to the end; empty before."""
        return next((e for e in reversed(self.entries) if "train_runtime" in e), {})

    def series(self, name: str) -> Series:
        """A metric over the run; empty where it was not logged."""
        points = [(e["step"], e[name]) for e in self.entries if _is_number(e.get(name))]
        return Series([step for step, _ in points], [value for _, value in points])

    def groups(self, metric: str) -> list[str]:
        """
        Names of the groups that `ogpsa/<metric>/<group>` was logged of.

        In the order of the settings: that of a saved log is the alphabet's.
        """
        prefix = f"ogpsa/{metric}/"
        logged = [name.removeprefix(prefix) for name in self.names if name.startswith(prefix)]
        known = (*self.settings.get("capability_groups", ()), *self.settings.get("gate_groups", ()))
        return list(dict.fromkeys([*(name for name in known if name in logged), *logged]))

    def mean_over_steps(self, name: str) -> float | None:
        """
        The mean over the steps of a metric whose logged values are means since the last log.

        `None` where it was not logged.
        """
        series = self.series(name)
        starts = [0, *series.steps][: len(series.steps)]
        weights = [step - start for step, start in zip(series.steps, starts, strict=True)]
        total = sum(weights)
        if total == 0:
            return None
        return sum(w * value for w, value in zip(weights, series.values, strict=True)) / total


def _of_checkpoints(folder: Path) -> list[Path]:
    """The logs in the checkpoints of a run, the last one last."""
    files = [
        (int(match[1]), path)
        for path in folder.glob(f"checkpoint-*/{_STATE}")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.parent.name))
    ]
    return [path for _, path in sorted(files)]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
