"""
From the column layouts of well-known data sets to TRL's formats, by name.

A data set entry in YAML selects one with `conversion: <name>`. Each takes a loaded data set and
returns one with the columns of a TRL format; rows that have no use there are left out.
"""

import re
from collections.abc import Callable
from itertools import cycle

from ogpsa_trl.data.columns import AnyDataset, Row

Messages = list[dict[str, str]]
Converted = dict[str, Messages]

CONVERSIONS: dict[str, Callable[[AnyDataset], AnyDataset]] = {}


def _conversion(convert: Callable[[Row], Converted | None]) -> Callable[[AnyDataset], AnyDataset]:
    """The conversion of a data set by that of a row, which gives `None` for one of no use."""

    def conversion(dataset: AnyDataset) -> AnyDataset:
        used = dataset.filter(lambda row: convert(row) is not None)
        return used.map(convert, remove_columns=dataset.column_names)

    conversion.__name__, conversion.__doc__ = convert.__name__, convert.__doc__
    CONVERSIONS[convert.__name__] = conversion
    return conversion


@_conversion
def pku_saferlhf_sft(row: Row) -> Converted | None:
    """
    PKU-SafeRLHF -> prompt-completion: the safer response, of rows where it is safe.

    Source: columns of PKU-Alignment/PKU-SafeRLHF. The paper trains on this data set; which of its
    rows and responses is not published.
    """
    safer = row["safer_response_id"]
    if not row[f"is_response_{safer}_safe"]:
        return None
    return _answered(row["prompt"], row[f"response_{safer}"])


@_conversion
def pku_saferlhf_dpo(row: Row) -> Converted | None:
    """
    PKU-SafeRLHF -> preference: the safe response over the unsafe one, of rows that have both.

    Source: columns of PKU-Alignment/PKU-SafeRLHF.
    """
    if row["is_response_0_safe"] == row["is_response_1_safe"]:
        return None
    safe = 0 if row["is_response_0_safe"] else 1
    return _preferred(row["prompt"], row[f"response_{safe}"], row[f"response_{1 - safe}"])


@_conversion
def beavertails_sft(row: Row) -> Converted | None:
    """
    BeaverTails -> prompt-completion: the responses that are safe.

    Its rows are single responses; PKU-SafeRLHF has pairs for DPO, of the same kind.

    Source: columns of PKU-Alignment/BeaverTails.
    """
    return _answered(row["prompt"], row["response"]) if row["is_safe"] else None


@_conversion
def hh_rlhf_dpo(row: Row) -> Converted | None:
    """
    HH-RLHF -> preference: the conversation up to the last answer, and the two last answers.

    A row is two texts of turns, "\\n\\nHuman: " and "\\n\\nAssistant: ". Rows are left out whose
    texts do not take turns from a question to an answer, or differ before the last answer, or not
    at all. There is no conversion for SFT: its authors say that the data are not meant for that.

    Source: columns and description of Anthropic/hh-rlhf.
    """
    chosen, rejected = _hh_turns(row["chosen"]), _hh_turns(row["rejected"])
    if not chosen or not rejected or chosen[-1] == rejected[-1]:
        return None
    return _last_answers(chosen, rejected)


@_conversion
def ultrafeedback_sft(row: Row) -> Converted | None:
    """
    UltraFeedback, binarized -> prompt-completion: the last answer, after all that comes before it.

    `columns: [messages]` takes the same data as they are; every turn then counts in the loss. Rows
    without an answer are left out.

    Source: columns of HuggingFaceH4/ultrafeedback_binarized.
    """
    messages = row["messages"]
    if not _is_answered(messages):
        return None
    return {"prompt": messages[:-1], "completion": messages[-1:]}


@_conversion
def ultrafeedback_dpo(row: Row) -> Converted | None:
    """
    UltraFeedback, binarized -> preference: the last answer of the two conversations.

    Rows are left out that lack an answer, whose answers have the same score, or whose
    conversations differ before the answer.

    Source: columns of HuggingFaceH4/ultrafeedback_binarized.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    is_better = row["score_chosen"] > row["score_rejected"]
    if not is_better or not _is_answered(chosen) or not _is_answered(rejected):
        return None
    return _last_answers(chosen, rejected)


@_conversion
def halueval_qa(row: Row) -> Converted:
    """
    HaluEval, question answering -> prompt-completion: knowledge and question, right answer.

    Source: columns of pminervini/HaluEval, configuration "qa". The paper names HaluEval; which part
    and which prompt is not published.
    """
    return _answered(f"{row['knowledge']}\n\n{row['question']}", row["right_answer"])


@_conversion
def halueval_qa_dpo(row: Row) -> Converted:
    """
    HaluEval, question answering -> preference: the right answer over the hallucinated one.

    Source: columns of pminervini/HaluEval, configuration "qa".
    """
    question = f"{row['knowledge']}\n\n{row['question']}"
    return _preferred(question, row["right_answer"], row["hallucinated_answer"])


@_conversion
def halueval_general(row: Row) -> Converted | None:
    """
    HaluEval, general queries -> prompt-completion: the responses without a hallucination.

    Source: columns of pminervini/HaluEval, configuration "general", and of general_data.json in
    RUCAIBox/HaluEval.
    """
    is_right = row["hallucination"] == "no"
    return _answered(row["user_query"], row["chatgpt_response"]) if is_right else None


@_conversion
def xstest_safe(row: Row) -> Converted | None:
    """
    XSTest -> prompts: the requests that look harmful and are not, which are to be answered.

    Source: columns of paul-rottger/exaggerated-safety, xstest_prompts.csv.
    """
    return {"prompt": _said("user", row["prompt"])} if row["label"] == "safe" else None


@_conversion
def xstest_unsafe(row: Row) -> Converted | None:
    """
    XSTest -> prompts: the requests that are harmful indeed.

    Source: columns of paul-rottger/exaggerated-safety, xstest_prompts.csv.
    """
    return {"prompt": _said("user", row["prompt"])} if row["label"] == "unsafe" else None


@_conversion
def gsm8k(row: Row) -> Converted:
    """
    GSM8K -> prompt-completion: question, worked answer.

    Source: columns of openai/grade-school-math.
    """
    return _answered(row["question"], row["answer"])


def _said(role: str, text: str) -> Messages:
    return [{"role": role, "content": text}]


def _answered(question: str, answer: str) -> Converted:
    return {"prompt": _said("user", question), "completion": _said("assistant", answer)}


def _preferred(question: str, chosen: str, rejected: str) -> Converted:
    answers = {"chosen": chosen, "rejected": rejected}
    said = {side: _said("assistant", answer) for side, answer in answers.items()}
    return {"prompt": _said("user", question), **said}


def _last_answers(chosen: Messages, rejected: Messages) -> Converted | None:
    """Those of two conversations that are the same before them; `None` if they are not."""
    if chosen[:-1] != rejected[:-1]:
        return None
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _is_answered(messages: Messages) -> bool:
    """Whether a conversation ends with an answer that says something, after something."""
    last = messages[-1] if len(messages) > 1 else {"role": "", "content": ""}
    return last["role"] == "assistant" and bool(last["content"].strip())


def _hh_turns(text: str) -> Messages:
    """The turns of a text of HH-RLHF; none where they are not questions and answers in turn."""
    start, *parts = re.split(r"\n\n(Human|Assistant):", text)
    contents = [content.strip() for content in parts[1::2]]
    in_turn = all(s == e for s, e in zip(parts[::2], cycle(("Human", "Assistant")), strict=False))
    if start.strip() or not in_turn or not all(contents) or len(contents) % 2:
        return []
    roles = cycle(("user", "assistant"))
    return [m for c, role in zip(contents, roles, strict=False) for m in _said(role, c)]
