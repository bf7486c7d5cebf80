"""
Does it pay, where every process holds the whole gradient (DDP), to store the basis elsewhere?

    torchrun --nproc_per_node 2 benchmarks/basis_placement.py --parameters 34e6 --rank 2

It measures the projection of one float32 gradient, scope `parameter`, with the basis

    whole    on the device of every process, as OGPSA has it under DDP
    sharded  divided over the processes: products summed over them, the projected gradient gathered

All in one run and interleaved, so that whatever else the machine does falls on all of them alike.
`gathering` is the all-gather alone, a part of `sharded`. gloo on the CPU, nccl on GPUs. Every
placement starts from the same gradient, and the results are compared. `sharded` has the best case:
one buffer for all gradients, in equal ranges, so that it is gathered in one call and not copied.

Shapes: P tensors of N entries each, K basis rows, X = K + 1.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ogpsa_trl.evaluation.tables import markdown_table
from ogpsa_trl.tensors import gradient_rows, matrices, vectors

BYTES = 4  # of a float32


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--parameters", type=float, default=34e6, help="trained parameters")
    parser.add_argument("--tensors", type=int, default=75, help="of equal size")
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--basis_dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=15, help="measurements of each placement")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class Placements:
    """One gradient, its basis in every placement, and the projection with each of them."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.rank, self.device = args.rank, device
        self.process_index, self.num_processes = dist.get_rank(), dist.get_world_size()
        per_tensor = round(args.parameters / args.tensors)
        per_tensor += -per_tensor % self.num_processes
        self.num_entries = per_tensor * args.tensors
        generator = torch.Generator(device).manual_seed(args.seed)  # the same on every process

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        self.original = random(self.num_entries)
        self.gradient = self.original.clone()
        self.gradients = list(self.gradient.view(args.tensors, per_tensor).unbind())

        # Every tensor's whole rows; and this process's range of all tensors laid end to end.
        dtype = getattr(torch, args.basis_dtype)
        size = self.num_entries // self.num_processes
        first, last = self.process_index * size, (self.process_index + 1) * size
        self.range = self.gradient[first:last]
        self.whole: list[Tensor] = []
        self.pieces: list[tuple[int, Tensor, Tensor]] = []
        grams_PKK = torch.zeros(args.tensors, self.rank, self.rank, device=device)
        for index, gradient in enumerate(self.gradients):
            rows_KN = (random(self.rank, per_tensor) / per_tensor**0.5).to(dtype)
            grams_PKK[index] = matrices.symmetric(gradient_rows.gram(rows_KN), self.rank)
            self.whole.append(rows_KN)
            offset = index * per_tensor
            start, end = max(first - offset, 0), min(last - offset, per_tensor)
            if start < end:
                piece = rows_KN[:, start:end].clone(memory_format=torch.contiguous_format)
                self.pieces.append((index, piece, gradient[start:end]))
        self.inverse_gram = matrices.inverse_gram(grams_PKK).float().to(device)

    def reset(self) -> None:
        self.gradient.copy_(self.original)

    def weights(self, products_PX: Tensor) -> Tensor:
        return (self.inverse_gram @ products_PX[:, 1:, None]).squeeze(-1)

    def project_whole(self) -> None:
        products_PX = torch.stack(
            [vectors.products(r, g) for r, g in zip(self.whole, self.gradients, strict=True)]
        )
        weights_PK = self.weights(products_PX)
        for rows, gradient, weights in zip(self.whole, self.gradients, weights_PK, strict=True):
            vectors.subtract_(gradient, rows, weights)

    def project_sharded(self) -> None:
        products_PX = torch.zeros(len(self.gradients), self.rank + 1, device=self.device)
        for index, rows, gradient in self.pieces:
            products_PX[index] = vectors.products(rows, gradient)
        dist.all_reduce(products_PX)
        weights_PK = self.weights(products_PX)
        for index, rows, gradient in self.pieces:
            vectors.subtract_(gradient, rows, weights_PK[index])
        self.gather()

    def gather(self) -> None:
        dist.all_gather_into_tensor(self.gradient, self.range)


def measured(call: Callable[[], None], device: torch.device) -> float:
    """Seconds until the slowest process is done."""
    dist.barrier()
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    seconds = torch.tensor(time.perf_counter() - start, device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    args = arguments()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    placements = Placements(args, device)
    calls = {
        "whole": placements.project_whole,
        "sharded": placements.project_sharded,
        "gathering": placements.gather,
    }

    expected = None
    for name in ("whole", "sharded"):  # also the warm-up
        placements.reset()
        calls[name]()
        if expected is None:
            expected = placements.gradient.clone()
        torch.testing.assert_close(placements.gradient, expected, rtol=0, atol=1e-5)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(args.repeats):
        for name, call in calls.items():
            placements.reset()
            seconds[name].append(measured(call, device))

    if dist.get_rank() == 0:
        report(args, placements, seconds)
    dist.destroy_process_group()


def report(
    args: argparse.Namespace, placements: Placements, seconds: dict[str, list[float]]
) -> None:
    num_processes, device = placements.num_processes, placements.device
    where = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine() + " CPU"
    print(
        f"{placements.num_entries / 1e6:.1f} million parameters in {args.tensors} tensors, rank "
        f"{args.rank}, {args.basis_dtype}; {num_processes} processes, {dist.get_backend()}, {where}"
        f", {torch.get_num_threads()} threads each; torch {torch.__version__}, seed {args.seed}, "
        f"median [quartiles] of {args.repeats}"
    )
    megabytes = {
        "whole": sum(rows.nbytes for rows in placements.whole) / 1e6,
        "sharded": sum(rows.nbytes for _, rows, _ in placements.pieces) / 1e6,
    }
    rows = []
    for name, values in seconds.items():
        low, middle, high = (1e3 * value for value in statistics.quantiles(values, n=4))
        # Of the ratios of one round each, which the machine's other work distorts less.
        ratios = [s / whole for s, whole in zip(values, seconds["whole"], strict=True)]
        rows.append(
            {
                "placement": name,
                "ms": f"{middle:.1f} [{low:.1f}, {high:.1f}]",
                "ratio to whole": statistics.median(ratios),
                "basis, MB": megabytes.get(name),
            }
        )
    print(markdown_table(rows, digits=2))
    gathered = BYTES * placements.num_entries * (num_processes - 1) / num_processes
    print(f"`sharded` makes every process receive {gathered / 1e6:.1f} MB in every step.")


if __name__ == "__main__":
    main()
