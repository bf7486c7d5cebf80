"""Whether a model is a causal language model, by its configuration: before weights are loaded."""

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, AutoConfig

_WAY_OUT = "Name one that `AutoModelForCausalLM` loads"


def check_no_encoder(config: Any, name: str, way_out: str = "") -> None:
    """
    Refuse an encoder-decoder model, which reads a text in another way than it writes one.

    Args:
        config: Its configuration.
        name: What the user knows it as.
        way_out: What else there is to do.

    Raises:
        ValueError: it is one.
    """
    parts = (config, config.get_text_config())
    if any(getattr(part, "is_encoder_decoder", False) for part in parts):
        raise ValueError(
            f"The model must be a causal language model, but {name} is an encoder-decoder model "
            f"(`model_type` {config.model_type!r}). {_WAY_OUT}{way_out}."
        )


def check_causal(
    name: str,
    *,
    way_out: str = "",
    as_saved: bool = False,
    revision: str = "main",
    trust_remote_code: bool = False,
) -> None:
    """
    Refuse a model that is no causal language model. Of an adapter the base model is looked at.

    Args:
        name: Folder, or name on the Hub.
        way_out: What else there is to do.
        as_saved: Whether it is loaded by the class that it was saved from, as TRL does, and not by
            `AutoModelForCausalLM`.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Whether to run code that comes with it.

    Raises:
        ValueError: it is none.
    """
    adapter = Path(name) / "adapter_config.json"
    if adapter.is_file() and not (Path(name) / "config.json").is_file():
        name, revision = json.loads(adapter.read_text("utf-8"))["base_model_name_or_path"], "main"
    try:
        config = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except OSError:  # the loader of the model says what is wrong
        return
    architecture = (getattr(config, "architectures", None) or ["?"])[0]
    check_no_encoder(config, f"{name!r} ({architecture})", way_out)
    saved = getattr(transformers, architecture, None)
    if saved is None or (not as_saved and saved is MODEL_MAPPING.get(type(config), None)):
        can_be = True  # code of its own; or a model without its head, which may be tied
    else:
        can_be = saved.can_generate()
    if not as_saved:
        own = getattr(config, "auto_map", None) or {}
        is_known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        can_be = can_be and (is_known or "AutoModelForCausalLM" in own)
    if not can_be:
        raise ValueError(
            f"The model must be a causal language model, but {name!r} is {architecture} "
            f"(`model_type` {config.model_type!r}), which has no language-modeling head. "
            f"{_WAY_OUT}{way_out}."
        )
