"""The keys of an evaluation, from one flat YAML file and the command line."""

from dataclasses import dataclass
from typing import Any, get_type_hints

from ogpsa_trl.config import setting
from ogpsa_trl.data.entries import (
    CapabilityDatasetConfig,
    GroupedDatasetConfig,
    entries_of,
    entry_types,
)
from ogpsa_trl.evaluation.refusal import REFUSALS


def check_keys_of(arguments: Any, least: dict[str, int]) -> None:
    """
    Make the entries of lists of data sets, and see that no number is too small.

    Raises:
        ValueError: one is.
    """
    for name, entry_type in entry_types(get_type_hints(type(arguments))).items():
        setattr(arguments, name, entries_of(entry_type, getattr(arguments, name)))
    for name, smallest in least.items():
        value = getattr(arguments, name)
        if value is not None and value < smallest:
            raise ValueError(f"`{name}` must be at least {smallest}, but got {value}.")


@dataclass
class HarmfulDatasetConfig(GroupedDatasetConfig):
    """One entry of `harmful_datasets`: prompts that are to be refused."""

    group: str = "harmful"


@dataclass
class OverRefusalDatasetConfig(GroupedDatasetConfig):
    """One entry of `over_refusal_datasets`: prompts that are to be answered."""

    group: str = "benign"


@dataclass
class PreferenceDatasetConfig(GroupedDatasetConfig):
    """One entry of `preference_datasets`: pairs of completions."""

    group: str = "pairs"


_LEAST = {
    "lm_eval_limit": 1, "max_samples": 1, "batch_size": 1, "max_length": 2, "max_new_tokens": 0,
    "num_bootstrap": 100,
}  # fmt: skip


@dataclass
class EvaluationArguments:
    """What is measured, on which models."""

    model_name_or_path: str = setting(
        "",
        "The model after training: a name on the Hub, a folder, or a folder with a PEFT "
        "adapter, which is put on its base model.",
    )
    base_model_name_or_path: str | None = setting(
        None, "The model before training. Without it there are values, but no changes."
    )
    model_revision: str = setting("main", "Branch, tag or commit of the model after, on the Hub.")
    base_model_revision: str = setting("main", "The same of the model before.")
    tokenizer_name_or_path: str | None = setting(
        None, "Tokenizer and chat template of both models. Default: each its own."
    )
    dtype: str = setting(
        "float32",
        "Of the weights: 'auto' (as they are stored), 'float32', 'bfloat16' or 'float16'. "
        "Both models get the same, unless it is 'auto': rounding is no effect of training.",
    )
    attn_implementation: str | None = setting(
        None, "Attention, as transformers names it. Default: its choice."
    )
    trust_remote_code: bool = setting(False, "Whether to run code that comes with a model.")
    load_in_8bit: bool = setting(False, "Whether to quantise the weights to 8 bits (bitsandbytes).")
    load_in_4bit: bool = setting(False, "Whether to quantise the weights to 4 bits (bitsandbytes).")
    device_map: str = setting(
        "auto",
        "Where the models are: 'auto' uses the accelerators there are, or a device such as "
        "'cpu' or 'cuda:1'. They are loaded one after the other.",
    )
    output_dir: str = setting("runs/evaluation", "Folder of the results, made if need be.")
    capability_datasets: list[CapabilityDatasetConfig] = setting(
        list,
        "Held-out capability data, in the schema of `datasets` with a `group` for each entry, "
        "as in training: negative log-likelihood per token.",
    )
    harmful_datasets: list[HarmfulDatasetConfig] = setting(
        list,
        "Prompts that are to be refused, in the column `prompt`: texts or conversations. A "
        "text is put as a user's message where there is a chat template.",
    )
    over_refusal_datasets: list[OverRefusalDatasetConfig] = setting(
        list, "Prompts that look harmful and are to be answered, in the same form."
    )
    preference_datasets: list[PreferenceDatasetConfig] = setting(
        list, "Pairs, in TRL's preference format."
    )
    exact_match: bool = setting(
        False,
        "Whether to say which share of the held-out answers of the capability data greedy decoding "
        "would give exactly: of use where answers are short.",
    )
    drift: bool = setting(
        False,
        "Whether to measure how far the model has gone from the one before, on the held-out "
        "capability data. Both are in memory for it.",
    )
    refusals: list[str] = setting(
        lambda: list(REFUSALS), "Whole refusals, the likelihood of which is measured."
    )
    lm_eval_tasks: list[str] = setting(
        list, "Tasks, groups or tags of lm-evaluation-harness (extra `eval`)."
    )
    lm_eval_include_path: str | None = setting(
        None, "Folder of task files of your own for the harness."
    )
    lm_eval_chat_template: bool = setting(
        False,
        "Whether the harness puts its prompts through the chat template, as users of a chat model "
        "do; published figures are often without.",
    )
    lm_eval_limit: int | None = setting(
        None, "Samples of each task, the first ones, at least 1. Default: all."
    )
    max_samples: int | None = setting(
        None, "Samples of each group, chosen by `seed`, at least 1. Default: all."
    )
    batch_size: int = setting(16, "Sequences of a forward pass; does not change the measures.")
    max_length: int = setting(
        1024,
        "Tokens, at least 2. Capability data are cut to it, as in training (default: TRL's). "
        "Prompts without room for a refusal and an answer in it, and longer pairs, are left "
        "out.",
    )
    max_new_tokens: int = setting(
        64,
        "Tokens of a generated answer, of which the first 150 characters are judged. 0 "
        "generates none.",
    )
    num_bootstrap: int = setting(2000, "Resamples for the intervals, at least 100.")
    confidence: float = setting(0.95, "Of the intervals, between 0 and 1.")
    seed: int = setting(0, "Of the choice of samples and of the resampling.")

    def __post_init__(self) -> None:
        check_keys_of(self, _LEAST)
        self.lm_eval_tasks = list(self.lm_eval_tasks or [])
        if not 0 < self.confidence < 1:
            raise ValueError(
                f"`confidence` must lie between 0 and 1, but got {self.confidence}. For 95 % "
                "write 0.95."
            )
        self.refusals = list(self.refusals or [])
        if len(set(self.refusals)) < len(self.refusals) or not all(self.refusals):
            raise ValueError(
                f"`refusals` must be different texts that are not empty, because their "
                f"probabilities are added up, but got {self.refusals}. Remove the others."
            )
        if (self.harmful_datasets or self.over_refusal_datasets) and not self.refusals:
            raise ValueError(
                "`harmful_datasets` and `over_refusal_datasets` need `refusals`, but there are "
                "none. Add some, or leave the key out for the usual ones."
            )
        if self.drift and not self.base_model_name_or_path:
            raise ValueError(
                "`drift` is measured from the model before, but `base_model_name_or_path` is not "
                "set. Set it, or leave `drift` out."
            )
        if not self.lm_eval_tasks and (
            self.lm_eval_include_path or self.lm_eval_limit or self.lm_eval_chat_template
        ):
            raise ValueError(
                "`lm_eval_include_path`, `lm_eval_limit` and `lm_eval_chat_template` are settings "
                "of `lm_eval_tasks`, of which there are none. Name some, or remove the settings."
            )
