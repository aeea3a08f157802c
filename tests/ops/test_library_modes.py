"""The training step under a dispatch mode: one operator, since kernels on raw memory would be invisible to the mode."""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import steadynorm as sn
from steadynorm.functional import batch_norm
from steadynorm.ops import library
from steadynorm.ops.backends import backend_for
from support import LAYOUTS, assert_close, laid_out, normalized, wide
from support_kernels import Step, expected, randn


def test_selective_checkpointing_can_keep_the_step(monkeypatch):
    asked = []
    monkeypatch.setattr(library, "backend_for", lambda operands: asked.append(1) or backend_for(operands))
    gradients = []
    for kept, runs_in_backward in ((None, 2), (torch.ops.steadynorm.train.default, 1)):

        def policy(_context, op, *_args, kept=kept, **_options):
            return CheckpointPolicy.MUST_SAVE if op is kept else CheckpointPolicy.PREFER_RECOMPUTE

        layer, x = sn.BatchNorm1d(3, activation="relu"), randn(6, 3, 4).float().requires_grad_()
        contexts = partial(create_selective_checkpoint_contexts, policy)
        y = checkpoint(lambda x, layer=layer: layer(x).sin(), x, use_reentrant=False, context_fn=contexts)
        asked.clear()
        gradients.append(torch.autograd.grad(y, x, randn(6, 3, 4, seed=1).float())[0])
        assert len(asked) == runs_in_backward
        assert layer.num_batches_tracked == 1
    assert torch.equal(*gradients)


def test_a_traced_step_runs_on_other_numbers():
    def gradient(x, upstream):
        return torch.autograd.grad(batch_norm(x, None, None, training=True, activation="relu"), x, upstream)[0]

    step = Step(randn(6, 3, 4).float(), activation="relu", grad_y=randn(6, 3, 4, seed=1).float())
    ones = torch.ones(6, 3, 4)
    traced = make_fx(gradient)(ones.clone().requires_grad_(), ones)
    assert_close(traced(step.x.requires_grad_(), step.grad_y), expected(step).grad_x, "gradient")


def test_a_traced_evaluation_runs_on_other_numbers():
    x, mean, variance = randn(6, 3).float(), randn(3, seed=1).float(), randn(3, seed=2).float() ** 2
    traced = make_fx(lambda x: batch_norm(x, mean, variance, training=False))(torch.ones(6, 3))
    assert_close(traced(x), normalized(x, wide(mean), wide(variance)), "output")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_tensors_have_the_strides_of_real_ones(layout):
    x = laid_out(randn(6, 3, 4, 5).float(), layout)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        y = batch_norm(fake, None, None, training=True)
    assert y.stride() == batch_norm(x, None, None, training=True).stride()
    assert isinstance(y, FakeTensor)
