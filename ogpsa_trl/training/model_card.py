"""What a model card says of OGPSA: the paper, the settings, the capability data."""

import html
from collections.abc import Sequence
from dataclasses import asdict

from ogpsa_trl.config import OGPSAConfig
from ogpsa_trl.data.groups import CapabilityGroup

_TITLE = (
    "Safety Alignment as Continual Learning: Mitigating the Alignment Tax via Orthogonal Gradient "
    "Projection"
)

# The form of `_paper` in TRL's trainers.
PAPER = {
    "title": _TITLE,
    "id": "2602.07892",
    "citation": f"""\
@misc{{sun2026safety,
    title         = {{{{{_TITLE}}}}},
    author        = {{Guanglong Sun and Siyuan Zhang and Liyuan Wang and Jun Zhu and Hang Su and \
Yi Zhong}},
    year          = {{2026}},
    eprint        = {{2602.07892}},
    archivePrefix = {{arXiv}},
    primaryClass  = {{cs.LG}},
    url           = {{https://arxiv.org/abs/2602.07892}},
}}""",
}


_DONE = {
    "gradient": "The gradient of the safety loss was projected away from the gradients of "
    "capability losses.",
    "update": "The update of every optimizer step was corrected so that, to first order, it keeps "
    "capability losses.",
    "none": "Gradients of capability losses were added to the gradient of the safety loss.",
}


def settings_section(config: OGPSAConfig, groups: Sequence[CapabilityGroup]) -> str:
    """Markdown section with the settings of the method and the capability groups."""
    settings = "\n".join(f"| `{name}` | {value} |" for name, value in asdict(config).items())
    data = "\n".join(
        f"| {_cell(group.name)} | {len(group.samples)} | {group.num_tokens} |" for group in groups
    )
    return f"""

## OGPSA

{_DONE[config.target]} These are the capability groups, and the settings:

| capability group | samples | tokens in the loss |
|---|---|---|
{data}

| setting | value |
|---|---|
{settings}
"""


def _cell(text: str) -> str:
    """Text of any kind as one cell of a table: neither HTML nor another cell."""
    return html.escape(text, quote=False).replace("|", r"\|")
