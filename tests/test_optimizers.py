"""Every optimizer that `metric: optimizer` knows shows the second moment of plain AdamW."""

import functools
import importlib

import pytest
import torch
from torch.distributed.tensor import DeviceMesh, DTensor, Shard, distribute_tensor
from transformers import Adafactor

from ogpsa_trl import optimizers
from runs import capability_groups, make_trainer, max_difference, paper, trained, weights
from test_update import ADAMW, run

NUM_STEPS, BETA = 6, 0.99
ROWS, COLUMNS = 24, 512  # of a tensor with 48 blocks of 256 entries, which quantised forms need

# Forms of Adam: package and class, options, and the largest relative rounding of one step.
FLOAT32 = 1e-6
FORMS = {
    "AdamW": ("torch.optim", "AdamW", {"foreach": False}, FLOAT32),
    "AdamW-foreach": ("torch.optim", "AdamW", {"foreach": True}, FLOAT32),
    "AdamW-fused": ("torch.optim", "AdamW", {"fused": True}, FLOAT32),
    "Adam": ("torch.optim", "Adam", {}, FLOAT32),
    "NAdam": ("torch.optim", "NAdam", {}, FLOAT32),
    "RAdam": ("torch.optim", "RAdam", {}, FLOAT32),
    # Of the largest entry of a block: half the distance between two values. 8 bits have 128 of
    # them above a tenth, 4 bits have 16 in all, 8-bit floats 8 above a half.
    "torchao-8bit": ("torchao.optim", "AdamW8bit", {}, 0.9 / 127 / 2),
    "torchao-4bit": ("torchao.optim", "AdamW4bit", {}, 1 / 16 / 2),
    "torchao-fp8": ("torchao.optim", "AdamWFp8", {}, 0.5 / 7 / 2),
    "torchao-Adam": ("torchao.optim", "Adam8bit", {}, 0.9 / 127 / 2),
    "bitsandbytes-8bit": ("bitsandbytes.optim", "AdamW8bit", {}, 0.9 / 127 / 2),
    "bitsandbytes-32bit": ("bitsandbytes.optim", "AdamW32bit", {}, FLOAT32),
    # What transformers makes of `adamw_bnb_8bit` and `paged_adamw_8bit`: named as torch's.
    "bitsandbytes": ("bitsandbytes.optim", "AdamW", {"optim_bits": 8}, 0.9 / 127 / 2),
    "bitsandbytes-paged": (
        "bitsandbytes.optim", "AdamW", {"optim_bits": 8, "is_paged": True}, 0.9 / 127 / 2,
    ),
}  # fmt: skip
every_form = pytest.mark.parametrize("form", FORMS)
pytestmark = pytest.mark.filterwarnings(
    "ignore:Paged optimizers are not supported on CPU",
    "ignore:.*_stable_hash_for_caching",
)


@pytest.fixture(autouse=True)
def uncompiled():
    """torchao compiles its step, which takes a minute here, and no part in what is tested."""
    with torch.compiler.set_stance("force_eager"):
        yield


def class_of(module, name):
    return getattr(pytest.importorskip(module, exc_type=ImportError), name)


def make(form, parameters, **more):
    module, name, options, _ = FORMS[form]
    return class_of(module, name)(parameters, betas=(0.9, BETA), **options, **more)


def gradients(seed=0):
    """Rows of very different sizes, so that one block of 256 is unlike the others."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-3, 1, ROWS)[:, None]
    for _ in range(NUM_STEPS):
        yield scales * torch.randn(ROWS, COLUMNS, generator=generator)


def stepped(optimizer, parameter):
    """Take the steps; the literal mean of squared gradients, which starts at zero."""
    mean = torch.zeros(ROWS, COLUMNS)
    for gradient in gradients():
        mean = BETA * mean + (1 - BETA) * gradient.square()
        parameter.grad = gradient.clone()
        optimizer.step()
    return mean.flatten()


def read(optimizer, parameter, start=0, size=None):
    return optimizers.second_moment(
        type(optimizer), optimizer.state.get(parameter, {}), start=start,
        size=parameter.numel() if size is None else size,
    )  # fmt: skip


def tensor_and_optimizer(form, **more):
    parameter = torch.nn.Parameter(torch.ones(ROWS, COLUMNS))
    return parameter, make(form, [parameter], **more)


@every_form
def test_it_is_the_mean_of_squared_gradients(form):
    parameter, optimizer = tensor_and_optimizer(form)
    optimizers.check_known(type(optimizer))
    assert read(optimizer, parameter) is None
    expected = stepped(optimizer, parameter)
    moment = read(optimizer, parameter)
    assert moment.dtype == torch.float32
    error = (moment - expected).view(-1, 256).abs().amax(dim=1)
    # Every step rounds anew, and hands on what the ones before have rounded.
    assert (error / expected.view(-1, 256).amax(dim=1)).max() < NUM_STEPS * FORMS[form][-1]


@every_form
def test_a_range_is_a_part_of_the_whole(form):
    """As under ZeRO, where one tensor holds many parameters: a range may begin in any block."""
    parameter, optimizer = tensor_and_optimizer(form)
    stepped(optimizer, parameter)
    whole = read(optimizer, parameter)
    for start, size in [(0, 1), (255, 2), (256, 256), (300, 1000), (len(whole) - 3, 3), (700, 0)]:
        part = read(optimizer, parameter, start, size)
        assert torch.equal(part, whole[start : start + size])


@pytest.mark.parametrize("form", ["torchao-8bit", "bitsandbytes-8bit"])
def test_it_is_what_the_package_itself_unpacks(form):
    parameter, optimizer = tensor_and_optimizer(form)
    stepped(optimizer, parameter)
    state = optimizer.state[parameter]
    if form.startswith("torchao"):
        expected = state["exp_avg_sq"].dequantize()
    else:
        functional = importlib.import_module("bitsandbytes.functional")
        assert state["state2"].dtype == torch.uint8
        expected = functional.dequantize_blockwise(
            state["state2"], absmax=state["absmax2"], code=state["qmap2"], blocksize=256
        )
    assert torch.equal(read(optimizer, parameter), expected.flatten())


@pytest.mark.parametrize("form", ["torchao-8bit", "torchao-4bit", "bitsandbytes-8bit"])
def test_small_tensors_are_not_quantised(form):
    """Both packages leave tensors below 4096 entries as they are, with no error to allow for."""
    parameter = torch.nn.Parameter(torch.ones(8, 4))
    optimizer = make(form, [parameter])
    parameter.grad = torch.linspace(-1, 1, 32).view(8, 4)
    expected = (1 - BETA) * parameter.grad.square().flatten()
    optimizer.step()
    assert torch.allclose(read(optimizer, parameter), expected, rtol=FLOAT32)


@every_form
def test_it_survives_a_checkpoint(form, tmp_path):
    parameter, optimizer = tensor_and_optimizer(form)
    stepped(optimizer, parameter)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other, resumed = tensor_and_optimizer(form)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert torch.equal(read(resumed, other), read(optimizer, parameter))


@pytest.mark.parametrize("form", ["AdamW", "AdamW-foreach", "AdamW-fused", "Adam"])
def test_amsgrad_divides_by_the_largest_so_far(form):
    parameter, optimizer = tensor_and_optimizer(form, amsgrad=True)
    for size in (2.0, 0.0):
        parameter.grad = torch.full((ROWS, COLUMNS), size)
        optimizer.step()
    assert torch.allclose(read(optimizer, parameter), torch.tensor((1 - BETA) * 4), rtol=FLOAT32)


@pytest.mark.parametrize("form", ["AdamW", "torchao-8bit", "torchao-4bit"])
def test_of_a_sharded_tensor_it_is_this_processs_part(form, tmp_path):
    """One process that holds the whole, so that the part is large enough to be quantised."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        scatter = functools.partial(distribute_tensor, device_mesh=mesh, placements=[Shard(0)])
        sharded = torch.nn.Parameter(scatter(torch.ones(ROWS, COLUMNS)))
        plain, reference = tensor_and_optimizer(form)
        optimizer = make(form, [sharded])
        for gradient in gradients():
            sharded.grad, plain.grad = scatter(gradient), gradient
            optimizer.step()
            reference.step()
        state = {
            key: value.to_local() if isinstance(value, DTensor) else value
            for key, value in optimizer.state[sharded].items()
        }
        part = optimizers.second_moment(type(optimizer), state, start=0, size=plain.numel())
        assert torch.equal(part, read(reference, plain))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("module", ["torch.optim", "bitsandbytes.optim"])
def test_plain_gradient_descent_has_none(module):
    parameter = torch.nn.Parameter(torch.ones(ROWS, COLUMNS))
    optimizer = class_of(module, "SGD")([parameter], lr=0.1, momentum=0.9)
    optimizers.check_known(type(optimizer))
    stepped(optimizer, parameter)
    assert read(optimizer, parameter) is None


class MyAdamW(torch.optim.AdamW):
    """A subclass may step in another way."""


def foreign(module, name):
    return type(name, (torch.optim.AdamW,), {"__module__": module})


UNKNOWN = {
    "torch.Adagrad": torch.optim.Adagrad,
    "torch.RMSprop": torch.optim.RMSprop,
    "torch.Muon": torch.optim.Muon,
    "transformers.Adafactor": Adafactor,
    "test_optimizers.MyAdamW": MyAdamW,
    "galore_torch.GaLoreAdamW": foreign("galore_torch.adamw", "GaLoreAdamW"),
    "schedulefree.AdamWScheduleFree": foreign("schedulefree.x", "AdamWScheduleFree"),
    # A name that another package uses for what is known.
    "my_package.AdamW": foreign("my_package.optim", "AdamW"),
}


class TestErrors:
    @pytest.mark.parametrize("name", UNKNOWN)
    def test_optimizers_that_are_not_known(self, name):
        with pytest.raises(ValueError, match=rf"the optimizer is {name}. Set `optim` to one of ad"):
            optimizers.check_known(UNKNOWN[name])

    @pytest.mark.parametrize("name", ["Lion", "AdEMAMix8bit", "LAMB", "RMSprop8bit", "Adagrad"])
    def test_others_of_bitsandbytes(self, name):
        known = class_of("bitsandbytes.optim", name)
        with pytest.raises(ValueError, match=rf"is bitsandbytes.{name}. .* `metric: euclidean`"):
            optimizers.check_known(known)


# Values of `optim`, and the package that they need.
QUANTISED = {
    "adamw_torch_8bit": "torchao", "adamw_torch_4bit": "torchao",
    "adamw_bnb_8bit": "bitsandbytes", "paged_adamw_8bit": "bitsandbytes",
}  # fmt: skip
SETTINGS = {
    "adamw_torch": "torch", "adamw_torch_fused": "torch", **QUANTISED,
    "paged_adamw_32bit": "bitsandbytes",
}  # fmt: skip


@pytest.mark.parametrize("optim", SETTINGS)
def test_the_step_is_orthogonal_to_every_capability_gradient(optim, base_model_path, tmp_path):
    pytest.importorskip(SETTINGS[optim], exc_type=ImportError)
    config = {"target": "update", "metric": "optimizer", "scope": "model"}
    _, probe = run(base_model_path, tmp_path, **config, **ADAMW | {"optim": optim})
    assert len(probe.steps) == 4
    assert max(probe.cosines("model")) < 1e-4  # weights of size 1 round steps of 1e-2 to 1e-5


# Four bits have no value below a 16th of the largest of a block: a coarse metric.
@pytest.mark.parametrize("optim", [optim for optim in SETTINGS if "4bit" not in optim])
def test_the_metric_is_that_of_plain_adamw(optim, base_model_path, tmp_path):
    """
    The first step, which all forms take alike: they round after it. What differs is the metric,
    rounded as above; it would be another thing altogether without the second moment.
    """
    pytest.importorskip(SETTINGS[optim], exc_type=ImportError)

    def after(optim, metric):
        return trained(
            "sft", base_model_path, tmp_path, capability=capability_groups(), max_steps=1,
            config=paper(target="update", metric=metric, scope="model"),
            optim=optim, learning_rate=1e-2,
        )[2]  # fmt: skip

    expected = after("adamw_torch", "optimizer")
    difference = max_difference(after("adamw_torch", "euclidean"), expected)
    assert max_difference(after(optim, "optimizer"), expected) < 0.1 * difference


@pytest.mark.parametrize("optim", QUANTISED)
def test_resume_is_bitwise(optim, base_model_path, tmp_path):
    pytest.importorskip(SETTINGS[optim], exc_type=ImportError)

    def make_run():
        return make_trainer(
            "sft", base_model_path, tmp_path, capability=capability_groups(),
            config=paper(target="update", metric="optimizer", refresh_interval=2),
            save_strategy="steps", save_steps=1,
            **ADAMW | {"optim": optim, "max_steps": 3},
        )  # fmt: skip

    straight = make_run()
    straight.train()
    resumed = make_run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert max_difference(weights(resumed), weights(straight)) == 0
