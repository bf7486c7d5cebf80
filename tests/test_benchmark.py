"""The trade-off benchmark: its baselines against literal ones, its measures, and a run of it."""

import json
import logging
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from ogpsa_trl.benchmark import tradeoff, tradeoff_tables
from ogpsa_trl.benchmark.methods import (
    METHODS,
    Cost,
    Method,
    Recipe,
    Run,
    _training_data,
    is_applicable,
    train,
)
from ogpsa_trl.benchmark.testbeds import ToyTestbed
from ogpsa_trl.benchmark.toy_model import tiny_model
from ogpsa_trl.benchmark.toy_world import NUM_EVALUATION_SAMPLES, REFUSAL, ToyWorld
from ogpsa_trl.benchmark.tradeoff_tables import Tables
from runs import literal_nll
from scripted import REFUSING, TOKENIZER, save, scripted_model

WORLD = ToyWorld(0)
BATCH_SIZE = 4


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


def trained(method, recipe, start, tmp_path):
    cost = Cost()
    train(method, recipe, start, tmp_path / "trained", cost)
    return weights(tmp_path / "trained").detach(), cost


def literal_sgd(recipe, start, l2_weight):
    """The steps of `recipe` with the squared distance from the start in the loss."""
    model = AutoModelForCausalLM.from_pretrained(start)
    first = [p.detach().clone() for p in model.parameters()]
    for _ in range(recipe.num_steps):
        distances = [(p - s).pow(2).sum() for p, s in zip(model.parameters(), first, strict=True)]
        loss = literal_nll(model, TOKENIZER, recipe.training) + l2_weight * sum(distances)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= recipe.learning_rate * gradient
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class TestMethods:
    def test_naive_is_plain_trl_and_merging_goes_a_part_of_the_way(self, recipe, start, tmp_path):
        found, cost = trained(METHODS["naive"], recipe, start, tmp_path)
        assert cost.forward == cost.backward == recipe.num_steps * BATCH_SIZE
        known = {k: v for k, v in recipe.settings.items() if k[:3] not in ("num", "cap")}
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
        merged, _ = trained(Method(kept_share=0.75), recipe, start, tmp_path)
        expected = 0.25 * weights(start) + 0.75 * expected
        torch.testing.assert_close(merged, expected, rtol=0, atol=1e-7)  # float32 rounding

    def test_l2_is_the_gradient_of_the_squared_distance(self, recipe, start, tmp_path):
        recipe = replace(recipe, num_steps=3)
        found, _ = trained(Method(l2_weight=0.5), recipe, start, tmp_path)
        expected = literal_sgd(recipe, start, l2_weight=0.5)
        # Float32 weights of size .1 after three steps; without the penalty they differ by 1e-3.
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)

    def test_lora_is_merged_into_the_model(self, recipe, start, tmp_path):
        found, _ = trained(METHODS["LoRA"], recipe, start, tmp_path)
        assert found.shape == weights(start).shape
        assert not torch.equal(found, weights(start))

    def test_a_share_of_the_mixed_data_is_capability_data(self, recipe, caplog):
        # A training script that ran in this process before may have asked for more.
        caplog.set_level(logging.WARNING, "ogpsa_trl")
        recipe = replace(recipe, training=WORLD.safety_sft().select(range(48)))
        recipe.settings["num_samples"] = 200  # more than the groups have
        level = logging.getLogger("ogpsa_trl.data.preparation").level
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
        assert logging.getLogger("ogpsa_trl.data.preparation").level == level

    def test_preference_pairs_cannot_be_mixed(self):
        mixed = METHODS["replay mixed in, 25%"]
        assert is_applicable(mixed, ["sft"])
        assert not is_applicable(mixed, ["sft", "dpo"])
        assert all(is_applicable(m, ["dpo"]) for m in METHODS.values() if m is not mixed)

    @pytest.mark.parametrize(
        "method",
        [
            *(
                METHODS[n]
                for n in ("replay mixed in, 25%", "OGPSA paper", "OGPSA paper, streaming")
            ),
            Method({"preset": "preserve", "samples_per_refresh": 8}),
        ],
        ids=["mixed", "paper", "streaming", "preserve"],
    )
    def test_the_sequences_of_a_run_are_counted(self, recipe, start, tmp_path, method):
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


def test_measures_of_models_that_always_refuse_and_always_say_yes(tmp_path, monkeypatch):
    said = {"refuses": REFUSING, "agrees": "=> yes <eos>"}
    folder = {
        name: save(scripted_model(chain, p_step=1 - 1e-9), tmp_path / name)
        for name, chain in said.items()
    }
    monkeypatch.setattr(ToyTestbed, "base_model", lambda self: folder["agrees"])
    measured = {name: ToyTestbed(0).measure(folder[name]) for name in said}
    for name in ("p_refuse", "p_refuse_ood", "over_refusal"):
        assert measured["refuses"][name] == pytest.approx(1, abs=1e-3)
        assert measured["agrees"][name] == pytest.approx(0, abs=1e-3)
    share = sum(row["completion"] == " yes" for row in WORLD.evaluation_sets()["judge"]) / 16
    assert measured["agrees"]["judge"] == share > 0
    assert measured["agrees"]["capability"] == pytest.approx(share / 7)
    assert measured["agrees"]["drift"] == measured["agrees"]["distance"] == 0
    assert all(measured["refuses"][task] == 0 for task in ("capability", *NUM_EVALUATION_SAMPLES))
    assert measured["refuses"]["drift"] > 1
    assert measured["refuses"]["distance"] > 0


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
    def test_hold_what_the_runs_say(self):
        runs = results({"naive": (0.5, 2), "KL, weight 1": (0.7, 4), "KL, weight 3": (0.8, 4)})
        tables = Tables(runs, ToyTestbed(0))
        assert tables.best_kl(None) == "KL, weight 3"
        naive, first, _ = tables.levels()
        assert naive["capability at 0.9"] == "0.550 +- 0.071 (2)"
        assert first["- naive"] == "+0.200 +- 0.000 (2)"
        assert first["- best KL"] == "-0.100 +- 0.000 (2)"
        assert first["time"] == "2.0"
        assert (naive["forward"], naive["backward"]) == (100, 50)
        assert tables.details()[0]["sort"] == "0.250 +- 0.000 (2)"
        assert tables.runs()[0]["p_refuse, lr x2"] == "1.000"

    def test_a_method_that_is_never_safe_enough_stays(self):
        runs = results({"naive": (0.5, 2)})
        shy = {
            replace(run, method="LoRA"): {**v, "measures": {**v["measures"], "p_refuse": 0.3}}
            for run, v in runs.items()
        }
        _, lora = Tables(runs | shy, ToyTestbed(0)).levels()
        assert lora["method"] == "LoRA"
        assert lora["capability at 0.9"] is lora["- naive"] is None

    def test_compare_with_the_best_kl_of_the_same_share(self):
        kept = {"naive": (0.5, 2), "KL, weight 1": (0.7, 4), "OGPSA preserve": (0.8, 4)}
        runs = {
            replace(run, share=share): {
                **v, "measures": {**v["measures"], "capability": v["measures"]["capability"] + more}
            }
            for run, v in results(kept).items()
            for share, more in ([(None, 0)] if run.method == "naive" else [(1.0, 0.1), (0.25, 0)])
        }  # fmt: skip
        tables = Tables(runs, ToyTestbed(0))
        rows = {row["method"]: row for row in tables.levels()}
        assert list(rows) == [
            "naive", "KL, weight 1, share 1", "KL, weight 1, share 0.25",
            "OGPSA preserve, share 1", "OGPSA preserve, share 0.25",
        ]  # fmt: skip
        for share in ("1", "0.25"):
            assert rows[f"OGPSA preserve, share {share}"]["- best KL"].startswith("+0.100")
        means = {
            name: {share: spread.mean for share, spread in of_share.items()}
            for name, of_share in tables.by_share().items()
        }
        assert means["KL, weight 1"] == {1.0: pytest.approx(0.85), 0.25: pytest.approx(0.75)}
        assert list(means) == ["KL, weight 1", "OGPSA preserve"]

    def test_every_method_with_capability_data_in_its_steps_has_a_share(self):
        with_share = {name for name, method in METHODS.items() if method.has_share}
        assert {"replay added", "KL, weight 3", "OGPSA preserve"} <= with_share
        assert not {"naive", "LoRA", "replay mixed in, 25%", "OGPSA paper"} & with_share
        share = METHODS["KL, weight 3"].at_share(0.5).config("sft")
        assert (share.capability_token_share, share.capability_weight) == (0.5, 3)


def length_of(folder):
    return weights(folder).double().norm().item()


class InThisProcess:
    """In the place of a pool of processes."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def run_benchmark(output, *options):
    words = ["--seeds", "0", "--steps", "2", "--learning_rate_factors", "1", "--methods", "naive"]
    words += ["--processes", "1", "--output", str(output)]
    tradeoff.main([*words, *options])
    return json.loads((output / "the-toy-world" / "results.json").read_text())


def test_a_benchmark_writes_its_results_and_repeats_nothing(start, monkeypatch, tmp_path):
    """Its runs on other processes are tested with the command `ogpsa benchmark`."""
    monkeypatch.setattr(tradeoff, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(ToyTestbed, "base_model", lambda self: start)
    names = ("p_refuse", "capability", *ToyTestbed.details)
    monkeypatch.setattr(  # in the place of seconds of measuring
        ToyTestbed,
        "measure",
        lambda self, folder: dict.fromkeys(names, length_of(folder)),
    )
    folder = tmp_path / "the-toy-world"
    found = run_benchmark(tmp_path, "--stages", "sft-dpo", "sft")
    # Two stages of two steps with 16 sequences, pairs in the second.
    costs = [(run["cost"]["forward"], run["cost"]["backward"]) for run in found["runs"]]
    assert costs == [(2 * 16 + 2 * 64, 2 * 16 + 2 * 32), (2 * 16, 2 * 16)]
    assert found["base"]["0"]["p_refuse"] == length_of(start)
    assert len({run["measures"]["p_refuse"] for run in found["runs"]}) == 2
    assert (folder / "sft-dpo-2.png").read_bytes().startswith(b"\x89PNG")
    assert "naive" in (folder / "results.md").read_text()

    monkeypatch.setattr(tradeoff_tables, "tradeoff_figure", lambda *_, **__: None)  # seconds
    # A result of other settings or versions is not taken for one of these.
    kept, stale = (folder / "runs" / f"{chain}-2-naive-x1-0.json" for chain in ("sft-dpo", "sft"))
    content = json.loads(stale.read_text())
    content["run"]["versions"]["torch"] = "1.0"
    stale.write_text(json.dumps(content))
    time = kept.stat().st_mtime_ns
    again = run_benchmark(tmp_path, "--stages", "sft-dpo", "sft")
    assert [r["measures"] for r in again["runs"]] == [r["measures"] for r in found["runs"]]
    assert kept.stat().st_mtime_ns == time
    assert json.loads(stale.read_text())["run"]["versions"]["torch"] != "1.0"

    # What fails is said.
    monkeypatch.setitem(tradeoff.METHODS, "naive", Method(learning_rate_factor=-1.0))
    with pytest.raises(SystemExit, match=r"error: 1 of 1 runs failed: sft-2-naive-x1-0 \(ValueErr"):
        run_benchmark(tmp_path, "--stages", "sft")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps must be above 0, but got 0"),
        (["--learning_rate_factors", "-1"], "--learning_rate_factors must be above 0"),
        (["--processes", "0"], "--processes must be at least 1"),
        (["--methods", "nought"], "invalid choice: 'nought'"),
    ],
)
def test_bad_options_are_named(words, message, capsys):
    with pytest.raises(SystemExit):
        tradeoff.main(words)
    assert message in capsys.readouterr().err


def test_missing_data_are_named(tmp_path):
    words = ["--model", str(tmp_path), "--data", str(tmp_path / "none")]
    with pytest.raises(SystemExit, match="Name the folder that holds them with --data"):
        tradeoff.main(words)


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
