"""The keys of a capability set, from one flat YAML file and the command line."""

import re
from dataclasses import dataclass

from ogpsa_trl.config import setting
from ogpsa_trl.data.entries import CapabilityDatasetConfig, GroupedDatasetConfig
from ogpsa_trl.evaluation.evaluation_keys import HarmfulDatasetConfig, check_keys_of


@dataclass
class LookAlikeDatasetConfig(GroupedDatasetConfig):
    """One entry of `look_alike_datasets`: benign requests that look like the harmful ones."""

    group: str = "look_alikes"


_LEAST = {"num_samples": 2, "max_new_tokens": 1, "max_length": 2, "batch_size": 1}

# What a group's file may be called, on any system.
_GROUP_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass
class CapabilitySetArguments:
    """What the groups are made of, and what is measured; the model is that of `ModelConfig`."""

    capability_datasets: list[CapabilityDatasetConfig] = setting(
        list,
        "What the groups are sampled from, in the schema of training: entries of one `group` "
        "are mixed. Texts, conversations, prompts with or without completions, or "
        "preferences, of which the chosen completions are used.",
    )
    look_alike_datasets: list[LookAlikeDatasetConfig] = setting(
        list,
        "Benign requests that look like the harmful ones, in the same schema. Without them "
        "over-refusal is not protected. Answers that sound like a refusal are left out.",
    )
    harmful_datasets: list[HarmfulDatasetConfig] = setting(
        list,
        "The prompts of safety training, in any format that has prompts. They are only "
        "compared with those of the groups.",
    )
    output_dir: str = setting(
        "runs/capability_set", "Folder of the groups, one JSON lines file each, and of the report."
    )
    num_samples: int = setting(
        200,
        "Samples of each group, chosen by `seed`, at least 2. The default is that of training "
        "(official).",
    )
    generate_completions: str = setting(
        "missing",
        "Where the starting model itself completes the prompts, by greedy decoding. "
        "'missing': where there is no completion. 'true': everywhere, in place of the "
        "completions of the data. 'false': nowhere.",
    )
    max_new_tokens: int = setting(
        256,
        "Tokens of a generated completion, at least 1. Prompts that leave no room for so many "
        "within `max_length` are left out.",
    )
    max_length: int = setting(
        1024, "Tokens kept of each sample, at least 2: that of training (default: TRL's)."
    )
    batch_size: int = setting(8, "Sequences of a forward pass; does not change the measures.")
    gradient_cosine: bool = setting(
        True,
        "Whether to compare the groups by their gradients, which tells redundant ones. It "
        "holds two gradients of each group in float32: 2 x groups x 4 bytes for each trained "
        "parameter, 56 GB a group at 7B. With `use_peft` they are those of a new LoRA "
        "adapter, as in training with one: a few hundred MB. 'false' measures losses only.",
    )
    device_map: str = setting(
        "auto",
        "Where the model is: 'auto' uses the accelerators there are, or a device such as "
        "'cpu' or 'cuda:0'. Gradients need a single one.",
    )
    trust_remote_code: bool = setting(False, "Whether to run code that comes with the model.")
    seed: int = setting(0, "Of the choice of samples, of the halves of a group, of the adapter.")

    def __post_init__(self) -> None:
        check_keys_of(self, _LEAST)
        self.generate_completions = str(self.generate_completions).lower()  # YAML has booleans
        if self.generate_completions not in ("missing", "true", "false"):
            raise ValueError(
                "`generate_completions` must be 'missing', true or false, but got "
                f"{self.generate_completions!r}."
            )
        self._check_groups()

    def _check_groups(self) -> None:
        look_alikes = {entry.group for entry in self.look_alike_datasets}
        groups = {entry.group for entry in self.capability_datasets}
        for name in sorted(groups | look_alikes):
            if not _GROUP_NAME.fullmatch(name):
                raise ValueError(
                    "`group` names a file, so it must be made of letters, digits, `_`, `-` and "
                    f"`.`, but got {name!r}. Rename the group."
                )
        if groups & look_alikes:
            raise ValueError(
                f"The group {min(groups & look_alikes)!r} must stand in one list, but it is in "
                "`capability_datasets` and in `look_alike_datasets`. Give the look-alikes a group "
                "of their own."
            )
