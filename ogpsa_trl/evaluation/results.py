"""What was measured before and after training, and what has changed."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from ogpsa_trl.evaluation.intervals import Interval, SampleValues, interval, paired_interval

Verdict = Literal["better", "worse", "unclear"]


class Measured(NamedTuple):
    """A measure of one model: the unit of its value, and the samples with their statistic."""

    unit: str
    higher_is_better: bool | None  # `None` where that is not known
    values: SampleValues


class Estimate(NamedTuple):
    """A value and its confidence interval; no interval where there are fewer than two samples."""

    value: float
    interval: Interval | None


@dataclass(frozen=True)
class Result:
    """
    A measure before and after training.

    `before` and `delta` are `None` where there is no model before, or where the measure compares
    the two models itself.
    """

    name: str  # `<measure>/<group>` or `<task>/<metric>`
    unit: str
    higher_is_better: bool | None
    num_samples: int  # that both models were measured on
    before: Estimate | None
    after: Estimate
    delta: Estimate | None  # after minus before, paired by sample

    @property
    def verdict(self) -> Verdict | None:
        """Whether the interval of the change is all on one side of zero, and on which."""
        if self.delta is None or self.delta.interval is None or self.higher_is_better is None:
            return None
        low, high = self.delta.interval
        if low <= 0 <= high:
            return "unclear"
        return "better" if (low > 0) == self.higher_is_better else "worse"

    def to_json(self) -> dict[str, Any]:
        """What `evaluation.json` holds of it, the verdict included."""
        estimates = {"before": self.before, "after": self.after, "delta": self.delta}
        return (
            asdict(self)
            | {when: value and value._asdict() for when, value in estimates.items()}
            | {"verdict": self.verdict}
        )

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Result":
        """The result that `to_json` has written."""
        estimates = {when: _estimate(content[when]) for when in ("before", "after", "delta")}
        values: Any = {name: content[name] for name in cls.__dataclass_fields__} | estimates
        return cls(**values)


def compare(
    before: Mapping[str, Measured] | None,
    after: Mapping[str, Measured],
    *,
    num_bootstrap: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Result]:
    """
    Values, changes and their intervals.

    Args:
        before: Measures of the model before, by name. It may lack some. Only samples that both
            models have count: with other tokens, some texts may have nothing to score.
        after: Those of the model after, whose order the results have.
        num_bootstrap, confidence, seed: As for `intervals.interval`.

    Raises:
        ValueError: two models have no sample of a measure in common.
    """
    options: Any = {"num_bootstrap": num_bootstrap, "confidence": confidence, "seed": seed}
    results = []
    for name, measured in after.items():
        values, old, delta = measured.values, None, None
        if before is not None and name in before:
            known = set(before[name].values.ids)
            common = [key for key in values.ids if key in known]
            if not common:
                raise ValueError(
                    f"`{name}` has no sample that both models were measured on. Use one tokenizer "
                    "for both (`tokenizer_name_or_path`), or look at the data of this group."
                )
            values, old_values = values.select(common), before[name].values.select(common)
            old = Estimate(old_values.value, interval(old_values, **options))
            delta = Estimate(
                values.value - old_values.value, paired_interval(old_values, values, **options)
            )
        new = Estimate(values.value, interval(values, **options))
        results.append(Result(name, *measured[:2], len(values.ids), old, new, delta))
    return results


def _estimate(content: Mapping[str, Any] | None) -> Estimate | None:
    if content is None:
        return None
    ends = content["interval"]
    return Estimate(content["value"], None if ends is None else Interval(*ends))
