"""The report of a run: one HTML page that needs nothing else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ogpsa_trl.evaluation.json_files import read_json
from ogpsa_trl.evaluation.results import Result
from ogpsa_trl.evaluation.tables import result_rows
from ogpsa_trl.run_report import contents
from ogpsa_trl.run_report.charts import MOST_POINTS, style, svg
from ogpsa_trl.run_report.log import RunLog

_DIGITS = 4  # of probabilities and likelihoods, as in the report of an evaluation


def write_report(
    folder: str | Path, *, evaluation: str | Path | None = None, output: str | Path | None = None
) -> Path:
    """
    Write the report of a run, from what is saved in its folder.

    Args:
        folder: The `output_dir` of a run of any trainer of transformers, or one of its checkpoints.
            It may have been cut off.
        evaluation: The `evaluation.json` of `ogpsa evaluate`. Default: the one in the folder, if
            there is one.
        output: The file to write. Default: `report.html` in the folder.

    Returns:
        The file written.

    Raises:
        ValueError: there is no log, or a file is not what it should be.
        ModuleNotFoundError: matplotlib or jinja2 is not installed (extra `scripts`).
    """
    log = RunLog.read(folder)
    if evaluation is None and (log.folder / "evaluation.json").exists():
        evaluation = log.folder / "evaluation.json"
    output = log.folder / "report.html" if output is None else Path(output)
    output.write_text(_html(log, evaluation), encoding="utf-8")
    return output


def _html(log: RunLog, evaluation: str | Path | None) -> str:
    # Needed for nothing else. What comes from data is escaped by it, not by us.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ogpsa_trl.run_report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = contents.shown
    charts = contents.charts(log)
    return environment.get_template("page.html.jinja").render(
        name=log.folder.resolve().name,
        title=contents.title(log),
        facts=contents.facts(log),
        notes=contents.notes(log),
        charts=[
            {
                "chart": chart,
                "svg": svg(chart, f"chart{number}"),
                "styles": [style(index) for index in range(len(chart.lines))],
            }
            for number, chart in enumerate(charts, start=1)
        ],
        has_means=any(
            len(line.series.steps) > MOST_POINTS for chart in charts for line in chart.lines
        ),
        tables=list(filter(None, (table(log) for table in contents.TABLES))),
        evaluation=None if evaluation is None else _evaluation(evaluation),
        settings=contents.settings(log),
        source=log.state_file.relative_to(log.folder).as_posix(),
    )


def _evaluation(path: str | Path) -> dict[str, Any]:
    """The table of an evaluation, and between what models."""
    content = read_json(path)
    if not isinstance(content, Mapping) or not {"settings", "measures"} <= content.keys():
        raise ValueError(
            f"{str(path)!r} must be the `evaluation.json` that `ogpsa evaluate` writes, but has "
            "no settings or measures."
        )
    results = [Result.from_json(measure) for measure in content["measures"].values()]
    rows: Sequence[Mapping[str, object]] = result_rows(results, digits=_DIGITS)
    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    settings = content["settings"]
    return {
        "before": settings["base_model_name_or_path"],
        "after": settings["model_name_or_path"],
        "confidence": 100 * settings["confidence"],
        "rows": [{name: row[name] for name in columns} for row in rows],
        "notes": content.get("notes", []),
    }
