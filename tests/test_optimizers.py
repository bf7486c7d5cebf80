"""Every optimizer that `metric: optimizer` knows shows the second moment of plain AdamW."""

import functools

import pytest
import torch
from torch.distributed.tensor import DeviceMesh, DTensor, Shard, distribute_tensor
from transformers import Adafactor, Trainer, TrainingArguments

from ogpsa_trl.engines import adam_moments
from runs import ADAMW, assert_resume_is_bitwise, paper, step_cosines

NUM_STEPS, BETA = 6, 0.99
ROWS, COLUMNS = 24, 512  # of a tensor with 48 blocks of 256 entries, which quantised forms need

# The largest relative rounding of one step: of float32; of quantised forms, relative to the largest
# entry of a block, half the distance between two values. 8 bits have 128 of them above a tenth,
# 4 bits have 16 in all, 8-bit floats 8 above a half.
FLOAT32, BITS8, BITS4, FP8 = 1e-6, 0.9 / 127 / 2, 1 / 16 / 2, 0.5 / 7 / 2
# Forms of Adam: package and class, options, rounding.
FORMS = {
    "AdamW": ("torch.optim", "AdamW", {"foreach": False}, FLOAT32),
    "AdamW-foreach": ("torch.optim", "AdamW", {"foreach": True}, FLOAT32),
    "Adam": ("torch.optim", "Adam", {}, FLOAT32),
    "NAdam": ("torch.optim", "NAdam", {}, FLOAT32),
    "RAdam": ("torch.optim", "RAdam", {}, FLOAT32),
    "torchao-fp8": ("torchao.optim", "AdamWFp8", {}, FP8),
    "torchao-Adam": ("torchao.optim", "Adam8bit", {}, BITS8),
    "bitsandbytes-8bit": ("bitsandbytes.optim", "AdamW8bit", {}, BITS8),
    "bitsandbytes-32bit": ("bitsandbytes.optim", "AdamW32bit", {}, FLOAT32),
}
# Values of `optim`: the package that they need, rounding. What transformers makes of those of
# bitsandbytes is named as torch's.
SETTINGS = {
    "adamw_torch": ("torch", FLOAT32), "adamw_torch_fused": ("torch", FLOAT32),
    "adamw_torch_8bit": ("torchao", BITS8), "adamw_torch_4bit": ("torchao", BITS4),
    "adamw_bnb_8bit": ("bitsandbytes", BITS8), "paged_adamw_8bit": ("bitsandbytes", BITS8),
    "paged_adamw_32bit": ("bitsandbytes", FLOAT32),
}  # fmt: skip
ROUNDINGS = {name: form[-1] for name, form in (FORMS | SETTINGS).items()}
every_form = pytest.mark.parametrize("form", ROUNDINGS)
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


def make_optimizer(form, parameters, **more):
    if form in FORMS:
        module, name, options, _ = FORMS[form]
        return class_of(module, name)(parameters, betas=(0.9, BETA), **options, **more)
    pytest.importorskip(SETTINGS[form][0], exc_type=ImportError)
    args = TrainingArguments("unused", optim=form, adam_beta2=BETA, learning_rate=1e-3)
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args)
    return optimizer_class(parameters, **options, **more)


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
    return adam_moments.second_moment(
        type(optimizer), optimizer.state.get(parameter, {}), start=start,
        size=parameter.numel() if size is None else size,
    )  # fmt: skip


def tensor_and_optimizer(form, **more):
    parameter = torch.nn.Parameter(torch.ones(ROWS, COLUMNS))
    return parameter, make_optimizer(form, [parameter], **more)


@every_form
def test_it_is_the_mean_of_squared_gradients(form, tmp_path):
    """All of it, a range (one tensor of ZeRO holds many parameters), and after a checkpoint."""
    parameter, optimizer = tensor_and_optimizer(form)
    adam_moments.check_known(type(optimizer))
    assert read(optimizer, parameter) is None
    expected = stepped(optimizer, parameter)
    moment = read(optimizer, parameter)
    assert moment.dtype == torch.float32
    error = (moment - expected).view(-1, 256).abs().amax(dim=1)
    # Every step rounds anew, and hands on what the ones before have rounded.
    assert (error / expected.view(-1, 256).amax(dim=1)).max() < NUM_STEPS * ROUNDINGS[form]

    for start, size in [(0, 1), (255, 2), (256, 256), (300, 1000), (len(moment) - 3, 3), (700, 0)]:
        assert torch.equal(read(optimizer, parameter, start, size), moment[start : start + size])

    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other, resumed = tensor_and_optimizer(form)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert torch.equal(read(resumed, other), moment)


@pytest.mark.parametrize("form", ["AdamW", "adamw_torch_fused"])
def test_amsgrad_divides_by_the_largest_so_far(form):
    parameter, optimizer = tensor_and_optimizer(form, amsgrad=True)
    for size in (2.0, 0.0):
        parameter.grad = torch.full((ROWS, COLUMNS), size)
        optimizer.step()
    assert torch.allclose(read(optimizer, parameter), torch.tensor((1 - BETA) * 4), rtol=FLOAT32)


@pytest.mark.parametrize("form", ["AdamW", "adamw_torch_8bit"])
def test_of_a_sharded_tensor_it_is_this_processs_part(form, tmp_path):
    """One process that holds the whole, so that the part is large enough to be quantised."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        scatter = functools.partial(distribute_tensor, device_mesh=mesh, placements=[Shard(0)])
        sharded = torch.nn.Parameter(scatter(torch.ones(ROWS, COLUMNS)))
        plain, reference = tensor_and_optimizer(form)
        optimizer = make_optimizer(form, [sharded])
        for gradient in gradients():
            sharded.grad, plain.grad = scatter(gradient), gradient
            optimizer.step()
            reference.step()
        state = {
            key: value.to_local() if isinstance(value, DTensor) else value
            for key, value in optimizer.state[sharded].items()
        }
        part = adam_moments.second_moment(type(optimizer), state, start=0, size=plain.numel())
        assert torch.equal(part, read(reference, plain))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("module", ["torch.optim", "bitsandbytes.optim"])
def test_plain_gradient_descent_has_none(module):
    parameter = torch.nn.Parameter(torch.ones(ROWS, COLUMNS))
    optimizer = class_of(module, "SGD")([parameter], lr=0.1, momentum=0.9)
    adam_moments.check_known(type(optimizer))
    stepped(optimizer, parameter)
    assert read(optimizer, parameter) is None


class MyAdamW(torch.optim.AdamW):
    """A subclass may step in another way."""


def foreign(module, name):
    return type(name, (torch.optim.AdamW,), {"__module__": module})


@pytest.mark.parametrize(
    ("name", "optimizer_class"),
    {
        "torch.RMSprop": torch.optim.RMSprop,
        "transformers.Adafactor": Adafactor,
        "test_optimizers.MyAdamW": MyAdamW,
        "galore_torch.GaLoreAdamW": foreign("galore_torch.adamw", "GaLoreAdamW"),
        "bitsandbytes.LAMB": foreign("bitsandbytes.optim.lamb", "LAMB"),
        # A name that another package uses for what is known.
        "my_package.AdamW": foreign("my_package.optim", "AdamW"),
    }.items(),
)  # fmt: skip
def test_optimizers_that_are_not_known_are_refused(name, optimizer_class):
    message = rf"the optimizer is {name}. Set `optim` to one of adamw_torch, .*`metric: euclidean`"
    with pytest.raises(ValueError, match=message):
        adam_moments.check_known(optimizer_class)


def test_the_optimizers_that_an_error_names_are_all_tested():
    assert set(adam_moments._SETTINGS) == set(SETTINGS)


def test_the_step_is_orthogonal_to_every_capability_gradient(train, base_model_path):
    """With states of 8 bits."""
    pytest.importorskip("bitsandbytes", exc_type=ImportError)
    config = paper(target="update", metric="optimizer", scope="model", refresh_interval=1)
    options = {"optim": "paged_adamw_8bit", "learning_rate": 1e-2, "weight_decay": 0.1}
    states = train(config=config, max_steps=3, **options).states
    # Weights of size 1 round steps of 1e-2 to 1e-5.
    assert max(step_cosines(states, base_model_path, "model")) < 1e-4


@pytest.mark.slow
def test_resume_is_bitwise(make, tmp_path):
    """Tensors of torchao are written and read by transformers."""
    pytest.importorskip("torchao", exc_type=ImportError)
    config = paper(target="update", metric="optimizer", refresh_interval=2)
    again = functools.partial(make, config=config, **ADAMW | {"optim": "adamw_torch_8bit"})
    assert_resume_is_bitwise(again, tmp_path, steps=(1,))
