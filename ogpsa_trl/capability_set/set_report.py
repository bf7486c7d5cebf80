"""What is reported of a capability set: its figures, its warnings, and keys for a training."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median_low
from typing import Any

from ogpsa_trl.capability_set.group_measures import GradientCosines, GroupMeasures
from ogpsa_trl.capability_set.set_keys import CapabilitySetArguments
from ogpsa_trl.capability_set.set_rows import RowGroup, num_known
from ogpsa_trl.evaluation.tables import markdown_table

LEGEND = """\
`tokens`: in the loss, of the group and of a sample. `loss`: of the starting model, nats per token.
`halves`: cosine between the likelihood gradients of two random halves of the group: how much of
them is more than chance. `cosine`: between those of two groups; `of the same data`: what two draws
of the same data would have, by their halves. A pair near that value is redundant."""

# A refresh draws 8 samples of each group by default: fewer than four draws that share none.
FEW_SAMPLES = 32
# The same, of samples with 8 tokens in the loss.
FEW_TOKENS = 256
# Share of the cosine of two draws of the same data from which on two groups count as the same.
REDUNDANT = 0.9
# The least such cosine that says something. Below, the noise of the halves decides.
CLEAR = 0.5


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


def report(
    figures: Mapping[str, Any], style: str = "pipe", emphasis: str = "**Warning:**"
) -> list[str]:
    """The paragraphs of the report, as Markdown or for a terminal."""
    parts = [markdown_table(group_rows(figures), style=style)]
    if figures["cosines"]:
        parts.append(markdown_table(pair_rows(figures), style=style))
    parts.append(LEGEND)
    for name, group in figures["groups"].items():
        if group["left_out"]:
            reasons = (f"{number} ({reason})" for reason, number in group["left_out"].items())
            parts.append(f"Left out of `{name}`: {', '.join(reasons)}.")
    return parts + [f"{emphasis} {warning}" for warning in figures["warnings"]]


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


def training_entries(paths: Mapping[str, Path]) -> str:
    """The groups as keys of a training configuration."""
    pairs = ((json.dumps(str(path)), json.dumps(name)) for name, path in paths.items())
    lines = (f"  - {{path: {path}, group: {name}}}" for path, name in pairs)
    return "\n".join(["capability_datasets:", *lines])


def warnings_of(
    groups: Sequence[RowGroup],
    measures: Mapping[str, GroupMeasures],
    cosines: GradientCosines | None,
    arguments: CapabilitySetArguments,
    safety_prompts: Collection[str],
) -> list[str]:
    """What is wrong with the groups, each with the way out."""
    warnings = []
    if arguments.harmful_datasets and not any(group.is_look_alike for group in groups):
        warnings.append(
            "No group holds benign look-alikes of the harmful prompts, so nothing in the set says "
            "that such requests are to be answered: over-refusal is not protected. List some in "
            "`look_alike_datasets`, such as XSTest with `conversion: xstest_safe`."
        )
    for group in groups:
        of_group = _of_group(group, measures[group.name], arguments, set(safety_prompts))
        warnings += [f"Group {group.name!r}{text}" for text in of_group]
    return warnings + (_of_cosines(cosines) if cosines else [])


def _of_group(
    group: RowGroup,
    measured: GroupMeasures,
    arguments: CapabilitySetArguments,
    safety_prompts: set[str],
) -> Iterator[str]:
    if measured.num_samples < FEW_SAMPLES:
        yield (
            f" has {measured.num_samples} samples, fewer than {FEW_SAMPLES}: every refresh draws "
            "nearly the same ones, and what they have by chance is protected too. Add data, or "
            "raise `num_samples`."
        )
    num_tokens, num_rows = sum(measured.num_tokens), len(group.rows)
    if num_tokens < FEW_TOKENS:
        yield (
            f" has {num_tokens} tokens in the loss, fewer than {FEW_TOKENS}: its gradient says "
            "little. Add data, or take longer completions."
        )
    shared = num_known(group, safety_prompts)
    if shared:
        yield (
            f": {shared} of {num_rows} prompts are prompts of safety training too, so what the "
            "model answers now is kept where it is to change. Take other prompts."
        )
    if measured.num_truncated:
        yield (
            f": {measured.num_truncated} of {num_rows} samples are longer than `max_length` "
            f"({arguments.max_length}) and cut, as they will be in training. Raise it in both, or "
            "take shorter data."
        )
    if group.num_cut:
        yield (
            f": the model had not ended {group.num_cut} of {group.num_generated} completions "
            f"within `max_new_tokens` ({arguments.max_new_tokens}). They end in the middle, and "
            "training takes that for their end. Raise it."
        )
    if arguments.generate_completions == "true" and "text" in group.rows[0]:
        yield (
            " holds plain texts without prompts, so nothing of it was completed by the model, "
            "although `generate_completions` is true."
        )


def _of_cosines(cosines: GradientCosines) -> list[str]:
    warnings = []
    for (first, second), cosine in cosines.pairs.items():
        same = cosines.of_the_same(first, second)
        expected = same if same is not None and same >= CLEAR else None
        if cosine is not None and cosine >= REDUNDANT * (1.0 if expected is None else expected):
            drawn = "" if expected is None else f", two draws of the same data {expected:.3f}"
            warnings.append(
                f"Groups {first!r} and {second!r} are redundant: their gradients have a cosine of "
                f"{cosine:.3f}{drawn}. Both protect one direction: give them one `group` name, or "
                "drop one."
            )
    return warnings
