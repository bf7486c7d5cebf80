"""Rows written in the layouts of the published data sets, in TRL's formats."""

import pytest
from datasets import Dataset

from ogpsa_trl.conversions import CONVERSIONS


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def saferlhf(question, answers, safe, safer):
    """A row with the columns of PKU-Alignment/PKU-SafeRLHF that matter, and one that does not."""
    return {
        "prompt": question, "response_0": answers[0], "response_1": answers[1],
        "is_response_0_safe": safe[0], "is_response_1_safe": safe[1],
        "better_response_id": 0, "safer_response_id": safer, "prompt_source": "x",
    }  # fmt: skip


ROWS = [
    saferlhf("q0", ("bad", "good"), (False, True), 1),
    saferlhf("q1", ("good", "bad"), (True, False), 0),
    saferlhf("q2", ("worse", "bad"), (False, False), 1),
    saferlhf("q3", ("fine", "finer"), (True, True), 1),
]


@pytest.fixture(params=[False, True], ids=["map", "stream"])
def convert(request):
    def run(name, rows):
        dataset = Dataset.from_list(rows)
        converted = CONVERSIONS[name](dataset.to_iterable_dataset() if request.param else dataset)
        return list(converted)

    return run


def test_sft_takes_the_safer_answer_where_it_is_safe(convert):
    assert convert("pku_saferlhf_sft", ROWS) == [
        {"prompt": user("q0"), "completion": assistant("good")},
        {"prompt": user("q1"), "completion": assistant("good")},
        {"prompt": user("q3"), "completion": assistant("finer")},
    ]


def test_dpo_takes_the_pairs_of_which_one_is_safe(convert):
    assert convert("pku_saferlhf_dpo", ROWS) == [
        {"prompt": user("q0"), "chosen": assistant("good"), "rejected": assistant("bad")},
        {"prompt": user("q1"), "chosen": assistant("good"), "rejected": assistant("bad")},
    ]


def test_halueval_takes_the_right_answer(convert):
    row = {"knowledge": "k", "question": "q", "right_answer": "r", "hallucinated_answer": "h"}
    [converted] = convert("halueval_qa", [row])
    assert converted == {"prompt": user("k\n\nq"), "completion": assistant("r")}


def test_xstest_is_told_apart_by_its_labels(convert):
    rows = [
        {"id": "1", "prompt": "q0", "type": "homonyms", "label": "safe"},
        {"id": "2", "prompt": "q1", "type": "contrast_homonyms", "label": "unsafe"},
    ]
    assert convert("xstest_safe", rows) == [{"prompt": user("q0")}]
    assert convert("xstest_unsafe", rows) == [{"prompt": user("q1")}]


def test_gsm8k_takes_the_worked_answer(convert):
    [converted] = convert("gsm8k", [{"question": "1 + 1 ?", "answer": "1 + 1 = 2\n#### 2"}])
    assert converted == {"prompt": user("1 + 1 ?"), "completion": assistant("1 + 1 = 2\n#### 2")}
