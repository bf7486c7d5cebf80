"""Short training runs on the toy world, and what they are compared by."""

import itertools

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from laws import largest_cosine
from ogpsa_trl import CapabilityGate, OGPSAConfig, OGPSADPOTrainer, OGPSASFTTrainer
from ogpsa_trl.benchmark.toy_model import toy_tokenizer
from ogpsa_trl.benchmark.toy_world import ToyWorld

WORLD = ToyWorld(seed=0)
TRAINERS = {"sft": OGPSASFTTrainer, "dpo": OGPSADPOTrainer}
PLAIN_TRAINERS = {"sft": SFTTrainer, "dpo": DPOTrainer}
CONFIGS = {"sft": SFTConfig, "dpo": DPOConfig}


def safety_data(stage, num_rows=16):
    data = WORLD.safety_sft() if stage == "sft" else WORLD.safety_preferences()
    return data.select(range(num_rows))


def capability_groups(num_samples=6):
    return WORLD.capability_groups(num_samples)


# Plain SGD with learning rate 1 and no clipping: the gradient is what the weights lost.
ARGUMENTS = {
    "max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1.0,
    "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0, "use_cpu": True,
    "bf16": False, "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no",
    "report_to": "none", "disable_tqdm": True, "seed": 7,
}  # fmt: skip


def arguments(stage, output_dir, **overrides):
    return CONFIGS[stage](**{"output_dir": str(output_dir), **ARGUMENTS, **overrides})


ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 4}
SAVES = {"save_strategy": "steps", "save_steps": 1}


def paper(**settings):
    """The published form, with some of its settings replaced."""
    return OGPSAConfig.from_preset("paper", **settings)


def make_trainer(
    stage, model, output_dir, *, plain=False, capability=None, config=None, data=None, more=None,
    **overrides,
):  # fmt: skip
    """A trainer of the package, or TRL's own if `plain`."""
    keywords = dict(more or {})
    if not plain:
        if capability is not None and config is None:
            config = paper()
        keywords |= {"capability_dataset": capability, "ogpsa_config": config}
    trainer_class = (PLAIN_TRAINERS if plain else TRAINERS)[stage]
    args = arguments(stage, output_dir, **overrides)
    torch.manual_seed(args.seed)  # trl 1.9 makes an adapter before it seeds, trl 1.16 after
    return trainer_class(
        model,
        args=args,
        train_dataset=safety_data(stage) if data is None else data,
        **keywords,
    )


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def trained(*args, **kwargs):
    """Train; the trainer, its weights before, and the weights after."""
    trainer = make_trainer(*args, **kwargs)
    before = weights(trainer)
    trainer.train()
    return trainer, before, weights(trainer)


def flat(tensors):
    """All entries of a state, or of another mapping of tensors."""
    return torch.cat([tensor.flatten() for tensor in tensors.values()]).double()


class SaveAfter(TrainerCallback):
    """Saves after these steps, and no others: a checkpoint takes as long as a step."""

    def __init__(self, *steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= state.global_step in self.steps


def assert_resume_is_bitwise(make, folder, steps):
    """Runs of `make()` resumed after these steps end, and log, as the one that never stopped."""
    straight = make()
    straight.add_callback(SaveAfter(*steps))
    straight.train()
    for step in steps:
        resumed = make()
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert_same_run(resumed, straight)
    return straight, resumed


def assert_same_run(resumed, straight):
    assert max_difference(weights(resumed), weights(straight)) == 0
    # TRL counts tokens from zero after a resume; the last entry sums up this call only.
    without = ("runtime", "per_second", "seconds", "refresh_share", "num_tokens")
    assert logged(resumed, without)[:-1] == logged(straight, without)[:-1]


def max_difference(left, right):
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


def logged(trainer, without=("runtime", "per_second", "seconds", "refresh_share")):
    """The log without the entries that measure time."""
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in without)}
        for entry in trainer.state.log_history
    ]


def gated(trainer, groups, config=None):
    """Put a gate on a trainer."""
    gate = CapabilityGate(trainer, groups, config)
    trainer.add_callback(gate)
    return gate


def contradicted(num_rows=8):
    """Gate data: the requests of the training data, with answers that training makes unlikely."""
    rows = safety_data("sft", num_rows)
    return Dataset.from_list([{"prompt": r["prompt"], "completion": " 6 6 0 6 6 0"} for r in rows])


def gate_entries(trainer):
    return [e for e in logged(trainer) if "ogpsa/gate_largest_increase" in e]


def trl_entries(trainer):
    """The log without the entries of a gate."""
    return [e for e in logged(trainer) if "ogpsa/gate_largest_increase" not in e]


class WeightsCallback(TrainerCallback):
    """The weights before training and after every step."""

    def __init__(self):
        self.states = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.states.append({n: p.detach().clone() for n, p in model.named_parameters()})

    on_step_end = on_train_begin


class CosineCallback(TrainerCallback):
    """The largest cosine of each gradient with any basis row, just before the optimizer's step."""

    def __init__(self):
        self.cosines = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        subspace = self.trainer.subspace
        for (_, parameter), rows in zip(subspace.backend.parameters, subspace.basis, strict=True):
            if parameter.grad is not None and rows is not None and parameter.grad.any():
                cosine = largest_cosine([parameter.grad.flatten()], [rows], "parameter")
                self.cosines.append(cosine)


def change_losses(trainer, groups, change):
    """Let every sum of the capability losses of these groups be another: a function of it."""
    original = trainer.capability_loss.sum

    def changed(batch):
        loss = original(batch)
        is_meant = any(sample.name.split("/")[0] in groups for sample in batch.samples)
        return change(loss) if is_meant else loss

    trainer.capability_loss.sum = changed


def to_messages(rows):
    """Prompt-completion rows as conversations of the same text."""
    texts = [(row["prompt"].removesuffix(" =>").strip(), row["completion"].strip()) for row in rows]
    roles = ("user", "assistant")
    return Dataset.from_list(
        [{"messages": [{"role": r, "content": t} for r, t in zip(roles, pair, strict=True)]}
         for pair in texts]
    )  # fmt: skip


def completion_log_probs(model, tokenizer, row):
    """Of every token after the prompt, over the whole vocabulary, shape [T, V]; and its tokens."""
    prompt_ids = tokenizer(row["prompt"])["input_ids"]
    target_ids = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
    ids = torch.tensor(prompt_ids + target_ids)[None, :-1]  # the end is only predicted
    logits_TV = model(input_ids=ids).logits[0, len(prompt_ids) - 1 :]
    return logits_TV.double().log_softmax(dim=-1), torch.tensor(target_ids)


def literal_kl(model, start, tokenizer, rows):
    """Token-mean KL(start || model) on the completions, over the whole vocabulary."""
    divergences = []
    for row in rows:
        with torch.no_grad():
            expected, _ = completion_log_probs(start, tokenizer, row)
        actual, _ = completion_log_probs(model, tokenizer, row)
        divergences.append((expected.exp() * (expected - actual)).sum(dim=-1))
    return torch.cat(divergences).mean()


def nats_per_token(scores):
    """The mean log-likelihood of the scored tokens of all completions."""
    return (scores.log_probs.sum() / scores.num_tokens.sum()).item()


def literal_drift(before, after, prompts, completions):
    """KL(before || after) per token of the completions, one sample at a time."""
    tokenizer = toy_tokenizer()
    total, num_tokens = 0.0, 0
    for prompt, completion in zip(prompts, completions, strict=True):
        start = len(tokenizer(prompt)["input_ids"])
        ids = torch.tensor([tokenizer(prompt + completion + "<eos>")["input_ids"]])
        with torch.no_grad():
            old, new = (
                model(input_ids=ids).logits[0, start - 1 : -1].double().log_softmax(-1)
                for model in (before, after)
            )
        total += (old.exp() * (old - new)).sum().item()
        num_tokens += len(old)
    return total / num_tokens


def literal_nll(model, tokenizer, rows):
    """Token-mean NLL of the completions of some rows, one sample at a time, from the logits."""
    losses = []
    for row in rows:
        log_probs_TV, targets_T = completion_log_probs(model, tokenizer, row)
        losses.append(-log_probs_TV.gather(1, targets_T[:, None])[:, 0])
    return torch.cat(losses).mean()


def literal_model(path, state=None):
    """A model with its tokenizer, at the weights of a state."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    if state is not None:
        model.load_state_dict(state)
    return model, AutoTokenizer.from_pretrained(path)


def literal_losses(path, state=None, groups=None):
    """The loss of every capability group, or of others, by name."""
    model, tokenizer = literal_model(path, state)
    with torch.no_grad():
        return {
            name: literal_nll(model, tokenizer, rows).item()
            for name, rows in (groups or capability_groups()).items()
        }


def literal_gradients(path, state):
    """The gradients of the loss of every capability group, by autograd, shape [R, N]."""
    model, tokenizer = literal_model(path, state)
    losses = [literal_nll(model, tokenizer, rows) for rows in capability_groups().values()]
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in gradients])


def step_cosines(states, path, scope):
    """Of every step with the literal capability gradients before it, the largest."""
    for before, after in itertools.pairwise(states):
        sizes = [tensor.numel() for tensor in before.values()]
        update, rows = flat(after) - flat(before), literal_gradients(path, before)
        yield largest_cosine(update.split(sizes), rows.split(sizes, dim=1), scope)
