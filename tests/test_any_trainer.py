"""OGPSA in front of trainers other than those of SFT and DPO, TRL's and a plain one."""

import functools
import subprocess
import sys

import pytest
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from trl import (
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ogpsa_trl import (
    GateConfig,
    OGPSAConfig,
    OGPSAGRPOTrainer,
    OGPSAKTOTrainer,
    OGPSAMixin,
    OGPSARLOOTrainer,
)
from ogpsa_trl.benchmark.toy_model import tiny_llama_config, toy_tokenizer
from runs import (
    ADAMW,
    ARGUMENTS,
    CosineCallback,
    assert_resume_is_bitwise,
    capability_groups,
    gated,
    literal_losses,
    max_difference,
    paper,
    safety_data,
    weights,
)

TOKENIZER = toy_tokenizer()


class OGPSATrainer(OGPSAMixin, Trainer):
    """What the documentation tells users to write for a trainer of their own."""


def text_length(completions, **_):
    """A reward that samples of an untrained model differ in."""
    return [float(len(text)) for text in completions]


def kto_data():
    return Dataset.from_list(
        [row | {"label": index % 2 == 0} for index, row in enumerate(safety_data("sft"))]
    )


def token_data():
    ids = [TOKENIZER(row["prompt"] + row["completion"])["input_ids"] for row in safety_data("sft")]
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])


SAMPLING = {
    "num_generations": 2, "max_completion_length": 6, "beta": 0.05, "temperature": 0.7,
}  # fmt: skip
OF_PROMPTS = (
    SAMPLING, lambda: safety_data("sft").select_columns("prompt"), {"reward_funcs": text_length}
)  # fmt: skip
# Arguments class, parent, trainer, more arguments, training data, more keywords.
KINDS = {
    "kto": (KTOConfig, KTOTrainer, OGPSAKTOTrainer, {}, kto_data, {}),
    "grpo": (GRPOConfig, GRPOTrainer, OGPSAGRPOTrainer, *OF_PROMPTS),
    "rloo": (RLOOConfig, RLOOTrainer, OGPSARLOOTrainer, *OF_PROMPTS),
    "plain": (
        TrainingArguments, Trainer, OGPSATrainer, {}, token_data,
        {"data_collator": DataCollatorForLanguageModeling(pad_token_id=TOKENIZER.pad_token_id)},
    ),
}  # fmt: skip


@pytest.fixture
def make(base_model_path, tmp_path):
    """Make the trainer of a kind, or its parent."""

    def make(kind, *, parent=False, config=None, capability=None, **overrides):
        arguments_class, parent_class, our_class, more, data, keywords = KINDS[kind]
        arguments = {**ARGUMENTS, "max_steps": 2, "learning_rate": 0.1, **more, **overrides}
        if not parent:
            keywords = {**keywords, "capability_dataset": capability, "ogpsa_config": config}
        return (parent_class if parent else our_class)(
            model=AutoModelForCausalLM.from_pretrained(base_model_path),
            args=arguments_class(output_dir=str(tmp_path), **arguments),
            train_dataset=data(),
            processing_class=TOKENIZER,
            **keywords,
        )

    return make


DEFAULT = {"config": OGPSAConfig(samples_per_refresh=4), **ADAMW, "max_steps": 2}


@pytest.mark.parametrize("kind", KINDS)
class TestAnyTrainer:
    def test_it_is_its_parent_until_it_projects(self, kind, make, base_model_path):
        """
        Without capability data, with a gate too; and with refreshes, which leave no trace in the
        gradients or in the random numbers that completions are drawn with.
        """
        parent, groups = make(kind, parent=True), capability_groups()
        before = weights(parent)
        parent.train()
        assert max_difference(weights(parent), before) > 0
        without = make(kind)
        gate = gated(without, groups, GateConfig(gate_interval=1))
        without.train()
        config = paper(target="none", refresh_interval=1)
        refreshed = make(kind, capability=groups, config=config)
        refreshed.train()
        for trainer in (without, refreshed):
            assert max_difference(weights(trainer), weights(parent)) == 0
        # Of the text, whatever the temperature of samples.
        for name, loss in literal_losses(base_model_path).items():
            logged = refreshed.state.log_history[0][f"ogpsa/capability_loss/{name}"]
            assert logged == pytest.approx(loss, rel=1e-5)
        for name, loss in literal_losses(base_model_path, weights(without)).items():
            assert gate.last.losses[name] == pytest.approx(loss, abs=1e-5)

    def test_nothing_of_the_gradient_is_left_in_the_subspace(self, kind, make):
        probe = CosineCallback()
        trainer = probe.trainer = make(
            kind, capability=capability_groups(), config=paper(refresh_interval=1)
        )
        trainer.add_callback(probe)
        trainer.train()
        assert max(probe.cosines) < 1e-5
        assert all(0 < e["ogpsa/removed_fraction"] <= 1 for e in trainer.state.log_history[:-1])

    def test_the_default_keeps_the_update_out_of_it(self, kind, make):
        trainer = make(kind, capability=capability_groups(), **DEFAULT)
        trainer.train()
        last = trainer.state.log_history[-2]
        assert last["ogpsa/proposal_in_subspace"] > 0
        assert last["ogpsa/capability_loss/skills"] > 0  # the divergence, after a step

    def test_capability_texts_are_cut(self, kind, make):
        config = paper(capability_max_length=7)
        trainer = make(kind, capability=capability_groups(), config=config)
        samples = [s for group in trainer.capability_groups for s in group.samples]
        assert max(len(sample.features["input_ids"]) for sample in samples) == 7
        # A batch without text, that of a process without samples, has a loss with a graph.
        part = trainer.capability_groups[0].whole()
        batch = next(iter(part.batches_of(999, 1000)))
        loss = trainer.capability_log_probs(batch).sum()
        loss.backward()
        assert loss == 0


def test_kto_resumes_bit_for_bit(make, tmp_path):
    again = functools.partial(make, "kto", capability=capability_groups(), **DEFAULT)
    assert_resume_is_bitwise(again, tmp_path, steps=(1,))


class OGPSARewardTrainer(OGPSAMixin, RewardTrainer):
    """A reward model has no language to protect."""


REFUSED = {
    "no language": "LlamaForSequenceClassification has no language-modeling head",
    "no tokenizer": "`processing_class` is NoneType",
    # TRL's trainers refuse copies on several devices themselves.
    "copies": r"2 GPUs.*DataParallel.*ddp\.yaml.*CUDA_VISIBLE_DEV",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_protected_is_refused(what, tmp_path, monkeypatch):
    config, arguments_class = tiny_llama_config(32, 1, 2, 32), RewardConfig
    if what == "no language":
        config.num_labels, data = 1, safety_data("dpo")
        model, trainer_class = LlamaForSequenceClassification(config), OGPSARewardTrainer
    else:
        model, data = AutoModelForCausalLM.from_config(config), token_data()
        arguments_class, trainer_class = TrainingArguments, OGPSATrainer
    if what == "copies":
        monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match=REFUSED[what]):
        trainer_class(
            model=model,
            args=arguments_class(str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
            train_dataset=data,
            processing_class=None if what == "no tokenizer" else TOKENIZER,
            capability_dataset=capability_groups(),
        )


def test_the_mixin_imports_no_trainer_of_trl():
    """Which may be those of another version than a framework's own trainer was made for."""
    names = "OGPSAMixin, SubspaceCallback, CapabilityGate, OGPSAConfig"
    code = f"""
import sys
from ogpsa_trl import {names}
print([name for name in sys.modules if name.startswith("trl.") and name.endswith("_trainer")])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
