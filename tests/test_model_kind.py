"""What is no causal language model is refused by its name, before its weights are loaded."""

import json

import pytest
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BertConfig,
    Florence2Config,
    LlamaConfig,
    LlavaConfig,
    T5Config,
    T5GemmaConfig,
    TrainingArguments,
    ViTConfig,
)

from ogpsa_trl.benchmark.toy_model import toy_tokenizer
from ogpsa_trl.cli import capability, train
from ogpsa_trl.cli.capability import parse_capability_set
from ogpsa_trl.cli.evaluate import parse_evaluation, run_evaluation
from ogpsa_trl.cli.train_keys import parse_run
from ogpsa_trl.training.model_kind import check_causal
from runs import WORLD, capability_groups
from test_any_trainer import OGPSATrainer, token_data

TOKENIZER = toy_tokenizer()
ENCODER_DECODERS = {
    "BartForConditionalGeneration": BartConfig(), "T5ForConditionalGeneration": T5Config(),
    "T5GemmaForConditionalGeneration": T5GemmaConfig(),
    "Florence2ForConditionalGeneration": Florence2Config(),  # its text model is one
}  # fmt: skip
WITHOUT_HEAD = {
    "LlamaForSequenceClassification": LlamaConfig(), "BertForMaskedLM": BertConfig(),
    "ViTForImageClassification": ViTConfig(),
}  # fmt: skip
CAUSAL = {"LlamaForCausalLM": LlamaConfig(), "SomethingOfItsOwn": LlamaConfig()}


def saved(folder, architecture, config):
    """A folder with a tokenizer, and with a configuration in place of a model."""
    config.architectures = [architecture]
    config.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def refusal(name, **options):
    """What `check_causal` raises; `None`: nothing."""
    try:
        return check_causal(name, **options)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("as_saved", [True, False])
@pytest.mark.parametrize("architecture", [*ENCODER_DECODERS, *WITHOUT_HEAD, *CAUSAL])
def test_only_causal_language_models_are_taken(architecture, as_saved, tmp_path):
    config = (ENCODER_DECODERS | WITHOUT_HEAD | CAUSAL)[architecture]
    message = refusal(saved(tmp_path / "model", architecture, config), as_saved=as_saved)
    if architecture in CAUSAL:
        assert message is None
    elif architecture in WITHOUT_HEAD:
        assert f"is {architecture} " in message
        assert "has no language-modeling head" in message
    else:
        assert f"model' ({architecture}) is an encoder-decoder model" in message
        assert f"'{config.model_type}'" in message


def test_what_counts_is_the_class_that_is_loaded(tmp_path):
    """TRL loads the class that was saved; the other commands load a causal language model."""
    vision = saved(tmp_path / "vision", "LlavaForConditionalGeneration", LlavaConfig())
    assert refusal(vision, as_saved=True) is None
    assert "is LlavaForConditionalGeneration " in refusal(vision)
    base = saved(tmp_path / "base", "LlamaModel", LlamaConfig())
    assert refusal(base) is None
    assert "is LlamaModel " in refusal(base, as_saved=True)


def test_of_an_adapter_its_base_model_counts(tmp_path):
    base = saved(tmp_path / "base", "T5ForConditionalGeneration", T5Config())
    (tmp_path / "adapter").mkdir()
    content = json.dumps({"base_model_name_or_path": base})
    (tmp_path / "adapter" / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"base' .* is an encoder-decoder model"):
        check_causal(str(tmp_path / "adapter"))


class TestCommands:
    @pytest.fixture
    def line(self, tmp_path):
        name = saved(tmp_path / "bart", "BartForConditionalGeneration", BartConfig())
        capability_groups()["skills"].to_json(tmp_path / "skills.jsonl")
        WORLD.safety_sft().select(range(8)).to_json(tmp_path / "sft.jsonl")
        return [
            "--model_name_or_path", name, "--output_dir", str(tmp_path / "out"),
            "--capability_datasets", str(tmp_path / "skills.jsonl"),
        ]  # fmt: skip

    def train(self, line, tmp_path, *more):
        data = ["--dataset_name", str(tmp_path / "sft.jsonl"), "--use_cpu", "--bf16", "false"]
        return train.prepare(parse_run([*line, *data, *more]))

    def test_training_refuses_them_with_capability_data(self, line, tmp_path):
        with pytest.raises(ValueError, match=r"encoder-decoder.* or set `ogpsa: false` to train"):
            self.train(line, tmp_path)

    def test_training_refuses_them_with_a_gate(self, line, tmp_path):
        line = [word.replace("capability_datasets", "gate_datasets") for word in line]
        with pytest.raises(ValueError, match=r"encoder-decoder .*, or leave out `gate_datasets`"):
            self.train(line, tmp_path)

    def test_plain_training_is_up_to_trl(self, line, tmp_path):
        with pytest.raises(OSError, match=r"safetensors"):  # the weights, which are not there
            self.train(line, tmp_path, "--ogpsa", "false")

    def test_an_evaluation_refuses_them(self, line):
        with pytest.raises(SystemExit, match=r"error: The model must be .* an encoder-decoder"):
            run_evaluation(parse_evaluation(line))

    def test_a_capability_set_refuses_them(self, line):
        with pytest.raises(SystemExit, match=r"error: The model must be .* an encoder-decoder"):
            capability.build_capability_set(*parse_capability_set(line))


SIZES = {
    "vocab_size": len(TOKENIZER), "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


class TestTrainers:
    def make(self, model, tmp_path, capability):
        return OGPSATrainer(
            model=model,
            args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
            train_dataset=token_data(),
            processing_class=TOKENIZER,
            capability_dataset=capability,
        )

    def test_refuse_them_with_capability_data_only(self, tmp_path):
        model = BartForConditionalGeneration(BartConfig(**SIZES))
        self.make(model, tmp_path, None)
        message = "BartForConditionalGeneration is an encoder-decoder model .*'bart'"
        with pytest.raises(ValueError, match=message):
            self.make(model, tmp_path, capability_groups())

    def test_take_a_decoder_of_one(self, tmp_path):
        trainer = self.make(BartForCausalLM(BartConfig(**SIZES)), tmp_path, capability_groups())
        assert [group.name for group in trainer.capability_groups] == list(capability_groups())
