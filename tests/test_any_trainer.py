"""OGPSA in front of trainers other than those of SFT and DPO, TRL's and a plain one."""

import functools

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


class TestRefused:
    def test_reward_models_have_no_language_to_protect(self, tmp_path):
        class OGPSARewardTrainer(OGPSAMixin, RewardTrainer):
            pass

        config = tiny_llama_config(32, 1, 2, 32)
        config.num_labels = 1
        message = "LlamaForSequenceClassification has no language-modeling head"
        with pytest.raises(ValueError, match=message):
            OGPSARewardTrainer(
                LlamaForSequenceClassification(config),
                args=RewardConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
                train_dataset=safety_data("dpo"),
                processing_class=TOKENIZER,
                capability_dataset=capability_groups(),
            )

    def assert_refused(self, message, path, output, **keywords):
        with pytest.raises(ValueError, match=message):
            OGPSATrainer(
                model=AutoModelForCausalLM.from_pretrained(path),
                args=TrainingArguments(str(output), use_cpu=True, report_to="none"),
                train_dataset=token_data(),
                capability_dataset=capability_groups(),
                **keywords,
            )

    def test_a_trainer_without_a_tokenizer(self, base_model_path, tmp_path):
        self.assert_refused("`processing_class` is NoneType", base_model_path, tmp_path)

    def test_copies_on_several_devices(self, base_model_path, tmp_path, monkeypatch):
        """TRL's trainers refuse them themselves."""
        monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
        message = r"2 GPUs.*DataParallel.*ddp\.yaml.*CUDA_VISIBLE_DEV"
        self.assert_refused(message, base_model_path, tmp_path, processing_class=TOKENIZER)
