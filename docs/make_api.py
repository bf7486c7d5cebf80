"""
Writes docs/api.md from the docstrings and the help texts of the package: `make docs`.

tests/test_docs.py fails where the file does not say what they say.
"""

import inspect
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import ogpsa_trl
from ogpsa_trl.data import conversions

FILE = Path(__file__).with_name("api.md")


def document() -> str:
    """The whole page."""
    parts = [
        "# API reference\n\nMade from the docstrings by `make docs`.",
        *(_entry("ogpsa_trl", name, getattr(ogpsa_trl, name)) for name in _names(ogpsa_trl)),
        "## Conversions\n\nSelected in YAML by `conversion: <name>`; `ogpsa_trl.data.conversions`.",
        *(_entry("", name, function) for name, function in conversions.CONVERSIONS.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _names(module: Any) -> list[str]:
    return [name for name in module.__all__ if not name.startswith("__")]


def _entry(module: str, name: str, value: Any) -> str:
    """Heading, signature, docstring, settings and methods of a class or function."""
    level = "##" if module else "###"
    parts = [f"{level} {name}"]
    is_settings = is_dataclass(value) and all("help" in f.metadata for f in fields(value))
    if not is_settings and callable(value):
        parts.append(f"```\n{name}{_signature(value)}\n```")
    parts.append(_text(value))
    if is_settings:
        parts.append(_settings(value))
    if inspect.isclass(value):
        for method_name, method in vars(value).items():
            function = getattr(method, "__func__", method)
            if method_name.startswith("_") or not inspect.isfunction(function):
                continue
            if function.__doc__:  # not that of a parent
                heading = f"**`{name}.{method_name}{_signature(function)}`**"
                parts.append(f"{heading}\n\n{_text(function)}")
    return "\n\n".join(parts)


def _signature(value: Any) -> str:
    signature = inspect.signature(value)
    kept = [p.replace(annotation=p.empty) for n, p in signature.parameters.items() if n != "self"]
    return str(signature.replace(parameters=kept, return_annotation=signature.empty))


def _text(value: Any) -> str:
    """The docstring, its sections in bold and their entries as lists; examples as they are."""
    lines = []
    is_example = False
    for line in (inspect.getdoc(value) or "").splitlines():
        if line.startswith("```"):
            is_example = not is_example
            # Excerpts, which take names for granted.
            lines.append(line.replace("```python", "```python notest"))
            continue
        if is_example:
            lines.append(line)
            continue
        is_heading = line.rstrip(":") in ("Args", "Returns", "Raises", "Attributes", "Source")
        if is_heading and line.endswith(":"):
            lines += [f"**{line}**", ""]
        elif line.startswith("    ") and not line.startswith("     "):
            lines.append(f"- {line.strip()}")
        elif line.startswith("     "):
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line)
    return "\n".join(lines)


def _settings(config: Any) -> str:
    rows = [f"| `{f.name}` | `{f.default!r}` | {f.metadata['help']} |" for f in fields(config)]
    return "\n".join(["| setting | default | |", "|---|---|---|", *rows])


if __name__ == "__main__":
    FILE.write_text(document(), encoding="utf-8")
