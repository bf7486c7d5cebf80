"""
The console command `ogpsa`.

    ogpsa train --config sft --accelerate_config fsdp2

What a command needs is imported when it is known, so that `ogpsa --help` answers at once.
"""

import argparse
import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import NoReturn

from ogpsa_trl import __version__
from ogpsa_trl.data.files import configs_folder

COMMANDS = {
    "train": "SFT or DPO from a YAML file, with or without OGPSA, launched by accelerate",
    "capability": "capability data for training, built and measured before it",
    "evaluate": "what training has done to a model: capabilities, refusals, preferences",
    "benchmark": "methods at equal safety; `benchmark overhead`: time and memory",
    "report": "a page about a finished run: `ogpsa report RUN_FOLDER`",
    "demo": "plain TRL and OGPSA on a small world of its own, in minutes",
}

# The function `main` of each takes the words after the command; it may return an exit status.
MODULES = {name: f"ogpsa_trl.cli.{name}" for name in COMMANDS} | {
    "train": "ogpsa_trl.cli.launch",
    "demo": "ogpsa_trl.benchmark.demo",
}
BENCHMARKS = {name: f"ogpsa_trl.benchmark.{name}" for name in ("tradeoff", "overhead", "data")}

# What brings the package for pictures, which is needed at the very end only.
EXTRAS = {"evaluate": "eval", "benchmark": "scripts", "demo": "scripts"}

EPILOG = """\
commands:
{commands}

`ogpsa COMMAND --help` explains every key. A --config is the path of a YAML file or the name of one
of those that come with ogpsa_trl, which are examples to copy from:
{configs}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a command.

    Args:
        argv: The words after `ogpsa`. Default: those of the process.

    Returns:
        The exit status; of `train` that of the training: 1 where the capability gate is not passed.
    """
    command, *args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if command not in COMMANDS:
        _end_without_command(command)
    _check_installed(command)
    module = MODULES[command]
    if command == "benchmark":
        module = BENCHMARKS[args.pop(0) if args and args[0] in BENCHMARKS else "tradeoff"]
    from ogpsa_trl.cli.command_line import expanded_words

    return import_module(module).main(expanded_words(args)) or 0


def _check_installed(command: str) -> None:
    if command in EXTRAS and find_spec("matplotlib") is None:
        sys.exit(
            f"error: `ogpsa {command}` needs the package matplotlib, but it is not installed. "
            f"Install it with `pip install 'ogpsa_trl[{EXTRAS[command]}]'`."
        )


def _end_without_command(word: str) -> NoReturn:
    parser = _parser()
    if word.startswith("-"):
        parser.parse_args([word])  # ends with the help, the version or an error of its own
    nearest = difflib.get_close_matches(word, COMMANDS, n=1, cutoff=0.0)[0]
    parser.exit(
        2,
        f"error: Unknown command {word!r}. The nearest known command is {nearest!r}; there are "
        f"{', '.join(COMMANDS)}.\n",
    )


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    epilog = EPILOG.format(
        commands="\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()),
        configs=configs_folder(),
    )
    parser = argparse.ArgumentParser(
        "ogpsa",
        usage="ogpsa COMMAND [--key value ...]",
        description="Safety post-training that leaves general capabilities alone.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ogpsa_trl {__version__}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
