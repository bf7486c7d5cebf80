"""Files and folders that a run names, looked at before anything is loaded."""

import tempfile
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint


def check_output_folder(path: str, key: str = "`output_dir`") -> None:
    """
    Make a folder, and see that files can be written into it.

    Raises:
        ValueError: it cannot be made, or not be written to.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, ValueError) as error:  # a `ValueError` for a zero in the name
        reason = "it is a file" if Path(path).is_file() else getattr(error, "strerror", error)
        raise ValueError(
            f"{key} must be a folder that can be written to, but {path!r} is not: {reason}. Name "
            "another, or change its permissions."
        ) from error


def check_model_path(
    path: str, key: str = "`model_name_or_path`", *, adapter: bool = False
) -> None:
    """
    Refuse what can be neither a model's folder nor its name on the Hub.

    Args:
        path: Name or folder.
        key: The key that names it.
        adapter: Whether it may be the folder of a PEFT adapter.

    Raises:
        ValueError: it is neither.
    """
    folder = Path(path)
    if folder.is_file():
        raise ValueError(
            f"{key} must be a folder or a name on the Hub, but {path!r} is a file. Name the folder "
            "that it is in."
        )
    if folder.is_dir():
        _check_model_folder(folder, path, key, adapter)
    elif path.startswith(("/", "./", "../", "~")) or path.count("/") > 1:
        raise ValueError(
            f"{key} must be a folder or a name on the Hub (`owner/model`), but there is no folder "
            f"{path!r} in {Path.cwd()}. Correct it, or train that model first."
        )


def check_template_path(path: str | None) -> None:
    """
    Refuse a file of a chat template that is not there; anything else is a model, for TRL.

    Raises:
        ValueError: it is not there.
    """
    if path and path.endswith((".jinja", ".j2")) and not Path(path).is_file():
        raise ValueError(
            f"`chat_template_path` must be a file, a folder of a model or a name on the Hub, but "
            f"there is no file {path!r} in {Path.cwd()}. Correct the path."
        )


def _check_model_folder(folder: Path, path: str, key: str, adapter: bool) -> None:
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        if adapter:
            return
        raise ValueError(
            f"{key} must be a whole model, but {path!r} holds a PEFT adapter. Merge it into its "
            "base model first (`merge_and_unload` of PEFT), and save the tokenizer beside it."
        )
    inside = get_last_checkpoint(str(folder))
    hint = f" Name the checkpoint {inside!r}, perhaps." if inside else ""
    raise ValueError(
        f"{key} must be the folder of a model, but there is no config.json in {path!r}.{hint} "
        "Correct the path, or train that model first."
    )
