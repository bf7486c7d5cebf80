"""
The rows of the groups: chosen, brought into one form, completed by the model, written.

With a chat template the form is that of conversations, `prompt` and `completion`; without one it is
the same of texts. Plain texts stay what they are, rows of `text`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.data_utils import maybe_convert_to_chatml, maybe_extract_prompt

from ogpsa_trl.capability_set.set_keys import CapabilitySetArguments
from ogpsa_trl.data.columns import Source
from ogpsa_trl.data.entries import GroupedDatasetConfig, load_groups
from ogpsa_trl.data.preparation import places_by_seed
from ogpsa_trl.data.rendering import TemplateCheck
from ogpsa_trl.data.row_values import row_named
from ogpsa_trl.data.rows import check_row
from ogpsa_trl.evaluation.generation import greedy_answers
from ogpsa_trl.evaluation.json_files import write_rows
from ogpsa_trl.evaluation.likelihoods import Text, answer_to, prompt_tokens
from ogpsa_trl.evaluation.refusal import is_refusal, normalised

# `{"text": ...}`, or `{"prompt": ..., "completion": ...}` with `None` where there is none yet.
Row = dict[str, Any]

# Columns that change what the model sees, and that the form of the rows does not have.
_NOT_KEPT = ("tools", "chat_template_kwargs", "image", "images")


@dataclass
class RowGroup:
    """The rows of a group, and what became of those that were chosen."""

    name: str
    rows: list[Row]
    is_look_alike: bool  # benign requests that look like harmful ones
    num_generated: int = 0  # completions that the starting model wrote
    num_cut: int = 0  # those of them that it had not ended within `max_new_tokens`
    left_out: Counter[str] = field(default_factory=Counter)  # chosen rows, by the reason

    def leave_out(self, is_useless: Sequence[bool], reason: str) -> None:
        """Remove rows, and count them."""
        self.left_out[reason] += sum(is_useless)
        self.left_out = +self.left_out  # without the reasons that none had
        self.rows = [row for row, leave in zip(self.rows, is_useless, strict=True) if not leave]


def choose_rows(
    arguments: CapabilitySetArguments, tokenizer: PreTrainedTokenizerBase
) -> list[RowGroup]:
    """
    Choose the rows of all groups, before any model is loaded.

    Raises:
        ValueError: a group is empty or in no known form, its rows differ in form, it needs a chat
            template or completions that are not there, or too few prompts leave room for one.
    """
    groups = []
    for key, is_look_alike in (("capability_datasets", False), ("look_alike_datasets", True)):
        for name, loaded in load_groups(getattr(arguments, key), f"`{key}`").items():
            dataset: Any = loaded
            source = Source(f"group {name!r} of `{key}`", "set")
            places = places_by_seed(len(dataset), arguments.num_samples, arguments.seed)
            _check_columns(source, dataset.select(places))
            is_chat = bool(tokenizer.chat_template)
            rows = [_in_form(source, place, dataset[place], is_chat) for place in places]
            group = RowGroup(name, rows, is_look_alike)
            if len({"text" in row for row in rows}) > 1:
                raise ValueError(
                    f"Group {name!r} must have one form, but mixes rows with `text` and rows with "
                    "`prompt`. Give the texts a group of their own."
                )
            check = TemplateCheck(source, tokenizer)
            for place, row in zip(places, rows, strict=True):
                check(row, place)
            _leave_out_long(group, arguments, tokenizer)
            _check_size(group)
            groups.append(group)
    return groups


def _check_columns(source: Source, dataset: Dataset) -> None:
    for column in _NOT_KEPT:
        if column in dataset.column_names and any(v is not None for v in dataset[column]):
            raise ValueError(
                f"{source.first} has a column `{column}`, which a capability set cannot keep. "
                "Leave it out with `columns: [...]`, or train with these data as they are."
            )


def _in_form(source: Source, place: int, row: Row, is_chat: bool) -> Row:
    """A row in the form of the groups. Entries of one group may have other columns: `None` here."""
    row = check_row(row, place, source)
    with row_named(source.where, place):
        row = maybe_extract_prompt(maybe_convert_to_chatml(row))
    if "text" in row:
        return {"text": row["text"]}
    if "messages" in row:
        messages = row["messages"]
        size = len(messages) - (messages[-1]["role"] == "assistant")
        row |= {"prompt": messages[:size], "completion": messages[size:] or None}
    prompt, completion = row["prompt"], row.get("chosen", row.get("completion"))
    if is_chat:
        return {"prompt": _messages(prompt, "user"), "completion": _messages(completion)}
    if not isinstance(prompt, str) or not isinstance(completion, str | None):
        raise ValueError(
            f"{source.first} holds conversations, but the tokenizer of the model has no chat "
            "template. Take texts, or a model that has one."
        )
    return {"prompt": prompt, "completion": completion}


def _messages(value: Text | None, role: str = "assistant") -> Text | None:
    """A text as a message; the space between it and the prompt is up to the chat template."""
    return [{"role": role, "content": value.strip()}] if isinstance(value, str) else value


def _leave_out_long(
    group: RowGroup, arguments: CapabilitySetArguments, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Leave out the prompts that are to be completed and leave no room for it."""
    missing = [row for row in group.rows if is_to_complete(row, "missing")]
    if missing and arguments.generate_completions == "false":
        raise ValueError(
            f"Group {group.name!r} has {len(missing)} prompts without a completion, but "
            "`generate_completions` is false. Set it to 'missing', or take data with completions."
        )
    room = arguments.max_length - arguments.max_new_tokens
    is_long = [
        is_to_complete(row, arguments.generate_completions)
        and len(prompt_tokens(tokenizer, row["prompt"])) > room
        for row in group.rows
    ]
    group.leave_out(is_long, "no room for a completion")


def is_to_complete(row: Row, mode: str) -> bool:
    """Whether the model is to complete a row, with `generate_completions` as the mode."""
    if "text" in row or mode == "false":
        return False
    return mode == "true" or row["completion"] is None


def _check_size(group: RowGroup) -> None:
    if len(group.rows) < 2:
        reasons = "".join(f", {number} left out ({why})" for why, number in group.left_out.items())
        raise ValueError(
            f"Group {group.name!r} must have at least 2 samples, but has {len(group.rows)}"
            f"{reasons}. Add data, lower `max_new_tokens`, or raise `max_length` or `num_samples`."
        )


def complete_rows(
    group: RowGroup,
    arguments: CapabilitySetArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """
    Let the starting model complete the prompts that need it, greedily, and leave out what is of no
    use: empty completions, and answers to look-alikes that sound like a refusal.

    Raises:
        ValueError: fewer than 2 rows are left.
    """
    rows = [row for row in group.rows if is_to_complete(row, arguments.generate_completions)]
    answers = greedy_answers(
        model,
        tokenizer,
        [row["prompt"] for row in rows],
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
    )
    group.num_generated = len(answers)
    group.num_cut = sum(not answer.is_complete for answer in answers)
    for row, answer in zip(rows, answers, strict=True):
        # Spaces around an answer belong to the prompt or the template in front, or to nothing.
        row["completion"] = answer_to(row["prompt"], answer.text.strip())
    group.leave_out([not _completion_text(row) for row in group.rows], "empty")
    if group.is_look_alike:
        refuses = [is_refusal(_completion_text(row)) for row in group.rows]
        group.leave_out(refuses, "sounds like a refusal")
    _check_size(group)


def write_group(group: RowGroup, folder: str | Path) -> Path:
    """Write the rows of a group as JSON lines, into a file of its name."""
    return write_rows(Path(folder) / f"{group.name}.jsonl", group.rows)


def known_prompts(entries: Sequence[GroupedDatasetConfig]) -> set[str]:
    """The prompts of all entries of `harmful_datasets`, as `num_known` compares them."""
    datasets: Any = load_groups(entries, "`harmful_datasets`")
    sources = {name: Source(f"group {name!r} of `harmful_datasets`", "set") for name in datasets}
    return {
        _prompt_text(_in_form(sources[name], place, row, is_chat=True))
        for name, dataset in datasets.items()
        for place, row in enumerate(dataset)
    }


def num_known(group: RowGroup, prompts: set[str]) -> int:
    """How many prompts of a group are among others, but for case, spaces and apostrophes."""
    return sum(_prompt_text(row) in prompts for row in group.rows)


def _prompt_text(row: Row) -> str:
    """What is asked, without a system prompt; a text as a whole."""
    return normalised(_as_text(row.get("prompt", row.get("text"))))


def _completion_text(row: Row) -> str:
    return _as_text(row.get("completion", row.get("text"))).strip()


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "\n".join(str(m["content"]) for m in value if m["role"] != "system")
