"""
Trains cells of the engine table on the processes of a launch; saves weights and logs.

tests/processes.py starts them: `launch(2, engine_worker.main, ENGINE, MODEL, OUTPUT, PART)`.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import sys
from pathlib import Path
from unittest import mock

import torch
import transformers
from accelerate import PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import LoraConfig
from torch.distributed.tensor import DTensor

import speed
from ogpsa_trl import GateConfig, OGPSAConfig, SubspaceCallback
from ogpsa_trl.method.projection import project
from ogpsa_trl.tensors import matrices
from runs import (
    capability_groups,
    contradicted,
    gate_entries,
    gated,
    logged,
    make_trainer,
    trl_entries,
)

ON_CPU = not torch.cuda.is_available()

ENGINES = ("ddp", "fsdp2", "zero3", "zero1", "zero2", "hsdp")
# Where the numbers of samples and steps are those of a short run, below; presets are as they are.
METHODS = {
    "paper": {},
    "paper-theorem": {},
    "update": {"target": "update"},
    "optimizer": {"target": "update", "metric": "optimizer", "scope": "model"},
    "feedback": {
        "target": "update", "metric": "optimizer", "restoration": 1.0, "capability_ema": 0.5,
    },
    "added replay": {"target": "none", "capability_weight": 0.5},
    "preserve": {}, "replay": {}, "kl": {},
}  # fmt: skip
# Every method once, and every pair of stage, form and accumulation.
QUICK_CELLS = [
    ("sft", "full", "paper", "acc1"), ("dpo", "lora", "paper-theorem", "acc2"),
    ("dpo", "full", "update", "acc2"), ("sft", "lora", "optimizer", "acc2"),
    ("sft", "full", "feedback", "acc2"), ("dpo", "full", "added replay", "acc1"),
    ("dpo", "lora", "preserve", "acc1"), ("sft", "lora", "replay", "acc1"),
    ("sft", "full", "kl", "acc2"),
]  # fmt: skip
# And the other stage, form and accumulation of each of them.
_OTHER = {"sft": "dpo", "full": "lora", "acc1": "acc2"}
_OTHER |= {value: key for key, value in _OTHER.items()}
SLOW_CELLS = [
    (_OTHER[stage], _OTHER[form], method, _OTHER[accumulation])
    for stage, form, method, accumulation in QUICK_CELLS
]
CELLS = QUICK_CELLS + SLOW_CELLS
# Hybrid sharding takes two replicas of two shards.
NUM_PROCESSES = {**dict.fromkeys(ENGINES, 2), "hsdp": 4}
RESUMED_METHODS = ("paper", "paper-theorem", "preserve")
RESUMED_ELSEWHERE = QUICK_CELLS[:2]
SIGNS_CELL = QUICK_CELLS[1]
PLAIN_CELL = ("sft", "full", "paper", "acc2")
DEFAULT_CELL = ("sft", "full", "preserve", "acc2")
GLOBAL_BATCH = 8


def name_of(cell):
    return "-".join(cell).replace(" ", "-")


# Plain TRL; and OGPSA, with passes of its own through other modules between those of the gate.
GATE_CELLS = {"gate-plain": ("dpo", "lora", "paper", "acc2"), "gate-ogpsa": DEFAULT_CELL}
# Of refreshes without a projection: the cell, and whether it is in bfloat16.
LEAKS = {
    "dpo-lora": (("dpo", "lora", "paper", "acc2"), False),
    "bf16": (PLAIN_CELL, True),
    "sft-full": (PLAIN_CELL, False),
}


# What every test run looks at; all else is slow. Each of these engines shards in another way. What
# is no question of shards is left to DDP.
_OF_SHARDS = [cell for cell in QUICK_CELLS if cell[2] not in ("update", "added replay", "replay")]
_QUICK = {
    "ddp": {*QUICK_CELLS, "gate-ogpsa", "errors", "bf16-default", "roundings"},
    "fsdp2": {*_OF_SHARDS, "signs", "bf16-default"},
    "zero3": {*_OF_SHARDS, "errors"},
}
_ALWAYS_QUICK = ("leak-dpo-lora", "leak-bf16", "bf16", "rates")


def is_quick(engine, job):
    """Whether every test run looks at a job (see `jobs`) of an engine."""
    return engine in _QUICK and (job in _QUICK[engine] or job in _ALWAYS_QUICK)


def config_of(cell, basis_dtype="float32"):
    """
    A refresh before the first and the third step, or before each; few samples in few batches. Rows
    in bfloat16 are rounded to other digits where sums are.
    """
    stage, _, method, _ = cell
    settings = METHODS[method]
    preset = "paper" if settings else method
    config = OGPSAConfig.from_preset(
        preset, stage=stage, capability_batch_size=2, basis_dtype=basis_dtype
    )
    if config.capability_token_share is not None or config.samples_per_refresh is not None:
        return dataclasses.replace(config, samples_per_refresh=3)  # of 6
    return dataclasses.replace(config, refresh_interval=2, **settings)


def use_cpu(engine):
    """
    Let accelerate and DeepSpeed run several processes on the CPU.

    accelerate picks FSDP2 and DeepSpeed only where it sees GPUs, so the state that it asks is made
    beforehand. DeepSpeed would compile an operator for shared memory; gloo does without.
    """
    if engine in ("fsdp2", "hsdp"):
        original_init = AcceleratorState.__init__

        def as_if_on_gpus(self, *args, **kwargs):
            if not AcceleratorState._shared_state:
                PartialState(cpu=True)
                PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
                PartialState._shared_state["device"] = torch.device("cpu")
            original_init(self, *args, **kwargs)
            self.__dict__["device"] = torch.device("cpu")

        AcceleratorState.__init__ = as_if_on_gpus
    if engine.startswith("zero"):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        original = PartialState.__init__

        def on_cpu(self, cpu=False, **kwargs):
            original(self, cpu=True, backend="gloo", timeout=kwargs.get("timeout"))

        PartialState.__init__ = on_cpu
        transformers.training_args.is_torch_bf16_gpu_available = lambda: True


def engine_arguments(engine, bf16):
    if engine in ("fsdp2", "hsdp"):
        config = {
            "version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "state_dict_type": "FULL_STATE_DICT",
        }  # fmt: skip
        mesh = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
        more = {"parallelism_config": mesh} if engine == "hsdp" else {}
        return {"fsdp": True, "fsdp_config": config, **more}
    if engine.startswith("zero"):
        config = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": int(engine[-1]),
                "stage3_gather_16bit_weights_on_model_save": True,
                # The tiny model has parameters on both sides of it.
                "stage3_param_persistence_threshold": 1000,
            },
        }
        if bf16:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        return {"deepspeed": config, "use_cpu": False}
    return {"ddp_backend": "gloo"} if engine == "ddp" and ON_CPU else {}


class ProjectionProbe:
    """All that a step of ours sends, and the largest cosine it leaves between step and basis."""

    def __init__(self, trainer):
        self.trainer, self.largest, self.sent_bytes = trainer, 0.0, []
        step = trainer.constrained_step
        self.project, self.project_update = step.project_gradient, step.project_update
        self.around_optimizer = step.around_optimizer
        step.project_gradient, step.project_update = self.on_gradient, self.on_update
        step.around_optimizer = self.on_step

    @contextlib.contextmanager
    def on_step(self):
        step = self.around_optimizer()
        with self.counted():
            step.__enter__()
        yield
        with self.counted():
            step.__exit__(None, None, None)

    def on_gradient(self):
        self.project()
        backend = self.trainer.subspace.backend
        self.measure([backend.gradient(p) for _, p in backend.parameters])

    def on_update(self, weights_before):
        self.project_update(weights_before)
        backend = self.trainer.subspace.backend
        weights = [backend.weights(p) for _, p in backend.parameters]
        self.measure(
            [after - before for after, before in zip(weights, weights_before, strict=True)]
        )

    @contextlib.contextmanager
    def counted(self):
        def counting(original):
            def send(tensor, *args, **kwargs):
                self.sent_bytes.append(tensor.nbytes)
                return original(tensor, *args, **kwargs)

            return send

        collectives = {n: getattr(torch.distributed, n) for n in ("all_reduce", "broadcast")}
        counting_all = {name: counting(original) for name, original in collectives.items()}
        with mock.patch.multiple(torch.distributed, **counting_all):
            yield

    def measure(self, vectors):
        subspace = self.trainer.subspace
        backend, model_wide = subspace.backend, subspace.config.scope == "model"
        num_rows = subspace.inverse_gram.shape[-1]
        products = torch.zeros(len(vectors), num_rows + 1, device=backend.device)
        for row, vector, rows in zip(products, vectors, subspace.basis, strict=True):
            if vector is not None and rows is not None:
                vector = vector.double()
                row[:-1] = rows.double() @ vector
                row[-1] = vector @ vector
        num_sent = len(self.sent_bytes)
        products = backend.sum_over_shards(products).double()
        del self.sent_bytes[num_sent:]  # this was the probe's
        if model_wide:
            products = products.sum(dim=0, keepdim=True)
        cosines = products[:, :-1].abs() / products[:, -1:].sqrt().clamp_min(1e-30)
        self.largest = max([self.largest, *cosines.flatten().tolist()])


def make(
    engine, cell, model_path, output_dir, num_processes, *, plain=False, ogpsa=True,
    basis_dtype="float32", **options
):  # fmt: skip
    """
    Three steps.

    Where the loss accumulates, gradient checkpointing is on too. LoRA starts as usual in DPO, so
    that A is held in the second step; in SFT it starts with a B that is not zero.
    """
    stage, form, _, accumulation = cell
    num_passes = int(accumulation[-1])
    # Three rows on two processes: shards of two sizes, on four processes an empty one.
    lora = LoraConfig(
        r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=stage == "dpo",
        lora_dropout=options.pop("lora_dropout", 0.0),
    )  # fmt: skip
    return make_trainer(
        stage, model_path, output_dir, plain=plain,
        capability=capability_groups() if ogpsa else None,
        config=config_of(cell, basis_dtype) if ogpsa else None,
        more={"peft_config": lora} if form == "lora" else None,
        **{
            "max_steps": 3, "gradient_accumulation_steps": num_passes,
            "gradient_checkpointing": num_passes > 1,
            "per_device_train_batch_size": GLOBAL_BATCH // num_passes // num_processes,
            "optim": "adamw_torch", "learning_rate": 1e-3, "adam_epsilon": 1e-4,
            "max_grad_norm": 0.5, "save_strategy": "steps", "save_steps": 1,
            "use_cpu": ON_CPU or engine == "one",
            **engine_arguments(engine, options.get("bf16", False)), **options,
        },
    )  # fmt: skip


def full_weights(trainer):
    """The trained parameters as one process would hold them; every process takes part."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    names = {name for name, _ in trainer.model.named_parameters()}
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().cpu().float().clone()
        for name, t in (state or {}).items()
        if name in names
    }


def train_cell(engine, model_path, folder, num_processes, cell, **options):
    """A run, what the engine held of it and, of some, the same run resumed after its first step."""
    is_resumed = cell[2] in RESUMED_METHODS
    if not is_resumed:
        options["save_strategy"] = "no"
    trainer = make(engine, cell, model_path, folder, num_processes, **options)
    probe = ProjectionProbe(trainer)
    trainer.train()
    subspace = trainer.subspace
    held = sum(shard.size for shard in subspace.backend.shards)
    sizes = torch.tensor([held, subspace.basis_bytes], dtype=torch.float64)
    result = {
        "engine": trainer.accelerator.distributed_type.value,
        "backend": type(subspace.backend).__name__,
        "num_processes": trainer.accelerator.num_processes,
        "num_entries": sum(shard.total for shard in subspace.backend.shards),
        "held_entries_and_basis_bytes": gathered(trainer, sizes),
        "num_parameters": len(subspace.backend.parameters),
        "cosine": probe.largest,
        "sent_bytes": probe.sent_bytes,
        "weights": full_weights(trainer),
        "log": logged(trainer),
    }
    if is_resumed:
        resumed = make(engine, cell, model_path, folder, num_processes, **options)
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
        result["resumed"] = full_weights(resumed)
    return result


def gathered(trainer, values):
    return trainer.accelerator.gather(values.to(trainer.args.device)[None]).cpu()


def train_without_projection(engine, model_path, folder, num_processes, cell, **options):
    """Plain TRL, and a run that refreshes before every step but does not project."""
    results = {}
    for kind in ("plain", "refreshed"):
        output_dir = folder / kind
        trainer = make(
            engine, cell, model_path, output_dir, num_processes, plain=kind == "plain",
            save_only_model=True, lora_dropout=0.3, **options,
        )  # fmt: skip
        if kind == "refreshed":
            trainer.constrained_step.project_gradient = lambda: None
            trainer.remove_callback(SubspaceCallback)
            trainer.add_callback(SubspaceCallback(trainer, refresh_interval=1))
        trainer.train()
        trainer.save_model()
        entries = logged(trainer, ("runtime", "per_second", "seconds", "ogpsa/"))
        results[kind] = {"weights": full_weights(trainer), "log": entries}
    return results


def train_gated(engine, model_path, folder, num_processes, name):
    """The run of a gate, the same without it and resumed, and those of its actions."""

    def run(has_gate=True, checkpoint=None, **settings):
        trainer = make(
            engine, GATE_CELLS[name], model_path, folder, num_processes,
            ogpsa=name == "gate-ogpsa", learning_rate=0.01, adam_epsilon=1e-2,
        )  # fmt: skip
        gate = has_gate and gated(trainer, gate_groups(), gate_config(**settings))
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer, gate

    (without, _), (trainer, _) = run(has_gate=False), run()
    resumed, _ = run(checkpoint=str(folder / "checkpoint-1"))
    entries = gate_entries(trainer)
    increases = [entry["ogpsa/gate_largest_increase"] for entry in entries]
    stopped, _ = run(max_capability_loss_increase=increases[1] / 2, gate_action="stop")
    between = (increases[1] + increases[2]) / 2
    best, gate = run(max_capability_loss_increase=between, gate_action="best")
    return {
        "entries": entries,
        "resumed_entries": gate_entries(resumed),
        "logs": [trl_entries(without), trl_entries(trainer)],
        "weights": [full_weights(without), full_weights(trainer), full_weights(resumed)],
        "stopped_at": gathered(stopped, torch.tensor(stopped.state.global_step)).tolist(),
        "first_and_best": [full_weights(stopped), full_weights(best)],
        "is_exceeded": gate.is_exceeded,
    }


def gate_groups():
    return {"answers": contradicted(7), **capability_groups(7)}


def gate_config(**settings):
    """Seven samples in batches of two: some processes have batches with nothing to learn."""
    return GateConfig(gate_interval=1, gate_batch_size=2, **settings)


def train_with_signs(engine, model_path, folder, num_processes):
    """As if the processes ran on processors that give eigenvectors other signs."""
    make_weights = matrices.orthonormal_weights

    def with_sign(*args):
        return make_weights(*args) * (-1) ** int(os.environ["RANK"])

    trainer = make(engine, SIGNS_CELL, model_path, folder, num_processes, save_strategy="no")
    with mock.patch.object(matrices, "orthonormal_weights", with_sign):
        trainer.train()
    return full_weights(trainer)


def errors_without_gradients(engine, model_path, folder, num_processes):
    """What is raised by a projection, and by a training step, that reach no gradient."""
    cell = QUICK_CELLS[0]
    trainer = make(engine, cell, model_path, folder, num_processes, save_strategy="no")
    trainer.train()
    errors = []
    try:
        project(trainer.subspace)
    except RuntimeError as error:
        errors.append(str(error))
    try:
        with trainer.subspace.backend.around_step(trainer.constrained_step.around_optimizer):
            pass
    except RuntimeError as error:
        errors.append(str(error))
    return errors


# Of `bf16: true`: steps that are far below what bfloat16 tells apart, and steps that are not.
BF16_RATES = {"small": 1e-5, "large": 1e-3}


def bf16_options(rate, **options):
    return {
        "learning_rate": BF16_RATES[rate], "adam_epsilon": 1e-8, "max_steps": 6,
        "save_strategy": "no", **options,
    }  # fmt: skip


def train_default_in_bf16(engine, model_path, folder, num_processes):
    """Of plain TRL and the default: the weights, and whether each restoration was capped."""
    results = {}
    for rate in BF16_RATES:
        for kind in ("plain", "preserve"):
            trainer = make(
                engine, DEFAULT_CELL, model_path, folder / rate / kind, num_processes,
                ogpsa=kind == "preserve", basis_dtype="bfloat16",
                **bf16_options(rate, bf16=True),
            )  # fmt: skip
            trainer.train()
            results[f"{rate} {kind}"] = full_weights(trainer), capped_steps(trainer)
    return results


def capped_steps(trainer):
    name = "ogpsa/restoration_capped"
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def train_with_rates(engine, model_path, folder, num_processes):
    """The default, with embeddings in a group of the optimizer that has the learning rate 0."""
    trainer = make(engine, DEFAULT_CELL, model_path, folder, num_processes, save_strategy="no")

    def create_optimizer(model=None):
        groups = [{"params": [], "lr": 1e-3}, {"params": [], "lr": 0.0}]
        for name, parameter in (model or trainer.model).named_parameters():
            groups["embed_tokens" in name]["params"].append(parameter)
        trainer.optimizer = torch.optim.AdamW(groups, eps=1e-4)
        return trainer.optimizer

    trainer.create_optimizer = create_optimizer
    trainer.train()
    return full_weights(trainer)


def train_with_roundings(engine, model_path, folder, num_processes):
    """
    As if the processes ran on processors that add in another order: the largest difference of what
    each holds of the weights from the same part in the first replica.
    """
    make_table, scale = matrices.table, 1 + 1e-6 * int(os.environ["RANK"])
    results = {}
    for cell in (DEFAULT_CELL, PLAIN_CELL):
        trainer = make(engine, cell, model_path, folder, num_processes, save_strategy="no")
        with mock.patch.object(matrices, "table", lambda *args: make_table(*args) * scale):
            trainer.train()
        backend = trainer.subspace.backend
        held = torch.cat([backend.weights(parameter) for _, parameter in backend.parameters])
        replicas = gathered(trainer, held).unflatten(0, (2, num_processes // 2))
        results[name_of(cell)] = (replicas - replicas[:1]).abs().max().item()
    return results


def train_in_8_bits(engine, model_path, folder, num_processes):
    """
    Per optimizer: the largest difference of the second moments of one step from those of AdamW, on
    any process and relative to the largest of them; and the largest cosine.
    """
    cell = ("sft", "full", "optimizer", "acc2")
    optimizers = {"adamw_torch": "torch", "adamw_torch_8bit": "torchao"}
    if engine not in ("fsdp2", "hsdp"):  # bitsandbytes takes no step of a DTensor
        optimizers["adamw_bnb_8bit"] = "bitsandbytes"
    moments, results = {}, {}
    for optim, package in optimizers.items():
        if importlib.util.find_spec(package) is None:
            continue
        trainer = make(
            engine, cell, model_path, folder, num_processes, optim=optim, max_steps=1,
            save_strategy="no",
        )  # fmt: skip
        probe = ProjectionProbe(trainer)
        with torch.compiler.set_stance("force_eager"):  # torchao would compile for a minute
            trainer.train()
        backend = trainer.subspace.backend
        held = [backend.second_moment(parameter) for _, parameter in backend.parameters]
        moments[optim] = torch.cat([moment for moment in held if moment is not None])
        expected = moments["adamw_torch"]
        difference = (moments[optim] - expected).abs().max() / expected.max()
        results[optim] = gathered(trainer, difference).max().item(), probe.largest
    return results


def jobs(engine):
    """What can be trained: cells and others by name, each a function of the engine and folders."""
    all_jobs = {cell: functools.partial(train_cell, cell=cell) for cell in CELLS}
    for name, (cell, is_bf16) in LEAKS.items():
        all_jobs[f"leak-{name}"] = functools.partial(
            train_without_projection, cell=cell, bf16=is_bf16
        )
    all_jobs |= {name: functools.partial(train_gated, name=name) for name in GATE_CELLS}
    all_jobs |= {
        "signs": train_with_signs, "errors": errors_without_gradients,
        "bf16": functools.partial(train_cell, cell=PLAIN_CELL, bf16=True),
        "rates": train_with_rates, "8-bit": train_in_8_bits,
    }  # fmt: skip
    if engine != "zero1":  # in bfloat16 its weights are not where its gradients are
        all_jobs["bf16-default"] = train_default_in_bf16
    if engine in ("ddp", "hsdp"):
        all_jobs["roundings"] = train_with_roundings
    return all_jobs


def main(engine, model_path, output_dir, part, checkpoints=None):
    """
    Train.

    Args:
        engine: One of `ENGINES`.
        model_path: Folder of the model.
        output_dir: Folder of the results.
        part: `quick`, what every test run looks at, or `all`.
        checkpoints: Output folder of a launch with another number of processes. It is only gone on
            from.
    """
    torch.set_num_threads(1)
    if ON_CPU:
        use_cpu(engine)
    speed.leave_libraries_out_of_garbage_collection()
    num_processes, output_dir = int(os.environ["WORLD_SIZE"]), Path(output_dir)

    def save(name, result):
        if os.environ["RANK"] == "0":
            torch.save(result, output_dir / f"{name}.pt")

    if checkpoints is not None:
        for cell in RESUMED_ELSEWHERE:
            trainer = make(engine, cell, model_path, output_dir / "run", num_processes)
            checkpoint = Path(checkpoints) / name_of(cell) / "checkpoint-1"
            trainer.train(resume_from_checkpoint=str(checkpoint))
            save(name_of(cell), full_weights(trainer))
    else:
        for job, train in jobs(engine).items():
            if part == "all" or is_quick(engine, job):
                name = job if isinstance(job, str) else name_of(job)
                save(name, train(engine, model_path=model_path, folder=output_dir / name,
                                 num_processes=num_processes))  # fmt: skip
    # gloo may abort a process that ends while another still reads from it.
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)
