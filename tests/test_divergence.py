"""KL(start || model): the laws of a divergence, and that it is the literal one."""

import itertools

import pytest
import torch

from ogpsa_trl.tensors.divergence import divergence, likely_tokens


def logits(seed, scale=2.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(7, 11, generator=generator)).to(dtype)


def of(start_TV, logits_TV, num_tokens):
    return divergence(logits_TV, *likely_tokens(start_TV, num_tokens)).sum()


def literal(start_TV, logits_TV, num_tokens=11):
    """In float64, of distributions over the likely tokens of the start; all others are one."""
    tokens = start_TV.topk(min(num_tokens, 11)).indices

    def coarse(logits_TV):
        probs = logits_TV.double().softmax(1)
        kept = probs.gather(1, tokens)
        rest = [1 - kept.sum(1, keepdim=True)] if num_tokens < 11 else []
        return torch.cat([kept, *rest], dim=1)

    start, model = coarse(start_TV), coarse(logits_TV)
    return (start * (start.log() - model.log())).sum()


@pytest.mark.parametrize("num_tokens", [1, 4, 10, 11, 99])
def test_it_is_the_literal_one_of_the_coarser_distributions(num_tokens):
    start, model = logits(0), logits(1).requires_grad_()
    value, expected = (function(start, model, num_tokens) for function in (of, literal))
    [gradient], [expected_gradient] = (torch.autograd.grad(v, model) for v in (value, expected))
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (gradient - expected_gradient).abs().max() < 1e-6


def test_it_grows_with_the_tokens_told_apart():
    values = [of(logits(0), logits(1), num_tokens).item() for num_tokens in range(1, 12)]
    assert values[0] > 0
    assert all(smaller <= larger + 1e-5 for smaller, larger in itertools.pairwise(values))


@pytest.mark.parametrize("num_tokens", [1, 4, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_it_is_zero_without_a_gradient_where_the_models_agree(num_tokens, dtype, scale):
    start = logits(0, scale=scale, dtype=dtype)
    model = (start + 3).requires_grad_() if dtype == torch.float32 else start.requires_grad_()
    value = of(start.detach(), model, num_tokens)
    [gradient] = torch.autograd.grad(value, model)
    assert 0 <= value.item() < 1e-11
    assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("size", [1e-4, 1e-2])
def test_small_divergences_keep_their_digits(size):
    """Half the squared size of the difference: a difference of two sums would lose it."""
    start = logits(0)
    model = start + size * logits(1)
    # Log-probabilities of size 1 are rounded to 1e-7, so differences of 1e-4 to a part in 1000.
    assert of(start, model, 11).item() == pytest.approx(literal(start, model).item(), rel=1e-2)


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 5, 11])
def test_extreme_logits_stay_finite(num_tokens, is_masked):
    start, model = logits(0, scale=1e4), logits(1, scale=1e4).requires_grad_()
    if is_masked:  # what is not possible at the start
        start[:, 5:] = -torch.inf
    value = of(start, model, num_tokens)
    [gradient] = torch.autograd.grad(value, model)
    assert value.isfinite() and value > 0
    assert gradient.isfinite().all()


def test_no_position_is_zero_with_a_graph():
    """What a process gets that has run out of samples: its backward pass must still happen."""
    model = logits(1)[:0].requires_grad_()
    value = of(logits(0)[:0], model, 4)
    value.backward()
    assert value == 0 and model.grad.shape == (0, 11)
