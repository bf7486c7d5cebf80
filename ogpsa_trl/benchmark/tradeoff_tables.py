"""The tables and pictures of the trade-off benchmark."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ogpsa_trl.benchmark.methods import METHODS, Run
from ogpsa_trl.benchmark.testbed import BenchmarkArguments
from ogpsa_trl.evaluation.equal_safety import (
    Spread,
    at_safety,
    paired_difference,
    share_figure,
    tradeoff_figure,
)
from ogpsa_trl.evaluation.json_files import in_words, package_versions, read_json, write_json
from ogpsa_trl.evaluation.suite import MEASURES
from ogpsa_trl.evaluation.tables import markdown_table


def report(results: Mapping[Run, dict[str, Any]], bed: BenchmarkArguments) -> None:
    """Write all runs as JSON, and for every chain and number of steps the tables and a picture."""
    output = Path(bed.output_dir)
    versions = package_versions("accelerate")
    starts = {s: read_json(bed.result_file(f"start-{s}")) for s in bed.seeds}
    before = [start["measures"] for start in starts.values()]
    higher_is_better = starts[bed.seeds[0]]["higher_is_better"]
    runs = list(results.values())
    write_json(
        output / "results.json",
        {"start": {s: start["measures"] for s, start in starts.items()}, "runs": runs}
        | {"higher_is_better": higher_is_better, "versions": versions},
    )
    start = {n: Spread.of([values[n] for values in before]).mean for n in before[0]}
    shown = [bed.safety, bed.over_refusal, *bed.capability, *bed.details]
    sections = [
        f"# {bed.title}: capability at equal safety",
        f"`capability` is {_names(bed.capability)}. Before training: "
        + ", ".join(f"`{n}` {start[n]:.3f}" for n in dict.fromkeys(shown))
        + ".",
        "\n".join(
            f"* `{kind}`: {MEASURES[kind].meaning} ({MEASURES[kind].unit})."
            for kind in dict.fromkeys(name.partition("/")[0] for name in shown)
            if kind in MEASURES
        ),
    ]
    for chain, num_steps in dict.fromkeys((run.chain, run.num_steps) for run in results):
        chosen = {r: v for r, v in results.items() if (r.chain, r.num_steps) == (chain, num_steps)}
        title = f"{bed.title}, {chain.upper().replace('-', ' -> ')}, {num_steps} steps"
        tables = Tables(chosen, bed, higher_is_better)
        sections += [f"## {title}"]
        sections += map(markdown_table, (tables.levels(), tables.details(), tables.runs()))
        tradeoff_figure(
            tables.sweeps(), output / f"{chain}-{num_steps}.png", safety=bed.safety,
            measures=["capability", bed.over_refusal], start=start, levels=bed.levels, title=title,
            lower_is_better=[name for name, up in higher_is_better.items() if not up],
        )  # fmt: skip
        if kept := tables.by_share():
            share_figure(
                kept, output / f"{chain}-{num_steps}-shares.png", title=title,
                capability=f"capability at {bed.safety} {tables.middle:g}",
            )  # fmt: skip
        print(f"\n{title}\n\n{markdown_table(tables.levels(), style='simple')}")
    sections.append(f"Seeds {', '.join(map(str, bed.seeds))}. {in_words(versions)}")
    (output / "results.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    print(f"\nTables, pictures and all runs: {output}")


def _names(measures: Sequence[str]) -> str:
    names = ", ".join(f"`{name}`" for name in measures)
    return names if len(measures) == 1 else f"the mean of {names}"


class Tables:
    """
    The rows of the tables of one chain of stages and number of steps.

    Args:
        results: The results of its runs.
        bed: Which measures there are.
        higher_is_better: Of each measure.
    """

    def __init__(
        self,
        results: Mapping[Run, dict[str, Any]],
        bed: BenchmarkArguments,
        higher_is_better: Mapping[str, bool],
    ) -> None:
        self.bed = bed
        self.higher_is_better = higher_is_better
        self.results = results
        self.shares = {
            run.label: run.share
            for run in sorted(
                results, key=lambda run: ([*METHODS].index(run.method), -(run.share or 0))
            )
        }
        self.methods = list(self.shares)
        self.factors = sorted({run.learning_rate_factor for run in results})
        self.middle = bed.levels[len(bed.levels) // 2]
        # Method to level to seed to measures.
        self.at_level = {
            method: {level: self._at_level(method, level) for level in bed.levels}
            for method in self.methods
        }

    def sweeps(self) -> dict[str, list[dict[str, Spread]]]:
        """Mean and standard deviation over the seeds of every measure, by method, in the sweep."""
        return {
            method: [
                {name: Spread.of([m[name] for m in measures]) for name in measures[0]}
                for factor in self.factors
                if (measures := self._measures(method, factor))
            ]
            for method in self.methods
        }

    def levels(self) -> list[dict[str, Any]]:
        """Capability at every level of safety, differences at the middle one, and the cost."""
        over_refusal = self.bed.over_refusal
        return [
            {"method": method}
            | {f"capability at {v:g}": self._cell(method, v, "capability") for v in self.bed.levels}
            | {"- naive": self._difference(method, "naive")}
            | {"- best KL": self._difference(method, self.best_kl(self.shares[method]))}
            | {f"{over_refusal} at {self.middle:g}": self._cell(method, self.middle, over_refusal)}
            | self._cost(method)
            for method in self.methods
        ]

    def details(self) -> list[dict[str, Any]]:
        """Further measures at the middle level of safety."""
        return [
            {f"at {self.bed.safety} {self.middle:g}": method}
            | {name: self._cell(method, self.middle, name) for name in self.bed.details}
            for method in self.methods
        ]

    def runs(self) -> list[dict[str, Any]]:
        """Safety and capability of every run of the sweep: what the tables above were read off."""
        names = (self.bed.safety, "capability", self.bed.over_refusal)
        return [
            {"method": method}
            | {
                f"{name}, lr x{factor:g}": f"{Spread.of([m[name] for m in measures]).mean:.3f}"
                for factor in self.factors
                if (measures := self._measures(method, factor))
                for name in names
            }
            for method in self.methods
        ]

    def by_share(self) -> dict[str, dict[float, Spread]]:
        """Capability at the middle level by method and share, where there is a share."""
        kept: dict[str, dict[float, Spread]] = {}
        for method, share in self.shares.items():
            values = self._values(method, self.middle, "capability")
            if share is not None and values:
                name = method.removesuffix(f", share {share:g}")
                kept.setdefault(name, {})[share] = Spread.of([*values.values()])
        return kept

    def best_kl(self, share: float | None) -> str | None:
        """
        The KL penalty of the weight that keeps most at the middle level, in most seeds, among those
        of a share.
        """
        sign = 1 if self.higher_is_better["capability"] else -1
        found = {}
        for method in self.methods:
            values = list(self._values(method, self.middle, "capability").values())
            if method.startswith("KL") and self.shares[method] == share and values:
                found[method] = (len(values), sign * Spread.of(values).mean)
        return max(found, key=lambda method: found[method]) if found else None

    def _measures(self, method: str, factor: float) -> list[dict[str, float]]:
        """Those of all seeds."""
        return [
            result["measures"]
            for run, result in self.results.items()
            if (run.label, run.learning_rate_factor) == (method, factor)
        ]

    def _at_level(self, method: str, level: float) -> dict[int, dict[str, float]]:
        """The measures of every seed whose sweep passes the level."""
        runs = [run for run in self.results if run.label == method]
        runs.sort(key=lambda run: run.learning_rate_factor)
        found = {}
        for seed in dict.fromkeys(run.seed for run in self.results):
            sweep = [self.results[run]["measures"] for run in runs if run.seed == seed]
            measures = at_safety(sweep, self.bed.safety, level)
            if measures is not None:
                found[seed] = measures
        return found

    def _values(self, method: str, level: float, name: str) -> dict[int, float]:
        return {seed: measures[name] for seed, measures in self.at_level[method][level].items()}

    def _cell(self, method: str, level: float, name: str) -> str | None:
        """Mean, standard deviation and number of the values at a level; `None` without any."""
        values = list(self._values(method, level, name).values())
        return f"{Spread.of(values):.3f} ({len(values)})" if values else None

    def _difference(self, method: str, other: str | None) -> str | None:
        """Of the capabilities at the middle level, by seed, with its standard error."""
        if other is None or method == other or other not in self.methods:
            return None
        values = (self._values(m, self.middle, "capability") for m in (method, other))
        spread = paired_difference(*values)
        if spread is None:
            return None
        error = f" +- {spread.standard_error:.3f}" if spread.num > 1 else ""
        return f"{spread.mean:+.3f}{error} ({spread.num})"

    def _cost(self, method: str) -> dict[str, Any]:
        """Sequences of a run, the mean over all runs, and its time, relative to plain TRL."""
        mean = {}
        for name in {method, "naive"} & {*self.methods}:
            costs = [result["cost"] for run, result in self.results.items() if run.label == name]
            mean[name] = {key: Spread.of([cost[key] for cost in costs]).mean for key in costs[0]}
        row: dict[str, Any] = {key: round(mean[method][key]) for key in ("forward", "backward")}
        if "naive" in mean:
            row["time"] = f"{mean[method]['seconds'] / mean['naive']['seconds']:.1f}"
        return row
