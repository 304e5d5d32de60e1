"""Divergences and their top-k forms against plain torch in double precision. Shards: test_model.py."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from halfbyte.training import losses, topk
from halfbyte.training.config_distill import Divergence

KINDS = list(Divergence)
BETA = 0.3


def draw(seed: int, *shape: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_torch(log_q: torch.Tensor, log_p: torch.Tensor, kind: Divergence) -> torch.Tensor:
    """The divergence of two distributions over the last axis, by torch's own KL and logarithms."""

    def kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
        return functional.kl_div(log_b, log_a, log_target=True, reduction="none").sum(-1)

    if kind is Divergence.forward_kl:
        return kl(log_p, log_q)
    if kind is Divergence.reverse_kl:
        return kl(log_q, log_p)
    log_m = (BETA * log_p.exp() + (1 - BETA) * log_q.exp()).log()
    return BETA * kl(log_p, log_m) + (1 - BETA) * kl(log_q, log_m)


def coarse(log_p: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the chosen tokens and of all others together, by summing probabilities."""
    others = torch.ones_like(log_p).scatter(-1, indices, 0.0)
    rest = (log_p.exp() * others).sum(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, indices), rest.log()], dim=-1)


def full(student, teacher, kind, temperature=1.0):
    return losses.distillation(student, teacher, None, temperature, kind, BETA)


def top(student, teacher, kind, k, temperature=1.0):
    kept = topk.top_k(teacher, k, temperature, None)
    return topk.top_k_distillation(student, kept, None, temperature, kind, BETA)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [None, 1, 4, 29])
def test_value_and_gradient_in_double_precision(kind, temperature, k):
    student, teacher, weight = draw(0, 2, 5, 30), draw(1, 2, 5, 30), draw(2, 2, 5)
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    log_q, log_p = ((x / temperature).log_softmax(-1) for x in (theirs, teacher))
    if k is not None:
        indices = teacher.argsort(-1, descending=True)[..., :k]
        log_q, log_p = coarse(log_q, indices), coarse(log_p, indices)
    expected = temperature**2 * by_torch(log_q, log_p, kind)
    loss = full(ours, teacher, kind, temperature) if k is None else top(ours, teacher, kind, k, temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    (loss * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [None, 3])
def test_gradcheck(kind, k):
    student, teacher = draw(3, 2, 7, scale=1.0).requires_grad_(), draw(4, 2, 7, scale=1.0)
    function = (lambda x: full(x, teacher, kind, 1.7)) if k is None else (lambda x: top(x, teacher, kind, k, 1.7))
    assert torch.autograd.gradcheck(function, (student,))


def test_gradcheck_of_the_label_cross_entropy():
    student, labels = draw(5, 2, 3, 7, scale=1.0).requires_grad_(), torch.tensor([[0, 6, 3], [1, 1, 5]])
    assert torch.autograd.gradcheck(lambda x: topk.label_cross_entropy(x, labels, None), (student,))


def test_label_cross_entropy_is_torchs():
    student, labels = draw(6, 2, 5, 30).float(), torch.randint(30, (2, 5), generator=torch.Generator().manual_seed(0))
    ours, theirs = student.clone().requires_grad_(), student.double().requires_grad_()
    loss = topk.label_cross_entropy(ours, labels, None)
    expected = functional.cross_entropy(theirs.flatten(0, 1), labels.flatten(), reduction="none").view(2, 5)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_kl_is_bit_for_bit_the_unchunked_formula(monkeypatch, temperature, dtype):
    monkeypatch.setattr(losses, "CHUNK", 3 * 40)  # three rows at a time, of fourteen
    student, teacher = draw(7, 2, 7, 40).to(dtype).requires_grad_(), draw(8, 2, 7, 40).to(dtype)

    def log_softmax(x: torch.Tensor) -> torch.Tensor:
        shifted = x - x.amax(-1, keepdim=True)
        return shifted - shifted.exp().sum(-1, keepdim=True).log()

    log_s, log_t = (log_softmax(x.detach().float() / temperature) for x in (student, teacher))
    p_t = log_t.exp()
    loss = full(student, teacher, Divergence.forward_kl, temperature)
    assert torch.equal(loss, (p_t * (log_t - log_s)).sum(-1) * temperature**2)
    loss.sum().backward()
    slope = ((log_s.exp() - p_t) / temperature).to(dtype)
    assert torch.equal(student.grad, torch.full((2, 7, 1), temperature**2).to(dtype) * slope)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [2, 40])
def test_chunks_change_nothing(monkeypatch, kind, k):
    def run() -> tuple[torch.Tensor, torch.Tensor]:
        student = draw(9, 14, 40).float().requires_grad_()
        loss = top(student, draw(10, 14, 40).float(), kind, k)
        loss.sum().backward()
        return loss.detach(), student.grad

    whole = run()
    monkeypatch.setattr(losses, "CHUNK", 3 * 40)
    assert all(torch.equal(a, b) for a, b in zip(run(), whole, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_as_top_k_is_the_full_divergence(kind):
    student, teacher = draw(11, 3, 20), draw(12, 3, 20)
    a, b = student.clone().requires_grad_(), student.clone().requires_grad_()
    ours, whole = top(a, teacher, kind, 20, 2.0), full(b, teacher, kind, 2.0)
    torch.testing.assert_close(ours, whole, rtol=1e-10, atol=1e-12)
    ours.sum().backward()
    whole.sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


EXTREMES = {
    "apart": ([1e4, 0.0, -1e4, 0.0], [0.0, 1e4, -1e4, 0.0]),
    "certain": ([1e4, 0.0, 0.0, 0.0], [1e4, 1.0, 0.0, -1.0]),
    "impossible": ([0.0, 1.0, -1e30, -1e30], [0.5, 0.0, -1e30, -1e30]),
    "huge": ([3e38, 0.0, 0.0, 1.0], [3e38, 0.0, 1.0, 0.0]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [None, 1, 2, 4])
@pytest.mark.parametrize("case", EXTREMES)
def test_extremes_stay_finite(case, k, kind):
    student, teacher = (torch.tensor([row]) for row in EXTREMES[case])
    student.requires_grad_()
    loss = full(student, teacher, kind) if k is None else top(student, teacher, kind, k)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert loss.item() >= -1e-6
    assert torch.isfinite(student.grad).all()
    assert float(student.grad.sum()) == pytest.approx(0, abs=1e-6)  # no divergence sees a shift


def test_an_underflowing_tail_keeps_its_logarithm():
    # Teacher (1/2, 1/2), student's rest at e^-200 of its first token: KL = -log 2 + 100, and FP32's e^-200 is 0.
    student = torch.tensor([[200.0, 0.0]], requires_grad=True)
    loss = top(student, torch.tensor([[1e-6, 0.0]]), Divergence.forward_kl, 1)
    assert float(loss) == pytest.approx(100 - math.log(2), rel=1e-5)
    loss.backward()
    assert student.grad.flatten().tolist() == pytest.approx([0.5, -0.5], rel=1e-5)


@given(seed=st.integers(0, 1000), k=st.integers(1, 11), kind=st.sampled_from(KINDS))
@settings(max_examples=60, deadline=None)
def test_coarser_distributions_are_closer(seed, k, kind):
    """The data-processing inequality: merging tokens into one event never raises a divergence; equal logits give 0."""
    student, teacher = draw(seed, 4, 12), draw(seed + 1, 4, 12)
    coarser, finer = (top(student, teacher, kind, n) for n in (k, k + 1))
    assert bool((coarser >= 0).all())
    assert bool((coarser <= finer + 1e-12).all())
    assert float(top(teacher, teacher, kind, k).abs().max()) < 1e-12


def test_jensen_shannon_is_bounded_and_tends_to_both_kls():
    student, teacher = draw(13, 6, 12, scale=30.0), draw(14, 6, 12, scale=30.0)
    half = losses.distillation(student, teacher, None, 1.0, Divergence.jensen_shannon, 0.5)
    assert float(half.max()) <= math.log(2) + 1e-12
    student, teacher, small = draw(15, 6, 12), draw(16, 6, 12), 1e-9
    forward, reverse = (full(student, teacher, kind) for kind in (Divergence.forward_kl, Divergence.reverse_kl))
    near = [losses.distillation(student, teacher, None, 1.0, Divergence.jensen_shannon, b) for b in (small, 1 - small)]
    torch.testing.assert_close(near[0] / small, forward, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(near[1] / small, reverse, rtol=1e-4, atol=1e-6)


def test_top_k_keeps_the_types_and_the_likeliest():
    teacher = draw(17, 2, 3, 50).bfloat16()
    kept = topk.top_k(teacher, 5, 2.0, None)
    assert (kept.values.dtype, kept.indices.dtype, kept.tail.dtype) == (torch.bfloat16, torch.int32, torch.float32)
    assert torch.equal(kept.values, teacher.sort(-1, descending=True).values[..., :5])
    assert torch.equal(teacher.gather(-1, kept.indices.long()), kept.values)
    whole = torch.cat([kept.values.float() / 2, kept.tail.unsqueeze(-1)], -1).logsumexp(-1)
    torch.testing.assert_close(whole, (teacher.float() / 2).logsumexp(-1))
