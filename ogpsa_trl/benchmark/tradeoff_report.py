"""The tables and pictures of the trade-off benchmark."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ogpsa_trl.benchmark.comparison import console, package_versions, write_json
from ogpsa_trl.benchmark.methods import METHODS, Run
from ogpsa_trl.benchmark.testbeds import Testbed
from ogpsa_trl.evaluation.equal_safety import (
    Spread,
    at_safety,
    paired_difference,
    tradeoff_figure,
)
from ogpsa_trl.evaluation.tables import markdown_table


def report(
    results: Mapping[Run, dict[str, Any]],
    testbed: Testbed,
    seeds: Sequence[int],
    factors: Sequence[float],
    output: Path,
) -> None:
    """Write all runs as JSON, and for every chain and number of steps the tables and a picture."""
    bases = {
        seed: json.loads((output / "runs" / f"base-{seed}.json").read_text("utf-8"))["measures"]
        for seed in seeds
    }
    write_json(
        output / "results.json",
        {"base": bases, "runs": list(results.values()), "versions": package_versions()},
    )
    sections = [f"# {testbed.title}: capability at equal safety", testbed.notes]
    for chain, num_steps in dict.fromkeys((run.chain, run.num_steps) for run in results):
        chosen = {r: v for r, v in results.items() if (r.chain, r.num_steps) == (chain, num_steps)}
        title = f"{testbed.title}, {chain.upper().replace('-', ' -> ')}, {num_steps} steps"
        table = Comparison(chosen, testbed)
        sections += [f"## {title}", table.levels(), table.details(), table.runs()]
        start = {
            name: Spread.of([base[name] for base in bases.values()]).mean
            for name in bases[seeds[0]]
        }
        tradeoff_figure(
            table.sweeps(),
            output / f"{chain}-{num_steps}.png",
            safety=testbed.safety,
            capability=testbed.capability,
            colour=testbed.over_refusal,
            marked=len(factors) // 2,
            start=start,
            levels=testbed.levels,
            lower_is_better=testbed.lower_is_better,
            title=title,
        )
        console.print(f"\n{title}\n{table.levels()}")
    versions = ", ".join(f"{name} {number}" for name, number in package_versions().items())
    sections.append(f"Seeds {', '.join(map(str, seeds))}. {versions}.")
    (output / "results.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    console.print(f"\nTables, pictures and all runs: {output}")


class Comparison:
    """
    The tables of one chain of stages and number of steps.

    Args:
        results: The results of its runs.
        testbed: Which measures there are.
    """

    def __init__(self, results: Mapping[Run, dict[str, Any]], testbed: Testbed) -> None:
        self.testbed = testbed
        self.results = results
        self.methods = [m for m in METHODS if any(run.method == m for run in results)]
        self.factors = sorted({run.learning_rate_factor for run in results})
        # Method to level to seed to measures.
        self.at_level = {
            method: {level: self._at_level(method, level) for level in testbed.levels}
            for method in self.methods
        }

    def sweeps(self) -> dict[str, list[dict[str, Spread]]]:
        """Mean and standard deviation over the seeds of every measure, by method, in the sweep."""
        return {
            method: [
                {
                    name: Spread.of([result["measures"][name] for result in results])
                    for name in results[0]["measures"]
                }
                for factor in self.factors
                if (results := self._of(method, factor))
            ]
            for method in self.methods
        }

    def levels(self) -> str:
        """Capability at every level of safety, differences at the middle one, and the cost."""
        testbed, middle = self.testbed, self._middle
        best_kl = self.best_kl()
        rows = []
        for method in self.methods:
            row: dict[str, Any] = {"method": method}
            for level in testbed.levels:
                values = self._values(method, level, testbed.capability)
                row[f"{testbed.capability} at {level:g}"] = _mean_and_sd(list(values.values()))
            for other in ("naive", best_kl):
                if other is not None:
                    row[f"- {other}"] = self._difference(method, other, middle)
            over_refusal = self._values(method, middle, testbed.over_refusal)
            row[f"{testbed.over_refusal} at {middle:g}"] = _mean_and_sd(list(over_refusal.values()))
            rows.append(row | self._cost(method))
        return _table(rows)

    def details(self) -> str:
        """Further measures at the middle level of safety."""
        rows = []
        for method in self.methods:
            row: dict[str, Any] = {f"at {self.testbed.safety} {self._middle:g}": method}
            for name in self.testbed.details:
                row[name] = _mean_and_sd(list(self._values(method, self._middle, name).values()))
            rows.append(row)
        return _table(rows)

    def runs(self) -> str:
        """Safety and capability of every run of the sweep: what the tables above were read off."""
        names = (self.testbed.safety, self.testbed.capability, self.testbed.over_refusal)
        rows = []
        for method in self.methods:
            row: dict[str, Any] = {"method": method}
            for factor in self.factors:
                results = self._of(method, factor)
                for name in names if results else ():
                    values = [result["measures"][name] for result in results]
                    row[f"{name}, lr x{factor:g}"] = f"{Spread.of(values).mean:.3f}"
            rows.append(row)
        return _table(rows)

    def best_kl(self) -> str | None:
        """The KL penalty of the weight that keeps most at the middle level, in most seeds."""
        values = {
            method: list(self._values(method, self._middle, self.testbed.capability).values())
            for method in self.methods
            if method.startswith("KL")
        }
        sign = -1 if self.testbed.capability in self.testbed.lower_is_better else 1
        found = {m: (len(v), sign * Spread.of(v).mean) for m, v in values.items() if v}
        return max(found, key=lambda method: found[method]) if found else None

    @property
    def _middle(self) -> float:
        return self.testbed.levels[len(self.testbed.levels) // 2]

    def _of(self, method: str, factor: float) -> list[dict[str, Any]]:
        wanted = (method, factor)
        return [
            result
            for run, result in self.results.items()
            if (run.method, run.learning_rate_factor) == wanted
        ]

    def _at_level(self, method: str, level: float) -> dict[int, dict[str, float]]:
        """The measures of every seed whose sweep passes the level."""
        sweeps: dict[int, list[tuple[float, dict[str, float]]]] = {}
        for run, result in self.results.items():
            if run.method == method:
                point = (run.learning_rate_factor, result["measures"])
                sweeps.setdefault(run.seed, []).append(point)
        found = {}
        for seed, points in sweeps.items():
            sweep = [measures for _, measures in sorted(points, key=lambda point: point[0])]
            measures = at_safety(sweep, self.testbed.safety, level)
            if measures is not None:
                found[seed] = measures
        return found

    def _values(self, method: str, level: float, name: str) -> dict[int, float]:
        return {seed: measures[name] for seed, measures in self.at_level[method][level].items()}

    def _difference(self, method: str, other: str, level: float) -> str | None:
        if method == other or other not in self.methods:
            return None
        values, others = (self._values(m, level, self.testbed.capability) for m in (method, other))
        spread = paired_difference(values, others)
        if spread is None:
            return None
        error = f" +- {spread.standard_error:.3f}" if spread.num > 1 else ""
        return f"{spread.mean:+.3f}{error} ({spread.num})"

    def _cost(self, method: str) -> dict[str, Any]:
        """Sequences and time of a run, the mean over all runs; the time relative to plain TRL."""
        costs = {
            name: [result["cost"] for run, result in self.results.items() if run.method == name]
            for name in (method, "naive")
        }
        mean = {
            name: {key: Spread.of([cost[key] for cost in values]).mean for key in values[0]}
            for name, values in costs.items()
            if values
        }
        row: dict[str, Any] = {
            "forward": round(mean[method]["forward"]),
            "backward": round(mean[method]["backward"]),
        }
        if "naive" in mean:
            row["time"] = f"{mean[method]['seconds'] / mean['naive']['seconds']:.1f}"
        return row


def _mean_and_sd(values: Sequence[float]) -> str | None:
    """For a table, with the number of values; `None` without any."""
    if not values:
        return None
    spread = Spread.of(values)
    sd = f" +- {spread.sd:.3f}" if spread.num > 1 else ""
    return f"{spread.mean:.3f}{sd} ({spread.num})"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    return markdown_table(rows, list(dict.fromkeys(column for row in rows for column in row)))
