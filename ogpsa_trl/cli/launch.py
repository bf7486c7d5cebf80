"""
Launch `ogpsa_trl.cli.train` through accelerate, as `trl sft` launches its script.

What belongs to the launch stands on the command line, before or among the keys of the training: the
engine (`--accelerate_config`) and every option of `accelerate launch`. A key that both know
(`gradient_accumulation_steps`, `debug`) is the training's.
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from subprocess import CalledProcessError

import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ogpsa_trl.cli.command_line import given_keys, split_config
from ogpsa_trl.cli.keys import unknown_key
from ogpsa_trl.cli.train_keys import run_parser, training_options
from ogpsa_trl.cli.user_errors import user_errors
from ogpsa_trl.data.files import configs_folder, find_config, shipped_configs

ENGINE = "--accelerate_config"
ENGINES = "accelerate"  # in configs/

HELP = (
    f"Only on the command line: {ENGINE} FILE chooses the engine, by the path of a file for "
    "accelerate or by a name: {engines}. All options of `accelerate launch` are passed on to it, "
    "such as --num_processes 2; `accelerate launch --help` lists them."
)


@user_errors()
def main(argv: Sequence[str]) -> int:
    """
    `ogpsa train`: look at the keys of a training and launch it.

    Args:
        argv: The command line: keys of the training, and options of the launch.

    Returns:
        The exit status of the training; 128 + n where signal n has ended it.

    Raises:
        SystemExit: a key or a value is wrong, an option has no value, or a file is not there.
    """
    launcher = launch_command_parser()
    launch_options, training = separated(split_config(argv), launcher)
    engines = ", ".join(shipped_configs(ENGINES))
    given = given_keys(training)
    run_parser(given, prog="ogpsa train", epilog=HELP.format(engines=engines)).check(given)
    line = [*launch_options, "-m", "ogpsa_trl.cli.train", *training]
    try:
        launch_command(launcher.parse_args(line))
    except CalledProcessError as error:  # one process
        status = error.returncode
    except ChildFailedError as error:  # several; torchrun has logged which of them failed
        status = error.get_first_failure()[1].exitcode
    else:
        status = 0
    return status if status >= 0 else 128 - status


def separated(args: Sequence[str], launcher: ArgumentParser) -> tuple[list[str], list[str]]:
    """
    The options of the launch, with the engine as `--config_file`, and the words of the training.

    Raises:
        ValueError: neither knows an option, an option has no value, or there is no such engine.
    """
    num_values = {
        option: action.nargs for action in launcher._actions for option in action.option_strings
    }
    num_values[ENGINE] = None  # one, which is argparse's default
    known = training_options()
    launch: list[str] = []
    training: list[str] = []
    words = iter(args)
    for word in words:
        option, has_value, value = word.partition("=")
        if not option.startswith("--") or option in known:
            training.append(word)
            continue
        if option not in num_values:
            keys = {name.removeprefix("--").replace("-", "_") for name in (*known, *num_values)}
            key = option.removeprefix("--").replace("-", "_")
            raise ValueError(unknown_key(key, "the command line", sorted(keys)))
        if num_values[option] == 0:
            launch.append(word)
            continue
        if not has_value:
            value = next(words, "--")
        if value.startswith("--"):
            raise ValueError(f"`{option}` needs a value, but none follows it.")
        launch += engine_options(value) if option == ENGINE else [option, value]
    return launch, training


def engine_options(name: str) -> list[str]:
    """
    What tells accelerate to use an engine.

    Args:
        name: Path of a file for accelerate, or the name of one in `ENGINES`.

    Raises:
        ValueError: there is no such file.
    """
    path = find_config(name, ENGINES).resolve()
    if not path.is_file():
        raise ValueError(
            f"`{ENGINE}` must be the path of a YAML file or one of the names "
            f"{', '.join(shipped_configs(ENGINES))}, but got {name!r}."
        )
    options = ["--config_file", str(path)]
    if path.is_relative_to(configs_folder()):
        # The path of DeepSpeed's file in it begins at the root of the project, and training may
        # be launched from anywhere. What stands on the command line replaces what is in the file.
        deepspeed = yaml.safe_load(path.read_text(encoding="utf-8")).get("deepspeed_config", {})
        if "deepspeed_config_file" in deepspeed:
            file = configs_folder().parent / deepspeed["deepspeed_config_file"]
            options += ["--deepspeed_config_file", str(file)]
    return options
