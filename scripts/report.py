"""
Write the report of a training run, one HTML page, from what is saved in its folder.

    python scripts/report.py RUN_FOLDER [--evaluation evaluation.json] [--output report.html]

scripts/train.py writes one at the end of a run; docs/reports.md says how to read it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ogpsa_trl.run_report import write_report


def main(args: Sequence[str] | None = None) -> Path:
    """Parse the command line and write the report; returns its file."""
    parser = argparse.ArgumentParser(
        description="Write the report of a training run: one HTML page.", allow_abbrev=False
    )
    parser.add_argument(
        "folder",
        type=Path,
        help="the `output_dir` of the run, also of one that was cut off, or one of its checkpoints",
    )
    parser.add_argument(
        "--evaluation",
        type=Path,
        help="results of scripts/evaluate.py, for a table before and after (default: "
        "evaluation.json in the folder, if it is there)",
    )
    parser.add_argument(
        "--output", type=Path, help="the file to write (default: report.html in the folder)"
    )
    arguments = parser.parse_args(args)
    return write_report(arguments.folder, evaluation=arguments.evaluation, output=arguments.output)


if __name__ == "__main__":
    try:
        print(f"The report is in {main()}.")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
