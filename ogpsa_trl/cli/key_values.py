"""
The values of keys, held against their types and ranges.

argparse converts text; what else comes from YAML it takes as it is, and dataclasses do not look at
types at all. A wrong value would come out in the middle of a run, or not at all.
"""

import difflib
import re
from typing import Annotated, Any

from annotated_types import Ge, Gt, Interval
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ogpsa_trl.data.row_values import shown

_STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)

# Settings within a key; transformers reads JSON too, and the files that `deepspeed` and such name.
JSON = Annotated[str, Field(pattern=r"^\{|\.json$")] | None
MAPPING = dict[str, Any] | JSON
# Variables, by name.
_TEXT = Annotated[str, Field(pattern=r"^[^\x00]*$")]
ENVIRONMENT = dict[Annotated[str, Field(pattern=r"^[^=\x00]+$")], _TEXT | float | bool] | None

# Numbers of TRL and transformers that stop a run after the model is loaded (batch sizes, AdamW,
# LoRA), or that mean something else, without a word, where they are out of range.
RANGES: dict[str, Any] = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size", "per_device_eval_batch_size",
            "gradient_accumulation_steps", "eval_accumulation_steps", "dataset_num_proc",
            "dataloader_prefetch_factor", "save_total_limit", "ddp_bucket_cap_mb",
            "precompute_ref_batch_size", "ref_model_sync_steps", "lora_r",
            "lora_alpha",
        ),
        Ge(1),
    ),
    **dict.fromkeys(
        (
            "learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "eval_delay",
            "neftune_noise_alpha", "router_aux_loss_coef", "dataloader_num_workers",
        ),
        Ge(0),
    ),
    **dict.fromkeys(
        (
            "num_train_epochs", "beta", "discopop_tau", "logging_steps", "eval_steps", "save_steps",
            "test_split_size",
        ),
        Gt(0),
    ),
    **dict.fromkeys(
        ("label_smoothing", "label_smoothing_factor", "ld_alpha", "ref_model_mixup_alpha"),
        Interval(ge=0, le=1),
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout"), Interval(ge=0, lt=1)),
    **dict.fromkeys(("seed", "data_seed"), Interval(ge=0, lt=2**32)),
    "max_length": Ge(2),  # the first token predicts the second
    "ddp_timeout": Interval(ge=1, le=10**7),  # seconds
}  # fmt: skip


def check_value(where: str, value: Any, hint: Any) -> None:
    """
    Raise where a value is not of its type, by the strict rules of pydantic, or not finite.

    Args:
        where: The key, in backquotes, and where it stands.
        value: The value.
        hint: The type; of a number with its range (`Annotated`).

    Raises:
        ValueError: it is not; the message names key, value, type and, if there is more to say, the
            way out.
    """
    if isinstance(value, str) and "\0" in value:
        raise ValueError(f"{where} must not hold the character zero, but got {shown(value)}.")
    try:
        TypeAdapter(hint, config=_STRICT).validate_python(value)
    except ValidationError as error:
        problems = error.errors()
        for problem in problems:
            place = problem["loc"]
            numbers = [part for part in place if isinstance(part, int)]
            if place[-1:] == ("[key]",):
                where, value, problems = f"a name in {where}", place[-2], [problem]
                break
            if numbers and isinstance(value, list):
                where, value = f"entry {numbers[0] + 1} of {where}", problem["input"]
                problems = [problem]
                break
        found = (re.sub(r"^\w+ should ", "", problem["msg"]) for problem in problems)
        words = " or ".join(dict.fromkeys(found)).replace(" or be ", " or ")
        raise ValueError(
            f"{where} must {words}, but got {shown(value)}.{_way_out(value, words, hint)}"
        ) from None


def _way_out(value: Any, words: str, hint: Any) -> str:
    """What may have been meant."""
    if value is None:
        return " Remove the key, and it has its default, or give it a value."
    if "list" in words:
        return " Write it in brackets, [...], or one entry a line, each after `-`."
    if "dictionary" in words:
        return " Write it as `name: value`."
    if isinstance(value, str):
        nearest = difflib.get_close_matches(value, re.findall(r"'(.*?)'", str(hint)), n=1)
        is_number = "number" in words or "integer" in words
        return f" The nearest is {nearest[0]!r}." if nearest else " Leave out quotes." * is_number
    if ("string" in words or "'" in words) and not isinstance(value, list | dict):
        return " Write it in quotes: YAML reads no, 3 or 2024-01-01 as something else than text."
    return ""
