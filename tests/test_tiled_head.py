"""Scores by tiles are those of the whole logits, whatever a model does to them, in less memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from ogpsa_trl.tensors import tiled_head
from ogpsa_trl.tensors.tiled_head import TiledHead

NUM_WORDS, LENGTH = 200, 12
SIZES = {
    "vocab_size": NUM_WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


CONFIG = LlamaConfig(**SIZES)


class Changing(LlamaForCausalLM):
    """Does something to its logits, with a bias that is zero at first."""

    def __init__(self, change):
        super().__init__(CONFIG)
        self.change = change
        self.bias = torch.nn.Parameter(torch.zeros(NUM_WORDS))

    def forward(self, input_ids, **kwargs):
        output = super().forward(input_ids, **kwargs)
        output.logits = self.change(output.logits, self.bias)
        return output


class WithHead(LlamaForCausalLM):
    """Makes its logits of the last hidden states in another way."""

    def __init__(self, apply):
        super().__init__(CONFIG)
        self.apply_head = apply

    def forward(self, input_ids, **kwargs):
        output = self.model(input_ids, **kwargs)
        output.logits = self.apply_head(self.lm_head, output.last_hidden_state)
        return output


class WithVirtualTokens(LlamaForCausalLM):
    """Puts three positions in front, as prompt learning does."""

    def forward(self, input_ids, **kwargs):
        in_front = torch.ones(len(input_ids), 3, dtype=torch.long)
        return super().forward(torch.cat([in_front, input_ids], dim=1), **kwargs)


MODELS = {
    "plain": lambda: LlamaForCausalLM(CONFIG),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "virtual tokens": lambda: WithVirtualTokens(CONFIG),
    "soft cap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0)
    ),
    "cut": lambda: Changing(lambda logits, _: logits[..., :-10]),
    "mask": lambda: Changing(lambda logits, _: logits.index_fill(2, torch.tensor([5]), -1e9)),
    "all positions in one row": lambda: WithHead(
        lambda head, states: head(states.flatten(0, 1)).view(*states.shape[:2], -1)
    ),
    "without call": lambda: WithHead(lambda head, states: states @ head.weight.T),
}
PLAIN = {"plain", "tied", "virtual tokens"}
# What is done to logits without changing them, with a bias of zero: and whether it may change them
# once the bias is trained.
UNCHANGED = {
    "bias": (True, lambda logits, bias: logits + bias),
    "bias, in place": (True, lambda logits, bias: logits.add_(bias)),
    "bias, after a cast": (True, lambda logits, bias: (logits.double() + bias).float()),
    "bias, copied": (True, lambda logits, bias: torch.empty_like(logits).copy_(logits + bias)),
    "scale": (True, lambda logits, bias: logits * (1 + bias)),
    "mask": (True, lambda logits, bias: logits.masked_fill(bias > 0, -1e9)),
    # As engines do with the outputs of modules.
    "cast": (False, lambda logits, _: logits.double().float()),
    "cast to less": (False, lambda logits, _: logits.bfloat16()),
    "view of a copy": (False, lambda logits, _: logits.clone()[:, :, :]),
    "written into another": (False, lambda logits, _: torch.empty_like(logits).copy_(logits)),
    "something else made of it": (
        False, lambda logits, bias: logits if (logits + bias).sum() > -1e30 else bias,
    ),
}  # fmt: skip


def make(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def make_batch(num_rows, share):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, NUM_WORDS, (num_rows, LENGTH), generator=generator)
    return ids, torch.rand(num_rows, LENGTH, generator=generator) < share


def score(logits_TV, positions):
    """Another one at every position, so that positions that were mixed up would show."""
    factors_T = 1 + torch.arange(positions.start, positions.stop)
    return factors_T * logits_TV.float().log_softmax(dim=1)[:, 7]


def scored(model, ids, is_scored, head=None):
    head = head or TiledHead(model.get_output_embeddings)
    return head.scores(lambda: model(input_ids=ids).logits, is_scored, score)


def literally_scored(model, ids, is_scored):
    logits_TV = model(input_ids=ids).logits[:, -LENGTH:][is_scored]
    return score(logits_TV, slice(0, len(logits_TV)))


def gradients(model, scores_T):
    model.zero_grad()
    scores_T.sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(scores, model, expected, literal_model):
    """The same scores, and the same gradients of them."""
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    found, wanted = gradients(model, scores), gradients(literal_model, expected)
    assert found.keys() - {"bias"} == wanted.keys() - {"bias"}
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("share", "tile"), [(0.0, 5), (0.3, 1), (0.3, 1000), (1.0, 5)])
@pytest.mark.parametrize("name", MODELS)
def test_scores_and_gradients_are_those_of_the_whole_logits(name, share, tile, monkeypatch):
    monkeypatch.setattr(tiled_head, "_TILE", tile)
    model, (ids, is_scored) = make(name), make_batch(3, share)
    expected = literally_scored(model, ids, is_scored)
    assert_same(scored(model, ids, is_scored), model, expected, model)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_model_whose_output_is_rounded_has_exact_scores(share):
    """FSDP2 in bfloat16 rounds what a model returns, and the gradient on its way back."""
    model, (ids, is_scored) = make("plain"), make_batch(3, share)
    rounded = Changing(lambda logits, _: logits.bfloat16())
    rounded.load_state_dict(model.state_dict(), strict=False)
    head = TiledHead(rounded.get_output_embeddings)
    scores = scored(rounded, ids, is_scored, head)
    assert head.is_plain
    assert_same(scores, rounded, literally_scored(model, ids, is_scored), model)


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_changes_its_logits_is_found_out_once(name, share):
    """
    A pass more in the first call. All processes of an engine have to make as many, and find the
    same, also without positions.
    """
    model, (ids, is_scored) = make(name), make_batch(3, share)
    head, num_passes = TiledHead(model.get_output_embeddings), []
    model.register_forward_hook(lambda *_: num_passes.append(1))
    for expected in (2, 3, 4):
        scored(model, ids, is_scored, head)
        assert len(num_passes) == expected
    assert head.is_plain == (name in PLAIN)


@pytest.mark.parametrize("name", UNCHANGED)
def test_a_copy_is_told_from_what_leaves_logits_as_they_are_only_for_now(name):
    """A bias that is zero at the start of training is not so later."""
    may_change, change = UNCHANGED[name]
    model, (ids, is_scored) = Changing(change), make_batch(3, 0.5)
    head = TiledHead(model.get_output_embeddings)
    scored(model, ids, is_scored, head)
    assert head.is_plain is not may_change
    if may_change:
        torch.nn.init.normal_(model.bias, std=0.5)
        scores = scored(model, ids, is_scored, head)
        expected = literally_scored(model, ids, is_scored)
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = (leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        self.size = max([self.size, *(tensor.untyped_storage().nbytes() for tensor in tensors)])
        return result


@pytest.mark.parametrize("name", ["plain", "soft cap"])
def test_the_logits_of_all_positions_are_never_there_at_once(name, monkeypatch):
    """Forward or backward: but for models that do more to their logits, or do not call the head."""
    monkeypatch.setattr(tiled_head, "_TILE", 16)
    model, (ids, is_scored) = make(name), make_batch(30, 1.0)
    with LargestTensor() as largest:
        scored(model, ids, is_scored).sum().backward()
    of_all = 4 * ids.numel() * NUM_WORDS
    if name in PLAIN:
        assert largest.size <= of_all / 2  # the activations of the 360 positions
    else:
        assert largest.size >= of_all


@pytest.mark.parametrize("has_own", [False, True])
def test_the_head_is_as_before(has_own):
    """Also after an error, and where a library has put its own `forward` before the class's."""
    model, (ids, is_scored) = make("plain"), make_batch(2, 0.5)
    if has_own:
        model.lm_head.forward = model.lm_head.forward
    before = dict(model.lm_head.__dict__)

    def fail(*_):
        raise KeyError("score")

    head = TiledHead(model.get_output_embeddings)
    scored(model, ids, is_scored, head)
    assert model.lm_head.__dict__ == before
    with pytest.raises(KeyError, match="score"):
        head.scores(lambda: model(input_ids=ids).logits, is_scored, fail)
    assert model.lm_head.__dict__ == before
