"""What is refused by name: the message says the rule, the value and the way out."""

import logging
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    TorchDynamoPlugin,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers.training_args import OptimizerNames

from ogpsa_trl import CapabilityGate
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


@pytest.mark.parametrize(
    "accelerator",
    [
        *(partial(fake_accelerator, engine) for engine in ("NO", "MULTI_CPU", "MULTI_GPU")),
        partial(fake_accelerator, mixed_precision="bf16"),
        partial(fsdp, reshard_after_forward=True),
        partial(fsdp, ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)),
        *(partial(zero, stage) for stage in (1, 2, 3)),
        partial(zero, 2, offload_optimizer={"device": "none"}, cpu_offload=False),
        partial(zero, 3, zero_hpz_partition_size=1, zero_quantized_gradients=False, zenflow=None),
    ],
)
def test_what_is_supported_passes_without_a_word(accelerator, caplog):
    """Also where it says what is the default."""
    check_supported(accelerator(), "adamw_torch")
    assert caplog.messages == []


def offload(setting, stage, **settings):
    """A way to offload, as the table below has it."""
    pieces = (
        "gradients on the device",
        f"`zero_optimization.{setting}.device` is ",
        "Set it to 'none'",
        "the old `cpu_offload",
        "LoRA",
    )
    return partial(zero, stage, **settings), pieces


# What makes the accelerator, and pieces of the message: the rule, the value, the way out.
REFUSED = {
    **{
        f"engine {engine}": (
            partial(fake_accelerator, engine),
            (
                "supports one process, DDP, FSDP2 and DeepSpeed ZeRO",
                f"engine of this run is {engine}.", "Launch with one of `configs/accelerate/`",
            ),
        )
        for engine in ("MEGATRON_LM", "XLA", "MULTI_NPU")
    },
    "FSDP1": (
        partial(fsdp, fsdp_version=1),
        (
            "supports FSDP2", "`fsdp_version: 1`", "Set `fsdp_version: 2`",
            "`configs/accelerate/fsdp2.yaml`",
        ),
    ),
    "FSDP2 with offload": (
        partial(fsdp, cpu_offload=True),
        (
            "gradients on the device", "`fsdp_offload_params` keeps them",
            "Set `fsdp_offload_params: false`", "LoRA",
        ),
    ),
    "DeepSpeed without ZeRO": (
        partial(deepspeed, zero_optimization={}),
        (
            "ZeRO stage 1, 2 or 3", "`zero_optimization.stage` is 0.", "Set it to 1",
            "`configs/accelerate/ddp.yaml`",
        ),
    ),
    "optimizer on the CPU": offload(
        "offload_optimizer", 2, offload_optimizer={"device": "cpu"}
    ),
    "parameters on a disk": offload("offload_param", 3, offload_param={"device": "nvme"}),
    "optimizer, old name": offload("offload_optimizer", 3, cpu_offload=True),
    "parameters, old name": offload("offload_param", 3, cpu_offload_param=True),
    **{
        setting: (
            partial(zero, 3, **{setting: value}),
            (
                "is not tested with", f"`zero_optimization.{setting}`, but it is {value!r}",
                "Leave it out of the DeepSpeed configuration",
            ),
        )
        for setting, value in {
            "zero_hpz_partition_size": 8, "zero_quantized_gradients": True,
            "zero_quantized_weights": True, "zero_quantized_nontrainable_weights": True,
            "zenflow": {"topk_ratio": 0.1},
        }.items()
    },
    **{
        size: (
            partial(make, parallelism=ParallelismConfig(dp_shard_size=2, **{size: 4})),
            (
                "supports data parallelism only", f"`parallelism_config` sets `{size}: 4`",
                "Leave it at 1", "`configs/accelerate/fsdp2.yaml`",
            ),
        )
        for size, make in (("tp_size", fsdp), ("cp_size", fsdp), ("sp_size", partial(zero, 2)))
    },
    "replicas without FSDP": (
        partial(
            fake_accelerator, "MULTI_GPU", parallelism=ParallelismConfig(dp_replicate_size=4)
        ),
        (
            "`parallelism_config` under FSDP2 only", "engine of this run is MULTI_GPU.",
            "Unset it, or launch with `configs/accelerate/hsdp.yaml`",
        ),
    ),
    # Without a GPU the training arguments refuse `fp16: true` before we can.
    "fp16": (
        partial(fake_accelerator, mixed_precision="fp16"),
        (
            "supports `bf16: true` and full precision", "mixed precision is 'fp16'",
            "Set `fp16: false`",
        ),
    ),
    "compilation": (
        partial(fake_accelerator, dynamo_plugin=TorchDynamoPlugin(backend="inductor")),
        ("does not support `torch_compile`", "backend INDUCTOR", "Set `torch_compile: false`"),
    ),
}  # fmt: skip


def assert_refused(pieces, *args):
    with pytest.raises(ValueError) as error:
        check_supported(*args)
    for piece in pieces:
        assert piece in str(error.value)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused(name):
    make, pieces = REFUSED[name]
    assert_refused(pieces, make(), "adamw_torch")


@pytest.mark.parametrize(
    "optimizer", [o.value for o in OptimizerNames if "lomo" in o or "layerwise" in o]
)
def test_optimizers_without_an_accumulated_gradient_are_refused(optimizer):
    pieces = (
        "projects the accumulated gradient", f"the optimizer {optimizer!r}", "never holds it",
        "Set `optim: adamw_torch`",
    )  # fmt: skip
    assert_refused(pieces, fake_accelerator(), optimizer)


def test_a_trainer_refuses_before_it_trains(base_model_path, tmp_path):
    with pytest.raises(ValueError, match="optimizer 'lomo' updates"):
        make_trainer("sft", base_model_path, tmp_path, capability=capability_groups(), optim="lomo")


class TestBFloat16Gradients:
    """They are no error, as training goes on as DeepSpeed does it: a warning says what is lost."""

    def messages(self, caplog, data_types, **bf16):
        config = {"zero_optimization": {"stage": 2}, "bf16": bf16, **data_types}
        with caplog.at_level(logging.WARNING, logger="ogpsa_trl.engines"):
            check_supported(deepspeed(**config), "adamw_torch")
        return [r.getMessage() for r in caplog.records if r.name == "ogpsa_trl.engines"]

    @pytest.mark.parametrize("data_types", [{}, {"data_types": {"grad_accum_dtype": "bf16"}}])
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


class TestTheFirstThatIsNotTheSame:
    """Two processes played by one: the second has fewer samples than the first."""

    @pytest.fixture
    def another(self, monkeypatch):
        def gather(values):
            (mine,) = values
            others = {name: "3 samples" if "group '" in name else v for name, v in mine.items()}
            return [mine, others]

        return lambda: monkeypatch.setattr("ogpsa_trl.engines.gather_object", gather)

    def test_is_named_by_the_trainer(self, another, base_model_path, tmp_path):
        another()
        message = r"same capability group 'skills', but process 0 has 6 samples .* process 1 has 3 "
        with pytest.raises(ValueError, match=message):
            make_trainer("sft", base_model_path, tmp_path, capability=capability_groups())

    def test_is_named_by_the_gate(self, another, base_model_path, tmp_path):
        trainer = make_trainer("sft", base_model_path, tmp_path)
        another()
        with pytest.raises(ValueError, match=r"same gate group 'skills', but process 0 has 7 "):
            CapabilityGate(trainer, capability_groups(7))
