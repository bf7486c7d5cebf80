"""The arguments of a training run: TRL's own, OGPSA's, and what the command adds."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from datasets import Dataset, IterableDataset
from trl.scripts.utils import ScriptArguments
from trl.trainer.model_config import ModelConfig

from ogpsa_trl.config import GateConfig, OGPSAConfig, Preset, setting
from ogpsa_trl.data.entries import (
    CapabilityDatasetConfig,
    ConvertibleDatasetConfig,
    ConvertibleMixtureConfig,
    entries_of,
    load_groups,
    load_mixture,
    loading,
)


@dataclass
class TrainArguments:
    """What the training script adds to the arguments of TRL and of OGPSA."""

    stage: Literal["sft", "dpo"] = setting(
        "sft",
        "Which trainer: 'sft' or 'dpo'. It decides the keys.",
    )
    ogpsa: bool = setting(
        True,
        "Whether to use the capability data. `--ogpsa false` trains plain TRL from the same file, "
        "for comparison.",
    )
    preset: Preset | None = setting(
        None,
        "Fills in OGPSA's settings; keys of your own replace them. 'preserve', the default: the "
        "constrained update. 'paper': the published form. 'paper-theorem': the same with one "
        "subspace. 'replay', 'kl': the baselines of these names.",
    )
    capability_datasets: list[CapabilityDatasetConfig] = field(
        default_factory=list,
        metadata={
            "help": "Capability data, in the schema of `datasets` with a `group` name for each "
            "entry. Leave it out to train plain TRL."
        },
    )
    gate_datasets: list[CapabilityDatasetConfig] = field(
        default_factory=list,
        metadata={
            "help": "Held-out capability data that the gate measures, in the schema of "
            "`capability_datasets`, with and without `ogpsa`. Leave it out to train without a gate."
        },
    )
    run_report: bool = setting(
        True,
        "Whether to write `report.html` into `output_dir` at the end: the run on one page "
        "(docs/quickstart.md). `ogpsa report` makes it again later.",
    )

    def __post_init__(self) -> None:
        self.capability_datasets = entries_of(CapabilityDatasetConfig, self.capability_datasets)
        self.gate_datasets = entries_of(CapabilityDatasetConfig, self.gate_datasets)

    def capability_groups(self) -> dict[str, Dataset | IterableDataset] | None:
        """Load the capability data by group; `None` where the run is to be plain TRL."""
        if not self.ogpsa or not self.capability_datasets:
            return None
        return load_groups(self.capability_datasets, "`capability_datasets`")

    def gate_groups(self) -> dict[str, Dataset | IterableDataset] | None:
        """Load the gate's data by group; `None` where the run has no gate."""
        return load_groups(self.gate_datasets, "`gate_datasets`") if self.gate_datasets else None


@dataclass
class RunArguments:
    """All arguments of a run, parsed and checked."""

    train: TrainArguments
    script: ScriptArguments
    training: Any
    model: ModelConfig
    datasets: ConvertibleMixtureConfig
    ogpsa: OGPSAConfig
    gate: GateConfig

    def keys(self) -> dict[str, Any]:
        """The keys that are neither training arguments nor settings of OGPSA or of the gate."""
        return {
            name: value
            for part in (self.train, self.script, self.model, self.datasets)
            for name, value in asdict(part).items()
        }

    def safety_datasets(self) -> Mapping[Any, Dataset | IterableDataset]:
        """
        Load the training data by split.

        Raises:
            ValueError: there are none, or two kinds of them, or they cannot be loaded.
        """
        name = self.script.dataset_name
        if bool(self.datasets.datasets) == (name is not None):
            raise ValueError(
                "A run needs training data from `datasets` or from `dataset_name`, but "
                + ("neither is set. Set one." if name is None else "both are set. Remove one.")
            )
        if name is None:
            return load_mixture(self.datasets)
        entry = ConvertibleDatasetConfig(name, name=self.script.dataset_config)
        entry.check_file()
        with loading(f"`dataset_name` {name!r}"):
            return entry.load(None, streaming=self.script.dataset_streaming)
