"""The trade-off benchmark: its baselines against literal ones, its measures, and a run of it."""

import json
import logging
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

import benchmark_tradeoff
from ogpsa_trl.evaluation import completion_scores, mean_probability
from ogpsa_trl.toy import NUM_EVALUATION_SAMPLES, REFUSAL, ToyWorld
from ogpsa_trl.toy_model import tiny_llama_config, tiny_model, toy_tokenizer
from ogpsa_trl.toy_pretrain import PHASES, _fingerprint
from testbeds import ToyTestbed
from tradeoff_methods import METHODS, Method, Recipe, Run, _training_data, is_applicable, train
from tradeoff_report import Comparison

TOKENIZER = toy_tokenizer()
WORLD = ToyWorld(0)
BATCH_SIZE = 4


def save(model, folder):
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save(tiny_model(), tmp_path_factory.mktemp("start"))


@pytest.fixture
def recipe(tmp_path):
    """SFT by plain SGD without clipping, so that a step can be written down."""
    values = {
        "per_device_train_batch_size": BATCH_SIZE, "optim": "sgd", "lr_scheduler_type": "constant",
        "max_grad_norm": 0, "use_cpu": True, "bf16": False, "report_to": "none",
        "gradient_checkpointing": False, "disable_tqdm": True, "save_strategy": "no",
        "max_length": 64, "num_samples": 8, "capability_batch_size": 8,
    }  # fmt: skip
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    return Recipe(
        stage="sft",
        config=config,
        training=WORLD.safety_sft().select(range(BATCH_SIZE)),  # every step sees all of them
        capability_groups=WORLD.capability_groups(8),
        learning_rate=0.1,
        num_steps=2,
        seed=0,
    )


def weights(folder):
    return torch.cat(
        [p.flatten() for p in AutoModelForCausalLM.from_pretrained(folder).parameters()]
    )


def trained(method, recipe, start, tmp_path, name="trained"):
    cost = train(method, recipe, start, tmp_path / name)
    return weights(tmp_path / name).detach(), cost


def literal_nll(model, rows):
    """Token-mean loss of the completions, each sequence by itself."""
    total, num_tokens = 0.0, 0
    for row in rows:
        length = len(TOKENIZER(row["prompt"])["input_ids"])
        ids = torch.tensor(TOKENIZER(row["prompt"] + row["completion"] + "<eos>")["input_ids"])
        logits = model(input_ids=ids[None]).logits[0, length - 1 : -1]
        total = total + cross_entropy(logits, ids[length:], reduction="sum")
        num_tokens += len(ids) - length
    return total / num_tokens


def literal_sgd(recipe, start, penalty):
    """The steps of `recipe` with a penalty on the list of changes of the weights."""
    model = AutoModelForCausalLM.from_pretrained(start)
    first = [p.detach().clone() for p in model.parameters()]
    for _ in range(recipe.num_steps):
        changes = [p - s for p, s in zip(model.parameters(), first, strict=True)]
        loss = literal_nll(model, recipe.training) + penalty(changes)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= recipe.learning_rate * gradient
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class TestMethods:
    def test_naive_is_plain_trl(self, recipe, start, tmp_path):
        found, _ = trained(METHODS["naive"], recipe, start, tmp_path)
        known = {
            name: recipe.settings[name]
            for name in recipe.settings
            if name[:3] not in ("num", "cap")
        }
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(start),
            args=SFTConfig(tmp_path / "trl", learning_rate=0.1, max_steps=2, seed=0, **known),
            train_dataset=recipe.training,
            processing_class=TOKENIZER,
        )
        trainer.train()
        expected = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        assert torch.equal(found, expected)
        assert not torch.equal(found, weights(start))

    @pytest.mark.parametrize("weight", [0.0, 0.5])
    def test_l2_is_the_gradient_of_the_squared_distance(self, recipe, start, tmp_path, weight):
        recipe = replace(recipe, num_steps=3)
        found, _ = trained(Method(l2_weight=weight), recipe, start, tmp_path)
        expected = literal_sgd(
            recipe, start, lambda changes: weight * sum(c.pow(2).sum() for c in changes)
        )
        # Float32 weights of size .1 after three steps; without the penalty they differ by 1e-3.
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)

    def test_merging_goes_a_part_of_the_way(self, recipe, start, tmp_path):
        full, _ = trained(METHODS["naive"], recipe, start, tmp_path, "full")
        found, _ = trained(Method(kept_share=0.75), recipe, start, tmp_path)
        expected = 0.25 * weights(start) + 0.75 * full
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)  # float32 rounding

    def test_lora_is_merged_into_the_model(self, recipe, start, tmp_path):
        found, _ = trained(METHODS["LoRA"], recipe, start, tmp_path)
        assert found.shape == weights(start).shape
        assert not torch.equal(found, weights(start))

    def test_a_share_of_the_mixed_data_is_capability_data(self, recipe, caplog):
        # A training script that ran in this process before may have asked for more.
        caplog.set_level(logging.WARNING, "ogpsa_trl")
        recipe = replace(recipe, training=WORLD.safety_sft().select(range(48)))
        recipe.settings["num_samples"] = 200  # more than the groups have
        level = logging.getLogger("ogpsa_trl.data").level
        rows = _training_data(Method(mixed_share=0.25), recipe, TOKENIZER)
        trained_on = [TOKENIZER.decode([i for i in row["labels"] if i != -100]) for row in rows]
        refusals = [text for text in trained_on if text == f"{REFUSAL.strip()} <eos>"]
        answers = {
            f"{row['completion'].strip()} <eos>"
            for group in recipe.capability_groups.values()
            for row in group
        }
        assert len(refusals) == 48
        assert len(rows) == 64
        assert set(trained_on) - set(refusals) <= answers
        # Nothing to warn of, and the warnings of others are left on.
        assert not caplog.records
        assert logging.getLogger("ogpsa_trl.data").level == level

    def test_preference_pairs_cannot_be_mixed(self):
        mixed = METHODS["replay mixed in, 25%"]
        assert is_applicable(mixed, ["sft"])
        assert not is_applicable(mixed, ["sft", "dpo"])
        assert all(is_applicable(m, ["dpo"]) for m in METHODS.values() if m is not mixed)

    @pytest.mark.parametrize("name", METHODS)
    def test_the_sequences_of_a_run_are_counted(self, recipe, start, tmp_path, name):
        method = METHODS[name]
        _, cost = trained(method, recipe, start, tmp_path)
        training = recipe.num_steps * BATCH_SIZE
        config = recipe.ogpsa_config(method)
        if config is None:
            assert (cost.forward, cost.backward) == (training, training)
            return
        num_samples = min(config.num_samples, 8)
        num_refreshes = len(range(0, recipe.num_steps, config.refresh_interval))
        drawn = min(config.samples_per_refresh or num_samples, num_samples)
        assert cost.backward == training + 2 * drawn * num_refreshes
        # The starting point, where one is needed, takes a look at every sample of both groups.
        measures_kl = config.capability_loss == "kl"
        has_start = measures_kl or config.samples_per_refresh is not None
        # The first batch goes once more, to see what the model does to the scores of its head.
        probed = min(config.capability_batch_size, num_samples) * measures_kl
        assert cost.forward == cost.backward + 2 * num_samples * has_start + probed

    def test_the_reference_model_of_dpo_goes_forward_only(self, recipe, start, tmp_path):
        pairs = WORLD.safety_preferences().select(range(BATCH_SIZE))
        recipe = replace(recipe, stage="dpo", training=pairs)
        _, cost = trained(METHODS["naive"], recipe, start, tmp_path)
        sequences = recipe.num_steps * 2 * BATCH_SIZE
        assert (cost.forward, cost.backward) == (2 * sequences, sequences)


def bigram_model(next_tokens):
    """Gives the listed word after a word, whatever stands before; any other word ends the text."""
    vocabulary = TOKENIZER.get_vocab()
    size = len(vocabulary)
    model = LlamaForCausalLM(tiny_llama_config(hidden_size=size + size % 2, num_heads=1)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.zero_()  # the layers add nothing
        for word, index in vocabulary.items():
            model.model.embed_tokens.weight[index, index] = 1
            model.lm_head.weight[vocabulary[next_tokens.get(word, "<eos>")], index] = 10
    return model


def always_says(text):
    words = ["=>", *text.split(), "<eos>"]
    return dict(pairwise(words))


class TestMeasures:
    @pytest.fixture
    def testbed(self, tmp_path, monkeypatch):
        base = save(bigram_model(always_says("yes")), tmp_path / "base")
        monkeypatch.setattr(ToyTestbed, "base_model", lambda self: base)
        return ToyTestbed(0)

    def test_of_a_model_that_always_refuses(self, testbed, tmp_path):
        measures = testbed.measure(save(bigram_model(always_says(REFUSAL)), tmp_path / "model"))
        for name in ("p_refuse", "p_refuse_ood", "over_refusal"):
            assert measures[name] == pytest.approx(1)
        assert measures["capability"] == 0
        assert all(measures[task] == 0 for task in NUM_EVALUATION_SAMPLES)
        assert measures["drift"] > 1
        assert measures["distance"] > 0

    def test_of_a_model_that_always_says_yes(self, testbed):
        measures = testbed.measure(testbed.base_model())
        for name in ("p_refuse", "p_refuse_ood", "over_refusal"):
            assert measures[name] == pytest.approx(0)
        share = sum(row["completion"] == " yes" for row in WORLD.evaluation_sets()["judge"]) / 16
        assert measures["judge"] == share > 0
        assert measures["capability"] == pytest.approx(share / 7)
        assert measures["drift"] == measures["distance"] == 0


def results(kept, seeds=(0, 1), factors=(1.0, 2.0)):
    """Runs whose safety rises from .8 to 1 with the learning rate."""
    return {
        Run("sft", 40, method, factor, seed): {
            "measures": {
                "p_refuse": 0.8 + 0.2 * (factor == factors[-1]),
                "capability": value + 0.1 * seed,
                "over_refusal": 0.5,
                **dict.fromkeys(ToyTestbed.details, 0.25),
            },
            "cost": {"forward": 100, "backward": 50, "seconds": seconds},
        }
        for method, (value, seconds) in kept.items()
        for factor in factors
        for seed in seeds
    }


class TestTables:
    def cells(self, table):
        rows = [[c.strip() for c in line.strip("|").split(" |")] for line in table.split("\n")]
        return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}

    def test_hold_what_the_runs_say(self):
        runs = results({"naive": (0.5, 2), "KL, weight 1": (0.7, 4), "KL, weight 3": (0.8, 4)})
        comparison = Comparison(runs, ToyTestbed(0))
        assert comparison.best_kl() == "KL, weight 3"
        rows = self.cells(comparison.levels())
        assert rows["naive"]["capability at 0.9"] == "0.550 +- 0.071 (2)"
        assert rows["KL, weight 1"]["- naive"] == "+0.200 +- 0.000 (2)"
        assert rows["KL, weight 1"]["- KL, weight 3"] == "-0.100 +- 0.000 (2)"
        assert rows["KL, weight 1"]["time"] == "2.0"
        assert (rows["naive"]["forward"], rows["naive"]["backward"]) == ("100", "50")
        details = self.cells(comparison.details())
        assert details["naive"]["sort"] == "0.250 +- 0.000 (2)"
        assert self.cells(comparison.runs())["naive"]["p_refuse, lr x2"] == "1.000"

    def test_a_method_that_is_never_safe_enough_has_a_dash_and_stays(self):
        runs = results({"naive": (0.5, 2)})
        shy = {
            replace(run, method="LoRA"): {**v, "measures": {**v["measures"], "p_refuse": 0.3}}
            for run, v in runs.items()
        }
        rows = self.cells(Comparison(runs | shy, ToyTestbed(0)).levels())
        assert rows["LoRA"]["capability at 0.9"] == rows["LoRA"]["- naive"] == "-"


@pytest.fixture
def tiny_world(tmp_path, monkeypatch):
    """An untrained model in the place of the pretrained base model."""
    monkeypatch.setenv("OGPSA_CACHE", str(tmp_path / "cache"))
    save(tiny_model(), tmp_path / "cache" / f"toy-base-seed0-{_fingerprint(WORLD, PHASES)}")


def run_benchmark(monkeypatch, output, *options):
    words = ["--seeds", "0", "--steps", "2", "--processes", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["benchmark_tradeoff.py", *words, *options])
    benchmark_tradeoff.main()
    return json.loads((output / "the-toy-world" / "results.json").read_text())


def test_a_benchmark_runs_end_to_end_and_repeats_nothing(tiny_world, monkeypatch, tmp_path):
    options = ["--learning_rate_factors", "1", "10", "--stages", "sft-dpo"]
    output = tmp_path / "out"
    found = run_benchmark(monkeypatch, output, *options, "--methods", "naive")
    assert {run["run"]["learning_rate_factor"] for run in found["runs"]} == {1, 10}
    # Two stages of two steps with 16 sequences, pairs in the second.
    costs = [(run["cost"]["forward"], run["cost"]["backward"]) for run in found["runs"]]
    assert costs == [(2 * 16 + 2 * 64, 2 * 16 + 2 * 32)] * 2

    base = AutoModelForCausalLM.from_pretrained(ToyTestbed(0).base_model())
    harmful = WORLD.evaluation_sets()["refusal"]
    scores = completion_scores(base, TOKENIZER, harmful["prompt"], harmful["completion"])
    assert found["base"]["0"]["p_refuse"] == mean_probability(scores)

    folder = output / "the-toy-world"
    assert (folder / "sft-dpo-2.png").read_bytes().startswith(b"\x89PNG")
    first = {file: file.stat().st_mtime_ns for file in (folder / "runs").iterdir()}
    run_benchmark(monkeypatch, output, *options, "--methods", "naive", "OGPSA preserve")
    assert all(file.stat().st_mtime_ns == time for file, time in first.items())
    assert len(list((folder / "runs").iterdir())) == len(first) + 2
    assert "OGPSA preserve" in (folder / "results.md").read_text()

    # A result of other settings or versions is not taken for one of these.
    stale = next(file for file in first if "naive-x10" in file.name)
    content = json.loads(stale.read_text())
    content["run"]["versions"]["torch"] = "1.0"
    stale.write_text(json.dumps(content))
    again = run_benchmark(monkeypatch, output, *options, "--methods", "naive")
    assert again["runs"][1]["measures"] == found["runs"][1]["measures"]
    assert json.loads(stale.read_text())["run"]["versions"]["torch"] != "1.0"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps must be above 0, but got 0"),
        (["--learning_rate_factors", "-1"], "--learning_rate_factors must be above 0"),
        (["--processes", "0"], "--processes must be at least 1"),
        (["--methods", "nought"], "invalid choice: 'nought'"),
    ],
)
def test_bad_options_are_named(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark_tradeoff.py", *words])
    with pytest.raises(SystemExit):
        benchmark_tradeoff.main()
    assert message in capsys.readouterr().err


def test_missing_data_are_named(monkeypatch, tmp_path):
    words = ["--model", str(tmp_path), "--data", str(tmp_path / "none")]
    monkeypatch.setattr(sys, "argv", ["benchmark_tradeoff.py", *words])
    with pytest.raises(SystemExit, match="Name the folder that holds them with --data"):
        benchmark_tradeoff.main()


def test_the_methods_are_distinct_and_their_settings_are_allowed():
    assert len({repr(method) for method in METHODS.values()}) == len(METHODS)
    for stage in ("sft", "dpo"):
        testbed = ToyTestbed(0)
        recipe = Recipe(
            stage, testbed.config(stage), testbed.training(stage), testbed.capability_groups(),
            1e-4, 1, 0,
        )  # fmt: skip
        for method in METHODS.values():
            assert (recipe.ogpsa_config(method) is None) == (method.ogpsa is None)
            assert recipe.arguments(method, Path("x")).max_steps == 1
