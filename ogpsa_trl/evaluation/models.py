"""Models that are measured: their tokenizers, weights, and how much they can read."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.peft_utils import find_adapter_config_file
from trl.trainer.model_config import ModelConfig
from trl.trainer.utils import get_quantization_config

from ogpsa_trl.data.preparation import context_of

logger = logging.getLogger(__name__)


def load_model(config: ModelConfig, *, device_map: str, trust_remote_code: bool) -> Any:
    """A model, by TRL's settings; of a PEFT adapter the base model with the adapter on it."""
    return AutoModelForCausalLM.from_pretrained(
        str(config.model_name_or_path),
        revision=config.model_revision,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        trust_remote_code=trust_remote_code,
        quantization_config=get_quantization_config(config),
        device_map=device_map,
    )


def load_folder(folder: str | Path) -> tuple[Any, Any]:
    """Model and tokenizer of a folder, as they were saved."""
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def length_for(
    max_length: int, models: Mapping[str, str | None], *, trust_remote_code: bool
) -> int:
    """
    `max_length`, or less where a model cannot read as much; known without its weights.

    Args:
        max_length: Tokens of a sample.
        models: Names and revisions; a PEFT adapter stands for its base model.
        trust_remote_code: Whether code that comes with a model is run.
    """
    for name, revision in models.items():
        adapter = find_adapter_config_file(name, revision=revision)
        if adapter is not None:
            base = json.loads(Path(adapter).read_text("utf-8"))["base_model_name_or_path"]
            name, revision = base, None
        config = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
        context = context_of(config)
        if context is not None and context < max_length:
            logger.warning(
                "`max_length` (%d) is above the %d tokens that %s can read: %d is used.",
                max_length, context, name, context,
            )  # fmt: skip
            max_length = context
    return max_length
