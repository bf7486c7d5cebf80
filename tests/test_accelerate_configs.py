"""configs/accelerate: each file goes through accelerate's own launcher, up to what it starts."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
)
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file
from transformers.integrations.deepspeed import (
    propagate_args_to_deepspeed,
    unset_hf_deepspeed_config,
)

from ogpsa_trl.benchmark.toy_model import tiny_llama_config
from ogpsa_trl.engines.supported import check_supported
from runs import arguments, capability_groups, max_difference, trained
from test_engine_errors import fake_accelerator

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "configs" / "accelerate"
SLURM = FOLDER / "multi_node.slurm"

ZERO = ("zero1", "zero2", "zero3")
ENGINES = {"single": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "hsdp": "FSDP"}
ENGINES |= dict.fromkeys(ZERO, "DEEPSPEED")


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    """Paths in the files begin there."""
    monkeypatch.chdir(ROOT)


def launch_arguments(*line):
    """What `accelerate launch` makes of its command line and the file."""
    parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args([*line]))
    return parsed


@pytest.fixture
def launched(monkeypatch):
    """Put the environment in place that `accelerate launch` gives the processes it starts."""

    def enter(name):
        # Port 0: any that is free, instead of one that must be.
        line = ("--config_file", f"configs/accelerate/{name}.yaml", "--main_process_port", "0")
        parsed = launch_arguments(*line, "scripts/train.py")
        parsed.deepspeed_fields_from_accelerate_config = ",".join(
            load_config_from_file(str(FOLDER / f"{name}.yaml")).deepspeed_config
        )
        if parsed.use_deepspeed:
            command, environment = prepare_deepspeed_cmd_env(parsed)
            assert command is None  # torchrun starts the processes, not DeepSpeed's launcher
        else:
            environment = prepare_multi_gpu_env(parsed)
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)
        return parsed

    yield enter
    unset_hf_deepspeed_config()


def supported(name, mixed_precision="bf16", **plugins):
    """`check_supported` on what accelerate would offer; several GPUs are needed for the rest."""
    is_parallel = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true"
    parallelism = ParallelismConfig() if is_parallel else None
    accelerator = fake_accelerator(
        ENGINES[name], parallelism, mixed_precision=mixed_precision, **plugins
    )
    check_supported(accelerator, "adamw_torch")
    return accelerator


def test_there_is_a_file_for_every_supported_engine():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == ENGINES.keys()
    assert {path.stem for path in FOLDER.glob("*.json")} == set(ZERO)


@pytest.mark.parametrize("name", ENGINES)
def test_every_key_is_one_that_accelerate_knows(name):
    """It refuses unknown keys at the top; below, it would take them for arguments of its own."""
    path = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type == DistributedType(ENGINES[name])
    known = set(vars(launch_command_parser().parse_args(["script.py"])))
    for section, values in yaml.safe_load(path.read_text()).items():
        if isinstance(values, dict):
            assert values.keys() <= known, section
    assert config.mixed_precision is None  # left to the training configuration
    assert config.dynamo_config == {}


@pytest.mark.parametrize("name", ["single", "ddp"])
def test_replicated_engines_are_supported(name, caplog):
    parsed = launch_arguments("--config_file", f"configs/accelerate/{name}.yaml", "script.py")
    assert parsed.multi_gpu == (name == "ddp")
    assert not parsed.use_fsdp and not parsed.use_deepspeed
    supported(name)
    assert caplog.messages == []


@pytest.mark.parametrize("name", ["fsdp2", "hsdp"])
def test_fsdp_plugin(name, launched, caplog):
    parsed = launched(name)
    plugin = FullyShardedDataParallelPlugin()
    sizes = supported(name, fsdp_plugin=plugin).parallelism_config
    assert plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.transformer_cls_names_to_wrap is None  # the model names its layers
    assert plugin.cpu_ram_efficient_loading is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert caplog.messages == []
    if name == "hsdp":
        # It shards within a machine, and all processes take part: accelerate raises an error
        # otherwise, once they have started.
        assert sizes.dp_replicate_size == parsed.num_machines == 2
        assert sizes.dp_shard_size * 2 == sizes.total_size == parsed.num_processes


def texts(config):
    """All texts in a nested configuration."""
    if isinstance(config, dict):
        return [text for value in config.values() for text in texts(value)]
    return [config] if isinstance(config, str) else []


@pytest.mark.parametrize(("name", "bf16"), [("zero1", False), ("zero2", True), ("zero3", True)])
def test_zero_plugin(name, bf16, launched, tmp_path, caplog):
    """Transformers resolves every "auto", DeepSpeed knows every key, and OGPSA has no objection."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.config import DeepSpeedConfig

    # Made before the environment is that of a launch, where they would ask for GPUs.
    args = arguments("sft", tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.5, bf16=bf16)
    launched(name)
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision(args.mixed_precision)
    accelerator = supported(name, args.mixed_precision, deepspeed_plugin=plugin)
    propagate_args_to_deepspeed(accelerator, args)
    model = SimpleNamespace(config=tiny_llama_config())
    plugin.hf_ds_config.trainer_config_finalize(args, model, num_training_steps=10)

    caplog.clear()
    check_supported(accelerator, "adamw_torch")
    assert not [r for r in caplog.records if r.name == "ogpsa_trl.engines.supported"]
    filled = plugin.deepspeed_config
    assert "auto" not in texts(filled)
    config = DeepSpeedConfig(filled)
    assert config.zero_config.stage == int(name[-1]) == plugin.zero_stage
    assert config.zero_config.offload_optimizer is config.zero_config.offload_param is None
    assert (config.gradient_accumulation_steps, config.gradient_clipping) == (2, 0.5)
    assert config.bfloat16_config.enabled == bf16
    assert config.grad_accum_dtype == "fp32"
    assert config.zero_allow_untested_optimizer
    if name == "zero3":
        assert plugin.is_zero3_init_enabled()
        assert config.zero_config.gather_16bit_weights_on_model_save


def test_the_stages_differ_by_their_stage_only():
    configs = [json.loads((FOLDER / f"{name}.json").read_text()) for name in ZERO]
    for config in configs:
        zero = config["zero_optimization"]
        config["zero_optimization"] = {k: v for k, v in zero.items() if not k.startswith("stage")}
    assert configs[0] == configs[1] == configs[2]


def test_the_slurm_script_launches_its_share_on_every_node(tmp_path):
    """The arguments that `accelerate` gets on each node, with Slurm's programs played."""
    programs = {
        "scontrol": 'for node in a b; do echo "node-$node"; done',
        "srun": "while [[ $1 == --* ]]; do shift; done\n"
        'for i in 0 1; do SLURM_NODEID=$i "$@"; done',
        "accelerate": f'printf "%s\\0" "$@" > {tmp_path}/line-$SLURM_NODEID',
    }
    for name, text in programs.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "64",
    }  # fmt: skip
    assert SLURM.read_text().startswith("#!/bin/bash\n")
    subprocess.run(["bash", str(SLURM)], env=environment, cwd=ROOT, check=True)
    for node_id in (0, 1):
        command, *line = (tmp_path / f"line-{node_id}").read_text().split("\0")[:-1]
        assert command == "launch"
        parsed = launch_arguments(*line)
        assert parsed.machine_rank == node_id
        assert (parsed.num_machines, parsed.num_processes) == (2, 16)
        assert (parsed.main_process_ip, parsed.main_process_port) == ("node-a", 29500)
        # c10d reads the address of the rendezvous only if this is off.
        assert parsed.rdzv_backend == "c10d" and not parsed.same_network
        assert parsed.config_file in {f"configs/accelerate/{name}.yaml" for name in ENGINES}
        assert parsed.training_script_args == ["--config", "configs/sft.yaml"]
        for path in (parsed.training_script, "configs/sft.yaml"):
            assert Path(path).is_file()


SCRIPT = f"""
import os
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
torch.set_num_threads(1)
from engine_worker import use_cpu
from runs import capability_groups, make_trainer
engine, model_path, folder, batch_size = sys.argv[1:]
use_cpu(engine)
trainer = make_trainer(
    "dpo", model_path, folder, capability=capability_groups(), max_steps=3, max_grad_norm=0.5,
    gradient_accumulation_steps=2, per_device_train_batch_size=int(batch_size),
    use_cpu=not engine.startswith("zero"),
)
trainer.train()
trainer.save_model()
torch.distributed.barrier()
os._exit(0)  # gloo aborts now and then ("terminate called") while it is taken down
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ENGINES if name not in ("single", "ddp")])
def test_a_launch_takes_the_steps_of_one_process(name, base_model_path, tmp_path):
    """Nothing is set but the number of processes; SGD is a type that DeepSpeed has not tested."""
    (tmp_path / "script.py").write_text(SCRIPT)
    sizes = ("--num_processes", "2")
    if name == "hsdp":
        sizes = ("--num_processes", "4", "--num_machines", "1")
        sizes += ("--parallelism_config_dp_shard_size", "2")
    batch_size = 4 // int(sizes[1])
    subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file",
            f"configs/accelerate/{name}.yaml", "--main_process_port", "0", *sizes,
            str(tmp_path / "script.py"), name, base_model_path, str(tmp_path / "run"),
            str(batch_size),
        ],
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu",
        },
        cwd=ROOT, timeout=240, check=True,
    )  # fmt: skip
    _, before, expected = trained(
        "dpo", base_model_path, tmp_path / "one", capability=capability_groups(), max_steps=3,
        max_grad_norm=0.5, gradient_accumulation_steps=2, per_device_train_batch_size=4,
    )  # fmt: skip
    assert max_difference(before, expected) > 1e-2
    # Sums over samples are rounded in another order.
    assert max_difference(load_file(tmp_path / "run" / "model.safetensors"), expected) < 1e-6
