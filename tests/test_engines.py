"""Several processes under every engine (gloo, CPU) take the steps of one process."""

import itertools

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine_worker import (
    BF16_RATES,
    CELLS,
    DEFAULT_CELL,
    ENGINES,
    GATE_CELLS,
    LEAKS,
    METHODS,
    NUM_PROCESSES,
    QUICK_CELLS,
    RESUMED_ELSEWHERE,
    RESUMED_METHODS,
    SIGNS_CELL,
    bf16_options,
    capped_steps,
    config_of,
    gate_config,
    gate_groups,
    is_quick,
    main,
    make,
    name_of,
    train_with_rates,
)
from ogpsa_trl.training.whole_checkpoints import LIST_NAME
from processes import launch
from runs import (
    capability_groups,
    gate_entries,
    gated,
    literal_kl,
    logged,
    max_difference,
    weights,
)

# A launch for all cells of an engine takes half a minute to two minutes on two cores.
pytestmark = [
    pytest.mark.timeout(1200),
    # transformers 5.16 does not resume several CPU processes; trl 1.9 does not load under ZeRO-3.
    pytest.mark.pinned,
]


def on_engines(jobs, name="job", engines=ENGINES):
    """Results of jobs on engines, each as slow as its job; `name` is that of the parameter."""

    def of(engine, job):
        text = job if isinstance(job, str) else name_of(job)
        marks = () if is_quick(engine, job) else pytest.mark.slow
        return pytest.param(engine, job, id=f"{engine}-{text}", marks=marks)

    return pytest.mark.parametrize(
        ("engine", name), [of(engine, job) for engine in engines for job in jobs]
    )


every_cell = on_engines(CELLS, "cell")
every_gate = on_engines(GATE_CELLS)
# What accelerate must have run, and what must have served it.
RUNS_AS = {
    "ddp": ("MULTI_CPU", "TorchBackend"),
    "fsdp2": ("FSDP", "TorchBackend"),
    "hsdp": ("FSDP", "TorchBackend"),
    "zero1": ("DEEPSPEED", "Zero12Backend"),
    "zero2": ("DEEPSPEED", "Zero12Backend"),
    "zero3": ("DEEPSPEED", "Zero3Backend"),
}


@pytest.fixture(scope="session")
def launched(request, base_model_path, tmp_path_factory):
    """
    The output folder of an engine's launch. There is one, for all that is looked at: processes
    spend their time importing.
    """
    slow = [item.name for item in request.session.items if "slow" in item.keywords]
    folders = {}

    def results_of(engine):
        if engine not in folders:
            is_slow = any(f"[{engine}-" in name for name in slow)
            folder, part = tmp_path_factory.mktemp(engine), "all" if is_slow else "quick"
            launch(
                NUM_PROCESSES[engine], main, engine, base_model_path, folder, part, folder=folder
            )
            folders[engine] = folder
        return folders[engine]

    return results_of


@pytest.fixture(scope="session")
def one_process(base_model_path, tmp_path_factory):
    """What one process makes of a cell: weights and log."""
    results = {}

    def result_of(cell):
        if cell not in results:
            folder = tmp_path_factory.mktemp(name_of(cell))
            trainer = make("one", cell, base_model_path, folder, 1, save_strategy="no")
            trainer.train()
            results[cell] = weights(trainer), logged(trainer)
        return results[cell]

    return result_of


def load(folder, job):
    name = job if isinstance(job, str) else name_of(job)
    return torch.load(folder / f"{name}.pt", weights_only=True)


def test_the_quick_cells_hold_every_method_and_every_pair_of_the_other_choices():
    assert {method for _, _, method, _ in QUICK_CELLS} == set(METHODS)
    choices = [("sft", "dpo"), ("full", "lora"), ("acc1", "acc2")]
    pairs = {p for a, b in itertools.combinations(choices, 2) for p in itertools.product(a, b)}
    others = [(stage, form, accumulation) for stage, form, _, accumulation in QUICK_CELLS]
    assert pairs == {pair for cell in others for pair in itertools.combinations(cell, 2)}


@every_cell
def test_processes_take_the_steps_of_one(engine, cell, launched, one_process, record_property):
    expected, expected_log = one_process(cell)
    result = load(launched(engine), cell)
    assert result["num_processes"] == NUM_PROCESSES[engine]
    assert (result["engine"], result["backend"]) == RUNS_AS[engine]
    difference = max_difference(expected, result["weights"])
    record_property("max_parameter_difference", difference)
    record_property("max_cosine_after_projection", result["cosine"])
    # Sums over samples are rounded in another order: 1e-7 of a gradient of size 1, times the
    # learning rate; AdamW divides by the root of the second moment, at most 1 / epsilon.
    assert difference < 2e-6
    config = config_of(cell)
    if not config.restoration:
        # Rounding of float32: of a gradient, and of weights of size 1 that move by 1e-3.
        assert result["cosine"] < (1e-6 if config.target == "gradient" else 1e-4)
    for ours, theirs in zip(expected_log, result["log"], strict=True):
        for key in ours:
            if key.startswith("ogpsa/") and key != "ogpsa/basis_megabytes":
                # Drifts and changes are differences of losses of size 5, rounded to 5e-7 each.
                is_difference = "drift" in key or "change" in key
                tolerance = 5e-6 if is_difference else 1e-6
                assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=tolerance), key


@on_engines([cell for cell in CELLS if cell[2] in RESUMED_METHODS], "cell")
def test_resume_on_several_processes_is_bitwise(engine, cell, launched):
    result = load(launched(engine), cell)
    assert max_difference(result["weights"], result["resumed"]) == 0


@every_cell
def test_the_basis_is_stored_in_the_shards_of_the_gradient(engine, cell, launched):
    """Memory per process is rank x trained parameters x 4 bytes / shards."""
    result = load(launched(engine), cell)
    held, basis_bytes = result["held_entries_and_basis_bytes"].T
    if engine == "ddp":
        assert held.tolist() == [result["num_entries"]] * 2
    else:
        num_replicas = 2 if engine == "hsdp" else 1
        assert held.sum() == result["num_entries"] * num_replicas
        # FSDP2 gives one process two of the three rows of LoRA's A, the others halve everything.
        assert held.max() <= result["num_entries"] * 2 / 3
    rank, bytes_per_entry = 2, 4
    assert (basis_bytes == rank * held * bytes_per_entry).all()


def messages(engine, config, rank, num_parameters):
    """How many numbers a logged step sends: tables of shards, decisions of replicas."""
    num_blocks = num_parameters if config.scope == "parameter" else 1

    def table(width):
        return [num_parameters * width] if engine != "ddp" else []

    def decision(size):
        return [size] if engine in ("ddp", "hsdp") and size else []

    if config.target == "gradient":
        # That the gradient is finite is seen in the same table. Then the update is measured.
        return [*table(rank + 1), *decision(num_blocks * rank), *table(rank + 1)]
    # The engines of torch have the trainer's own norm to see it in.
    is_finite = table(1) if config.target == "none" or engine.startswith("zero") else []
    if config.target == "none":
        return [*is_finite, *table(rank + 1)]
    sent = is_finite
    if config.metric == "optimizer":  # the mean of every second moment, and the rows' own products
        sent += [*table(1), *decision(num_parameters)]
        sent += table(rank + 2 + rank * (rank + 1) // 2)
    else:
        sent += table(rank + 1)
    return [*sent, *decision(num_blocks * rank)]


@every_cell
def test_a_step_sends_a_table_and_what_replicas_must_agree_on(engine, cell, launched):
    result = load(launched(engine), cell)
    config, bytes_per_number = config_of(cell), 4
    # The divergence has no gradient at the start, and so no direction.
    ranks = [0 if config.capability_loss == "kl" else 2, 2, 2]
    sizes = [n for rank in ranks for n in messages(engine, config, rank, result["num_parameters"])]
    assert result["sent_bytes"] == [size * bytes_per_number for size in sizes]


@on_engines([f"leak-{name}" for name in LEAKS])
def test_a_refresh_leaves_no_gradient_in_the_engine(engine, job, launched):
    """
    Refreshes before every step, but no projection: bit for bit plain TRL, and its files, to which
    every checkpoint adds the list of them that makes it whole.
    """
    folder = launched(engine)
    result = load(folder, job)
    plain, refreshed = result["plain"], result["refreshed"]
    assert max_difference(plain["weights"], refreshed["weights"]) == 0
    if engine == "zero3":  # it counts only parameters that happen to be gathered
        del plain["log"][-1]["total_flos"], refreshed["log"][-1]["total_flos"]
    assert plain["log"] == refreshed["log"]
    paths = {kind: folder / job / kind for kind in ("plain", "refreshed")}
    files = {
        kind: sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
        for kind, path in paths.items()
    }
    lists = [f"checkpoint-{step}/{LIST_NAME}" for step in (1, 2, 3)]
    assert sorted([*files["plain"], *lists]) == files["refreshed"]
    saved = [file for file in files["plain"] if file.endswith(".safetensors")]
    assert len(saved) == 4  # three checkpoints of the model only, and the last
    for file in saved:
        left, right = (load_file(path / file) for path in paths.values())
        assert max_difference(left, right) == 0


@every_gate
def test_a_gate_leaves_no_trace_in_training(engine, job, launched):
    """Measured after every step, and bit for bit the run without; so is the resumed one."""
    result = load(launched(engine), job)
    without, *others = result["weights"]
    assert [max_difference(without, other) for other in others] == [0, 0]
    logs = result["logs"]
    if engine == "zero3":  # it counts only parameters that happen to be gathered
        for log in logs:
            del log[-1]["total_flos"]
    assert logs[0] == logs[1]


@every_gate
def test_a_gate_measures_what_one_process_does(engine, job, launched, base_model_path, tmp_path):
    trainer = make(
        "one", GATE_CELLS[job], base_model_path, tmp_path, 1, ogpsa=job == "gate-ogpsa",
        learning_rate=0.01, adam_epsilon=1e-2, save_strategy="no",
    )  # fmt: skip
    gated(trainer, gate_groups(), gate_config())
    trainer.train()
    result = load(launched(engine), job)
    assert result["resumed_entries"] == result["entries"]
    for ours, theirs in zip(gate_entries(trainer), result["entries"], strict=True):
        # Losses of size 5 in float32, of weights that differ by 2e-6.
        assert ours == pytest.approx(theirs, abs=1e-5)


@every_gate
def test_a_gate_acts_on_all_processes_at_once(engine, job, launched):
    """It stops them after the same step, and loads the checkpoint of that step as the best."""
    result = load(launched(engine), job)
    assert result["stopped_at"] == [1] * NUM_PROCESSES[engine]
    assert max_difference(*result["first_and_best"]) == 0
    assert not result["is_exceeded"]


@on_engines(["bf16"])
def test_bf16_leaves_nothing_in_the_subspace_and_resumes_bitwise(engine, job, launched):
    result = load(launched(engine), job)
    assert result["backend"] == ("Zero1BF16Backend" if engine == "zero1" else RUNS_AS[engine][1])
    assert result["cosine"] < 1e-6
    assert max_difference(result["weights"], result["resumed"]) == 0


@pytest.fixture(scope="session")
def in_float32(base_model_path, tmp_path_factory):
    """What one process makes of the default in float32: weights, and steps with a cap, by rate."""
    results = {}
    for rate in BF16_RATES:
        trainer = make(
            "one", DEFAULT_CELL, base_model_path, tmp_path_factory.mktemp(rate), 1,
            **bf16_options(rate),
        )  # fmt: skip
        trainer.train()
        results[rate] = weights(trainer), capped_steps(trainer)
    return results


def divergence(model_path, state):
    """From the model of these tests, in float32, over the whole vocabulary."""
    start, model = (AutoModelForCausalLM.from_pretrained(model_path) for _ in range(2))
    model.load_state_dict(state, strict=False)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    rows = [row for group in capability_groups().values() for row in group]
    with torch.no_grad():
        return literal_kl(model, start, tokenizer, rows).item()


@on_engines(["bf16-default"], engines=[engine for engine in ENGINES if engine != "zero1"])
def test_bf16_protects_as_float32_does(engine, job, launched, in_float32, base_model_path):
    """
    Where a step can be seen in bfloat16 the divergence is at most twice that of float32; where it
    cannot, it is not above plain training's. Restoration is not at its cap where it is not there.
    """
    results = load(launched(engine), job)
    for rate, (expected, expected_capped) in in_float32.items():
        weights_, capped = results[f"{rate} preserve"]
        plain, _ = results[f"{rate} plain"]
        ours, theirs = divergence(base_model_path, weights_), divergence(base_model_path, plain)
        if rate == "large":
            assert ours < 2 * divergence(base_model_path, expected)
            assert ours < theirs / 2
        else:
            # Weights in bfloat16 mostly stay where they are, in both.
            assert ours <= 1.1 * theirs + 1e-9
        assert sum(capped) <= sum(expected_capped) + 1


@pytest.fixture(scope="session")
def one_process_with_rates(base_model_path, tmp_path_factory):
    return train_with_rates("one", base_model_path, tmp_path_factory.mktemp("rates"), 1)


@on_engines(["rates"])
def test_a_group_at_rate_zero_is_frozen(
    engine, job, launched, one_process_with_rates, base_model_path
):
    """Bit for bit; all else takes the steps of one process."""
    result = load(launched(engine), job)
    assert max_difference(result, one_process_with_rates) < 2e-6
    before = dict(AutoModelForCausalLM.from_pretrained(base_model_path).named_parameters())
    distances = {name: (value - before[name]).abs().max() for name, value in result.items()}
    assert distances.pop("model.embed_tokens.weight") == 0
    assert min(distances.values()) > 1e-5


@on_engines(["roundings"], engines=("ddp", "hsdp"))
def test_replicas_that_add_in_another_order_stay_the_same(engine, job, launched):
    assert set(load(launched(engine), job).values()) == {0.0}


@pytest.mark.parametrize("package", ["torchao", "bitsandbytes"])
@on_engines(["8-bit"])
def test_8_bit_states_give_the_second_moment_of_adamw(engine, job, package, launched):
    pytest.importorskip(package, exc_type=ImportError)
    optim = {"torchao": "adamw_torch_8bit", "bitsandbytes": "adamw_bnb_8bit"}[package]
    if package == "bitsandbytes" and engine in ("fsdp2", "hsdp"):
        pytest.skip("bitsandbytes takes no step of a DTensor")
    difference, cosine = load(launched(engine), job)[optim]
    # Half the distance between two of the values that a code can have; see test_optimizers.py.
    assert difference < 0.9 / 127 / 2
    assert cosine < 1e-4


@on_engines(["signs"])
def test_processors_that_differ_in_signs_make_one_basis(engine, job, launched):
    folder = launched(engine)
    expected = load(folder, SIGNS_CELL)["weights"]
    assert max_difference(expected, load(folder, job)) == 0


@on_engines(["errors"])
def test_a_step_that_reaches_no_gradient_is_an_error(engine, job, launched):
    """Called after the step, as under an engine that has made it already."""
    of_project, of_step = load(launched(engine), job)
    assert "No parameter has a gradient on process 0" in of_project
    if engine.startswith("zero"):
        assert "ended without a step of the DeepSpeed engine" in of_step
    else:
        assert of_step == of_project


@pytest.mark.slow
def test_fsdp2_resumes_on_another_number_of_processes(launched, base_model_path, tmp_path):
    """The basis is sharded anew; the rest of the run is that of two processes."""
    arguments = ("fsdp2", base_model_path, tmp_path, "quick", launched("fsdp2"))
    launch(4, main, *arguments, folder=tmp_path)
    for cell in RESUMED_ELSEWHERE:
        expected = load(launched("fsdp2"), cell)["weights"]
        assert max_difference(expected, load(tmp_path, cell)) < 2e-6


@pytest.mark.parametrize("cell", RESUMED_ELSEWHERE, ids=name_of)
def test_one_process_resumes_what_ddp_began(cell, launched, base_model_path, tmp_path):
    folder = launched("ddp")
    trainer = make("one", cell, base_model_path, tmp_path, 1, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(folder / name_of(cell) / "checkpoint-1"))
    expected = load(folder, cell)["weights"]
    assert max_difference(expected, weights(trainer)) < 2e-6
