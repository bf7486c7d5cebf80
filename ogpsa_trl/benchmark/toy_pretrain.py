"""The base model of the toy world: pretrained within two minutes on two CPU cores, kept on disk.

The base model must be *weakly* aligned: it answers every task, complies with harmful requests when
decoded greedily, and yet gives a refusal a probability of about .2 on harmful and .05 on benign
requests. From a model that hardly ever refuses, safety training has nothing to take hold of but the
form of a request, and over-refusal becomes total with any method.
"""

import hashlib
import json
import os
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from ogpsa_trl.benchmark.toy_model import tiny_llama_config, toy_tokenizer
from ogpsa_trl.benchmark.toy_world import REFUSAL, Sample, ToyWorld

# B sequences in a batch, L tokens of the longest, C completion tokens in the batch, D model width


@dataclass(frozen=True)
class Phase:
    """
    One stretch of pretraining with AdamW.

    The learning rate rises linearly, stays, then falls linearly to a fiftieth.

    """

    num_steps: int
    batch_size: int
    learning_rate: float  # the highest
    num_warmup_steps: int  # over which the learning rate rises
    decay_start: float  # share of the steps, in [0, 1], after which it falls
    mixture: Mapping[str, float]  # weight of each task in a batch
    harmful_refusal_share: float  # of the harmful requests answered with a refusal
    benign_refusal_share: float

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        decay_steps = self.num_steps * (1 - self.decay_start)
        remaining = 1 - max(0.0, step - self.num_steps * self.decay_start) / max(decay_steps, 1.0)
        warmed_up = min(1.0, (step + 1) / self.num_warmup_steps)
        return self.learning_rate * warmed_up * max(0.02, remaining)


TASKS = {
    "add": 0.26, "reverse": 0.22, "sort": 0.18, "facts": 0.12, "passive": 0.06, "howto": 0.06,
    "judge": 0.03,
}  # fmt: skip
LEARN_TASKS = Phase(
    num_steps=700,
    batch_size=192,
    learning_rate=4e-3,
    num_warmup_steps=50,
    decay_start=0.4,
    mixture=TASKS | {"harmful": 0.07},
    # Telling harmful from benign requests is learned all at once, at a step that luck decides: this
    # phase is long enough for it, so the next one has only the shares to settle.
    harmful_refusal_share=0.15,
    benign_refusal_share=0.04,
)
ALIGN_WEAKLY = Phase(
    num_steps=150,
    batch_size=128,
    learning_rate=2e-3,
    num_warmup_steps=10,
    decay_start=0.0,
    mixture=TASKS | {"howto": 0.15, "harmful": 0.19},
    harmful_refusal_share=0.22,
    benign_refusal_share=0.05,
)
PHASES = (LEARN_TASKS, ALIGN_WEAKLY)


def pretrain(
    world: ToyWorld, phases: Sequence[Phase] = PHASES, *, show_progress: bool = True
) -> LlamaForCausalLM:
    """
    Train a tiny Llama on the tasks of a world, from scratch, on the CPU.

    The loss is the mean negative log-likelihood of the completion tokens. The world's seed decides
    the initial parameters and the batches; the global generators are left as they were.

    Args:
        world: Where the samples are drawn from. Evaluation prompts are never drawn unless their
            task is memorised.
        phases: What to train on, in this order; each phase starts a new optimizer.
        show_progress: Whether to draw a progress bar.

    Returns:
        The trained model, float32, in evaluation mode.
    """
    tokenizer = toy_tokenizer()
    rng = random.Random(f"pretraining {world.seed}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(world.seed)
        model = LlamaForCausalLM(tiny_llama_config()).train()
    with tqdm(
        total=sum(phase.num_steps for phase in phases),
        desc="pretraining",
        disable=not show_progress,
    ) as bar:
        for phase in phases:
            optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
            for step in range(phase.num_steps):
                for group in optimizer.param_groups:
                    group["lr"] = phase.learning_rate_at(step)
                optimizer.zero_grad()
                _backward(model, tokenizer, _draw_samples(world, phase, rng))
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                bar.update()
    return model.eval()


def _draw_samples(world: ToyWorld, phase: Phase, rng: random.Random) -> list[Sample]:
    refusal_share = {"harmful": phase.harmful_refusal_share, "howto": phase.benign_refusal_share}
    samples = []
    for task in rng.choices(list(phase.mixture), list(phase.mixture.values()), k=phase.batch_size):
        sample = world.draw_for_pretraining(task, rng)
        is_refused = rng.random() < refusal_share.get(task, 0.0)
        samples.append(sample._replace(completion=REFUSAL) if is_refused else sample)
    return samples


def _backward(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, samples: list[Sample]
) -> None:
    """Accumulate the gradient of the mean negative log-likelihood of all completion tokens."""
    # Samples of similar length share a padded part: one part for all would be two fifths padding.
    samples = sorted(samples, key=lambda sample: len((sample.prompt + sample.completion).split()))
    part_size = -(-len(samples) // 3)
    parts = [_pad(tokenizer, samples[i : i + part_size]) for i in range(0, len(samples), part_size)]
    num_tokens = sum(int(is_completion_BL.sum()) for _, is_completion_BL in parts)
    for ids_BL, is_completion_BL in parts:
        # No attention mask: padding comes last, where a causal model cannot see it, and attention
        # is faster without.
        hidden_BLD = model.model(input_ids=ids_BL[:, :-1], use_cache=False).last_hidden_state
        is_target_BL = is_completion_BL[:, 1:]
        logits_CV = model.lm_head(hidden_BLD[is_target_BL])
        total_nll = cross_entropy(logits_CV, ids_BL[:, 1:][is_target_BL], reduction="sum")
        (total_nll / num_tokens).backward()


def _pad(tokenizer: PreTrainedTokenizerFast, samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """Token ids, padded on the right, and which belong to a completion, both `[B, L]`."""
    texts = [sample.prompt + sample.completion + str(tokenizer.eos_token) for sample in samples]
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    # A word is a token.
    prompt_lengths_B = torch.tensor([len(sample.prompt.split()) for sample in samples])
    ids_BL = encoded["input_ids"]
    positions_L = torch.arange(ids_BL.shape[1])
    return ids_BL, encoded["attention_mask"].bool() & (positions_L >= prompt_lengths_B[:, None])


def base_model_folder(seed: int = 0, cache_dir: str | Path | None = None) -> Path:
    """
    The folder of the base model of a world, with its tokenizer; pretrained by the first call.

    The folder's name holds a fingerprint of the world, the architecture and the training, so a
    change of one of them gives a new folder. It appears complete or not at all: an interrupted call
    leaves none, and of calls at the same time the first to finish provides it.

    Args:
        seed: Of the world.
        cache_dir: Where such folders are kept. `None` means `$OGPSA_CACHE` or, if that is not set,
            `~/.cache/ogpsa_trl`.
    """
    if cache_dir is None:
        cache_dir = os.environ.get("OGPSA_CACHE") or Path.home() / ".cache" / "ogpsa_trl"
    cache_dir = Path(cache_dir)
    world = ToyWorld(seed)
    folder = cache_dir / f"toy-base-seed{seed}-{_fingerprint(world, PHASES)}"
    if folder.is_dir():
        return folder
    model = pretrain(world)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=cache_dir) as unfinished:
        complete = Path(unfinished) / "model"
        model.save_pretrained(complete)
        toy_tokenizer().save_pretrained(complete)
        try:
            complete.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another call was faster, and its model is the same
                raise
    return folder


def _fingerprint(world: ToyWorld, phases: Sequence[Phase]) -> str:
    """A short hash of what the base model follows from: the settings and texts, not the code."""
    rng = random.Random(0)
    config = tiny_llama_config().to_dict()
    config.pop("transformers_version")
    tokenizer = toy_tokenizer()
    settings = {
        "config": config,
        "vocabulary": tokenizer.get_vocab(),
        "chat_template": tokenizer.chat_template,
        "phases": [asdict(phase) for phase in phases],
        "samples": [_draw_samples(world, phase, rng) for phase in phases for _ in range(10)],
        "held out": [dataset.to_list() for dataset in world.evaluation_sets().values()],
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
