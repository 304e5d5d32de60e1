"""The distillation loss in a world of one: closed forms, torch's own KL, finite differences. Shards: test_model.py."""

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from halfbyte.training import losses
from halfbyte.training.data import MicroBatch


@pytest.fixture(scope="module")
def group():
    assert not dist.is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def draw(seed: int, *shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_torch(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    log_s, log_t = ((x.double() / temperature).log_softmax(-1) for x in (student, teacher))
    return temperature**2 * functional.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1)


def test_two_tokens_in_closed_form(group):
    # Teacher (3/4, 1/4), student (1/2, 1/2): forward KL, not reverse.
    teacher, student = torch.tensor([[[math.log(3.0), 0.0]]]), torch.zeros(1, 1, 2, requires_grad=True)
    loss = losses.distillation(student, teacher, group)
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert loss.item() == pytest.approx(expected, abs=1e-7)
    loss.backward()
    assert student.grad.flatten().tolist() == pytest.approx([0.5 - 0.75, 0.5 - 0.25], abs=1e-7)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_value_and_gradient_are_torchs(group, temperature):
    student, teacher, weight = draw(0, 2, 7, 50), draw(1, 2, 7, 50), draw(2, 2, 7)
    ours, theirs = student.clone().requires_grad_(), student.double().requires_grad_()
    loss, expected = losses.distillation(ours, teacher, group, temperature), by_torch(theirs, teacher, temperature)
    assert loss.shape == (2, 7)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    (loss * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_the_slope_of_the_value(group):
    student, teacher = draw(3, 1, 2, 9), draw(4, 1, 2, 9)
    leaf = student.clone().requires_grad_()
    losses.distillation(leaf, teacher, group, 2.0).sum().backward()
    direction = draw(5, 1, 2, 9)
    step = 2.0**-7
    up, down = (losses.distillation(student + s * step * direction, teacher, group, 2.0).sum() for s in (1, -1))
    assert float((up - down) / (2 * step)) == pytest.approx(float((leaf.grad * direction).sum()), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_for_identical_logits(group, dtype):
    teacher = draw(6, 2, 3, 40).to(dtype)
    student = teacher.clone().requires_grad_()
    loss = losses.distillation(student, teacher, group, 1.7)
    assert torch.equal(loss, torch.zeros(2, 3))
    loss.sum().backward()
    assert torch.equal(student.grad, torch.zeros_like(student))
    assert student.grad.dtype == dtype


def test_bfloat16_logits_are_computed_in_float32(group):
    student, teacher = draw(7, 2, 3, 40).bfloat16(), draw(8, 2, 3, 40).bfloat16()
    torch.testing.assert_close(
        losses.distillation(student, teacher, group).double(), by_torch(student, teacher, 1.0), rtol=1e-5, atol=1e-6
    )


def test_only_the_student_learns(group):
    student, teacher = draw(9, 1, 2, 8).requires_grad_(), draw(10, 1, 2, 8).requires_grad_()
    losses.distillation(student, teacher, group).sum().backward()
    assert teacher.grad is None


def test_large_logits_stay_finite(group):
    student = torch.tensor([[[1e4, 0.0, -1e4]]], requires_grad=True)
    loss = losses.distillation(student, torch.tensor([[[0.0, 1e4, -1e4]]]), group)
    assert loss.item() == pytest.approx(1e4)
    loss.sum().backward()
    assert student.grad.flatten().tolist() == [1.0, -1.0, 0.0]


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 1000),
    shift=st.floats(-50, 50),
    temperature=st.floats(0.25, 8),
)
def test_blind_to_shifts_and_never_negative(group, seed, shift, temperature):
    student, teacher = draw(seed, 1, 4, 12), draw(seed + 1, 1, 4, 12)
    loss = losses.distillation(student, teacher, group, temperature)
    assert bool((loss > 0).all())
    torch.testing.assert_close(
        losses.distillation(student + shift, teacher, group, temperature), loss, rtol=1e-3, atol=1e-4
    )


def test_high_temperature_compares_the_logits_themselves(group):
    # T^2 KL -> half the variance of the difference over the vocabulary (Hinton et al. 2015, section 2.1).
    student, teacher = draw(11, 1, 1, 30), draw(12, 1, 1, 30)
    expected = float((student - teacher).double().var(unbiased=False)) / 2
    assert float(losses.distillation(student, teacher, group, 100.0)) == pytest.approx(expected, rel=0.05)


def test_cross_entropy_is_what_megatron_computed():
    per_token = draw(13, 2, 5)
    batch = MicroBatch(torch.zeros(2, 5).long(), torch.zeros(2, 5).long(), torch.ones(2, 5), None)
    assert losses.cross_entropy(per_token, batch, 0) is per_token
