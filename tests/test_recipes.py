"""The recipes of docs/performance.md: figures, published settings, and two steps of each."""

import math
import re
import runpy
import shlex
import shutil
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ogpsa_trl.benchmark.toy_model import tiny_model, toy_tokenizer
from ogpsa_trl.cli import train
from ogpsa_trl.cli.launch import separated
from ogpsa_trl.cli.train_keys import parse_run
from runs import max_difference
from test_conversions import HALUEVAL_QA, saferlhf, ultrafeedback

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
TEXT = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
PAGE = runpy.run_path(str(ROOT / "docs" / "make_recipes.py"), run_name="recipes")
PAGE["Recipe"].run = cache(PAGE["Recipe"].run)  # the parser is made anew each time
COMMANDS = re.findall(r"^ogpsa train (.*?)(?:  # \d+)?$", TEXT, re.MULTILINE)

STAGES = ("sft", "dpo")
FORMS = ("paper_{}", "{}", "{}_lora", "{}_qlora")
RECIPES = [form.format(stage) for form in FORMS for stage in STAGES]

# The authors' command lines, as the method's description gives them.
BOTH = {
    "num_samples": 200, "learning_rate": 1e-6, "lr_scheduler_type": "cosine", "warmup_steps": 0,
    "max_grad_norm": 1.0, "optim": "adamw_torch", "max_length": 2048, "bf16": True,
}  # fmt: skip
PUBLISHED = {
    "sft": BOTH | {
        "num_train_epochs": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4,
    },
    "dpo": BOTH | {
        "num_train_epochs": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 16,
        "beta": 0.2, "loss_type": ["sigmoid"],
    },
}  # fmt: skip
GROUPS = {"sft": ["ultrafeedback", "halueval"], "dpo": ["ultrafeedback"]}
# What the form has of its own; all else is as in the form before it.
OWN = {
    "{}": {"preset", "dtype", "output_dir"},
    "{}_lora": {
        "dtype", "use_peft", "lora_r", "lora_alpha", "lora_target_modules", "learning_rate",
        "output_dir",
    },
    "{}_qlora": {
        "load_in_4bit", "use_bnb_nested_quant", "output_dir",
        "per_device_train_batch_size", "gradient_accumulation_steps",
    },
}  # fmt: skip

# What stands in for the data sets of the Hub: rows in their layouts.
ROWS = {
    "PKU-Alignment/PKU-SafeRLHF": [
        saferlhf(f"q{i}", ("bad", "sorry i can not"), (False, True), 1) for i in range(8)
    ],
    "HuggingFaceH4/ultrafeedback_binarized": [
        ultrafeedback(f"add {i} {i}", ("1 2 3", "4"), (8.5, 3.0)) for i in range(8)
    ],
    "pminervini/HaluEval": [HALUEVAL_QA | {"right_answer": f"{i}"} for i in range(8)],
}
SPLITS = {
    ("PKU-Alignment/PKU-SafeRLHF", None, "train"),
    ("HuggingFaceH4/ultrafeedback_binarized", None, "train_sft"),
    ("pminervini/HaluEval", "qa", "data"),
}


def values_of(recipe):
    return yaml.safe_load((CONFIGS / f"{recipe}.yaml").read_text(encoding="utf-8"))


def entries_of(values):
    return [*values["datasets"], *values["capability_datasets"]]


def test_the_table_is_what_configurations_and_formulas_give():
    assert PAGE["document"](TEXT) == TEXT, "run `make docs`"
    assert "**Memory and hours are\ncomputed, not measured**" in TEXT


def test_every_row_has_its_command():
    assert COMMANDS[: len(PAGE["RECIPES"])] == [
        recipe.command.removeprefix("ogpsa train ") for recipe in PAGE["RECIPES"]
    ]
    assert len(COMMANDS) == len(PAGE["RECIPES"]) + 1


def test_a_command_launches_what_it_says():
    launcher = launch_command_parser()
    for recipe in PAGE["RECIPES"]:
        line = shlex.split(recipe.command.removeprefix("ogpsa train "))
        launch, training = separated(line, launcher)
        assert launch[0] == "--config_file"
        assert launch[1] == str(CONFIGS / "accelerate" / f"{recipe.engine}.yaml")
        assert training == shlex.split(recipe.options)
        run = recipe.run()
        values = {**vars(run.training), **vars(run.model)}
        for key, value in zip(training[2::2], training[3::2], strict=True):
            assert str(values[key[2:]]) == value
    assert parse_run([*separated(shlex.split(COMMANDS[-1]), launcher)[1], "--use_cpu", "true"])


def test_dpo_starts_where_sft_ends():
    ends = {recipe.run().training.output_dir for recipe in PAGE["RECIPES"]}
    starts = [
        r.run().model.model_name_or_path for r in PAGE["RECIPES"] if r.title.startswith("SFT ->")
    ]
    assert len(starts) == 2
    assert set(starts) <= ends


@pytest.mark.parametrize(
    ("model", "config", "head"),
    [
        (PAGE["QWEN"], Qwen2Config, Qwen2ForCausalLM),
        (PAGE["LLAMA"], LlamaConfig, LlamaForCausalLM),
    ],
    ids=["qwen", "llama"],
)
def test_parameters_are_those_of_the_model_that_transformers_makes(model, config, head):
    head_size = 128
    shape = config(
        num_hidden_layers=model.layers, hidden_size=model.hidden, vocab_size=model.vocabulary,
        intermediate_size=model.feed_forward, num_attention_heads=model.hidden // head_size,
        num_key_value_heads=model.key_value // head_size, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        made = head(shape)
        assert sum(p.numel() for p in made.parameters()) == model.parameters
        lora = get_peft_model(made, LoraConfig(r=16, target_modules="all-linear"))
    assert sum(p.numel() for p in lora.parameters() if p.requires_grad) == model.adapter(16)


def test_every_recipe_fits_its_gpu_with_room():
    for recipe in PAGE["RECIPES"]:
        size = float(re.search(r", (\d+) GB", recipe.gpu)[1])
        assert PAGE["memory_bytes"](recipe) / 1e9 < 0.9 * size, recipe


def test_memory_and_hours_by_hand():
    """Of the first recipe: SFT of 7.6 billion parameters under ZeRO-2."""
    n, shards, tokens = 7_615_616_512, 8, 4 * 2048
    held = 2 * n + (4 + 4 + 8 + 2 * 2) * n / shards
    logits = 20 * 256 * 152_064
    activations = 2 * tokens * (28 * 3584 + 8 * 3584 + 2 * 512 + 4 * 18944)
    recipe = PAGE["RECIPES"][0]
    assert PAGE["memory_bytes"](recipe) == pytest.approx(held + logits + activations)
    training, refreshing = PAGE["hours"](recipe)
    speed = 8 * 989e12 * 0.35 * 3600
    assert training == pytest.approx(8 * n * 3 * 50_000 * 300 / speed)
    # A quarter of 128 texts of 300 tokens buys 24 samples of 400: for each GPU one of two groups.
    assert refreshing == pytest.approx(8 * n * (150_000 / 128) * 2 * 400 / (speed / 8))


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_called_official_is_the_published_setting(recipe):
    values, stage = values_of(recipe), recipe.removeprefix("paper_").partition("_")[0]
    lines = (CONFIGS / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()
    named = {line.partition(":")[0] for line in lines if "# official" in line}
    published = PUBLISHED[stage]
    own = {key for form in OWN if form != "{}" for key in OWN[form]} if "lora" in recipe else set()
    assert named >= published.keys() - own
    assert {k: values[k] for k in published if k in named} == {
        k: v for k, v in published.items() if k in named
    }
    assert [entry["group"] for entry in values["capability_datasets"]] == GROUPS[stage]
    sources = {(e["path"], e.get("name"), e["split"]) for e in entries_of(values)}
    assert sources <= SPLITS


@pytest.mark.parametrize(("stage", "interval"), [("sft", 30), ("dpo", 5)])
def test_the_published_form_is_the_official_one(stage, interval):
    ogpsa = parse_run(["--config", str(CONFIGS / f"paper_{stage}.yaml"), "--use_cpu", "true"]).ogpsa
    assert (ogpsa.scope, ogpsa.target, ogpsa.capability_loss) == ("parameter", "gradient", "nll")
    assert (ogpsa.refresh_interval, ogpsa.samples_per_refresh) == (interval, None)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("before", "form"), list(pairwise(FORMS)))
def test_a_form_differs_in_its_own_keys_only(before, form, stage):
    old, new = values_of(before.format(stage)), values_of(form.format(stage))
    different = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    assert different == OWN[form]


def test_qlora_takes_as_many_samples_a_step_as_lora():
    for stage in STAGES:
        a, b = values_of(f"{stage}_lora"), values_of(f"{stage}_qlora")
        keys = "per_device_train_batch_size", "gradient_accumulation_steps"
        assert math.prod(a[key] for key in keys) == math.prod(b[key] for key in keys)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model that bitsandbytes can hold in 4 bits on the CPU."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(seed=0, hidden_size=64, ffn_size=128).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def train_recipe(tiny, tmp_path, monkeypatch):
    """Two steps of a recipe, with everything of it but model, rows and device."""
    monkeypatch.chdir(tmp_path)

    def run(recipe, *options):
        values = values_of(recipe)
        for entry in entries_of(values):
            file = tmp_path / f"{entry['path'].replace('/', '-')}.jsonl"
            Dataset.from_list(ROWS[entry["path"]]).to_json(file)
            entry |= {"path": str(file), "name": None, "split": "train"}
        path = tmp_path / f"{recipe}.yaml"
        path.write_text(yaml.safe_dump(values))
        line = ["--config", str(path), "--model_name_or_path", tiny, "--use_cpu", "true"]
        line += ["--max_steps", "2", "--logging_steps", "1", "--max_length", "64"]
        line += ["--run_report", "false"]
        arguments = parse_run([*line, "--disable_tqdm", "true", *options])
        assert train.run_training(arguments) == 0
        return tmp_path / arguments.training.output_dir

    return run


def is_finite_and_moved(folder, start):
    after = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    before = AutoModelForCausalLM.from_pretrained(start).state_dict()
    difference = max((after[name].float() - before[name].float()).abs().max() for name in before)
    return math.isfinite(difference) and difference > 0


def test_sft_then_dpo_starts_from_the_first_model(train_recipe, tiny):
    first = train_recipe("sft", "--learning_rate", "1e-3")
    assert is_finite_and_moved(first, tiny)
    second = train_recipe("dpo", "--model_name_or_path", str(first), "--learning_rate", "1e-3")
    assert is_finite_and_moved(second, first)


@pytest.mark.parametrize("stage", [pytest.param("sft", marks=pytest.mark.slow), "dpo"])
def test_the_published_form_runs(stage, train_recipe, tiny):
    assert is_finite_and_moved(train_recipe(f"paper_{stage}", "--learning_rate", "1e-3"), tiny)


@pytest.mark.parametrize(
    "recipe", ["dpo_lora", "sft_qlora", pytest.param("sft_lora", marks=pytest.mark.slow)]
)
def test_an_adapter_is_trained_on_all_matrices(recipe, train_recipe):
    if "qlora" in recipe:
        pytest.importorskip("bitsandbytes")
    model = AutoModelForCausalLM.from_pretrained(train_recipe(recipe))
    adapter = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert len(adapter) == 14  # seven matrices of two layers
    assert max(p.abs().max() for p in adapter) > 0


@pytest.mark.slow
def test_an_adapter_of_qlora_is_merged_as_the_page_says(train_recipe, tiny):
    """In bfloat16, as the page does it."""
    pytest.importorskip("bitsandbytes")
    train_recipe("sft_qlora", "--learning_rate", "1e-1")
    [snippet] = re.findall(r"^```python notest\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    exec(compile(snippet, "docs/performance.md", "exec"), {})
    merged = AutoModelForCausalLM.from_pretrained("runs/sft_merged", dtype="auto")
    assert merged.dtype == torch.bfloat16
    start = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).state_dict()
    assert max_difference(merged.state_dict(), start) > 0
    assert is_finite_and_moved("runs/sft_merged", tiny)
    train_recipe("dpo_qlora", "--model_name_or_path", "runs/sft_merged")


@pytest.mark.parametrize("stage", ["sft", pytest.param("dpo", marks=pytest.mark.slow)])
def test_a_tokenizer_without_a_pad_token_trains_the_same(stage, config, base_model_path, tmp_path):
    """As that of Llama: the end token pads, and is learned where it ends a text."""
    bare = tmp_path / "bare"
    shutil.copytree(base_model_path, bare)
    tokenizer = toy_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(bare)
    assert AutoTokenizer.from_pretrained(bare).pad_token is None
    file = config(stage, max_steps=2, save_strategy="no", run_report=False)
    weights = []
    for name, model in (("padded", base_model_path), ("bare", str(bare))):
        line = ["--config", file, "--model_name_or_path", model]
        assert train.run_training(parse_run([*line, "--output_dir", str(tmp_path / name)])) == 0
        weights.append(AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict())
    assert AutoTokenizer.from_pretrained(tmp_path / "bare").pad_token == "<eos>"
    assert max_difference(*weights) == 0
