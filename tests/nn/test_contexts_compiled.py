"""no_commit and accumulate around what is compiled, and within."""

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import steadynorm as sn
from steadynorm.errors import RejectedBatchWarning
from support import assert_close, batch_norm, stats
from support_contexts import NAN, assert_remembers, layer_of, parts_of


class TestCompiled:
    def test_both_contexts_around_a_compiled_model(self):
        model, blocks = nn.Sequential(layer_of()), [[part + k for part in parts_of(4, 4)] for k in range(3)]
        counter = CompileCounterWithBackend("aot_eager")
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        mean, variance = np.zeros(3), np.ones(3)
        for parts in blocks:
            compiled(parts[0])
            with sn.no_commit(model):
                compiled(parts[1])
            with sn.accumulate(model):
                for part in parts:
                    compiled(part)
            for measured in (stats(parts[0]), stats(torch.cat(parts))):
                mean, variance = 0.9 * mean + 0.1 * measured.mean, 0.9 * variance + 0.1 * measured.unbiased
        assert_close(model[0].running_mean, mean, "statistic")
        assert_close(model[0].running_var, variance, "variance")
        assert model[0].num_batches_tracked.item() == 6
        assert counter.frame_count == 3, "one program for each way to remember, however often a block is entered"

    def test_a_context_inside_of_what_is_compiled(self):
        layer, parts = layer_of(), parts_of(4, 4)

        def step(first, second):
            with sn.accumulate(layer):
                y = layer(first) + layer(second)
            with sn.no_commit(layer):
                return y + layer(second)

        torch._dynamo.reset()
        y = torch.compile(step, fullgraph=True, backend="aot_eager")(*parts)
        assert_close(y, batch_norm(parts[0]) + 2 * batch_norm(parts[1]), "output")
        assert_remembers(layer, stats(torch.cat(parts)))

    def test_a_bad_micro_batch(self):
        layer, parts = layer_of(), parts_of(4, 4, 4)
        parts[1][2, 0] = NAN
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with sn.accumulate(layer):
            for part in parts:
                compiled(part)
        assert_remembers(layer, stats(torch.cat([parts[0], parts[2]])))
        with pytest.warns(RejectedBatchWarning, match="1 batches"):
            assert layer.rejected_batches == 1
