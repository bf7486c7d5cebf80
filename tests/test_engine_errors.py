"""What is refused by name: the message says the rule, the value and the way out."""

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
from ogpsa_trl.engines.choose import make_backend
from ogpsa_trl.engines.supported import check_supported
from ogpsa_trl.engines.torch_engines import TorchBackend
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


OPTIONS = {
    "zero_hpz_partition_size": 8, "zero_quantized_gradients": True, "zero_quantized_weights": True,
    "zero_quantized_nontrainable_weights": True, "zenflow": {"topk_ratio": 0.1},
}  # fmt: skip
# What is not supported; the rule, the value and the way out, with dots between them.
REFUSED = {
    "engine": (
        partial(fake_accelerator, "MEGATRON_LM"),
        "supports one process, DDP, FSDP2 and DeepSpeed ZeRO, but the engine of this run is "
        "MEGATRON_LM. Launch with one of `configs/accelerate/`",
    ),
    "FSDP1": (
        partial(fsdp, fsdp_version=1),
        "supports FSDP2, .*`fsdp_version: 1`.* Set `fsdp_version: 2`.*accelerate/fsdp2.yaml",
    ),
    "FSDP2 with offload": (
        partial(fsdp, cpu_offload=True),
        "gradients on the device, but `fsdp_offload_params` .*Set `fsdp_offload_params: false`",
    ),
    "DeepSpeed without ZeRO": (
        partial(deepspeed, zero_optimization={}),
        "ZeRO stage 1, 2 or 3, but .*`zero_optimization.stage` is 0. Set it to 1.*/ddp.yaml",
    ),
    **{
        f"offload {stage} {settings}": (
            partial(zero, stage, **settings),
            f"gradients on the device, but .*`zero_optimization.{name}.device` is '{device}'. Set "
            "it to 'none', and leave out the old `cpu_offload.*; with less memory train with LoRA",
        )
        for stage, name, device, settings in (
            (2, "offload_optimizer", "cpu", {"offload_optimizer": {"device": "cpu"}}),
            (3, "offload_param", "nvme", {"offload_param": {"device": "nvme"}}),
            (3, "offload_optimizer", "cpu", {"cpu_offload": True}),
            (3, "offload_param", "cpu", {"cpu_offload_param": True}),
        )
    },
    **{
        setting: (
            partial(zero, 3, **{setting: value}),
            f"not tested with `zero_optimization.{setting}`, but it is .*Leave it out of the Deep",
        )
        for setting, value in OPTIONS.items()
    },
    **{
        size: (
            partial(make, parallelism=ParallelismConfig(dp_shard_size=2, **{size: 4})),
            f"data parallelism only, but `parallelism_config` sets `{size}: 4`.* Leave it at 1.*"
            "`configs/accelerate/fsdp2.yaml`",
        )
        for size, make in (("tp_size", fsdp), ("cp_size", fsdp), ("sp_size", partial(zero, 2)))
    },
    "replicas without FSDP": (
        partial(fake_accelerator, "MULTI_GPU", parallelism=ParallelismConfig(dp_replicate_size=4)),
        "`parallelism_config` under FSDP2 only, .* engine of this run is MULTI_GPU. Unset it, or "
        "launch with `configs/accelerate/hsdp.yaml`",
    ),
    # Without a GPU the training arguments refuse `fp16: true` before we can.
    "fp16": (
        partial(fake_accelerator, mixed_precision="fp16"),
        "supports `bf16: true` and full precision, but .* is 'fp16'. Set `fp16: false`",
    ),
    "compilation": (
        partial(fake_accelerator, dynamo_plugin=TorchDynamoPlugin(backend="inductor")),
        r"not support `torch_compile`, but .*backend .*INDUCTOR\). Set `torch_compile: false`",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        check_supported(make(), "adamw_torch")


@pytest.mark.parametrize(
    "optimizer", [o.value for o in OptimizerNames if "lomo" in o or "layerwise" in o]
)
def test_optimizers_without_an_accumulated_gradient_are_refused(optimizer):
    message = f"the optimizer {optimizer!r} updates .* never holds it. Set `optim: adamw_torch`"
    with pytest.raises(ValueError, match=message):
        check_supported(fake_accelerator(), optimizer)


def test_a_trainer_refuses_before_it_trains(base_model_path, tmp_path):
    with pytest.raises(ValueError, match="optimizer 'lomo' updates"):
        make_trainer("sft", base_model_path, tmp_path, capability=capability_groups(), optim="lomo")


@pytest.mark.parametrize(
    ("is_bf16", "dtype", "is_warned"),
    [(True, None, True), (True, "bf16", True), (True, "fp32", False), (False, "bf16", False)],
)
def test_gradients_in_bfloat16_are_a_warning(is_bf16, dtype, is_warned, caplog):
    """No error, as training goes on as DeepSpeed does it: it says what is lost."""
    types = {"data_types": {"grad_accum_dtype": dtype}} if dtype else {}
    config = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": is_bf16}, **types}
    check_supported(deepspeed(**config), "adamw_torch")
    messages = [r.getMessage() for r in caplog.records if r.name == "ogpsa_trl.engines.supported"]
    assert len(messages) == is_warned
    for message in messages:
        assert "keeps gradients in bfloat16" in message
        assert "cosines of 5e-4 with the capability directions" in message
        assert 'Set `"data_types": {"grad_accum_dtype": "fp32"}`' in message


def test_updates_of_zero1_with_whole_gradients_are_refused():
    config = {
        "zero_optimization": {"stage": 1}, "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    }  # fmt: skip
    check_supported(deepspeed(**config), "adamw_torch", "gradient")
    with pytest.raises(ValueError, match=r"`target: update` needs .* Set the stage to 2"):
        check_supported(deepspeed(**config), "adamw_torch", "update")


class TestMakeBackend:
    def test_models_on_several_devices(self):
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
        message = (
            "on one device per process, but .* spread over cpu, meta. Load it without "
            "`device_map`, and launch one process per GPU"
        )
        with pytest.raises(ValueError, match=message):
            make_backend(fake_accelerator(), model, model, optimizer=None)

    @pytest.fixture
    def mesh(self):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        dist.destroy_process_group()

    def test_parameters_that_another_library_has_sharded(self, mesh):
        model = torch.nn.Linear(2, 2)
        model.weight = torch.nn.Parameter(distribute_tensor(model.weight.data, mesh, [Shard(0)]))
        message = (
            r"that every process holds whole, but 'weight' is sharded \(a DTensor\).* without "
            "`tp_plan` or `distributed_config`, .*`configs/accelerate/fsdp2.yaml`"
        )
        with pytest.raises(ValueError, match=message):
            make_backend(fake_accelerator("MULTI_GPU"), model, model, optimizer=None)

    def test_under_fsdp_sharded_parameters_are_served(self, mesh):
        model = torch.nn.Linear(2, 2)
        for name, parameter in list(model.named_parameters()):
            shard = torch.nn.Parameter(distribute_tensor(parameter.data, mesh, [Shard(0)]))
            setattr(model, name, shard)
        backend = make_backend(fsdp(), model, model, optimizer=None)
        assert isinstance(backend, TorchBackend)
        assert [(shard.size, shard.total) for shard in backend.shards] == [(4, 4), (2, 2)]


@pytest.mark.parametrize("kind", ["capability", "gate"])
def test_what_processes_do_not_share_is_named(kind, base_model_path, tmp_path, monkeypatch):
    """Two processes played by one: the second has fewer samples than the first."""

    def gather(values):
        (mine,) = values
        return [mine, {n: "3 samples" if f"{kind} group '" in n else v for n, v in mine.items()}]

    monkeypatch.setattr("ogpsa_trl.engines.supported.gather_object", gather)
    groups = capability_groups()
    message = rf"same {kind} group 'skills', but process 0 has 6 samples .* process 1 has 3 "
    trainer = partial(make_trainer, "sft", base_model_path, tmp_path)
    with pytest.raises(ValueError, match=message):
        trainer(capability=groups) if kind == "capability" else CapabilityGate(trainer(), groups)
