"""
Where the trade-off benchmark is run, as a file describes it: a model, its training and evaluation.

Training and evaluation are files of `ogpsa train` and `ogpsa evaluate`: a test bed is made of what
users have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ogpsa_trl.benchmark.methods import CHAINS, METHODS, Method, stage_run
from ogpsa_trl.cli.command_line import given_keys, load_mapping
from ogpsa_trl.cli.evaluate import answer_rows, parse_evaluation
from ogpsa_trl.cli.key_values import check_value
from ogpsa_trl.cli.keys import KeyParser
from ogpsa_trl.config import setting
from ogpsa_trl.data.files import find_config
from ogpsa_trl.evaluation.evaluation_keys import EvaluationArguments
from ogpsa_trl.evaluation.models import load_folder
from ogpsa_trl.evaluation.sets import EvaluationSets, load_sets
from ogpsa_trl.evaluation.suite import ModelScores, score_model


@dataclass
class BenchmarkArguments:
    """A test bed, and what is run in it. `{seed}` in a path stands for the seed of a run."""

    title: str = setting("", "Heading of the tables.")
    model_name_or_path: str = setting("", "Folder of the model that all training starts from.")
    sft: str = setting("", "File of `ogpsa train` for the stage SFT.")
    dpo: str = setting("", "The same for DPO.")
    evaluate: str = setting("", "File of `ogpsa evaluate`: what is measured.")
    safety: str = setting(
        "",
        "The measure that methods are compared at equal values of, as `ogpsa evaluate` names it.",
    )
    levels: list[float] = setting(
        list, "Those values; the middle one is that of the details and differences."
    )
    capability: list[str] = setting(
        list, "What is to be kept: one measure, or several that are averaged."
    )
    over_refusal: str = setting("", "The measure of refusals of benign prompts.")
    details: list[str] = setting(list, "Further measures to report at the middle level.")
    stages: list[str] = setting(
        lambda: ["sft"], f"What is trained, each by itself: {', '.join(CHAINS)}."
    )
    steps: list[int] = setting(lambda: [40], "Steps of every stage, each by itself.")
    methods: list[str] = setting(lambda: list(METHODS), "Which methods. Default: all.")
    seeds: list[int] = setting(lambda: [0, 1, 2], "Of training.")
    shares: list[float] = setting(
        list, "`capability_token_share` of the methods that have one. Default: each its own."
    )
    learning_rate_factors: list[float] = setting(
        lambda: [0.5, 1.0, 2.0], "The sweep, on the learning rates of the files of training."
    )
    processes: int = setting(2, "Runs at a time, each on one thread.")
    output_dir: str = setting("runs/benchmark", "Folder of all results; finished runs are kept.")

    def __post_init__(self) -> None:
        for name in ("title", "model_name_or_path", "evaluate", "safety", "over_refusal"):
            if not getattr(self, name):
                raise ValueError(f"A benchmark needs `{name}`, but it is not set. Set it.")
        for name in ("levels", "capability", "stages", "steps", "methods", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` must hold at least one value, but is empty.")
        for name in ("steps", "shares", "learning_rate_factors"):
            for value in getattr(self, name):
                if value <= 0:
                    raise ValueError(f"`{name}` must hold values above 0, but has {value}.")
        if self.processes < 1:
            raise ValueError(f"`processes` must be at least 1, but got {self.processes}.")
        for name, known in (("stages", CHAINS), ("methods", METHODS)):
            for value in getattr(self, name):
                if value not in known:
                    raise ValueError(
                        f"`{name}` must hold names among {', '.join(map(repr, known))}, but has "
                        f"{value!r}."
                    )
        self.learning_rate_factors = sorted(self.learning_rate_factors)
        for stage in self.training_stages:
            if not getattr(self, stage):
                raise ValueError(
                    f"`stages` has {stage!r} in it, but `{stage}`, its file, is not set. Set it."
                )

    @property
    def training_stages(self) -> list[str]:
        """The stages that are trained in any chain."""
        return list(dict.fromkeys(stage for chain in self.stages for stage, _ in CHAINS[chain]))

    def path(self, name: str, seed: int) -> str:
        """The path that a key holds, for a seed."""
        return getattr(self, name).replace("{seed}", str(seed))

    def check(self) -> None:
        """
        Look at the files of training and of evaluation before anything is run.

        Raises:
            ValueError: one of them cannot be read, or says what is not allowed.
        """
        for seed in self.seeds:
            for stage in self.training_stages:
                model = Path(self.path("model_name_or_path", seed))
                config = self.path(stage, seed)
                run = stage_run(config, Method(), model=model, output=Path("unused"))
                if run.train.stage != stage:
                    raise ValueError(
                        f"`{stage}` names {config!r}, which has `stage: {run.train.stage}`. Name a "
                        f"file with `stage: {stage}`."
                    )
            _evaluation_arguments(
                self.path("evaluate", seed), self.path("model_name_or_path", seed)
            )

    def result_file(self, name: str) -> Path:
        """The file of the result with a name."""
        return Path(self.output_dir) / "runs" / f"{name}.json"

    def settings(self, chain: str, seed: int) -> dict[str, Any]:
        """All that the result of a run of a chain follows from, as the files say it."""
        names = [*dict.fromkeys(stage for stage, _ in CHAINS[chain]), "evaluate"]
        files = {name: self.path(name, seed) for name in names}
        texts = {name: load_mapping(str(find_config(file))) for name, file in files.items()}
        return {"model": self.path("model_name_or_path", seed), **texts}

    def measure(self, folder: str | Path, seed: int) -> "Measures":
        """The measures of the model in a folder."""
        start_folder = self.path("model_name_or_path", seed)
        evaluation = evaluation_of(self.path("evaluate", seed), start_folder)
        model, tokenizer = load_folder(folder)
        scores = evaluation.scores(model, tokenizer)
        values = {name: measured.values.value for name, measured in scores.measures.items()}
        up = {name: bool(measured.higher_is_better) for name, measured in scores.measures.items()}
        for name in (self.safety, *self.capability, self.over_refusal, *self.details):
            if name not in values and name != "distance":
                raise ValueError(
                    f"There is no measure {name!r}. The file of `evaluate` gives "
                    f"{', '.join(values)}, and there is `distance`."
                )
        values["distance"], up["distance"] = distance(model, evaluation.start_model), False
        values["capability"] = sum(values[name] for name in self.capability) / len(self.capability)
        up["capability"] = up[self.capability[0]]
        return Measures(values, up, list(answer_rows(evaluation.sets, {"after": scores})))


class Measures(NamedTuple):
    """What was measured of a model."""

    values: dict[str, float]  # `capability` and `distance` among them
    higher_is_better: dict[str, bool]
    answers: list[dict[str, Any]]  # to the prompts, where some were generated


class Evaluation(NamedTuple):
    """What models are measured on, and the one that their training starts with."""

    arguments: EvaluationArguments
    sets: EvaluationSets
    start_model: Any

    def scores(self, model: Any, tokenizer: Any) -> ModelScores:
        """The measures of a model, by the file of the evaluation."""
        start = self.start_model if self.arguments.drift else None
        return score_model(model, tokenizer, self.sets, self.arguments, start)


@cache
def evaluation_of(config: str, start: str) -> Evaluation:
    """The evaluation of a file, for models that start from the one in a folder; loaded once."""
    arguments = _evaluation_arguments(config, start)
    model, tokenizer = load_folder(start)
    return Evaluation(arguments, load_sets(arguments, [tokenizer]), model)


def _evaluation_arguments(config: str, start: str) -> EvaluationArguments:
    words = ["--config", config, "--model_name_or_path", start, "--base_model_name_or_path", start]
    return parse_evaluation(words)


def parse_benchmark(args: Sequence[str] | None = None) -> BenchmarkArguments:
    """
    Parse the command line and the YAML file that `--config` names; the command line wins.

    Raises:
        ValueError: a key is unknown, a value is not allowed, or a file cannot be read.
    """
    description = "Which method keeps most of a model's capability at equal safety, at what cost?"
    parser = KeyParser(BenchmarkArguments, description, prog="ogpsa benchmark")
    [arguments] = parser.parse(given_keys(args))
    for key, hint in parser.hints.items():
        check_value(f"`{key}`", getattr(arguments, key), hint)
    arguments.check()
    return arguments


@torch.no_grad()
def distance(model: nn.Module, start: nn.Module) -> float:
    """Length of the difference of two models' weights, relative to that of the second's."""
    pairs = list(zip(model.parameters(), start.parameters(), strict=True))
    change = sum((p.double() - s.double()).pow(2).sum().item() for p, s in pairs)
    return (change / sum(s.double().pow(2).sum().item() for _, s in pairs)) ** 0.5
