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


PAIRS = Path(__file__).resolve().parents[2] / "shared" / "data" / "safety"
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
GOOD_PAIR = hh_rlhf([(H, "q"), (A, "yes")], [(H, "q"), (A, "no")])
BEFORE = [(H, "q0"), (A, "a0\n\nwith: two parts"), (H, " q1 ")]
HALUEVAL_QA = {"knowledge": "k", "question": "q", "right_answer": "r", "hallucinated_answer": "h"}
ULTRAFEEDBACK = [
    ultrafeedback("q0", ("better", "worse"), (8.5, 3.0)),
    ultrafeedback("q1", ("a", "b"), (7.0, 7.0)),
    ultrafeedback("q2", (" ", "b"), (7.0, 6.0)),
    ultrafeedback("q3", ("a", "b"), (9.0, 8.0)) | {"rejected": user("q4") + assistant("b")},
]
LONG = user("q5") + assistant("a") + user("q6") + assistant("c")
XSTEST = [
    {"id": "1", "prompt": "q0", "type": "homonyms", "label": "safe"},
    {"id": "2", "prompt": "q1", "type": "contrast_homonyms", "label": "unsafe"},
]


def answered(question, answer):
    return {"prompt": user(question), "completion": assistant(answer)}


def preferred(question, chosen, rejected):
    return {
        "prompt": user(question), "chosen": assistant(chosen), "rejected": assistant(rejected),
    }  # fmt: skip


def halueval_general(number, label, spans):
    return {
        "ID": str(number), "user_query": f"q{number}", "chatgpt_response": f"a{number}",
        "hallucination": label, "hallucination_spans": spans,
    }  # fmt: skip


# Rows, and what is made of them.
CONVERTED = {
    "pku_saferlhf_sft": (
        ROWS, [answered("q0", "good"), answered("q1", "good"), answered("q3", "finer")]),
    "pku_saferlhf_dpo": (ROWS, [preferred("q0", "good", "bad"), preferred("q1", "good", "bad")]),
    "beavertails_sft": (
        [beavertails("q0", "a0", True), beavertails("q0", "a1", False),
         beavertails("q1", "a2", True)],
        [answered("q0", "a0"), answered("q1", "a2")]),
    "hh_rlhf_dpo": (
        [hh_rlhf([*BEFORE, (A, "good")], [*BEFORE, (A, "bad")]), GOOD_PAIR],
        [preferred("q1", "good", "bad")
         | {"prompt": user("q0") + assistant("a0\n\nwith: two parts") + user("q1")},
         preferred("q", "yes", "no")]),
    "ultrafeedback_dpo": (ULTRAFEEDBACK, [preferred("q0", "better", "worse")]),
    "ultrafeedback_sft": (
        [*ULTRAFEEDBACK[:3], ULTRAFEEDBACK[0] | {"messages": LONG},
         ULTRAFEEDBACK[0] | {"messages": LONG[:-1]}],
        [answered("q0", "better"), answered("q1", "a"),
         {"prompt": LONG[:-1], "completion": LONG[-1:]}]),
    "halueval_qa": ([HALUEVAL_QA], [answered("k\n\nq", "r")]),
    "halueval_qa_dpo": ([HALUEVAL_QA], [preferred("k\n\nq", "r", "h")]),
    "halueval_general": (
        [halueval_general(0, "no", []), halueval_general(1, "yes", ["a1"])],
        [answered("q0", "a0")]),
    "xstest_safe": (XSTEST, [{"prompt": user("q0")}]),
    "xstest_unsafe": (XSTEST, [{"prompt": user("q1")}]),
    "gsm8k": (
        [{"question": "1 + 1 ?", "answer": "1 + 1 = 2\n#### 2"}],
        [answered("1 + 1 ?", "1 + 1 = 2\n#### 2")]),
}  # fmt: skip


def convert(name, rows, *, as_stream=False):
    dataset = Dataset.from_list(rows)
    return list(CONVERSIONS[name](dataset.to_iterable_dataset() if as_stream else dataset))


@pytest.mark.parametrize("as_stream", [False, True])
@pytest.mark.parametrize("name", CONVERSIONS)
def test_rows_of_use_are_converted_and_the_others_left_out(name, as_stream):
    rows, expected = CONVERTED[name]
    assert convert(name, rows, as_stream=as_stream) == expected


USELESS_PAIRS = {
    "other questions": ([(H, "q0"), (A, "a")], [(H, "q1"), (A, "b")]),
    "another answer before": (
        [(H, "q"), (A, "a"), (H, "q"), (A, "c")], [(H, "q"), (A, "b"), (H, "q"), (A, "d")]),
    "other lengths": ([(H, "q"), (A, "a")], [(H, "q"), (A, "a"), (H, "q"), (A, "b")]),
    "the same answer": ([(H, "q"), (A, "a")], [(H, "q"), (A, "a ")]),
    "a question last": ([(H, "q"), (A, "a"), (H, "r")], [(H, "q"), (A, "b"), (H, "r")]),
    "an empty answer": ([(H, "q"), (A, "")], [(H, "q"), (A, "b")]),
    "an answer first": ([(A, "a")], [(A, "b")]),
    "two questions in a row": ([(H, "p"), (H, "q"), (A, "a")], [(H, "p"), (H, "q"), (A, "b")]),
    "no question": ([(H, ""), (A, "a")], [(H, ""), (A, "b")]),
    "no turns": ([], []),
}  # fmt: skip


@pytest.mark.parametrize("pair", USELESS_PAIRS.values(), ids=USELESS_PAIRS)
def test_hh_rlhf_leaves_out(pair):
    assert convert("hh_rlhf_dpo", [hh_rlhf(*pair), GOOD_PAIR]) == [preferred("q", "yes", "no")]


def test_hh_rlhf_leaves_out_texts_that_do_not_begin_with_a_turn():
    late = {side: f"Once. {text}" for side, text in GOOD_PAIR.items()}
    assert len(convert("hh_rlhf_dpo", [late, GOOD_PAIR])) == 1


@pytest.mark.skipif(not PAIRS.is_dir(), reason="no data in ../shared/data")
def test_hh_rlhf_gives_back_real_conversations():
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


@pytest.mark.parametrize(
    ("name", "row"),
    [
        *((name, CONVERTED[name][0][0]) for name in CONVERSIONS if name.endswith("sft")),
        ("pku_saferlhf_dpo", ROWS[0]),
        ("hh_rlhf_dpo", hh_rlhf([(H, "q"), (A, "a")], [(H, "q"), (A, "b")])),
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
