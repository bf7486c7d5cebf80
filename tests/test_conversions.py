"""Rows written in the layouts of the published data sets, in TRL's formats."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from ogpsa_trl.benchmark.toy_model import toy_tokenizer
from ogpsa_trl.data.conversions import CONVERSIONS
from ogpsa_trl.data.preparation import Preparation, prepare_group


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


def beavertails(question, answer, is_safe):
    """A row of PKU-Alignment/BeaverTails; of its 14 categories two."""
    category = {"animal_abuse": False, "violence,aiding_and_abetting,incitement": not is_safe}
    return {"prompt": question, "response": answer, "category": category, "is_safe": is_safe}


def hh_rlhf(chosen, rejected):
    """A row of Anthropic/hh-rlhf: turns as (speaker, text)."""
    texts = (
        "".join(f"\n\n{speaker}: {text}" for speaker, text in turns) for turns in (chosen, rejected)
    )
    return dict(zip(("chosen", "rejected"), texts, strict=True))


def ultrafeedback(question, answers, scores):
    """A row of HuggingFaceH4/ultrafeedback_binarized."""
    chosen, rejected = (
        [{"content": question, "role": "user"}, {"content": answer, "role": "assistant"}]
        for answer in answers
    )
    return {
        "prompt": question, "prompt_id": "3f2a", "chosen": chosen, "rejected": rejected,
        "messages": chosen, "score_chosen": scores[0], "score_rejected": scores[1],
    }  # fmt: skip


H, A = "Human", "Assistant"
PAIRS = Path(__file__).resolve().parents[2] / "shared" / "data" / "safety"
HALUEVAL_QA = {"knowledge": "k", "question": "q", "right_answer": "r", "hallucinated_answer": "h"}


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


def test_beavertails_takes_the_safe_answers(convert):
    rows = [beavertails("q0", "a0", True), beavertails("q0", "a1", False)]
    rows.append(beavertails("q1", "a2", True))
    assert convert("beavertails_sft", rows) == [
        {"prompt": user("q0"), "completion": assistant("a0")},
        {"prompt": user("q1"), "completion": assistant("a2")},
    ]


def test_hh_rlhf_keeps_all_turns_before_the_last_answer(convert):
    before = [(H, "q0"), (A, "a0\n\nwith: two parts"), (H, " q1 ")]
    rows = [hh_rlhf([*before, (A, "good")], [*before, (A, "bad")])]
    rows.append(hh_rlhf([(H, "q"), (A, "yes")], [(H, "q"), (A, "no")]))
    assert convert("hh_rlhf_dpo", rows) == [
        {
            "prompt": user("q0") + assistant("a0\n\nwith: two parts") + user("q1"),
            "chosen": assistant("good"),
            "rejected": assistant("bad"),
        },
        {"prompt": user("q"), "chosen": assistant("yes"), "rejected": assistant("no")},
    ]


USELESS_PAIRS = {
    "other questions": ([(H, "q0"), (A, "a")], [(H, "q1"), (A, "b")]),
    "another answer before": (
        [(H, "q"), (A, "a"), (H, "q"), (A, "c")],
        [(H, "q"), (A, "b"), (H, "q"), (A, "d")],
    ),
    "other lengths": ([(H, "q"), (A, "a")], [(H, "q"), (A, "a"), (H, "q"), (A, "b")]),
    "the same answer": ([(H, "q"), (A, "a")], [(H, "q"), (A, "a ")]),
    "a question last": ([(H, "q"), (A, "a"), (H, "r")], [(H, "q"), (A, "b"), (H, "r")]),
    "an empty answer": ([(H, "q"), (A, "")], [(H, "q"), (A, "b")]),
    "an answer first": ([(A, "a")], [(A, "b")]),
    "two questions in a row": ([(H, "p"), (H, "q"), (A, "a")], [(H, "p"), (H, "q"), (A, "b")]),
    "no question": ([(H, ""), (A, "a")], [(H, ""), (A, "b")]),
    "no turns": ([], []),
}


@pytest.mark.parametrize("pair", USELESS_PAIRS.values(), ids=USELESS_PAIRS)
def test_hh_rlhf_leaves_out(convert, pair):
    good = hh_rlhf([(H, "q"), (A, "yes")], [(H, "q"), (A, "no")])
    [converted] = convert("hh_rlhf_dpo", [hh_rlhf(*pair), good])
    assert converted["prompt"] == user("q")
    assert converted["chosen"] == assistant("yes")


def test_hh_rlhf_leaves_out_texts_that_do_not_begin_with_a_turn(convert):
    good = hh_rlhf([(H, "q"), (A, "yes")], [(H, "q"), (A, "no")])
    assert len(convert("hh_rlhf_dpo", [{k: f"Once. {v}" for k, v in good.items()}, good])) == 1


@pytest.mark.skipif(not PAIRS.is_dir(), reason="no data in ../shared/data")
def test_hh_rlhf_gives_back_real_conversations(convert):
    """Pairs of HH-RLHF that were taken apart elsewhere, put together as they are published."""
    file = PAIRS / "hh_harmless_pairs_test.jsonl"
    pairs = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    pairs = [{key: pair[key] for key in ("prompt", "chosen", "rejected")} for pair in pairs]
    speakers = {"user": H, "assistant": A}
    rows = [
        hh_rlhf(*(
            [(speakers[m["role"]], m["content"]) for m in pair["prompt"] + pair[side]]
            for side in ("chosen", "rejected")
        ))
        for pair in pairs
    ]  # fmt: skip
    assert convert("hh_rlhf_dpo", rows) == pairs


ULTRAFEEDBACK = [
    ultrafeedback("q0", ("better", "worse"), (8.5, 3.0)),
    ultrafeedback("q1", ("a", "b"), (7.0, 7.0)),
    ultrafeedback("q2", (" ", "b"), (7.0, 6.0)),
    ultrafeedback("q3", ("a", "b"), (9.0, 8.0)) | {"rejected": user("q4") + assistant("b")},
]


def test_ultrafeedback_takes_the_better_answers(convert):
    assert convert("ultrafeedback_dpo", ULTRAFEEDBACK) == [
        {"prompt": user("q0"), "chosen": assistant("better"), "rejected": assistant("worse")}
    ]


def test_ultrafeedback_for_sft_takes_the_last_answer_of_the_conversation(convert):
    long = ultrafeedback("q5", ("a", "b"), (9.0, 8.0))
    long["messages"] = [*long["messages"], *user("q6"), *assistant("c")]
    unanswered = long | {"messages": long["messages"][:-1]}
    assert convert("ultrafeedback_sft", [*ULTRAFEEDBACK[:3], long, unanswered]) == [
        {"prompt": user("q0"), "completion": assistant("better")},
        {"prompt": user("q1"), "completion": assistant("a")},
        {"prompt": user("q5") + assistant("a") + user("q6"), "completion": assistant("c")},
    ]


def test_halueval_takes_the_right_answer(convert):
    [converted] = convert("halueval_qa", [HALUEVAL_QA])
    assert converted == {"prompt": user("k\n\nq"), "completion": assistant("r")}


def test_halueval_prefers_the_right_answer(convert):
    [converted] = convert("halueval_qa_dpo", [HALUEVAL_QA])
    assert converted == {
        "prompt": user("k\n\nq"), "chosen": assistant("r"), "rejected": assistant("h"),
    }  # fmt: skip


def test_halueval_general_takes_responses_without_a_hallucination(convert):
    rows = [
        {
            "ID": str(i), "user_query": f"q{i}", "chatgpt_response": f"a{i}",
            "hallucination": label, "hallucination_spans": spans,
        }
        for i, (label, spans) in enumerate([("no", []), ("yes", ["a1"])])
    ]  # fmt: skip
    assert convert("halueval_general", rows) == [
        {"prompt": user("q0"), "completion": assistant("a0")}
    ]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("pku_saferlhf_sft", ROWS[0]),
        ("pku_saferlhf_dpo", ROWS[0]),
        ("beavertails_sft", beavertails("q", "a", True)),
        ("hh_rlhf_dpo", hh_rlhf([(H, "q"), (A, "a")], [(H, "q"), (A, "b")])),
        ("ultrafeedback_sft", ULTRAFEEDBACK[0]),
        ("ultrafeedback_dpo", ULTRAFEEDBACK[0]),
        ("halueval_qa_dpo", HALUEVAL_QA),
    ],
)
def test_what_comes_out_can_be_capability_data(name, row):
    """Of preferences the chosen answers: in each of these one word and the end."""
    tokenizer = toy_tokenizer()
    group = prepare_group(
        "group",
        CONVERSIONS[name](Dataset.from_list([row])),
        Preparation(tokenizer, tokenizer, None),
        num_samples=1, num_parts=1, batch_size=1, seed=0,
    )  # fmt: skip
    assert group.num_tokens == 2


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
