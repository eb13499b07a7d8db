"""What the measurements of the host's part of a step measure, and what is made of it."""

from __future__ import annotations

import gc

import pytest
import torch

from bench import records, tables
from bench.speed import host_time, rivals
from bench.speed.harness import GRADIENT_SCALE, Subject, Values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_left_as_by_a_backward_pass(dtype):
    shapes = [(3, 5), (1,), (7,)]
    subject = Subject(rivals.VARIANTS["foreach_sgd_fused"].build, shapes, dtype)
    with torch.no_grad():
        subject.params[0].set_(torch.randn(5, 3).to(dtype).t())  # transposed: its gradient is to be, too

    def python_tensors():
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    expected = [view.clone() for view in subject.grads.views]
    gc.collect()
    before = python_tensors()
    subject.assign_gradients()
    assert python_tensors() == before
    for p, value in zip(subject.params, expected, strict=True):
        assert (p.grad.dtype, p.grad.stride()) == (dtype, p.stride())
        torch.testing.assert_close(p.grad, value, rtol=0, atol=0)
        p.grad.zero_()  # memory of its own: the values that gradients are made from stay
    subject.assign_gradients()
    torch.testing.assert_close([p.grad for p in subject.params], expected, rtol=0, atol=0)
