"""What is refused by name: the message says the rule, the value and the way out."""

import logging
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    TorchDynamoPlugin,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers.training_args import OptimizerNames

from ogpsa_trl.backends import TorchBackend
from ogpsa_trl.engines import check_supported, make_backend
from runs import capability_groups, make_trainer


def fake_accelerator(engine="NO", parallelism=None, **state):
    """What accelerate offers of a run: engines that need several GPUs cannot be made on a CPU."""
    engine = DistributedType(engine)
    defaults = {"mixed_precision": "no", "dynamo_plugin": TorchDynamoPlugin()}
    return SimpleNamespace(
        state=SimpleNamespace(distributed_type=engine, **defaults | state),
        distributed_type=engine,
        parallelism_config=parallelism,
        device=torch.device("cpu"),
        process_index=0,
        num_processes=1,
    )


def fsdp(parallelism=None, **settings):
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2} | settings)
    return fake_accelerator("FSDP", parallelism, fsdp_plugin=plugin)


def deepspeed(parallelism=None, **config):
    """The configuration after transformers has filled in "auto", as a trainer has it."""
    plugin = DeepSpeedPlugin(hf_ds_config={"train_micro_batch_size_per_gpu": 1, **config})
    return fake_accelerator("DEEPSPEED", parallelism, deepspeed_plugin=plugin)


def zero(stage, parallelism=None, **settings):
    return deepspeed(parallelism, zero_optimization={"stage": stage, **settings})


def assert_refused(accelerator, *pieces, optimizer="adamw_torch"):
    with pytest.raises(ValueError) as error:
        check_supported(accelerator, optimizer)
    for piece in pieces:
        assert piece in str(error.value)


NOTHING = {"device": "none"}


@pytest.mark.parametrize(
    "accelerator",
    [
        *(partial(fake_accelerator, engine) for engine in ("NO", "MULTI_CPU", "MULTI_GPU")),
        *(partial(fake_accelerator, mixed_precision=precision) for precision in ("no", "bf16")),
        partial(fsdp, reshard_after_forward=True),
        partial(fsdp, ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)),
        *(partial(zero, stage) for stage in (1, 2, 3)),
        partial(zero, 2, offload_optimizer=NOTHING, offload_param=NOTHING),
        partial(zero, 3, zero_hpz_partition_size=1, zero_quantized_gradients=False, zenflow=None),
    ],
)
def test_what_is_supported_passes_without_a_word(accelerator, caplog):
    """Also where it says what is the default."""
    check_supported(accelerator(), "adamw_torch")
    assert caplog.messages == []


@pytest.mark.parametrize("engine", ["MEGATRON_LM", "XLA", "MULTI_NPU"])
def test_unknown_engine(engine):
    assert_refused(
        fake_accelerator(engine), "supports one process, DDP, FSDP2 and DeepSpeed ZeRO",
        f"engine of this run is {engine}.", "Launch with one of `configs/accelerate/`",
    )  # fmt: skip


def test_fsdp1():
    assert_refused(
        fsdp(fsdp_version=1), "supports FSDP2", "`fsdp_version: 1`", "Set `fsdp_version: 2`",
        "`configs/accelerate/fsdp2.yaml`",
    )  # fmt: skip


def test_fsdp_offload():
    assert_refused(
        fsdp(cpu_offload=True), "gradients on the device", "`fsdp_offload_params` keeps them",
        "Set `fsdp_offload_params: false`", "LoRA",
    )  # fmt: skip


@pytest.mark.parametrize("zero_optimization", [{"stage": 0}, {}])
def test_deepspeed_without_zero(zero_optimization):
    assert_refused(
        deepspeed(zero_optimization=zero_optimization), "ZeRO stage 1, 2 or 3",
        "`zero_optimization.stage` is 0.", "Set it to 1", "`configs/accelerate/ddp.yaml`",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("old", "setting"),
    [("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")],
)
def test_deepspeed_offload_by_its_old_name(old, setting):
    assert_refused(zero(3, **{old: True}), f"{setting}.device` is 'cpu'", f"the old `{old}`")
    check_supported(zero(3, **{old: False}), "adamw_torch")


@pytest.mark.parametrize("device", ["cpu", "nvme"])
@pytest.mark.parametrize(
    ("stage", "setting"), [(1, "offload_optimizer"), (2, "offload_optimizer"), (3, "offload_param")]
)
def test_deepspeed_offload(stage, setting, device):
    assert_refused(
        zero(stage, **{setting: {"device": device}}), "gradients on the device",
        f"`zero_optimization.{setting}.device` is {device!r}", "Set it to 'none'", "LoRA",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("zero_hpz_partition_size", 8),
        ("zero_quantized_gradients", True),
        ("zero_quantized_weights", True),
        ("zero_quantized_nontrainable_weights", True),
        ("zenflow", {"topk_ratio": 0.1}),
    ],
)
def test_zero_options_that_move_or_change_gradients(setting, value):
    assert_refused(
        zero(3, **{setting: value}), "is not tested with",
        f"`zero_optimization.{setting}`, but it is {value!r}",
        "Leave it out of the DeepSpeed configuration",
    )  # fmt: skip


@pytest.mark.parametrize("size", ["tp_size", "cp_size", "sp_size"])
@pytest.mark.parametrize("make", [fsdp, partial(zero, 2)])
def test_parallelism_within_a_sample_or_a_matrix(make, size):
    assert_refused(
        make(parallelism=ParallelismConfig(dp_shard_size=2, **{size: 4})),
        "supports data parallelism only", f"`parallelism_config` sets `{size}: 4`",
        "Leave it at 1", "`configs/accelerate/fsdp2.yaml`",
    )  # fmt: skip


@pytest.mark.parametrize("make", [partial(fake_accelerator, "MULTI_GPU"), partial(zero, 2)])
def test_a_parallelism_config_without_fsdp(make):
    accelerator = make(parallelism=ParallelismConfig(dp_replicate_size=4))
    assert_refused(
        accelerator, "`parallelism_config` under FSDP2 only",
        f"engine of this run is {accelerator.distributed_type.value}.",
        "Unset it, or launch with `configs/accelerate/hsdp.yaml`",
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_precision(precision):
    """Without a GPU the training arguments refuse `fp16: true` before we can."""
    assert_refused(
        fake_accelerator(mixed_precision=precision), "supports `bf16: true` and full precision",
        f"mixed precision is {precision!r}", "Set `fp16: false`",
    )  # fmt: skip


def test_compilation():
    assert_refused(
        fake_accelerator(dynamo_plugin=TorchDynamoPlugin(backend="inductor")),
        "does not support `torch_compile`", "backend INDUCTOR", "Set `torch_compile: false`",
    )  # fmt: skip


@pytest.mark.parametrize(
    "optimizer", [o.value for o in OptimizerNames if "lomo" in o or "layerwise" in o]
)
def test_optimizers_without_an_accumulated_gradient(optimizer):
    assert_refused(
        fake_accelerator(), "projects the accumulated gradient", f"the optimizer {optimizer!r}",
        "never holds it", "Set `optim: adamw_torch`", optimizer=optimizer,
    )  # fmt: skip


class TestATrainerRefuses:
    """Before it trains: these two can be asked for on the CPU."""

    @pytest.fixture(autouse=True)
    def state(self):
        yield
        AcceleratorState._reset_state(reset_partial_state=True)  # compilation would stay on

    def assert_refused(self, message, model_path, folder, **arguments):
        with pytest.raises(ValueError, match=message):
            make_trainer("sft", model_path, folder, capability=capability_groups(), **arguments)

    def test_compilation(self, base_model_path, tmp_path):
        message = "does not support `torch_compile`"
        self.assert_refused(message, base_model_path, tmp_path, torch_compile=True)

    @pytest.mark.parametrize("optimizer", ["lomo", "galore_adamw_layerwise"])
    def test_optimizers_without_an_accumulated_gradient(self, optimizer, base_model_path, tmp_path):
        message = f"optimizer '{optimizer}' updates"
        self.assert_refused(message, base_model_path, tmp_path, optim=optimizer)


class TestBFloat16Gradients:
    """They are no error, as training goes on as DeepSpeed does it: a warning says what is lost."""

    def messages(self, caplog, data_types, **bf16):
        config = {"zero_optimization": {"stage": 2}, "bf16": bf16, **data_types}
        with caplog.at_level(logging.WARNING, logger="ogpsa_trl.engines"):
            check_supported(deepspeed(**config), "adamw_torch")
        return [r.getMessage() for r in caplog.records if r.name == "ogpsa_trl.engines"]

    @pytest.mark.parametrize(
        "data_types", [{}, {"data_types": {}}, {"data_types": {"grad_accum_dtype": "bf16"}}]
    )
    def test_a_warning(self, data_types, caplog):
        (message,) = self.messages(caplog, data_types, enabled=True)
        assert "keeps gradients in bfloat16" in message
        assert "cosines of 5e-4 with the capability directions" in message
        assert 'Set `"data_types": {"grad_accum_dtype": "fp32"}`' in message

    def test_updates_of_zero1_with_whole_gradients_are_refused(self):
        config = {
            "zero_optimization": {"stage": 1}, "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
        }  # fmt: skip
        check_supported(deepspeed(**config), "adamw_torch", "gradient")
        with pytest.raises(ValueError, match=r"`target: update` needs .* Set the stage to 2"):
            check_supported(deepspeed(**config), "adamw_torch", "update")

    @pytest.mark.parametrize(("enabled", "dtype"), [(True, "fp32"), (False, "bf16")])
    def test_none_with_gradients_or_parameters_in_float32(self, enabled, dtype, caplog):
        data_types = {"data_types": {"grad_accum_dtype": dtype}}
        assert self.messages(caplog, data_types, enabled=enabled) == []


class TestMakeBackend:
    def test_models_on_several_devices(self):
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
        with pytest.raises(ValueError) as error:
            make_backend(fake_accelerator(), model, model, optimizer=None)
        for piece in (
            "on one device per process", "spread over cpu, meta.",
            "Load it without `device_map`, and launch one process per GPU",
        ):  # fmt: skip
            assert piece in str(error.value)

    @pytest.fixture
    def mesh(self):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        dist.destroy_process_group()

    @pytest.mark.parametrize("engine", ["NO", "MULTI_GPU"])
    def test_parameters_that_another_library_has_sharded(self, engine, mesh):
        model = torch.nn.Linear(2, 2)
        model.weight = torch.nn.Parameter(distribute_tensor(model.weight.data, mesh, [Shard(0)]))
        with pytest.raises(ValueError) as error:
            make_backend(fake_accelerator(engine), model, model, optimizer=None)
        for piece in (
            "that every process holds whole", "'weight' is sharded (a DTensor)",
            "without `tp_plan` or `distributed_config`", "`configs/accelerate/fsdp2.yaml`",
        ):  # fmt: skip
            assert piece in str(error.value)

    def test_under_fsdp_sharded_parameters_are_served(self, mesh):
        model = torch.nn.Linear(2, 2)
        for name, parameter in list(model.named_parameters()):
            shard = torch.nn.Parameter(distribute_tensor(parameter.data, mesh, [Shard(0)]))
            setattr(model, name, shard)
        backend = make_backend(fsdp(), model, model, optimizer=None)
        assert isinstance(backend, TorchBackend)
        assert [(shard.size, shard.total) for shard in backend.shards] == [(4, 4), (2, 2)]
