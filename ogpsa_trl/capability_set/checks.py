"""What a user has to be warned of before training with a capability set."""

from collections.abc import Collection, Mapping, Sequence

from ogpsa_trl.capability_set.arguments import CapabilitySetArguments
from ogpsa_trl.capability_set.measures import GradientCosines, GroupMeasures
from ogpsa_trl.capability_set.rows import RowGroup, num_known

# A refresh draws 8 samples of each group by default: fewer than four draws that share none.
FEW_SAMPLES = 32
# The same, of samples with 8 tokens in the loss.
FEW_TOKENS = 256
# Share of the cosine of two draws of the same data from which on two groups count as the same.
REDUNDANT = 0.9
# The least such cosine that says something. Below, the noise of the halves decides.
CLEAR = 0.5


def warnings_of(
    groups: Sequence[RowGroup],
    measures: Mapping[str, GroupMeasures],
    cosines: GradientCosines | None,
    arguments: CapabilitySetArguments,
    safety_prompts: Collection[str],
) -> list[str]:
    """
    What is wrong with the groups, each with the way out.

    Args:
        groups: The groups.
        measures: By group, of the starting model.
        cosines: Between their gradients; `None`: not measured.
        arguments: The keys.
        safety_prompts: The prompts of safety training, as `known_prompts` gives them.
    """
    warnings = []
    if arguments.harmful_datasets and not any(group.is_look_alike for group in groups):
        warnings.append(
            "No group holds benign look-alikes of the harmful prompts, so nothing in the set says "
            "that such requests are to be answered: over-refusal is not protected. List some in "
            "`look_alike_datasets`, such as XSTest with `conversion: xstest_safe`."
        )
    for group in groups:
        warnings += _of_group(group, measures[group.name], arguments, set(safety_prompts))
    if cosines is not None:
        warnings += _of_cosines(cosines)
    return warnings


def _of_group(
    group: RowGroup,
    measured: GroupMeasures,
    arguments: CapabilitySetArguments,
    safety_prompts: set[str],
) -> list[str]:
    name, warnings = group.name, []
    if measured.num_samples < FEW_SAMPLES:
        warnings.append(
            f"Group {name!r} has {measured.num_samples} samples, fewer than {FEW_SAMPLES}: every "
            "refresh draws nearly the same ones, and what they have by chance is protected too. "
            "Add data, or raise `num_samples`."
        )
    num_tokens = sum(measured.num_tokens)
    if num_tokens < FEW_TOKENS:
        warnings.append(
            f"Group {name!r} has {num_tokens} tokens in the loss, fewer than {FEW_TOKENS}: its "
            "gradient says little. Add data, or take longer completions."
        )
    shared = num_known(group, safety_prompts)
    if shared:
        warnings.append(
            f"Group {name!r}: {shared} of {len(group.rows)} prompts are prompts of safety training "
            "too, so what the model answers now is kept where it is to change. Take other prompts."
        )
    if measured.num_truncated:
        warnings.append(
            f"Group {name!r}: {measured.num_truncated} of {len(group.rows)} samples are longer "
            f"than `max_length` ({arguments.max_length}) and cut, as they will be in training. "
            "Raise it in both, or take shorter data."
        )
    if group.num_cut:
        warnings.append(
            f"Group {name!r}: the model had not ended {group.num_cut} of {group.num_generated} "
            f"completions within `max_new_tokens` ({arguments.max_new_tokens}). They end in the "
            "middle, and training takes that for their end. Raise it."
        )
    if arguments.generate_completions == "true" and "text" in group.rows[0]:
        warnings.append(
            f"Group {name!r} holds plain texts without prompts, so nothing of it was completed by "
            "the model, although `generate_completions` is true."
        )
    return warnings


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
