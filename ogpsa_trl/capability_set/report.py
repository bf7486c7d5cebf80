"""The figures of a capability set, for JSON, as a text, and as keys of a training configuration."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median_low
from typing import Any

from ogpsa_trl.capability_set.measures import GradientCosines, GroupMeasures
from ogpsa_trl.capability_set.rows import RowGroup
from ogpsa_trl.evaluation.report import markdown_table

GROUP_COLUMNS = [
    "group", "samples", "generated", "left out", "tokens", "min", "median", "max", "truncated",
    "loss", "halves",
]  # fmt: skip
PAIR_COLUMNS = ["groups", "cosine", "of the same data"]

LEGEND = """\
`tokens`: in the loss, of the group and of a sample. `loss`: of the starting model, nats per token.
`halves`: cosine between the likelihood gradients of two random halves of the group: how much of
them is more than chance. `cosine`: between those of two groups; `of the same data`: what two draws
of the same data would have, by their halves. A pair near that value is redundant."""


def content(
    groups: Sequence[RowGroup],
    paths: Mapping[str, Path],
    measures: Mapping[str, GroupMeasures],
    cosines: GradientCosines | None,
    warnings: Sequence[str],
) -> dict[str, Any]:
    """The figures as they go into JSON."""
    return {
        "groups": {
            group.name: {
                "path": str(paths[group.name]),
                "is_look_alike": group.is_look_alike,
                "num_generated": group.num_generated,
                "num_cut": group.num_cut,
                "left_out": dict(group.left_out),
                **asdict(measures[group.name]),
                "half_cosine": cosines.halves[group.name] if cosines else None,
            }
            for group in groups
        },
        "cosines": [
            {
                "groups": list(pair),
                "cosine": cosine,
                "of_the_same_data": cosines.of_the_same(*pair) if cosines else None,
            }
            for pair, cosine in (cosines.pairs if cosines else {}).items()
        ],
        "warnings": list(warnings),
    }


def markdown(figures: Mapping[str, Any], title: str, versions: Mapping[str, str], seed: int) -> str:
    """The report as a text, from the figures of `content`."""
    parts = [f"# {title}", markdown_table(group_rows(figures), GROUP_COLUMNS)]
    if figures["cosines"]:
        parts.append(markdown_table(pair_rows(figures), PAIR_COLUMNS))
    parts.append(LEGEND)
    parts += [f"Left out of `{name}`: {text}." for name, text in left_out(figures).items()]
    parts += [f"**Warning:** {warning}" for warning in figures["warnings"]]
    parts.append(", ".join(f"{name} {number}" for name, number in versions.items()) + ".")
    parts[-1] += f" Seed {seed}."
    return "\n\n".join(parts) + "\n"


def group_rows(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of groups."""
    return [
        {
            "group": name,
            "samples": group["num_samples"],
            "generated": group["num_generated"],
            "left out": sum(group["left_out"].values()),
            "tokens": sum(group["num_tokens"]),
            "min": min(group["num_tokens"]),
            "median": median_low(group["num_tokens"]),
            "max": max(group["num_tokens"]),
            "truncated": group["num_truncated"],
            "loss": group["loss"],
            "halves": group["half_cosine"],
        }
        for name, group in figures["groups"].items()
    ]


def pair_rows(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of pairs of groups."""
    return [
        {
            "groups": " - ".join(pair["groups"]),
            "cosine": pair["cosine"],
            "of the same data": pair["of_the_same_data"],
        }
        for pair in figures["cosines"]
    ]


def left_out(figures: Mapping[str, Any]) -> dict[str, str]:
    """How many of the chosen samples of a group were left out, and why; of those that lost some."""
    return {
        name: ", ".join(f"{number} ({reason})" for reason, number in group["left_out"].items())
        for name, group in figures["groups"].items()
        if group["left_out"]
    }


def training_entries(paths: Mapping[str, Path]) -> str:
    """The groups as keys of a training configuration."""
    pairs = ((json.dumps(str(path)), json.dumps(name)) for name, path in paths.items())
    lines = (f"  - {{path: {path}, group: {name}}}" for path, name in pairs)
    return "\n".join(["capability_datasets:", *lines])
