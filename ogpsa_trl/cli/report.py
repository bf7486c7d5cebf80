"""
Write the report of a training run, one HTML page, from what is saved in its folder.

    ogpsa report RUN_FOLDER [--evaluation evaluation.json] [--output report.html]

Training writes one at the end of a run; docs/quickstart.md says how to read it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ogpsa_trl.cli.user_errors import user_errors
from ogpsa_trl.run_report import write_report


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and write the report."""
    parser = argparse.ArgumentParser(
        "ogpsa report",
        description="Write the report of a training run: one HTML page.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "folder",
        type=Path,
        help="the `output_dir` of the run, also of one that was cut off, or one of its checkpoints",
    )
    parser.add_argument(
        "--evaluation",
        type=Path,
        help="results of `ogpsa evaluate`, for a table before and after (default: "
        "evaluation.json in the folder, if it is there)",
    )
    parser.add_argument(
        "--output", type=Path, help="the file to write (default: report.html in the folder)"
    )
    options = parser.parse_args(argv)
    with user_errors():
        file = write_report(options.folder, evaluation=options.evaluation, output=options.output)
    print(f"The report is in {file}.")
