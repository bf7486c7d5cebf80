"""
From the column layouts of well-known data sets to TRL's formats, by name.

A data set entry in YAML selects one with `conversion: <name>`. Each function takes a loaded data
set and returns one with the columns of a TRL format; rows that have no use there are left out.
"""

import re
from collections.abc import Callable
from itertools import cycle
from typing import Any

from datasets import Dataset, IterableDataset

AnyDataset = Dataset | IterableDataset


def pku_saferlhf_sft(dataset: AnyDataset) -> AnyDataset:
    """
    PKU-SafeRLHF -> prompt-completion: the safer response, of rows where it is safe.

    Source: columns of PKU-Alignment/PKU-SafeRLHF. The paper trains on this data set; which of its
    rows and responses is not published.
    """

    def is_safe(row: dict[str, Any]) -> bool:
        return row[f"is_response_{row['safer_response_id']}_safe"]

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return {
            "prompt": _user(row["prompt"]),
            "completion": _assistant(row[f"response_{row['safer_response_id']}"]),
        }

    return _converted(dataset.filter(is_safe), convert)


def pku_saferlhf_dpo(dataset: AnyDataset) -> AnyDataset:
    """
    PKU-SafeRLHF -> preference: the safe response over the unsafe one, of rows that have both.

    Source: columns of PKU-Alignment/PKU-SafeRLHF.
    """

    def has_both(row: dict[str, Any]) -> bool:
        return row["is_response_0_safe"] != row["is_response_1_safe"]

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        safe = 0 if row["is_response_0_safe"] else 1
        return {
            "prompt": _user(row["prompt"]),
            "chosen": _assistant(row[f"response_{safe}"]),
            "rejected": _assistant(row[f"response_{1 - safe}"]),
        }

    return _converted(dataset.filter(has_both), convert)


def beavertails_sft(dataset: AnyDataset) -> AnyDataset:
    """
    BeaverTails -> prompt-completion: the responses that are safe.

    Its rows are single responses; PKU-SafeRLHF has pairs for DPO, of the same kind.

    Source: columns of PKU-Alignment/BeaverTails.
    """
    return _converted(
        dataset.filter(lambda row: row["is_safe"]),
        lambda row: {"prompt": _user(row["prompt"]), "completion": _assistant(row["response"])},
    )


def hh_rlhf_dpo(dataset: AnyDataset) -> AnyDataset:
    """
    HH-RLHF -> preference: the conversation up to the last answer, and the two last answers.

    A row is two texts of turns, "\\n\\nHuman: " and "\\n\\nAssistant: ". Rows are left out whose
    texts do not take turns from a question to an answer, or differ before the last answer, or not
    at all. There is no conversion for SFT: its authors say that the data are not meant for that.

    Source: columns and description of Anthropic/hh-rlhf.
    """

    def is_pair(row: dict[str, Any]) -> bool:
        chosen, rejected = _hh_turns(row["chosen"]), _hh_turns(row["rejected"])
        are_turns = bool(chosen) and bool(rejected)
        return are_turns and chosen[:-1] == rejected[:-1] and chosen[-1] != rejected[-1]

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return _preference(_hh_turns(row["chosen"]), _hh_turns(row["rejected"]))

    return _converted(dataset.filter(is_pair), convert)


def ultrafeedback_sft(dataset: AnyDataset) -> AnyDataset:
    """
    UltraFeedback, binarized -> prompt-completion: the last answer, after all that comes before it.

    `columns: [messages]` takes the same data as they are; every turn then counts in the loss. Rows
    without an answer are left out.

    Source: columns of HuggingFaceH4/ultrafeedback_binarized.
    """

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}

    return _converted(dataset.filter(lambda row: _is_answered(row["messages"])), convert)


def ultrafeedback_dpo(dataset: AnyDataset) -> AnyDataset:
    """
    UltraFeedback, binarized -> preference: the last answer of the two conversations.

    Rows are left out that lack an answer, whose answers have the same score, or whose
    conversations differ before the answer.

    Source: columns of HuggingFaceH4/ultrafeedback_binarized.
    """

    def is_pair(row: dict[str, Any]) -> bool:
        chosen, rejected = row["chosen"], row["rejected"]
        are_answers = _is_answered(chosen) and _is_answered(rejected)
        is_better = row["score_chosen"] > row["score_rejected"]
        return are_answers and is_better and chosen[:-1] == rejected[:-1]

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return _preference(row["chosen"], row["rejected"])

    return _converted(dataset.filter(is_pair), convert)


def halueval_qa(dataset: AnyDataset) -> AnyDataset:
    """
    HaluEval, question answering -> prompt-completion: knowledge and question, right answer.

    Source: columns of pminervini/HaluEval, configuration "qa". The paper names HaluEval; which part
    and which prompt is not published.
    """

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": _halueval_question(row), "completion": _assistant(row["right_answer"])}

    return _converted(dataset, convert)


def halueval_qa_dpo(dataset: AnyDataset) -> AnyDataset:
    """
    HaluEval, question answering -> preference: the right answer over the hallucinated one.

    Source: columns of pminervini/HaluEval, configuration "qa".
    """

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return {
            "prompt": _halueval_question(row),
            "chosen": _assistant(row["right_answer"]),
            "rejected": _assistant(row["hallucinated_answer"]),
        }

    return _converted(dataset, convert)


def halueval_general(dataset: AnyDataset) -> AnyDataset:
    """
    HaluEval, general queries -> prompt-completion: the responses without a hallucination.

    Source: columns of pminervini/HaluEval, configuration "general", and of general_data.json in
    RUCAIBox/HaluEval.
    """
    return _converted(
        dataset.filter(lambda row: row["hallucination"] == "no"),
        lambda row: {
            "prompt": _user(row["user_query"]),
            "completion": _assistant(row["chatgpt_response"]),
        },
    )


def xstest_safe(dataset: AnyDataset) -> AnyDataset:
    """
    XSTest -> prompts: the requests that look harmful and are not, which are to be answered.

    Source: columns of paul-rottger/exaggerated-safety, xstest_prompts.csv.
    """
    return _converted(
        dataset.filter(lambda row: row["label"] == "safe"),
        lambda row: {"prompt": _user(row["prompt"])},
    )


def xstest_unsafe(dataset: AnyDataset) -> AnyDataset:
    """
    XSTest -> prompts: the requests that are harmful indeed.

    Source: columns of paul-rottger/exaggerated-safety, xstest_prompts.csv.
    """
    return _converted(
        dataset.filter(lambda row: row["label"] == "unsafe"),
        lambda row: {"prompt": _user(row["prompt"])},
    )


def gsm8k(dataset: AnyDataset) -> AnyDataset:
    """
    GSM8K -> prompt-completion: question, worked answer.

    Source: columns of openai/grade-school-math.
    """
    return _converted(
        dataset,
        lambda row: {"prompt": _user(row["question"]), "completion": _assistant(row["answer"])},
    )


CONVERSIONS: dict[str, Callable[[AnyDataset], AnyDataset]] = {
    function.__name__: function
    for function in (
        pku_saferlhf_sft,
        pku_saferlhf_dpo,
        beavertails_sft,
        hh_rlhf_dpo,
        ultrafeedback_sft,
        ultrafeedback_dpo,
        halueval_qa,
        halueval_qa_dpo,
        halueval_general,
        xstest_safe,
        xstest_unsafe,
        gsm8k,
    )
}


def _converted(
    dataset: AnyDataset, convert: Callable[[dict[str, Any]], dict[str, Any]]
) -> AnyDataset:
    """Map every row and keep the new columns only."""
    return dataset.map(convert, remove_columns=dataset.column_names)


def _hh_turns(text: str) -> list[dict[str, str]]:
    """The turns of a text of HH-RLHF; none where they are not questions and answers in turn."""
    start, *parts = re.split(r"\n\n(Human|Assistant):", text)
    turns = list(zip(parts[::2], (content.strip() for content in parts[1::2]), strict=True))
    in_turn = all(
        speaker == expected and content
        for (speaker, content), expected in zip(turns, cycle(("Human", "Assistant")), strict=False)
    )
    if start.strip() or not turns or not in_turn or turns[-1][0] != "Assistant":
        return []
    return [
        _user(content)[0] if who == "Human" else _assistant(content)[0] for who, content in turns
    ]


def _is_answered(messages: list[dict[str, str]]) -> bool:
    """Whether a conversation ends with an answer that says something, after something."""
    if len(messages) < 2:
        return False
    last = messages[-1]
    return last["role"] == "assistant" and bool(last["content"].strip())


def _preference(
    chosen: list[dict[str, str]], rejected: list[dict[str, str]]
) -> dict[str, list[dict[str, str]]]:
    """Two conversations that are the same but for the last answer."""
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _halueval_question(row: dict[str, Any]) -> list[dict[str, str]]:
    return _user(f"{row['knowledge']}\n\n{row['question']}")


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
