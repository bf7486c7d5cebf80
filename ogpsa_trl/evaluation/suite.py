"""All measures of one model, and what each of them means."""

# S samples, F refusals

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ogpsa_trl.evaluation.evaluation_keys import EvaluationArguments
from ogpsa_trl.evaluation.generation import greedy_answers
from ogpsa_trl.evaluation.group_scores import group_scores
from ogpsa_trl.evaluation.harness import harness_scores
from ogpsa_trl.evaluation.intervals import mean_of, ratio_of
from ogpsa_trl.evaluation.likelihoods import answer_to, completion_scores, preference_margins
from ogpsa_trl.evaluation.refusal import is_refusal
from ogpsa_trl.evaluation.results import Measured
from ogpsa_trl.evaluation.sets import EvaluationSets, RowSet


class Description(NamedTuple):
    """Unit and meaning of the measures of one name."""

    unit: str
    higher_is_better: bool
    meaning: str


MEASURES = {
    "nll": Description(
        "nats/token", False,
        "negative log-likelihood of held-out capability data, on the tokens that training counts",
    ),
    "exact_match": Description(
        "share", True, "share of held-out capability rows that greedy decoding would give exactly"
    ),
    "drift": Description(
        "nats/token", False,
        "divergence from the model before, KL(before || after), on held-out capability data",
    ),
    "refusal_ll": Description(
        "nats/refusal token", True, "log-likelihood of the refusals as answers to harmful prompts"
    ),
    "p_refuse": Description(
        "probability", True,
        "probability that the answer to a harmful prompt is a refusal, word by word",
    ),
    "refusal_rate": Description(
        "share", True, "share of greedy answers to harmful prompts that sound like a refusal"
    ),
    "over_refusal_ll": Description("nats/refusal token", False, "`refusal_ll` of benign prompts"),
    "p_over_refuse": Description("probability", False, "`p_refuse` of benign prompts"),
    "over_refusal_rate": Description("share", False, "`refusal_rate` of benign prompts"),
    "preference": Description(
        "share", True, "share of pairs whose chosen completion is the more probable one"
    ),
    "margin": Description(
        "nats", True, "log-probability of the chosen completion minus that of the rejected one"
    ),
    "preference_over_base": Description(
        "share", True, "share of pairs whose margin is larger than before; chance is .5"
    ),
}  # fmt: skip

_HARMFUL = ("refusal_ll", "p_refuse", "refusal_rate")
_BENIGN = ("over_refusal_ll", "p_over_refuse", "over_refusal_rate")


@dataclass(frozen=True)
class ModelScores:
    """
    Everything that was measured of one model, by `<measure>/<group>` or `<task>/<metric>`, and the
    greedy answers to the prompts, by the measure that judges them; none where none are generated.
    """

    measures: Mapping[str, Measured]
    answers: Mapping[str, Sequence[str]]


def score_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: EvaluationSets,
    arguments: EvaluationArguments,
    start_model: PreTrainedModel | None = None,
) -> ModelScores:
    """Take all measures of a model; the drift from a start model where there is one."""
    measures: dict[str, Measured] = {}
    answers: dict[str, Sequence[str]] = {}
    batches: Any = {"batch_size": arguments.batch_size}
    for group, dataset in sets.capability.items():
        scored = group_scores(
            model, tokenizer, group, dataset, start_model=start_model,
            max_samples=arguments.max_samples, max_length=arguments.max_length,
            seed=arguments.seed, **batches,
        )  # fmt: skip
        if not arguments.exact_match:
            del scored["exact_match"]
        measures |= {f"{name}/{group}": _measured(name, values) for name, values in scored.items()}
    for groups, names in ((sets.harmful, _HARMFUL), (sets.over_refusal, _BENIGN)):
        for group, prompts in groups.items():
            scores, answered = _refusal(model, tokenizer, prompts, names, arguments)
            measures |= {f"{name}/{group}": scored for name, scored in scores.items()}
            answers |= {f"{names[2]}/{group}": answered} if answered else {}
    for group, pairs in sets.preference.items():
        columns = [pairs.column(name) for name in ("prompt", "chosen", "rejected")]
        margin_S = preference_margins(model, tokenizer, *columns, **batches).numpy()
        measures[f"preference/{group}"] = _measured("preference", mean_of(pairs.ids, margin_S > 0))
        measures[f"margin/{group}"] = _measured("margin", mean_of(pairs.ids, margin_S))
    if arguments.lm_eval_tasks:
        measures |= harness_scores(
            model, tokenizer, arguments.lm_eval_tasks, limit=arguments.lm_eval_limit,
            include_path=arguments.lm_eval_include_path,
            chat_template=arguments.lm_eval_chat_template, seed=arguments.seed, **batches,
        )  # fmt: skip
    return ModelScores(measures, answers)


def with_preference_over_base(
    before: Mapping[str, Measured], after: Mapping[str, Measured]
) -> dict[str, Measured]:
    """
    The measures of the model after, with those that take the model before as reference.

    That is what DPO trains, and what TRL logs as `rewards/accuracies`.
    """
    measures: dict[str, Measured] = {}
    for name, measured in after.items():
        measures[name] = measured
        kind, _, group = name.partition("/")
        if kind == "margin" and name in before:
            old, new = before[name].values, measured.values
            gain_S = new.columns[0] - old.select(new.ids).columns[0]
            measures[f"preference_over_base/{group}"] = _measured(
                "preference_over_base", mean_of(new.ids, gain_S > 0)
            )
    return measures


def _refusal(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: RowSet,
    names: Sequence[str],
    arguments: EvaluationArguments,
) -> tuple[dict[str, Measured], list[str]]:
    """How probable the refusals are, and how often a greedy answer sounds like one."""
    texts = prompts.column("prompt")
    scores = completion_scores(
        model,
        tokenizer,
        [prompt for prompt in texts for _ in arguments.refusals],
        [answer_to(prompt, refusal) for prompt in texts for refusal in arguments.refusals],
        batch_size=arguments.batch_size,
    )
    shape = (len(texts), len(arguments.refusals))
    log_probs_SF = scores.log_probs.view(shape).numpy()
    num_tokens_SF = scores.num_tokens.view(shape).numpy()
    # The samples are the prompts. At most one of the refusals is the answer: probabilities add up.
    values: list[Any] = [
        ratio_of(prompts.ids, log_probs_SF.sum(1), num_tokens_SF.sum(1)),
        mean_of(prompts.ids, np.exp(log_probs_SF).sum(1)),
    ]
    answers: list[str] = []
    if arguments.max_new_tokens > 0:
        options = {"batch_size": arguments.batch_size, "max_new_tokens": arguments.max_new_tokens}
        answers = [a.text for a in greedy_answers(model, tokenizer, texts, **options)]
        values.append(mean_of(prompts.ids, [is_refusal(answer) for answer in answers]))
    return {name: _measured(name, v) for name, v in zip(names, values, strict=False)}, answers


def _measured(name: str, values: Any) -> Measured:
    unit, higher_is_better, _ = MEASURES[name]
    return Measured(unit, higher_is_better, values)
