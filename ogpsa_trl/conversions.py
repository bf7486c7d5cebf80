"""
From the column layouts of well-known data sets to TRL's formats, by name.

A data set entry in YAML selects one with `conversion: <name>`. Each function takes a loaded data
set and returns one with the columns of a TRL format; rows that have no use there are left out.
"""

from collections.abc import Callable
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


def halueval_qa(dataset: AnyDataset) -> AnyDataset:
    """
    HaluEval, question answering -> prompt-completion: knowledge and question, right answer.

    Source: columns of pminervini/HaluEval, configuration "qa". The paper names HaluEval; which part
    and which prompt is not published.
    """

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return {
            "prompt": _user(f"{row['knowledge']}\n\n{row['question']}"),
            "completion": _assistant(row["right_answer"]),
        }

    return _converted(dataset, convert)


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
        halueval_qa,
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


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
