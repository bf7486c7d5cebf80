"""What chat templates and TRL make of rows; where they cannot, the row is named."""

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import ProcessorMixin
from trl.data_utils import (
    maybe_convert_to_chatml,
    maybe_extract_prompt,
    prepare_multimodal_messages,
)

from ogpsa_trl.data.columns import (
    IMAGES,
    AnyDataset,
    Row,
    Source,
    known_columns,
    used_columns,
    without_nulls,
)
from ogpsa_trl.data.row_values import RowError, reason_of, row_named, shown
from ogpsa_trl.data.rows import checked


@dataclass
class TemplateCheck:
    """
    Refuses a row that cannot be made into the text that TRL makes of it.

    Attributes:
        source: What the rows are from.
        processing_class: Tokenizer or processor.
        chat_template: Instead of its own.
    """

    source: Source
    processing_class: Any
    chat_template: str | None = None

    def __call__(self, row: Row, number: int) -> None:
        """
        Render one row.

        Raises:
            RowError: the row or the chat template does not go with the other.
            ValueError: there is no template.
        """
        source = self.source
        row = without_nulls(row)
        row = {column: deepcopy(row[column]) for column in used_columns(row, source)}
        with row_named(source.where, number):
            # Of a pair without a prompt nothing else is left.
            values: Row = {**row, **maybe_extract_prompt(maybe_convert_to_chatml(row))}
        prompt = values["prompt"] if isinstance(values.get("prompt"), list) else []
        sides = ("messages", "completion", "chosen") + ("rejected",) * (source.use != "group")
        conversations: list[list[Any]] = [
            [*prompt, *values[side]] for side in sides if isinstance(values.get(side), list)
        ]
        if prompt:
            conversations.append(prompt)
        if not conversations:
            return
        if not (self.chat_template or self.processing_class.chat_template):
            raise ValueError(
                f"{source.first} holds conversations, but the tokenizer has no chat template to "
                "make text of them. Take a model that has one, set `chat_template_path` (SFT) or "
                "`tokenizer.chat_template`, or use the columns `prompt` and `completion` (DPO: "
                "`chosen` and `rejected`) with text."
            )
        tools = values.get("tools")
        options = {
            "chat_template": self.chat_template,
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            **(values.get("chat_template_kwargs") or {}),
        }
        for conversation in conversations:
            self._check_parts(conversation, number)
            is_prompt = conversation is prompt
            self._render(conversation, number, options | {"add_generation_prompt": is_prompt})

    def _render(self, conversation: list[Any], number: int, options: Mapping[str, Any]) -> None:
        try:
            if isinstance(self.processing_class, ProcessorMixin):
                conversation = prepare_multimodal_messages(conversation)
            self.processing_class.apply_chat_template(conversation, tokenize=False, **options)
        except Exception as error:  # a template may raise whatever Python does
            raise RowError(
                f"{self.source.first} does not go with the chat template of the tokenizer, which "
                f"refuses row {number}: {reason_of(error)}. Change the roles of the messages, "
                "their content or their tools, or set another template with `chat_template_path` "
                "(SFT)."
            ) from error

    def _check_parts(self, conversation: list[Any], number: int) -> None:
        """A template that joins texts may write parts out as Python does."""
        for index, message in enumerate(conversation):
            if isinstance(message.get("content"), list) and not self._takes_parts():
                raise RowError(
                    f"The chat template of the tokenizer reads content that is text, but message "
                    f"{index} of row {number} of {self.source.where} has parts: {shown(message)}. "
                    "Make one text of them, or take a model whose template reads parts."
                )

    def _takes_parts(self) -> bool:
        if isinstance(self.processing_class, ProcessorMixin):
            return True
        contents: list[Any] = ["word", [{"type": "text", "text": "word"}]]
        render = partial(
            self.processing_class.apply_chat_template,
            tokenize=False,
            chat_template=self.chat_template,
        )
        try:
            one, other = (render([{"role": "user", "content": content}]) for content in contents)
        except Exception:  # see `_render`
            return False
        return one == other


def check_rendering(
    dataset: AnyDataset,
    source: Source,
    processing_class: Any,
    chat_template: str | None = None,
    numbers: Sequence[int] | None = None,
    num_rows: int | None = None,
) -> AnyDataset:
    """
    Refuse data with a row of which the chat template makes no text.

    Args:
        dataset: What `readable` gives. Of a stream the first row is looked at now, each of the
            others when it is read.
        source, processing_class, chat_template: As for `TemplateCheck`.
        numbers: What the rows are known by; their places if `None`.
        num_rows: Rows looked at, from the first on; all if `None`.

    Raises:
        RowError: a row and the template do not go together.
        ValueError: there is no template.
    """
    check = TemplateCheck(source, processing_class, chat_template)
    if isinstance(dataset, IterableDataset):
        return dataset if next(iter(dataset)).keys() & IMAGES else checked(dataset, check)
    if IMAGES & set(dataset.column_names):
        return dataset
    return checked(dataset, check, known_columns(dataset, source), numbers, num_rows)


def prepared(
    dataset: AnyDataset,
    prepare: Callable[[Any], Any],
    where: str,
    numbers: Sequence[int] | None = None,
) -> Any:
    """
    What TRL prepares of data; where it cannot, the first row of which it cannot is looked for.

    Args:
        dataset: The data. A stream is prepared while it is read, and not searched.
        prepare: Prepares them, or some rows of them.
        where: Their name in messages.
        numbers: What the rows are known by; their places if `None`.

    Raises:
        RowError: a row cannot be prepared.
        Exception: what `prepare` raises where no row alone is the reason.
    """
    try:
        return prepare(dataset)
    except Exception as error:  # whatever a row makes it raise
        if not isinstance(dataset, Dataset) or not len(dataset) or isinstance(error, RowError):
            raise
        numbers = range(len(dataset)) if numbers is None else numbers
        if len(dataset) == 1:
            with row_named(where, numbers[0]):
                raise
        middle = len(dataset) // 2
        for places in (range(middle), range(middle, len(dataset))):
            prepared(dataset.select(places), prepare, where, [numbers[place] for place in places])
        raise
