"""
Bad input: one screen that names the key, the value and the way out, before it costs anything.

Every row of a table is a run that is refused. The rows of `BEFORE_THE_MODEL` are refused before any
weights are loaded, those of `WITH_THE_MODEL` before an optimizer makes a step.
docs/reliability.md counts them.
"""

import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, NamedTuple

import pytest
import yaml
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from datasets import IterableDataset, config
from trl.trainer import dpo_trainer, sft_trainer

from ogpsa_trl.benchmark.toy_model import tiny_model, toy_tokenizer
from ogpsa_trl.cli import train
from ogpsa_trl.cli.key_values import RANGES as NUMBERS
from ogpsa_trl.cli.key_values import check_value
from ogpsa_trl.cli.train_keys import parse_run
from ogpsa_trl.cli.user_errors import user_errors
from ogpsa_trl.data.groups import warn_of_samples_in_training, warn_of_uneven_groups
from runs import capability_groups, make_trainer, paper, safety_data, to_messages

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = object()  # a key that the base run has and this one has not


class Case(NamedTuple):
    """
    A run that is refused.

    Attributes:
        name: What is wrong.
        values: Keys that differ from a run that works. `@` is the folder of the files below.
        words: Pieces of the message, in any order: the key, the value, the way out.
        line: Words of the command line.
        text: Lines of YAML after the keys, for what no mapping can say.
        stage: `sft` or `dpo`.
    """

    name: str
    values: dict
    words: tuple
    line: tuple = ()
    text: str = ""
    stage: str = "sft"


def entry(path="@/skills.jsonl", **more):
    return {"path": path, **more}


def groups(*entries):
    return {"capability_datasets": list(entries)}


def safety(*entries, **more):
    return {"dataset_name": LEFT_OUT, "datasets": list(entries), **more}


def number(key, value, *words):
    """A number out of range."""
    return Case(f"{key} {value}", {key: value}, (f"`{key}` must be", f"got {value}", *words))


KEYS = [
    Case("unknown key", {"refresh_intervall": 3}, ("`refresh_intervall` in", "`refresh_interval`")),
    Case("unknown key on the line", {}, ("`lerning_rate` in the command", "`learning_rate`"),
         line=("--lerning_rate", "1")),
    Case("unknown key in an entry", groups(entry(), entry(colums=["a"])),
         ("`colums` in entry 2 of `capability_datasets`", "`columns`")),
    Case("group of training data", safety(entry(group="a")),
         ("Unknown key `group` in entry 1 of `datasets`",)),
    Case("unknown key in an entry of the gate", {"gate_datasets": [entry(spilt="a")]},
         ("`spilt` in entry 1 of `gate_datasets`", "`split`")),
    Case("unknown key in a nested mapping", {"accelerator_config": {"split_batchs": True}},
         ("a name in `accelerator_config` must", "'split_batchs'", "'split_batches'")),
    Case("key of the other stage", {"beta": 0.1}, ("`beta` in", "stage 'dpo'", "`stage: dpo`")),
    Case("key twice", {}, ("`seed` stands in line", "again in line", "Remove"),
         text="seed: 1\nseed: 2"),
    Case("key twice in an entry", {"capability_datasets": LEFT_OUT}, ("`path` stands in", "Remove"),
         text="capability_datasets:\n- path: a\n  group: b\n  path: c"),
    Case("key twice, once in quotes", {}, ("`seed` stands in",), text="seed: 1\n'seed': 2"),
    Case("word of no key", {}, ("'facts.json' in the command line", "`--`"), line=("facts.json",)),
    Case("key without a value on the line", {}, ("--seed", "expected one argument"),
         line=("--seed",)),
    Case("config twice", {}, ("`--config` needs one file", "--config other.yaml"),
         line=("--seed", "1", "--config", "other.yaml")),
    Case("settings of OGPSA without data", {"capability_datasets": LEFT_OUT},
         ("`num_samples` (6) is a setting of OGPSA", "`ogpsa: false`")),
    Case("settings of the gate without data", {"gate_interval": 3},
         ("`gate_interval` (3)", "`gate_datasets`")),
    Case("environment that is no mapping", {"env": ["A=1"]},
         ("`env` must be a valid dictionary", "A=1", "`name: value`")),
    Case("environment with a name that is none", {"env": {"A=B": 1}}, ("`env`", "'A=B'")),
    Case("environment with a list", {"env": {"A": [1]}},
         ("`env` must be a valid string", "{'A': [1]}")),
]  # fmt: skip

TYPES = [
    Case("fraction of a step", {"max_steps": 1.5}, ("`max_steps` must be a valid integer", "1.5")),
    Case("count in words", {"max_steps": "many"}, ("--max_steps", "'many'")),
    Case("number in words on the line", {}, ("--learning_rate", "'fast'"),
         line=("--learning_rate", "fast")),
    Case("list for a number", {"learning_rate": [1e-3]},
         ("`learning_rate` must be a valid number", "[0.001]")),
    Case("truth for a number", {"seed": True}, ("`seed` must be a valid integer", "True")),
    Case("number for a truth", {"packing": 3}, ("`packing` must be a valid boolean", "got 3")),
    Case("text for a truth", {"bf16": "perhaps"}, ("--bf16", "perhaps", "true/false")),
    Case("no value", {"seed": None}, ("`seed` must be a valid integer", "None", "Remove the key")),
    Case("number for a text", {"output_dir": 3},
         ("`output_dir` must be a valid string", "got 3", "in quotes")),
    Case("truth for a choice", {}, ("`eval_strategy` must be 'no'", "False", "in quotes"),
         text="eval_strategy: no"),
    Case("number for a list", {"lora_target_modules": 3},
         ("`lora_target_modules`", "a valid list", "got 3", "[...]")),
    Case("list of numbers for one of texts", {"label_names": [1]},
         ("entry 1 of `label_names` must be a valid string", "got 1", "in quotes")),
    Case("numbers as text in a list", {}, ("entry 1 of `loss_weights` must be a valid number",
         "'1e-1'", "Leave out quotes"), text="loss_weights: ['1e-1']", stage="dpo"),
    Case("number as text for a list", {"loss_weights": "0.5"},
         ("`loss_weights` must be a valid list", "0.5", "Write it in brackets"), stage="dpo"),
    Case("text for a mapping", {"model_init_kwargs": "fast"},
         ("`model_init_kwargs` must be a valid dictionary", "'fast'", "`name: value`")),
    Case("settings of parallelism", {"parallelism_config": {"tp_size": 2}},
         ("`parallelism_config` cannot be set in a file of keys", "hsdp.yaml")),
    Case("mapping for entries", {"capability_datasets": entry()},
         ("`capability_datasets` must be a valid list", "after `-`")),
    Case("entry that is a text", groups("@/skills.jsonl"), ("entry 1 of `capability_datasets`",
         "must be a valid dictionary", "`name: value`")),
    Case("entry without a path", safety({"name": "main"}), ("entry 1 of `datasets`", "a `path`")),
    Case("path that is a number", groups(entry(3)),
         ("`path` in entry 1", "valid string", "in quotes")),
    Case("columns that are a text", groups(entry(columns="prompt")), ("`columns` in entry 1",
         "a valid list", "'prompt'", "brackets")),
    Case("fraction that is a text", groups(entry(fraction="half")), ("`fraction` in entry 1",
         "a valid number", "'half'")),
    Case("fraction below zero", groups(entry(fraction=-1)), ("`fraction`", "above 0", "-1")),
    Case("group without a name", groups(entry(group="")), ("`group` in entry 1", "''")),
    Case("group of two lines", groups(entry(group="a\nb")), ("`group` in entry 1", "on one line")),
    Case("path with a zero", {"output_dir": "a\0b"}, ("`output_dir`", "the character zero")),
]  # fmt: skip

CHOICES = [
    Case("stage", {"stage": "ppo"}, ("`stage` must be 'sft' or 'dpo'", "'ppo'")),
    Case("preset", {"preset": "papr"}, ("`preset` must be", "'papr'", "nearest is 'paper'")),
    Case("scope", {"scope": "whole"}, ("scope", "'whole'")),
    Case("dtype", {"dtype": "float8"}, ("`dtype` must be 'auto'", "'float8'", "'float32'")),
    Case("optimizer", {"optim": "adamw_troch"}, ("`optim` must be", "nearest is 'adamw_torch'")),
    Case("scheduler", {"lr_scheduler_type": "cosin"}, ("`lr_scheduler_type`", "'cosine'")),
    Case("loss of SFT", {"loss_type": "mse"}, ("`loss_type` must be 'nll'", "'mse'")),
    Case("tracker", {"report_to": ["wandd"]}, ("`report_to`", "nearest is 'wandb'")),
    Case("conversion", groups(entry(conversion="gsm")), ("`conversion`", "gsm8k", "'gsm'")),
]  # fmt: skip

RANGES = [
    number("learning_rate", -1, "greater than or equal to 0"),
    number("num_train_epochs", float("inf"), "finite"),
    number("num_train_epochs", 0, "greater than 0"),
    number("max_steps", 0, "or -1"),
    number("per_device_train_batch_size", 0, "greater than or equal to 1"),
    number("dataloader_num_workers", -1, "greater than or equal to 0"),
    number("save_steps", -5, "greater than 0"),
    number("adam_beta1", 1.5, "less than 1"),
    number("label_smoothing_factor", 2, "less than or equal to 1"),
    number("max_length", 1, "greater than or equal to 2"),
    number("seed", -1, "greater than or equal to 0"),
    number("ddp_timeout", 0, "greater than or equal to 1"),
    number("pad_to_multiple_of", 0, "greater than or equal to 1"),
    number("lora_r", 0, "greater than or equal to 1"),
    number("refresh_interval", 0, "at least 1"),
    Case("beta -0.1", {"beta": -0.1}, ("`beta` must be greater than 0", "-0.1"), stage="dpo"),
    Case("out of range on the line", {}, ("`learning_rate` must be", "-1.0"),
         line=("--learning_rate=-1",)),
    Case("more parts than samples", {"gradients_per_group": 9},
         ("`gradients_per_group`", "at most `num_samples` (6)", "raise `num_samples`")),
]  # fmt: skip

FILES = [
    Case("no such file", {}, ("`--config` must name a YAML file", "No such file"),
         line=("@config", "@/no.yaml")),
    Case("folder", {}, ("`--config` must name a YAML file", "Is a directory"),
         line=("@config", "@")),
    Case("binary file", {}, ("`--config`", "model.safetensors' of", "is not valid YAML"),
         line=("@config", "@/model/model.safetensors")),
    Case("no YAML", {}, ("is not valid YAML",), text="seed: [1"),
    Case("nested too deeply", {}, ("not valid YAML", "recursion", "closed"),
         text=f"seed: {'[' * 600}"),
    Case("object of Python", {}, ("not valid YAML", "python/object"),
         text="seed: !!python/object/apply:os.system ['true']"),
    Case("date that is none", {}, ("a date", "in quotes"), text="run_name: 2024-13-45"),
    Case("file of a list", {}, ("must hold keys with values", "[1]"),
         line=("@config", "@/list.yaml")),
    Case("model that is not there", {"model_name_or_path": "@/no"},
         ("`model_name_or_path`", "no folder", "Correct it")),
    Case("model without a name", {"model_name_or_path": ""}, ("`model_name_or_path` is not set",)),
    Case("model that is a file", {"model_name_or_path": "@/sft.jsonl"},
         ("`model_name_or_path`", "is a file", "Name the folder")),
    Case("folder without a model", {"model_name_or_path": "@/nothing"},
         ("`model_name_or_path`", "no config.json", "Correct the path")),
    Case("adapter for a model", {"model_name_or_path": "@/adapter"},
         ("`model_name_or_path` must be a whole model", "adapter", "Merge")),
    Case("model of the Hub that cannot be reached", {"model_name_or_path": "nobody/nothing"},
         ("`model_name_or_path` 'nobody/nothing' cannot be loaded", "connect")),
    Case("model without a tokenizer", {"model_name_or_path": "@/no_tokenizer"},
         ("tokenizer of `model_name_or_path`", "no_tokenizer")),
    Case("output folder that is a file", {"output_dir": "@/sft.jsonl"},
         ("`output_dir`", "it is a file", "Name another")),
    Case("output folder below a file", {"output_dir": "@/sft.jsonl/run"},
         ("`output_dir`", "Not a directory", "Name another")),
    Case("output folder that cannot be made", {"output_dir": "/proc/run"},
         ("`output_dir`", "'/proc/run'", "change its permissions")),
    Case("output folder without a name", {"output_dir": ""}, ("`output_dir`", "is empty")),
    Case("chat template that is not there", {"chat_template_path": "@/no.jinja"},
         ("`chat_template_path`", "no file", "Correct the path")),
]  # fmt: skip

DATA = [
    Case("none", {"dataset_name": LEFT_OUT},
         ("from `datasets` or from `dataset_name`", "neither is set", "Set one")),
    Case("two kinds", safety(entry(), dataset_name="@/sft.jsonl"),
         ("`datasets` or from `dataset_name`", "Remove one")),
    Case("file that is not there", {"dataset_name": "@/no.jsonl"}, ("no file", "Correct the path")),
    Case("folder that is not there", groups(entry("./no")), ("no file './no'", "Correct")),
    Case("data of the Hub that cannot be reached", groups(entry("nobody/nothing")),
         ("'nobody/nothing' (split 'train') in `capability_datasets`", "reach")),
    Case("builder without files", groups(entry("json")), ("`path: json` needs `data_files`",)),
    Case("files of a builder that are not there", groups(entry("json", data_files="no.json")),
         ("'no.json'", "`capability_datasets` cannot be loaded", "Check its path")),
    Case("empty file", {"dataset_name": "@/empty.jsonl"}, ("`dataset_name`", "it is empty")),
    Case("empty file of a group", groups(entry("@/empty.jsonl")),
         ("`capability_datasets` cannot be loaded", "it is empty")),
    Case("conversion that leaves no row",
         groups(entry("@/unsafe.jsonl", conversion="beavertails_sft")),
         ("Capability group 'capability'", "at least one row", "Check its file and split")),
    Case("table without rows", groups(entry("@/empty.csv")), ("`capability_datasets`", "no data")),
    Case("damaged JSON", {"dataset_name": "@/damaged.jsonl"}, ("`dataset_name`", "JSON parse")),
    Case("another encoding", groups(entry("@/latin.jsonl")),
         ("'capability'", "`capability_datasets`", "cannot be loaded", "utf-8")),
    Case("split that is not there", groups(entry(split="validation")),
         ("`capability_datasets`", '"validation"', "['train']")),
    Case("split that is none", groups(entry(split="train[:")),
         ("`capability_datasets`", "train[:")),
    Case("split of the training data", {"dataset_train_split": "trian"},
         ("`dataset_train_split`", "'train'", "'trian'")),
    Case("evaluation without data", {"eval_strategy": "epoch"},
         ("`dataset_test_split`", "'test'", "`test_split_size`")),
    Case("columns that are not there", groups(entry(columns=["messages"])),
         ("`capability_datasets`", "'messages'", "['prompt', 'completion']")),
    Case("columns of another conversion", groups(entry(conversion="gsm8k")),
         ("`conversion: gsm8k` needs a column 'question'", "['prompt', 'completion']")),
    Case("columns that differ in a group", groups(entry(), entry("@/messages.jsonl")),
         ("`prompt` in capability group 'capability'", "row 8 has None", "the same columns")),
    Case("rows of a group without a completion", groups(entry("@/missing.jsonl")),
         ("`completion` in capability group 'capability'", "row 1 has None", "Remove such rows")),
    Case("entry twice", groups(entry(group="a"), entry(group="b")),
         ("entry 2 of `capability_datasets` is the same data as entry 1", "Remove one")),
    Case("group names alike",
         groups(entry(group="Facts"), entry("@/language.jsonl", group="facts ")),
         ("'facts '", "'Facts'", "spaces or capitals")),
    Case("gate on training data", {"gate_datasets": [entry()]},
         ("entry 1 of `gate_datasets` must be held out", "`capability_datasets`")),
    Case("stream without a length", {"dataset_streaming": True, "max_steps": LEFT_OUT},
         ("`dataset_streaming: true`", "`max_steps`", "-1")),
    Case("stream of a mixture without a length",
         safety(entry(), streaming=True, max_steps=LEFT_OUT), ("`streaming: true`", "`max_steps`")),
    Case("stream divided in two", safety(entry(), streaming=True, test_split_size=0.5),
         ("`test_split_size` (0.5)", "a stream does not have", "`streaming: false`")),
    Case("fraction of a stream", safety(entry(fraction=0.5), streaming=True),
         ("`fraction` (0.5)", "`datasets`", "`streaming: false`")),
    Case("fraction of a converted mixture",
         groups(entry(fraction=0.5, conversion="gsm8k")), ("`fraction`", "0.5", "Convert the")),
    Case("streaming of the other key", {"streaming": True},
         ("`streaming` (True)", "`dataset_name`", "`dataset_streaming`")),
    Case("streaming of the other list", safety(entry(), dataset_streaming=True),
         ("`dataset_streaming` (True)", "Set `streaming`")),
    Case("test split of another size", safety(entry(), test_split_size=2.5),
         ("`datasets`", "test_size=2.5")),
]  # fmt: skip


def of_group(file, **more):
    return groups(entry(f"@/{file}", group="x")) | more


def of_gate(file, **more):
    return {"gate_datasets": [entry(f"@/{file}", group="x")], **more}


CAPABILITY, GATE = "apability group 'x' (`capability_datasets`)", "ate group 'x' (`gate_datasets`)"

# Rows that are wrong wherever they stand: in training, capability and gate data.
ROWS = [
    Case("a number", {"dataset_name": "@/late_number.jsonl"},
         ("`completion` in the training data", "row 5 has 3", "in quotes")),
    Case("a table of numbers", of_group("sums.csv"),
         (CAPABILITY, "`completion` in", "row 0 has 3", "in CSV")),
    Case("JSON of messages", of_gate("json.jsonl"),
         (GATE, "`messages` in", "row 0 has '[{", "`json.loads`")),
    Case("message without content", of_group("no_content.jsonl"),
         (CAPABILITY, "message 1 of row 5 has", "content"), stage="dpo"),
    Case("parts", {"dataset_name": "@/parts.jsonl"},
         ("message 0 of row 0 of the training data", "has parts", "Make one text of them")),
    Case("tools of another syntax", of_gate("tools.jsonl"),
         (GATE, "`tools` in", "row 0 has", "JSON text of one"), stage="dpo"),
    Case("template that refuses a late row",
         of_group("late_system.jsonl", model_name_or_path="@/strict"),
         (CAPABILITY, "does not go with", "refuses row 5: no system role here", "Change the")),
    Case("no answer", of_gate("no_answer.jsonl", assistant_only_loss=True,
         dataset_name="@/chat.jsonl"),
         (GATE, "turn of the assistant", "row 5 has none", "`assistant_only_loss: false`")),
    Case("number among preferences", {"dataset_name": "@/late_preference.jsonl"},
         ("`rejected` in the training data", "row 2 has 4"), stage="dpo"),
    Case("template that refuses a preference",
         {"dataset_name": "@/system_preference.jsonl", "model_name_or_path": "@/strict"},
         ("The training data does not go", "refuses row 2: no system role here"), stage="dpo"),
]  # fmt: skip

FORMATS = [
    Case("preferences for SFT", {"dataset_name": "@/dpo.jsonl"},
         ("The training data has the columns", "`stage: dpo`")),
    Case("completions for DPO", {"dataset_name": "@/sft.jsonl"},
         ("`chosen` and `rejected`", "['completion', 'prompt']", "`stage: sft`"), stage="dpo"),
    Case("unknown columns", {"dataset_name": "@/question.jsonl"},
         ("`messages`", "['answer', 'question']", "`conversion`")),
    Case("unknown columns for DPO", {"dataset_name": "@/question.jsonl"},
         ("`chosen` and `rejected`", "['answer', 'question']", "`conversion`"), stage="dpo"),
    Case("text column of another name",
         {"dataset_name": "@/text.jsonl", "dataset_text_field": "body"},
         ("`body` (`dataset_text_field`)", "['text']")),
    Case("group of unknown columns", groups(entry("@/question.jsonl", group="facts")),
         ("Capability group 'facts'", "['answer', 'question']", "`conversion`")),
    Case("gate group of unknown columns", {"gate_datasets": [entry("@/question.jsonl", group="x")]},
         ("Gate group 'x' (`gate_datasets`)", "['answer', 'question']")),
    Case("text beside conversations", {"dataset_name": "@/mixed.jsonl"},
         ("all be text or all be conversations", "['prompt']", "`columns`"), stage="dpo"),
    Case("no chat template",
         {"dataset_name": "@/messages.jsonl", "model_name_or_path": "@/no_chat"},
         ("The training data holds conversations", "no chat template", "`chat_template_path`")),
    Case("no chat template for a group",
         {**groups(entry("@/messages.jsonl", group="chat")), "model_name_or_path": "@/no_chat"},
         ("Capability group 'chat'", "holds conversations", "no chat template")),
]  # fmt: skip

MODELS = [
    Case("quantised full fine-tuning, 4 bits", {"load_in_4bit": True},
         ("`load_in_4bit: true`", "cannot be trained", "`use_peft: true`")),
    Case("two quantisations", {"load_in_4bit": True, "load_in_8bit": True, "use_peft": True},
         ("8 bit and 4 bit",)),
    Case("compilation", {"torch_compile": True}, ("`torch_compile`", "inductor", "false")),
    Case("half precision", {"fp16": True}, ("`bf16: true`", "'fp16'", "`fp16: false`")),
    Case("FSDP1", {"fsdp": True, "fsdp_config": {"version": 1, "sync_module_states": False}},
         ("FSDP1 (`fsdp_version: 1`)", "Set `fsdp_version: 2`")),
    Case("gradients on the CPU", {"fsdp": True, "fsdp_config": {"cpu_offload": True}},
         ("`fsdp_offload_params`", "Set `fsdp_offload_params: false`")),
    Case("DeepSpeed without ZeRO", {"deepspeed": {"zero_optimization": {"stage": 0}}},
         ("`zero_optimization.stage` is 0", "Set it to 1")),
    Case("optimizer without a gradient", {"optim": "lomo"}, ("'lomo'", "`optim: adamw_torch`")),
    Case("precision of two kinds", {"fp16": True, "bf16": True}, ("fp16", "bf16", "not both")),
    Case("metric of another target", {"target": "none", "metric": "optimizer"},
         ("`metric` 'optimizer'", "'none'", "`metric: euclidean`")),
    Case("gate without a tolerance", {"gate_datasets": [entry("@/held_out.jsonl")],
         "gate_action": "stop"}, ("`gate_action` 'stop'", "`max_capability_loss_increase`")),
    Case("gate without checkpoints", {"gate_datasets": [entry("@/held_out.jsonl")],
         "gate_action": "best", "max_capability_loss_increase": 0.1},
         ("`gate_action` 'best'", "`save_strategy` is 'no'", "`save_strategy: steps`")),
]  # fmt: skip

RESUME = [
    Case("from nothing", {"resume_from_checkpoint": True, "output_dir": "@/nothing"},
         ("`resume_from_checkpoint: true`", "there is none", "Leave it out")),
    Case("from no folder", {"resume_from_checkpoint": "@/no"},
         ("`resume_from_checkpoint` must be a whole checkpoint", "there is no such folder")),
    Case("from an empty folder", {"resume_from_checkpoint": "@/nothing"},
         ("must be a whole checkpoint", "trainer_state.json is not there")),
    Case("from the folder of checkpoints", {"resume_from_checkpoint": "@/run"},
         ("must be a whole checkpoint", "/run' there are checkpoints, and it is none itself")),
    Case("from half an optimizer", {"resume_from_checkpoint": "@/half_optimizer.pt"},
         ("must be a whole checkpoint", "optimizer.pt has", "bytes instead of")),
    Case("from no weights", {"resume_from_checkpoint": "@/no_weights"},
         ("must be a whole checkpoint", "model.safetensors is not there")),
]  # fmt: skip

BEFORE_THE_MODEL = {
    "keys": KEYS, "types": TYPES, "choices": CHOICES, "ranges": RANGES, "files": FILES,
    "data": DATA, "formats": FORMATS + ROWS, "models": MODELS, "resume": RESUME,
}  # fmt: skip

WITH_THE_MODEL = [
    Case("images", {"dataset_name": "@/images.jsonl"}, ("vision", "check your model")),
    Case("everything truncated away", {"max_length": 3, "ogpsa": False},
         ("no sample has one within `max_length` 3", "Raise `max_length`")),
    Case("everything truncated away in DPO", {"max_length": 3, "ogpsa": False},
         ("no sample has one within `max_length` 3", "Raise `max_length`"), stage="dpo"),
    Case("labels without a token", {"dataset_name": "@/labels.jsonl", "max_length": None},
         ("token to learn from", "labels that are all -100")),
    Case("weights of low precision", {"dtype": "bfloat16"},
         ("`target: update`", "torch.bfloat16", "`dtype: float32`")),
    Case("attention that is none", {"attn_implementation": "fast"},
         ("attn_implementation", "fast")),
    Case("adapter on nothing", {"use_peft": True, "lora_target_modules": ["query"]},
         ("Target modules", "query", "check the target modules")),
    Case("end token that is none", {"eos_token": "<end>"}, ("`eos_token` ('<end>')", "vocabulary")),
    Case("packing without a length", {"packing": True, "max_length": None}, ("`max_length`",)),
    Case("loss on the assistant of no conversation", {"assistant_only_loss": True},
         ("assistant_only_loss", "not conversational")),
    Case("loss of DPO", {"loss_type": ["mse"]}, ("Unknown loss type: mse",), stage="dpo"),
]  # fmt: skip

# What trl 1.9 and 1.16 do not both declare as choices.
PINNED = {"loss of SFT": pytest.mark.pinned}
CASES = [
    pytest.param(case, id=f"{kind}: {case.name}", marks=PINNED.get(case.name, ()))
    for kind, cases in BEFORE_THE_MODEL.items()
    for case in cases
]
CASES_WITH_THE_MODEL = [pytest.param(case, id=case.name) for case in WITH_THE_MODEL]


def base(stage):
    """A run that works, of one step."""
    return {
        "stage": stage, "model_name_or_path": "@/model", "use_cpu": True, "bf16": False,
        "dataset_name": f"@/{stage}.jsonl", "output_dir": "@/out", "max_steps": 1,
        "capability_datasets": [
            entry(group="skills"), entry("@/language.jsonl", group="language"),
        ],
        "per_device_train_batch_size": 4, "num_samples": 6, "samples_per_refresh": 2,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
        "gradient_checkpointing": False,
    }  # fmt: skip


def copy_without(source, target, *, cut=(), without=()):
    """A folder, some files of which are cut in the middle or left out."""
    shutil.copytree(source, target)
    for name in without:
        (target / name).unlink()
    for name in cut:
        content = (target / name).read_bytes()
        (target / name).write_bytes(content[: len(content) // 2])


def rows_of_files():
    """What stands in the files of the runs above, by their names."""
    sft, dpo = safety_data("sft").to_list(), safety_data("dpo").to_list()
    messages = to_messages(sft).to_list()
    answer = {"role": "assistant", "content": "no"}
    asked, system = ({"role": role, "content": "add"} for role in ("user", "system"))
    return {
        "sft": sft, "dpo": dpo, "messages": messages,
        **{name: rows.to_list() for name, rows in capability_groups(8).items()},
        "held_out": capability_groups(12)["skills"].to_list()[8:],
        "unsafe": [{"prompt": "add", "response": "A", "is_safe": False}],
        "question": [{"question": "add", "answer": "A"}],
        "text": [{"text": "add"}],
        "missing": [sft[0], {"prompt": "add", "completion": None}],
        "mixed": [{"prompt": "add", "chosen": [answer], "rejected": [answer]}],
        "images": [{"image": "a.png", "text": "add"}],
        "chat": messages[:6],
        "late_number": [*sft[:5], {"prompt": "add", "completion": 3}],
        "json": [{"messages": json.dumps(row["messages"])} for row in messages[:6]],
        "no_content": [*messages[:5], {"messages": [asked, {"role": "assistant"}]}],
        "parts": [
            {"messages": [{**asked, "content": [{"type": "text", "text": "add"}]}] * 2}
        ] * 6,
        "tools": [{**row, "tools": "[{'type': 'function'}]"} for row in messages[:6]],
        "late_system": [*messages[:5], {"messages": [system, asked]}],
        "no_answer": [*messages[:5], {"messages": [system, asked]}],
        "late_preference": [*dpo[:2], {**dpo[2], "rejected": 4}],
        "system_preference": [
            {"prompt": [first], "chosen": [answer], "rejected": [{**answer, "content": "yes"}]}
            for first in (asked, asked, system)
        ],
        "labels": [{"input_ids": [3, 4, 5], "labels": [-100] * 3}] * 4,
    }  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The folder that `@` stands for: files, models, a checkpoint, and some that are not whole."""
    folder = tmp_path_factory.mktemp("bad_input")
    for name, rows in rows_of_files().items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    for name, content in {
        "empty.jsonl": b"", "empty.csv": b"prompt,completion\n",
        "sums.csv": b"prompt,completion\n" + b"add 1 2 =>,3\n" * 6,
        "damaged.jsonl": b"{bad", "list.yaml": b"- 1",
        "latin.jsonl": '{"text": "\xe9"}\n'.encode("latin-1"),
    }.items():  # fmt: skip
        (folder / name).write_bytes(content)
    (folder / "nothing").mkdir()
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    tiny_model(seed=0).save_pretrained(folder / "model")
    toy_tokenizer().save_pretrained(folder / "model")
    for name, template in (
        ("no_chat", None),
        ("strict", "{% if messages[0]['role'] == 'system' %}"
                   "{{ raise_exception('no system role here') }}{% endif %}x"),
    ):  # fmt: skip
        tokenizer = toy_tokenizer()
        tokenizer.chat_template = template
        tiny_model(seed=0).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    tokenizer_files = [path.name for path in (folder / "model").glob("*token*")]
    copy_without(folder / "model", folder / "no_tokenizer", without=tokenizer_files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "HF_DATASETS_CACHE", str(folder / "cache"))
        save = {"save_strategy": "steps", "save_steps": 1}
        assert run_with(folder, {**save, "output_dir": "@/run"}) == 0
    good = folder / "run" / "checkpoint-1"
    copy_without(good, folder / "half_optimizer.pt", cut=["optimizer.pt"])
    copy_without(good, folder / "no_weights", without=["model.safetensors"])
    return folder


@pytest.fixture(autouse=True)
def surroundings(files, monkeypatch):
    """What a run leaves behind outside its folders: the cache, the engine, variables."""
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(files / "cache"))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def write(files, values, text="", stage="sft"):
    """The YAML file of a run."""
    values = {k: v for k, v in (base(stage) | values).items() if v is not LEFT_OUT}
    content = f"{yaml.safe_dump(values, sort_keys=False)}{text}\n".replace("@", str(files))
    (files / "run.yaml").write_text(content)
    return str(files / "run.yaml")


def run_with(files, values=None, line=(), text="", stage="sft"):
    return train.run_training(parsed(files, values, line, text, stage))


def parsed(files, values=None, line=(), text="", stage="sft"):
    line = [word.replace("@config", "--config").replace("@", str(files)) for word in line]
    if "--config" not in line[:1]:
        line = ["--config", write(files, values or {}, text, stage), *line]
    with user_errors():
        return parse_run(line)


def message_of(files, case):
    """What the script ends with."""
    with pytest.raises(SystemExit, match=r"^error: ") as refusal:
        run_with(files, case.values, case.line, case.text, case.stage)
    return str(refusal.value)


def assert_says(message, case):
    for word in case.words:
        assert word in message
    # One screen, whatever stands in the file.
    assert sum(1 + len(line) // 80 for line in message.splitlines()) <= 24
    assert "Traceback" not in message


# Keys of the ranges above; out of them some would stop a run after the model is loaded.
OUT_OF_RANGE = {
    0: ("per_device_eval_batch_size", "gradient_accumulation_steps", "eval_accumulation_steps",
        "dataset_num_proc", "dataloader_prefetch_factor", "save_total_limit", "ddp_bucket_cap_mb",
        "lora_alpha", "precompute_ref_batch_size", "ref_model_sync_steps",
        "logging_steps", "eval_steps", "discopop_tau"),
    -1: ("weight_decay", "adam_epsilon", "max_grad_norm", "neftune_noise_alpha", "eval_delay",
         "router_aux_loss_coef", "data_seed", "label_smoothing", "ld_alpha",
         "ref_model_mixup_alpha"),
    1: ("adam_beta2", "lora_dropout"),
}  # fmt: skip


@pytest.mark.parametrize("value", OUT_OF_RANGE)
def test_other_numbers_of_trl_have_these_ranges_too(value):
    for key in OUT_OF_RANGE[value]:
        with pytest.raises(ValueError, match=rf"`{key}` must be .*, but got {value}\."):
            check_value(f"`{key}`", value, Annotated[float, NUMBERS[key]])


@pytest.fixture
def no_model(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("the model is loaded")

    for trainer in (sft_trainer, dpo_trainer):
        monkeypatch.setattr(trainer, "create_model_from_path", load)


@pytest.fixture
def no_step(monkeypatch):
    def step(*args, **kwargs):
        raise AssertionError("the optimizer makes a step")

    monkeypatch.setattr(AcceleratedOptimizer, "step", step)


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_before_the_model_is_loaded(case, files, no_model):
    assert_says(message_of(files, case), case)


@pytest.mark.filterwarnings("ignore")  # of torch, of optimizers that never made a step
@pytest.mark.parametrize("case", CASES_WITH_THE_MODEL)
def test_what_takes_the_model_to_know_is_refused_before_a_step(case, files, no_step):
    assert_says(message_of(files, case), case)


def test_the_run_that_the_cases_differ_from_works(files):
    assert (files / "run" / "model.safetensors").exists()  # of SFT
    assert run_with(files, stage="dpo") == 0


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_columns_of_nulls_change_nothing(stage, files):
    """Those that TRL would read, or take for another format, in all data of a run."""
    nulls = ("text", "messages", "conversations", "input_ids", "image", "tools")
    for name in (stage, "skills", "held_out"):
        rows = [json.loads(line) for line in (files / f"{name}.jsonl").read_text().splitlines()]
        lines = [json.dumps({**dict.fromkeys(nulls), **row}) + "\n" for row in rows]
        (files / f"{name}_nulls.jsonl").write_text("".join(lines))

    def prepared(end):
        data = groups(entry(f"@/skills{end}.jsonl")) | {
            "dataset_name": f"@/{stage}{end}.jsonl",
            "gate_datasets": [entry(f"@/held_out{end}.jsonl")],
        }
        trainer, gate = train.prepare(parsed(files, data, stage=stage))
        [group] = trainer.capability_groups
        samples = [*group.samples, *gate.parts["capability"].samples]
        return trainer.train_dataset.to_list(), [sample.features for sample in samples]

    assert prepared("_nulls") == prepared("")


def test_a_row_of_a_stream_ends_the_run_with_one_line_when_it_is_read(files):
    values = {"dataset_name": "@/late_stream.jsonl", "dataset_streaming": True, "max_steps": 9}
    rows = safety_data("sft").to_list()
    lines = [json.dumps(row) + "\n" for row in [*rows[:13], {**rows[0], "completion": None}]]
    (files / "late_stream.jsonl").write_text("".join(lines))
    with pytest.raises(SystemExit, match=r"^error: `completion` in the training data .* row 13"):
        run_with(files, values)


def test_a_checkpoint_that_is_whole_is_gone_on_from(files):
    folder = str(files / "run" / "checkpoint-1")
    run = parsed(files, {"resume_from_checkpoint": folder, "max_steps": 2})
    assert train.check_paths(run) == folder


def test_at_the_log_level_of_debugging_errors_keep_their_traceback(files):
    with pytest.raises(ValueError, match="there is no folder"):
        run_with(files, {"model_name_or_path": "@/no", "log_level": "debug"})


def of_size(name, num_samples):
    return SimpleNamespace(name=name, samples=range(num_samples))


class TestWarnings:
    """What a user may have meant is no error."""

    def messages(self, caplog):
        return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]

    def test_groups_of_very_different_sizes(self, caplog):
        warn_of_uneven_groups([of_size("a", 5), of_size("many", 31), of_size("few", 3)])
        [message] = self.messages(caplog)
        for words in ("'many' has 31 samples", "'few' has 3", "Add samples to 'few'"):
            assert words in message
        caplog.clear()
        warn_of_uneven_groups([of_size("many", 30), of_size("few", 3)])
        assert self.messages(caplog) == []

    @pytest.mark.parametrize("as_stream", [False, True], ids=["data", "stream"])
    @pytest.mark.parametrize("stage", ["sft", "dpo"])
    def test_capability_data_that_are_the_safety_data(
        self, stage, as_stream, base_model_path, tmp_path, caplog
    ):
        rows = safety_data(stage)
        data = rows.to_iterable_dataset() if as_stream else rows
        few, others = rows.select(range(6)), capability_groups(70)["skills"]
        make_trainer(
            stage, base_model_path, tmp_path, capability={"same": few, "other": others}, data=data,
            config=paper(num_samples=70),
        )  # fmt: skip
        messages = self.messages(caplog)
        assert sum("differ much in size" in message for message in messages) == 1
        [same] = [message for message in messages if "among the training data" in message]
        assert "Capability group 'same': 6 of its 6 samples" in same
        assert "Take other data for the group" in same

    def test_a_stream_is_not_read_to_its_end(self, caplog):
        """It has none."""
        num_read = itertools.count()

        def endless():
            for number in num_read:
                yield {"input_ids": [number]}

        samples = [SimpleNamespace(features={"input_ids": [5]})]
        group = SimpleNamespace(name="same", samples=samples)
        warn_of_samples_in_training([group], IterableDataset.from_generator(endless))
        assert next(num_read) < 200
        assert "'same': 1 of its 1 samples" in self.messages(caplog)[0]


@pytest.mark.slow
def test_the_script_ends_with_one_line_and_status_1(files, tmp_path):
    file = write(files, {"lerning_rate": 1})
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train.py"), "--config", file],
        capture_output=True, text=True, timeout=200, cwd=tmp_path, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (1, "")
    # Optional packages that do not fit this machine may complain as they are imported.
    assert result.stderr.splitlines()[-1] == (
        f"error: Unknown key `lerning_rate` in {file}. The nearest known key is `learning_rate`."
    )
    assert "Traceback" not in result.stderr


def test_the_documents_count_these_cases():
    cases = [*itertools.chain(*BEFORE_THE_MODEL.values()), *WITH_THE_MODEL]
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert f"{len(cases)} cases" in text
    for kind in BEFORE_THE_MODEL:
        assert f"`{kind}`" in text
