"""
Writes the table in docs/performance.md from the configurations and the formulas there: `make docs`.

tests/test_recipes.py fails where the file does not say what they say. Nothing is measured here.
"""

import math
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path

from ogpsa_trl.cli.train_arguments import RunArguments
from ogpsa_trl.cli.train_keys import parse_run
from ogpsa_trl.method.draws import Draws

FILE = Path(__file__).with_name("performance.md")
BEGIN, END = "<!-- made by `make docs` -->\n", "<!-- end -->\n"


@dataclass(frozen=True)
class Model:
    """Shapes of a Llama or Qwen2: what `config.json` on the Hub says."""

    name: str
    layers: int
    hidden: int
    key_value: int
    feed_forward: int
    vocabulary: int
    has_bias: bool  # of queries, keys and values

    @property
    def linear_shapes(self) -> list[tuple[int, int]]:
        """Of the seven matrices of a layer."""
        h, kv, f = self.hidden, self.key_value, self.feed_forward
        return [(h, h), (h, kv), (h, kv), (h, h), (h, f), (h, f), (f, h)]

    @property
    def in_layers(self) -> int:
        """Entries of the matrices of all layers."""
        return self.layers * sum(a * b for a, b in self.linear_shapes)

    @property
    def parameters(self) -> int:
        bias = self.hidden + 2 * self.key_value if self.has_bias else 0
        embeddings = 2 * self.vocabulary * self.hidden  # not tied
        norms = (2 * self.layers + 1) * self.hidden
        return self.in_layers + embeddings + norms + self.layers * bias

    def adapter(self, lora_r: int) -> int:
        """Parameters of LoRA on the seven matrices."""
        return self.layers * sum(lora_r * (a + b) for a, b in self.linear_shapes)


QWEN = Model("Qwen/Qwen2.5-7B-Instruct", 28, 3584, 512, 18944, 152064, True)
LLAMA = Model("meta-llama/Llama-3.1-8B-Instruct", 32, 4096, 1024, 14336, 128256, False)
MODELS = {model.name: model for model in (QWEN, LLAMA)}

# Of a GPU: peak in bfloat16, dense, as its maker gives it; what of it training is assumed to reach.
PEAK = {"H100, 80 GB": 989e12, "RTX 4090, 24 GB": 165e12}
UTILISATION = {"H100, 80 GB": 0.35, "RTX 4090, 24 GB": 0.25}
# Assumed of the data, after the conversion: rows, and mean tokens of a text.
ROWS = {"sft": 50_000, "dpo": 25_000}
TOKENS = 300
CAPABILITY_TOKENS = 400
BEGINNING_TOKENS = 100  # of one, cut after the first tokens of its answer


@dataclass(frozen=True)
class Recipe:
    """What is run, and where."""

    title: str
    engine: str
    gpus: int
    options: str

    @property
    def command(self) -> str:
        return f"ogpsa train --accelerate_config {self.engine} {self.options}"

    @property
    def gpu(self) -> str:
        return "RTX 4090, 24 GB" if "qlora" in self.options else "H100, 80 GB"

    @property
    def shards(self) -> int:
        return self.gpus if self.engine in ("fsdp2", "zero2") else 1

    def run(self) -> RunArguments:
        """Its settings, as scripts/train.py reads them."""
        return parse_run([*shlex.split(self.options), "--use_cpu", "true"])  # bf16 needs a device


_LLAMA = f"--model_name_or_path {LLAMA.name}"
RECIPES = [
    Recipe("SFT", "zero2", 8, "--config sft"),
    Recipe("SFT", "fsdp2", 8, "--config sft"),
    Recipe("DPO", "zero2", 8, "--config dpo"),
    Recipe("DPO", "fsdp2", 8, "--config dpo"),
    Recipe(
        "SFT -> DPO", "zero2", 8,
        "--config dpo --model_name_or_path runs/sft --output_dir runs/sft_dpo",
    ),
    Recipe("SFT, published form", "zero2", 8, "--config paper_sft"),
    Recipe("DPO, published form", "zero2", 8, "--config paper_dpo"),
    Recipe("SFT, LoRA", "single", 1, "--config sft_lora"),
    Recipe("DPO, LoRA", "single", 1, "--config dpo_lora"),
    Recipe("SFT, QLoRA", "single", 1, "--config sft_qlora"),
    Recipe("DPO, QLoRA", "single", 1, "--config dpo_qlora"),
    Recipe("SFT", "zero2", 8, f"--config sft {_LLAMA} --output_dir runs/llama_sft"),
    Recipe("DPO", "fsdp2", 8, f"--config dpo {_LLAMA} --output_dir runs/llama_dpo"),
    Recipe(
        "SFT -> DPO", "zero2", 8,
        "--config dpo --model_name_or_path runs/llama_sft --output_dir runs/llama_sft_dpo",
    ),
    Recipe("SFT, LoRA", "single", 1, f"--config sft_lora {_LLAMA} --output_dir runs/llama_lora"),
    Recipe("SFT, QLoRA", "single", 1, f"--config sft_qlora {_LLAMA} --output_dir runs/llama_qlora"),
]  # fmt: skip


def model_of(recipe: Recipe, run: RunArguments) -> Model:
    """That of a run that goes on from another, in runs/, is the one that the other began with."""
    for other in RECIPES:
        if other.run().training.output_dir == run.model.model_name_or_path and other != recipe:
            return model_of(other, other.run())
    return MODELS[str(run.model.model_name_or_path)]


def static_bytes(recipe: Recipe, model: Model, run: RunArguments) -> float:
    """Weights, gradients, optimizer, basis, reference model: what a GPU always holds."""
    rank = len({entry.group for entry in run.train.capability_datasets})
    basis = rank * (2 if run.ogpsa.basis_dtype == "bfloat16" else 4)
    n = model.parameters
    if run.model.use_peft:
        others = n - model.in_layers
        # 4 bits, 8 for the scale of 64 of them, 32 for the scale of 256 scales.
        base = model.in_layers * (4 + 8 / 64 + 32 / 64 / 256) / 8 if run.model.load_in_4bit else 0
        base += 2 * others if run.model.load_in_4bit else 2 * n
        return base + (4 + 4 + 8 + basis) * model.adapter(run.model.lora_r)
    sharded = (4 + 4 + 8 + basis) * n / recipe.shards
    is_dpo = run.train.stage == "dpo"
    if recipe.engine == "zero2":
        return sharded + 2 * n * (2 if is_dpo else 1)
    # Two layers, and embeddings and head, are gathered in bfloat16.
    gathered = 2 * (2 * model.in_layers / model.layers + 2 * model.vocabulary * model.hidden)
    return sharded + gathered + (4 * n / recipe.shards if is_dpo else 0)


def activation_bytes(model: Model, num_tokens: int) -> float:
    """With checkpoints at every layer: its inputs, and the inside of one layer, in bfloat16."""
    inside = 8 * model.hidden + 2 * model.key_value + 4 * model.feed_forward
    return 2 * num_tokens * (model.layers * model.hidden + inside)


def memory_bytes(recipe: Recipe) -> float:
    """The most that a GPU holds, where a batch has texts of `max_length`."""
    run = recipe.run()
    model = model_of(recipe, run)
    texts = run.training.per_device_train_batch_size * (2 if run.train.stage == "dpo" else 1)
    training = activation_bytes(model, texts * run.training.max_length)
    num_tokens = run.ogpsa.capability_batch_size * run.training.max_length
    # Scored tile by tile (see ogpsa_trl/tensors/tiled_head.py).
    logits = 20 * min(num_tokens, 256) * model.vocabulary
    refresh = activation_bytes(model, num_tokens)
    refresh += logits if run.ogpsa.capability_loss == "kl" else 0
    trained = model.adapter(run.model.lora_r) if run.model.use_peft else model.parameters
    copy = 4 * trained / recipe.shards  # when the activations are gone
    return static_bytes(recipe, model, run) + max(training, refresh, copy)


def hours(recipe: Recipe) -> tuple[float, float]:
    """Of training without refreshes, and of the refreshes."""
    run = recipe.run()
    model, args, ogpsa = model_of(recipe, run), run.training, run.ogpsa
    is_dpo = run.train.stage == "dpo"
    forward, n = 2, model.parameters
    passes = forward * (3 if run.model.use_peft else 4)  # forward twice, backward once or twice
    rows = ROWS[run.train.stage] * args.num_train_epochs
    tokens = rows * TOKENS * (2 if is_dpo else 1)
    training = n * tokens * (passes + (forward if is_dpo else 0)) / recipe.gpus

    batch = recipe.gpus * args.per_device_train_batch_size * args.gradient_accumulation_steps
    refreshes = rows / batch / ogpsa.refresh_interval
    num_groups = len({entry.group for entry in run.train.capability_datasets})
    num_samples, num_beginnings = ogpsa.samples_per_refresh or ogpsa.num_samples, 0
    if ogpsa.capability_token_share is not None and ogpsa.samples_per_refresh is None:
        draws = Draws.within(
            ogpsa.capability_token_share * ogpsa.refresh_interval * batch * tokens / rows,
            [CAPABILITY_TOKENS] * num_groups, [BEGINNING_TOKENS] * num_groups,
            num_processes=recipe.gpus, num_parts=ogpsa.gradients_per_group, seed=args.seed,
        )  # fmt: skip
        num_samples = draws.num_samples or num_samples
        num_groups = draws.num_groups or num_groups
        num_beginnings = draws.num_beginnings[0]
    turns = [math.ceil(num_samples / recipe.gpus) * CAPABILITY_TOKENS]
    if num_beginnings:
        turns.append(math.ceil(num_beginnings / recipe.gpus) * BEGINNING_TOKENS)
    tokens = num_groups * statistics.mean(turns)
    refreshing = refreshes * n * tokens * passes

    speed = PEAK[recipe.gpu] * UTILISATION[recipe.gpu] * 3600
    return training / speed, refreshing / speed


def two_digits(value: float) -> str:
    return f"{value:,.{max(0, 1 - math.floor(math.log10(value)))}f}"


def table() -> str:
    """All recipes, one a row."""
    lines = ["| | model | GPUs | GB of each | hours | + refreshes |", "|---|---|---|---|---|---|"]
    commands: list[str] = []
    for number, recipe in enumerate(RECIPES, start=1):
        training, refreshing = hours(recipe)
        model = model_of(recipe, recipe.run()).name.partition("/")[2].removesuffix("-Instruct")
        gpus = f"{recipe.gpus} {recipe.gpu}" + (f", {recipe.engine}" if recipe.gpus > 1 else "")
        numbers = [memory_bytes(recipe) / 1e9, training, refreshing]
        cells = [f"{number}. {recipe.title}", model, gpus, *map(two_digits, numbers)]
        lines.append("| " + " | ".join(cells) + " |")
        commands.append(f"{recipe.command}  # {number}")
    return "\n".join([*lines, "", "```", *commands, "```"]) + "\n"


def document(text: str) -> str:
    """The page with its table made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    FILE.write_text(document(FILE.read_text(encoding="utf-8")), encoding="utf-8")
