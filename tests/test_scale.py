"""Tables of docs/performance.md are what formulas give, and the formulas what is measured."""

import contextlib
import gc
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from laws import products_of
from ogpsa_trl.benchmark.toy_model import tiny_model
from ogpsa_trl.data.groups import Part, Sample
from ogpsa_trl.engines import backend as engines_backend
from ogpsa_trl.engines.torch_engines import TorchBackend
from ogpsa_trl.method.capability_gradients import capability_gradients
from ogpsa_trl.method.projection import project
from ogpsa_trl.method.saved_state import FILE_NAME
from ogpsa_trl.method.subspace import CapabilitySubspace
from ogpsa_trl.tensors import blocks, gradient_rows, vectors
from runs import capability_groups, make_trainer, paper

DOCUMENT = (Path(__file__).parents[1] / "docs/performance.md").read_text(encoding="utf-8")
PROSE = " ".join(DOCUMENT.split())
BYTES = {"float32": 4, "bfloat16": 2}

# --- The formulas of the document. N: trained entries of this process, P: trained tensors,
# --- R: capability gradients, rank: rows of the basis.


def basis_bytes(num_entries, rank, dtype):
    return rank * num_entries * BYTES[dtype]


def refresh_bytes(num_entries, num_gradients, rank, dtype, largest=0):
    """The rows of the capability gradients, in the memory of the basis where they fit in it."""
    is_in_place = rank == num_gradients
    rows = basis_bytes(num_entries, num_gradients, dtype)
    return rows + (0 if is_in_place else basis_bytes(largest, rank, dtype))


def step_traffic(num_tensors, rank):
    return 4 * num_tensors * (rank + 1)


def gram_traffic(num_tensors, num_gradients, rank):
    """Two Gram matrices, and the length of each gradient, which has to be finite."""
    entries = num_gradients * (num_gradients + 1) // 2 + rank * (rank + 1) // 2
    return 4 * num_tensors * (entries + num_gradients)


def broadcast_traffic(num_blocks, num_gradients, rank):
    return 8 * num_blocks * rank * (num_gradients + rank)


def largest_shard(shapes, num_shards):
    """Entries of the first process under FSDP2, which divides the rows of every tensor."""
    return sum(math.ceil(shape[0] / num_shards) * math.prod(shape[1:]) for shape in shapes)


def checkpoint_bytes(num_entries, num_tensors, num_gradients, rank, dtype):
    """One file, scope `parameter`, without its header."""
    small = 4 * num_tensors * rank * (2 * rank + num_gradients + 1) + 2 * num_tensors
    small += 21 * num_gradients + 33
    return basis_bytes(num_entries, rank, dtype) + small


# --- The tables.

LLAMAS = {  # layers, hidden, key and value, feed-forward, vocabulary
    "Llama-2-7B": (32, 4096, 4096, 11008, 32000),
    "Llama-3-70B": (80, 8192, 1024, 28672, 128256),
    "Llama-3.1-405B": (126, 16384, 1024, 53248, 128256),
}


def llama_shapes(name, *, lora):
    """The shapes of all trained tensors, of the model that transformers and peft make."""
    num_layers, hidden, key_value, feed_forward, vocabulary = LLAMAS[name]
    config = LlamaConfig(
        num_hidden_layers=1, hidden_size=hidden, intermediate_size=feed_forward,
        vocab_size=vocabulary, head_dim=128, num_attention_heads=hidden // 128,
        num_key_value_heads=key_value // 128,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        if lora:
            model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    shapes = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
    return [s for n, s in shapes.items() for _ in range(num_layers if ".layers." in n else 1)]


@pytest.fixture(scope="module")
def trained_shapes():
    shapes = {name: llama_shapes(name, lora=False) for name in LLAMAS}
    return shapes | {"Llama-3-70B, LoRA": llama_shapes("Llama-3-70B", lora=True)}


def three_digits(value):
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"


def gigabytes(num_bytes):
    return three_digits(num_bytes / 1e9)


def kilobytes(num_bytes):
    return three_digits(num_bytes / 1e3)


def table(title):
    """The cells of the table under a heading of the document."""
    text = DOCUMENT.split(f"\n### {title}\n")[1].split("\n#")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def count(shapes):
    return sum(math.prod(shape) for shape in shapes)


def test_the_memory_table_is_the_formula(trained_shapes):
    expected = []
    for name, shapes in trained_shapes.items():
        sizes = [count(shapes), *(largest_shard(shapes, shards) for shards in (8, 64, 512))]
        for rank in (2, 8):
            cells = [gigabytes(basis_bytes(size, rank, "bfloat16")) for size in sizes]
            expected.append([name, str(rank), *cells])
    assert table("Memory of a process in GB") == expected
    lora = trained_shapes["Llama-3-70B, LoRA"]
    times = largest_shard(lora, 512) / (count(lora) / 512)
    assert f"the largest shard is {times:.0f} times the mean" in PROSE


def test_the_traffic_and_checkpoint_table_is_the_formula(trained_shapes):
    expected = []
    for name, shapes in trained_shapes.items():
        num_entries, num_tensors = count(shapes), len(shapes)
        for rank in (2, 8):
            sent = broadcast_traffic(num_tensors, rank, rank)
            expected.append([
                name, f"{num_entries:,}", f"{num_tensors:,}", str(rank),
                kilobytes(step_traffic(num_tensors, rank)),
                kilobytes(gram_traffic(num_tensors, rank, rank) + sent),
                gigabytes(4 * num_entries),
                gigabytes(basis_bytes(num_entries, rank, "bfloat16")),
            ])  # fmt: skip
    assert table("Traffic and checkpoints") == expected


# --- Memory and files, measured on one process.


class LiveBytes(TorchDispatchMode):
    """Counts the storages that were made while it is on and are alive, and the most of them."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak, self.is_watching = {}, 0, False

    def now(self):
        self.storages = {ref: size for ref, size in self.storages.items() if not ref.expired()}
        return sum(self.storages.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = storages_of(result) - storages_of((args, kwargs))  # a view makes none
        if made:
            self.storages |= dict(made)
            if self.is_watching:
                self.peak = max(self.peak, self.now())
        return result


def storages_of(tree):
    """The storages of all tensors in a nested structure, with their bytes."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {(StorageWeakRef(storage), storage.nbytes()) for storage in storages}


def measure_refreshes(trainer):
    """
    Train; of every refresh the bytes that are alive during it and were not before it, the old
    basis counted as if it were new: when the rows are complete, and at most before and after that.
    """
    refresh_subspace, measured = trainer.refresh_subspace, []

    def refresh_and_measure():
        subspace = trainer.subspace
        release, refresh = subspace.release_gradients, subspace.refresh
        gc.collect()
        before = live.now() - subspace.basis_bytes
        held, peaks = [], []

        def watched(call, *args):
            gc.collect()
            live.peak = live.now()
            held.append(live.peak - before)
            live.is_watching = True
            result = call(*args)
            live.is_watching = False
            peaks.append(live.peak - before)
            return result

        subspace.release_gradients = lambda *args: watched(release, *args)
        subspace.refresh = lambda *args: watched(refresh, *args)
        refresh_subspace()
        subspace.release_gradients, subspace.refresh = release, refresh
        measured.append((held[1], max(peaks)))

    trainer.refresh_subspace = refresh_and_measure
    with LiveBytes() as live:
        trainer.train()
    return measured


CASES = [
    # The rows fit into the memory of the basis, or they do not.
    ("lora", 1, 2, "bfloat16"), ("full", 2, 3, "float32"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (("full", 1, 1, "bfloat16"), ("full", 1, 2, "float32"),
                     ("full", 2, 4, "bfloat16"), ("lora", 2, 3, "bfloat16"))
    ),
]  # fmt: skip


@pytest.mark.parametrize(("form", "parts", "rank", "dtype"), CASES)
def test_what_is_measured_on_one_process_is_the_formula(
    form, parts, rank, dtype, base_model_path, tmp_path, monkeypatch
):
    monkeypatch.setattr(blocks, "BLOCK", 512)  # the temporaries of a block would hide the rest
    # With B = 0, as LoRA starts, A would have no direction yet, and so no rows.
    lora = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    trainer = make_trainer(
        "sft", base_model_path, tmp_path, capability=capability_groups(),
        config=paper(
            refresh_interval=1, gradients_per_group=parts, rank=rank, basis_dtype=dtype
        ),
        more={"peft_config": lora} if form == "lora" else None,
        max_steps=2, learning_rate=1e-3, save_strategy="steps", save_steps=2,
    )  # fmt: skip
    (first_rows, first_peak), (rows, peak) = measure_refreshes(trainer)

    sizes = [parameter.numel() for _, parameter in trainer.subspace.backend.parameters]
    num_entries, num_tensors, num_gradients = sum(sizes), len(sizes), 2 * parts
    basis = basis_bytes(num_entries, rank, dtype)
    assert trainer.subspace.basis_bytes == basis
    logged = [entry["ogpsa/basis_megabytes"] for entry in trainer.state.log_history[:2]]
    assert logged == [basis / 1e6] * 2

    # Gram matrices of all tensors, some copies in float32 and float64, and the blocks.
    small = 80 * num_tensors * num_gradients**2 + 4 * 512 * (num_gradients + rank + 1)
    of_rows = basis_bytes(num_entries, num_gradients, dtype)
    assert of_rows <= first_rows <= of_rows + 1000
    assert of_rows <= rows <= of_rows + 1000
    at_most = refresh_bytes(num_entries, num_gradients, rank, dtype, max(sizes)) + small
    assert of_rows <= first_peak <= at_most
    assert of_rows <= peak <= at_most

    path = tmp_path / "checkpoint-2" / FILE_NAME
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")  # safetensors: length, JSON, data
    data = checkpoint_bytes(num_entries, num_tensors, num_gradients, rank, dtype)
    assert path.stat().st_size == header + data
    assert header < 1000 + 400 * num_tensors


def test_the_temporaries_of_a_block_are_bounded(monkeypatch):
    """3 in a step, with a basis in bfloat16 its rows too; in a refresh twice the rows."""
    size, rank, block = 10 * 1024, 6, 1024
    monkeypatch.setattr(blocks, "BLOCK", block)
    dtypes = (torch.float32, torch.bfloat16)
    weights = torch.ones(rank, rank)
    for basis_dtype, gradient_dtype in itertools.product(dtypes, dtypes):
        rows = torch.ones(rank, size, dtype=basis_dtype)
        gradient = torch.ones(size, dtype=gradient_dtype)
        metric = vectors.AdamMetric(torch.ones(size), torch.ones(()))
        update = vectors.Difference(torch.ones(size), torch.ones(size))
        with LiveBytes() as step:
            step.is_watching = True
            products_of(rows, gradient)
            products_of(rows, gradient, metric)
            vectors.subtract_(gradient, rows, weights[0])
            vectors.subtract_(gradient, rows, weights[0], metric)
            products_of(rows, update, metric)
            vectors.subtract_(update, rows, weights[0])
        with LiveBytes() as refresh:
            refresh.is_watching = True
            gradient_rows.squared_length(gradient)
            gradient_rows.gram(rows)
            combined = gradient_rows.combine_(weights, rows)
        num_blocks = 3 if basis_dtype == torch.float32 else 3 + rank
        assert step.peak <= 4 * block * num_blocks + 4000  # and the numbers of ten blocks
        assert refresh.peak <= 4 * block * 2 * rank + 1000
        assert combined.data_ptr() == rows.data_ptr()


# --- Traffic, counted on one process that takes the others to be there.


class Sent(TorchDispatchMode):
    """The collectives that are called, each with the bytes of its largest tensor."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            sizes = [leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.calls.append((func._schema.name.removeprefix("c10d::").strip("_"), max(sizes)))
        return func(*args, **(kwargs or {}))

    def total(self, collective):
        return sum(size for name, size in self.calls if name == collective)


@contextlib.contextmanager
def as_process(process_index, num_processes):
    """As if the others were there: collectives return at once, their results mean nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=process_index, world_size=num_processes)
    try:
        yield
    finally:
        dist.destroy_process_group()


def make_backend(engine, model):
    """Wrapped as accelerate does it: by DDP, or layer by layer for FSDP2 and HSDP."""
    num_processes, wrapped_model = dist.get_world_size(), model
    if engine == "ddp":
        wrapped_model = DistributedDataParallel(model)
    else:
        shape = (2, num_processes // 2) if engine == "hsdp" else (num_processes,)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        for module in model.modules():
            if isinstance(module, LlamaDecoderLayer):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def all_reduced(value, reduction):
        dist.all_reduce(value)
        return value

    accelerator = SimpleNamespace(
        device=torch.device("cpu"), process_index=dist.get_rank(), num_processes=num_processes,
        backward=lambda loss: loss.backward(), no_sync=lambda model: model.no_sync(),
        reduce=all_reduced,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters())
    return TorchBackend(accelerator, model, wrapped_model, optimizer)


@pytest.mark.parametrize("scope", ["parameter", "model"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "hsdp"])
def test_what_a_refresh_and_a_step_send_is_the_formula(engine, scope, monkeypatch):
    """Two parts of 16 batches on 8 processes: 2 passes each. The shards divide without rest."""
    monkeypatch.setattr(engines_backend, "broadcast_object_list", dist.broadcast_object_list)
    num_processes, num_gradients, num_passes = 8, 2, 4
    rows = torch.arange(3, 35).view(2, 2, 8)
    parts = []
    for group, ids in zip("ab", rows, strict=True):
        inputs = {"input_ids": ids, "labels": ids}
        samples = [Sample(f"{group}/{i}", {"input_ids": ids[0]}, 7) for i in range(32)]
        parts.append(Part(group, samples, 2, lambda _, inputs=inputs: dict(inputs)))
    model = tiny_model()
    sizes = [parameter.numel() for parameter in model.parameters()]
    with as_process(0, num_processes):
        backend = make_backend(engine, model)
        subspace = CapabilitySubspace(backend, paper(scope=scope))
        reduced_by_ddp = []
        if engine == "ddp":  # its own collectives are called where Python cannot see them
            backend.wrapped_model.register_comm_hook(reduced_by_ddp, instead_of_all_reduce)

        def nll(batch):
            return backend.wrapped_model(**batch.inputs).loss

        def refresh():
            old_rows, _ = subspace.release_gradients(num_gradients)
            gradients = capability_gradients(backend, parts, nll, old_rows)
            subspace.refresh(gradients, [0.0, 0.0])

        refresh()  # DDP settles its buckets in the first pass
        reduced_by_ddp.clear()
        with Sent() as refreshing:
            refresh()
        assert sum(reduced_by_ddp) == (4 * sum(sizes) * num_gradients if engine == "ddp" else 0)
        nll(parts[0].batches_of(0, 8)[0]).backward()
        with Sent() as stepping:
            project(subspace)

    rank, num_shards = num_gradients, {"ddp": 1, "fsdp2": 8, "hsdp": 4}[engine]
    assert subspace.basis_bytes == basis_bytes(sum(sizes) // num_shards, rank, "float32")
    num_blocks = len(sizes) if scope == "parameter" else 1
    expected = broadcast_traffic(num_blocks, num_gradients, rank)
    # What replicas have to agree on: both Gram matrices; in a step, the weights of the rows.
    is_replicated = engine in ("ddp", "hsdp")
    losses_of_parts = 4 * num_gradients * len(sizes)
    expected += is_replicated * (gram_traffic(len(sizes), num_gradients, rank) - losses_of_parts)
    decided = [("broadcast", 4 * num_blocks * rank)] * is_replicated
    # Two pickled tensors with their lengths; DDP sends the model's buffer in every part.
    assert expected <= refreshing.total("broadcast") <= expected + 1000
    losses = 4 * num_gradients
    if engine == "ddp":
        assert refreshing.total("allreduce") == losses
        assert stepping.calls == decided
        return
    of_gradient = 4 * sum(sizes) * num_passes
    assert refreshing.total("reduce_scatter_base") == of_gradient
    assert of_gradient <= refreshing.total("allgather_base") <= 2 * of_gradient
    between_replicas = of_gradient // num_shards if engine == "hsdp" else 0
    of_grams = gram_traffic(len(sizes), num_gradients, rank)
    assert refreshing.total("allreduce") == of_grams + losses + between_replicas
    assert stepping.calls == [("allreduce", step_traffic(len(sizes), rank)), *decided]


def instead_of_all_reduce(reduced_by_ddp, bucket):
    """A communication hook of DDP that only counts."""
    reduced_by_ddp.append(bucket.buffer().nbytes)
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


@pytest.mark.parametrize("process_index", [0, 15, 16, 511])
def test_on_512_processes_sixteen_hold_all_of_lora_a(process_index):
    """FSDP2 divides rows, and A has 16; B has one row for each of the first processes."""
    with as_process(process_index, 512):
        lora = LoraConfig(r=16, target_modules="all-linear")
        model = get_peft_model(tiny_model(), lora)
        shapes = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
        backend = make_backend("fsdp2", model)
        held = sum(shard.size for shard in backend.shards)
    of_a = sum(shape[1] for name, shape in shapes.items() if "lora_A" in name)
    of_b = sum(16 for n, shape in shapes.items() if "lora_B" in n and process_index < shape[0])
    assert held == of_a * (process_index < 16) + of_b
    if process_index == 0:
        assert held == largest_shard(shapes.values(), 512)
