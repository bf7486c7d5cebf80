"""The trade-off benchmark: its baselines against literal ones, its test beds, and a run of it."""

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

from ogpsa_trl.benchmark import data, tradeoff, tradeoff_tables
from ogpsa_trl.benchmark.data import write_files, write_world
from ogpsa_trl.benchmark.methods import METHODS, Cost, Method, Run, mixed_data, stage_run, train
from ogpsa_trl.benchmark.testbed import BenchmarkArguments, Measures, parse_benchmark
from ogpsa_trl.benchmark.toy_model import tiny_model
from ogpsa_trl.benchmark.toy_world import NUM_EVALUATION_SAMPLES, REFUSAL, ToyWorld
from ogpsa_trl.benchmark.tradeoff_tables import Tables
from ogpsa_trl.evaluation.json_files import write_rows
from runs import literal_nll
from scripted import REFUSING, TOKENIZER, save, scripted_model

WORLD = ToyWorld(0)
BATCH_SIZE = 4
LEARNING_RATE = 0.1
NUM_STEPS = 2
SAFETY = WORLD.safety_sft().select(range(BATCH_SIZE))  # every step sees all of them


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What `load_dataset` makes of the files here does not stay in the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return save(tiny_model(), tmp_path_factory.mktemp("start"))


@pytest.fixture
def make_run(start, tmp_path):
    """The arguments of a short run by plain SGD without clipping: a step can be written down."""

    def make_run(method, safety=SAFETY, stage="sft", num_steps=NUM_STEPS, **keys):
        groups = WORLD.capability_groups(8)
        values = {
            "stage": stage, "learning_rate": LEARNING_RATE,
            "per_device_train_batch_size": BATCH_SIZE, "optim": "sgd",
            "lr_scheduler_type": "constant", "max_grad_norm": 0, "use_cpu": True, "bf16": False,
            "report_to": "none", "gradient_checkpointing": False, "disable_tqdm": True,
            "max_length": 64, "num_samples": 8, "capability_batch_size": 8,
            "dataset_name": str(write_rows(tmp_path / "safety.jsonl", safety)),
            "capability_datasets": [
                {"path": str(write_rows(tmp_path / f"{name}.jsonl", rows)), "group": name}
                for name, rows in groups.items()
            ],
        } | keys  # fmt: skip
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(values))
        return stage_run(
            str(config), method, model=start, output=tmp_path / "trainer", num_steps=num_steps
        )

    return make_run


def weights(folder):
    return torch.cat(
        [p.flatten() for p in AutoModelForCausalLM.from_pretrained(folder).parameters()]
    )


def trained(method, run, tmp_path):
    cost = Cost()
    train(method, run, tmp_path / "trained", cost)
    return weights(tmp_path / "trained").detach(), cost


def literal_sgd(start, l2_weight, num_steps):
    """Steps of SGD with the squared distance from the start in the loss."""
    model = AutoModelForCausalLM.from_pretrained(start)
    first = [p.detach().clone() for p in model.parameters()]
    for _ in range(num_steps):
        distances = [(p - s).pow(2).sum() for p, s in zip(model.parameters(), first, strict=True)]
        loss = literal_nll(model, TOKENIZER, SAFETY) + l2_weight * sum(distances)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= LEARNING_RATE * gradient
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class TestMethods:
    def test_naive_is_plain_trl_and_merging_goes_a_part_of_the_way(self, make_run, start, tmp_path):
        found, cost = trained(METHODS["naive"], make_run(METHODS["naive"]), tmp_path)
        assert cost.forward == cost.backward == NUM_STEPS * BATCH_SIZE
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(start),
            args=SFTConfig(
                tmp_path / "trl", learning_rate=LEARNING_RATE, max_steps=NUM_STEPS, seed=0,
                per_device_train_batch_size=BATCH_SIZE, optim="sgd", max_length=64,
                lr_scheduler_type="constant", max_grad_norm=0, use_cpu=True, bf16=False,
                report_to="none", disable_tqdm=True,
            ),
            train_dataset=SAFETY,
            processing_class=TOKENIZER,
        )  # fmt: skip
        trainer.train()
        expected = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        assert torch.equal(found, expected)
        assert not torch.equal(found, weights(start))
        merged = Method(kept_share=0.75)
        found, _ = trained(merged, make_run(merged), tmp_path)
        expected = 0.25 * weights(start) + 0.75 * expected
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)  # float32 rounding

    def test_l2_is_the_gradient_of_the_squared_distance(self, make_run, start, tmp_path):
        method = Method(l2_weight=0.5)
        found, _ = trained(method, make_run(method, num_steps=3), tmp_path)
        expected = literal_sgd(start, l2_weight=0.5, num_steps=3)
        # Float32 weights of size .1 after three steps; without the penalty they differ by 1e-3.
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)

    def test_lora_is_merged_into_the_model(self, make_run, start, tmp_path):
        found, _ = trained(METHODS["LoRA"], make_run(METHODS["LoRA"]), tmp_path)
        assert found.shape == weights(start).shape
        assert not torch.equal(found, weights(start))

    def test_a_share_of_the_mixed_data_is_capability_data(self, make_run, caplog):
        # A training script that ran in this process before may have asked for more.
        caplog.set_level(logging.WARNING, "ogpsa_trl")
        # More samples are asked for than the groups have.
        run = make_run(Method(mixed_share=0.25), num_samples=200)
        level = logging.getLogger("ogpsa_trl.data.preparation").level
        safety = WORLD.safety_sft().select(range(48))
        rows = mixed_data(0.25, run, safety, TOKENIZER)
        trained_on = [TOKENIZER.decode([i for i in row["labels"] if i != -100]) for row in rows]
        refusals = [text for text in trained_on if text == f"{REFUSAL.strip()} <eos>"]
        answers = {
            f"{row['completion'].strip()} <eos>"
            for group in WORLD.capability_groups(8).values()
            for row in group
        }
        assert len(refusals) == 48
        assert len(rows) == 64
        assert set(trained_on) - set(refusals) <= answers
        # Nothing to warn of, and the warnings of others are left on.
        assert not caplog.records
        assert logging.getLogger("ogpsa_trl.data.preparation").level == level

    def test_preference_pairs_have_neither_mixed_data_nor_the_loss_of_dft(self):
        sft_only = {"replay mixed in, 25%", "DFT loss"}
        assert all(method.can_train(["sft"]) for method in METHODS.values())
        for stages in (["dpo"], ["sft", "dpo"]):
            refused = {name for name, method in METHODS.items() if not method.can_train(stages)}
            assert refused == sft_only

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
    def test_the_sequences_of_a_run_are_counted(self, make_run, tmp_path, method):
        run = make_run(method)
        _, cost = trained(method, run, tmp_path)
        training = NUM_STEPS * BATCH_SIZE
        if not run.train.ogpsa:
            assert (cost.forward, cost.backward) == (training, training)
            return
        config = run.ogpsa
        num_samples = min(config.num_samples, 8)
        num_refreshes = len(range(0, NUM_STEPS, config.refresh_interval))
        drawn = min(config.samples_per_refresh or num_samples, num_samples)
        assert cost.backward == training + 2 * drawn * num_refreshes
        # The starting point, where one is needed, takes a look at every sample of both groups.
        has_start = config.capability_loss == "kl" or config.samples_per_refresh is not None
        # The first batch goes once more, to see what the model does to the scores of its head.
        probed = min(config.capability_batch_size, num_samples)
        assert cost.forward == cost.backward + 2 * num_samples * has_start + probed

    def test_the_reference_model_of_dpo_goes_forward_only(self, make_run, tmp_path):
        pairs = WORLD.safety_preferences().select(range(BATCH_SIZE))
        run = make_run(METHODS["naive"], pairs, stage="dpo")
        _, cost = trained(METHODS["naive"], run, tmp_path)
        sequences = NUM_STEPS * 2 * BATCH_SIZE
        assert (cost.forward, cost.backward) == (2 * sequences, sequences)


@pytest.fixture
def toy_bed(start, tmp_path):
    """The test bed of the toy world, of one seed, with an untrained model."""

    def toy_bed(*words, model=start, output="results"):
        folder = tmp_path / "toy"
        write_world(WORLD, folder / "seed-0")
        (folder / "seed-0" / "model").unlink(missing_ok=True)
        (folder / "seed-0" / "model").symlink_to(model)
        write_files("toy", folder, {}, kinds=("benchmark",))
        words = ["--seeds", "0", "--output_dir", str(tmp_path / output), *words]
        return ["--config", str(folder / "benchmark.yaml"), *words]

    return toy_bed


def test_measures_of_models_that_always_refuse_and_always_say_yes(toy_bed, tmp_path):
    said = {"refuses": REFUSING, "agrees": "=> yes <eos>"}
    folder = {
        name: save(scripted_model(chain, p_step=1 - 1e-9), tmp_path / name)
        for name, chain in said.items()
    }
    bed = parse_benchmark(toy_bed(model=folder["agrees"]))
    measured = {name: bed.measure(folder[name], 0) for name in said}
    refuses, agrees = measured["refuses"].values, measured["agrees"].values
    for name in ("p_refuse/harmful", "p_refuse/new_verbs", "p_over_refuse/howto"):
        assert refuses[name] == pytest.approx(1, abs=1e-3)
        assert agrees[name] == pytest.approx(0, abs=1e-3)
    share = sum(row["completion"] == " yes" for row in WORLD.evaluation_sets()["judge"]) / 16
    assert agrees["exact_match/judge"] == share > 0
    assert agrees["capability"] == pytest.approx(share / 7)
    assert agrees["drift/howto"] == agrees["distance"] == 0
    assert refuses["capability"] == 0
    assert all(refuses[f"exact_match/{task}"] == 0 for task in NUM_EVALUATION_SAMPLES)
    assert refuses["drift/howto"] > 1
    assert refuses["distance"] > 0
    up = measured["agrees"].higher_is_better
    assert up["capability"] and up["p_refuse/harmful"]
    assert not (up["drift/howto"] or up["distance"] or up["p_over_refuse/howto"])


BED = BenchmarkArguments(
    title="A bed", model_name_or_path="m", sft="s", evaluate="e", safety="p_refuse",
    levels=[0.8, 0.9, 0.95], capability=["exact"], over_refusal="over_refusal",
    details=["sort", "drift"],
)  # fmt: skip
UP = {"capability": True, "sort": True, "drift": False}


def results(kept, seeds=(0, 1), factors=(1.0, 2.0)):
    """Runs whose safety rises from .8 to 1 with the learning rate."""
    return {
        Run("sft", 40, method, factor, seed): {
            "measures": {
                "p_refuse": 0.8 + 0.2 * (factor == factors[-1]),
                "capability": value + 0.1 * seed,
                "over_refusal": 0.5,
                **dict.fromkeys(BED.details, 0.25),
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
        tables = Tables(runs, BED, UP)
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
        _, lora = Tables(runs | shy, BED, UP).levels()
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
        tables = Tables(runs, BED, UP)
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
        at_half = METHODS["KL, weight 3"].at_share(0.5).keys
        assert (at_half["capability_token_share"], at_half["capability_weight"]) == (0.5, 3)


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


def test_a_benchmark_writes_its_results_and_repeats_nothing(toy_bed, start, monkeypatch, tmp_path):
    """Its runs on other processes are tested with the command `ogpsa benchmark`."""
    monkeypatch.setattr(tradeoff, "ProcessPoolExecutor", InThisProcess)

    def measure(self, folder, seed):  # in the place of seconds of measuring
        names = ("capability", self.safety, self.over_refusal, *self.capability, *self.details)
        names = dict.fromkeys((*names, "distance"))
        return Measures(dict.fromkeys(names, length_of(folder)), dict.fromkeys(names, True), [])

    monkeypatch.setattr(BenchmarkArguments, "measure", measure)
    folder = tmp_path / "results"

    def run_benchmark(*words):
        short = ["--steps", "2", "--learning_rate_factors", "1", "--methods", "naive"]
        tradeoff.main(toy_bed("--processes", "1", *short, *words))
        return json.loads((folder / "results.json").read_text())

    found = run_benchmark("--stages", "sft-dpo", "sft")
    # Two stages of two steps with 16 sequences, pairs in the second.
    costs = [(run["cost"]["forward"], run["cost"]["backward"]) for run in found["runs"]]
    assert costs == [(2 * 16 + 2 * 64, 2 * 16 + 2 * 32), (2 * 16, 2 * 16)]
    assert found["start"]["0"]["p_refuse/harmful"] == length_of(start)
    assert len({run["measures"]["p_refuse/harmful"] for run in found["runs"]}) == 2
    assert (folder / "sft-dpo-2.png").read_bytes().startswith(b"\x89PNG")
    assert "naive" in (folder / "results.md").read_text()

    monkeypatch.setattr(tradeoff_tables, "tradeoff_figure", lambda *_, **__: None)  # seconds
    # A result of other settings or versions is not taken for one of these.
    kept, stale = (folder / "runs" / f"{chain}-2-naive-x1-0.json" for chain in ("sft-dpo", "sft"))
    content = json.loads(stale.read_text())
    content["run"]["versions"]["torch"] = "1.0"
    stale.write_text(json.dumps(content))
    time = kept.stat().st_mtime_ns
    again = run_benchmark("--stages", "sft-dpo", "sft")
    assert [r["measures"] for r in again["runs"]] == [r["measures"] for r in found["runs"]]
    assert kept.stat().st_mtime_ns == time
    assert json.loads(stale.read_text())["run"]["versions"]["torch"] != "1.0"

    # What fails is said.
    monkeypatch.setitem(tradeoff.METHODS, "naive", Method(learning_rate_factor=-1.0))
    with pytest.raises(SystemExit, match=r"error: 1 runs failed: sft-2-naive-x1-0 \(ValueErr"):
        run_benchmark("--stages", "sft")


class TestKeys:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--steps", "0"], "`steps` must hold values above 0, but has 0"),
            (["--learning_rate_factors", "-1"], "`learning_rate_factors` must hold values above 0"),
            (["--processes", "0"], "`processes` must be at least 1"),
            (["--methods", "nought"], "`methods` must hold names among 'naive'.*has 'nought'"),
            (["--stages", "rlhf"], "`stages` must hold names among 'sft'"),
            (["--safety", ""], "needs `safety`"),
            (["--dpo", "", "--stages", "sft-dpo"], "`dpo`, its file, is not set"),
            (["--sft", "toy_dpo"], "which has `stage: dpo`. Name a file with `stage: sft`"),
            (["--evaluate", "no.yaml"], "'no.yaml' cannot be read"),
        ],
    )
    def test_values_that_make_no_sense_are_refused(self, toy_bed, words, message):
        with pytest.raises(ValueError, match=message):
            parse_benchmark(toy_bed(*words))

    def test_an_unknown_measure_names_those_there_are(self, toy_bed, start):
        bed = parse_benchmark(toy_bed("--over_refusal", "refusal"))
        with pytest.raises(ValueError, match=r"no measure .refusal.*p_refuse/harmful"):
            bed.measure(start, 0)

    @pytest.mark.parametrize("name", ["toy", "stories", "smollm2"])
    def test_the_test_beds_that_we_ship_are_valid(self, name, monkeypatch):
        monkeypatch.setattr("ogpsa_trl.cli.evaluate.check_installed", lambda: None)
        # Their files are found by name; in the test bed stand the paths of what is written.
        words = [f"--{kind}={name}_{kind}" for kind in ("sft", "dpo", "evaluate")]
        bed = parse_benchmark(["--config", f"{name}_benchmark", *words, "--stages", "sft-dpo"])
        assert bed.title and len(bed.levels) == 3

    @pytest.mark.parametrize("stage", ["sft", "dpo"])
    def test_the_methods_are_distinct_and_their_settings_are_allowed(self, stage):
        assert len({repr(method) for method in METHODS.values()}) == len(METHODS)
        for method in METHODS.values():
            if method.can_train([stage]):
                run = stage_run(f"toy_{stage}", method, model=Path("m"), output=Path("o"))
                assert run.train.ogpsa == ("preset" in method.keys)
                assert run.training.max_steps == 1


def test_the_files_of_a_test_bed_name_what_was_written(tmp_path, monkeypatch):
    """In the folder that is the default too, whose name stands in the files that come with us."""
    monkeypatch.chdir(tmp_path)
    for folder in (Path("runs/toy/seed-0"), tmp_path / "elsewhere"):
        write_world(WORLD, folder)
        for kind in ("sft", "dpo"):
            values = yaml.safe_load((folder / f"{kind}.yaml").read_text())
            assert Path(values["dataset_name"]) == folder / f"{kind}.jsonl"
            assert all(Path(e["path"]).is_file() for e in values["capability_datasets"])


def test_missing_data_are_named(tmp_path):
    words = ["stories", "--data", str(tmp_path / "none"), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="Name the folder that holds them with --data"):
        data.main([*words, "--model", str(save(tiny_model(), tmp_path))])
