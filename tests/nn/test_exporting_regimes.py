"""torch.export of what aten's batch norm cannot say, and inside of the contexts: no op of our own, or a way out."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import export

import ranks
import steadynorm as sn
import support_renorm
from steadynorm.errors import ModelError, ShapeError, SingleValueError
from steadynorm.functional import batch_norm as functional_batch_norm
from support import ACTIVATIONS, assert_close, batch_norm, stats
from support_exporting import NODE, calls, exported, is_aten_alone, rand, ready


class TestContexts:
    def test_the_domain_that_is_in_use_is_the_one_written(self):
        layer, x = sn.BatchNorm1d(3, dtype=torch.float64, domains=("photo", "sketch")), rand(5, 3, seed=1)
        with sn.domain(layer, "sketch"):
            program = exported(layer, rand(4, 3))
        assert NODE in calls(program)
        module = program.module()
        module(x)
        assert_close(module.running_mean_sketch, 0.1 * stats(x).mean, "statistic")
        assert module.running_mean.tolist() == [0, 0, 0]

    def test_no_commit_writes_nothing(self):
        layer, x = sn.BatchNorm1d(3, dtype=torch.float64), rand(5, 3, seed=1)
        with sn.no_commit(layer):
            program = exported(layer, rand(4, 3))
        assert calls(program) == [NODE]
        assert_close(program.module()(x), batch_norm(x), "output")

    @pytest.mark.parametrize("strict", [False, True])
    def test_functional_call_returns_what_it_would_write(self, strict):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = sn.BatchNorm1d(3, dtype=torch.float64)

            def forward(self, input):
                return sn.functional_call(self.norm, dict(self.norm.named_parameters()), (input,))

        x, program = rand(5, 3, seed=1), exported(Model(), rand(4, 3), strict)
        assert is_aten_alone(program)
        y, buffers = program.module()(x)
        assert_close(y, batch_norm(x), "output")
        assert_close(buffers["running_mean"], 0.1 * stats(x).mean, "statistic")
        assert program.module().norm.running_mean.tolist() == [0, 0, 0]

    def test_inside_of_accumulate_it_says_what_to_do(self):
        layer = sn.BatchNorm1d(3)
        with pytest.raises(ModelError, match="no_commit"), sn.accumulate(layer):
            exported(layer, rand(4, 3).float(), mask=torch.ones(4, dtype=torch.bool))
        with pytest.raises(ModelError, match="no_commit"), sn.accumulate(layer):
            exported(layer, rand(4, 3).float())


class TestBeyondAten:
    """Aten's batch norm cannot say these: the program spells out the exact step, with its guard of the statistics."""

    @pytest.mark.parametrize("strict", [False, True])
    def test_masks_weights_and_the_cumulative_average(self, strict):
        layer = ready(sn.BatchNorm1d(3, dtype=torch.float64, momentum=None, activation="relu"))
        gamma, beta = (p.detach().numpy() for p in layer.parameters())

        def batch(n: int) -> dict[str, Tensor]:
            mask = rand(n, 4, seed=n + 1) > -0.5
            return {"residual": rand(n, 3, 4, seed=n), "mask": mask, "sample_weight": rand(n, seed=n + 2).abs() + 1}

        program = exported(layer, rand(4, 3, 4), strict, **batch(4))
        assert NODE not in calls(program)
        assert is_aten_alone(program)
        module, x, options = program.module(), rand(7, 3, 4, seed=3), batch(7)
        y = module(x, **options)
        assert_close(y, batch_norm(x, gamma, beta, activation=ACTIVATIONS["relu"], **options), "output")
        weight = options["mask"] * options["sample_weight"][:, None]
        module(x * float("inf"), **options)
        assert_close(module.running_mean, stats(x, weight=weight).mean, "statistic")
        assert_close(module.running_var, stats(x, weight=weight).unbiased, "variance")
        assert (module.num_batches_tracked.item(), module._rejected.item()) == (1, 1)

    def test_renorm(self):
        layer = support_renorm.layer_of(rand(4, 3))
        program = exported(layer, rand(4, 3))
        assert is_aten_alone(program)
        x, before = support_renorm.rand(6, 3, seed=1), support_renorm.Running.of(layer)
        y = program.module()(x)
        r, d = support_renorm.corrections(x, before, support_renorm.TIGHT)
        assert_close(y, support_renorm.renormed(x, layer.weight, layer.bias, r, d), "output")

    def test_ghost_batches_of_a_fixed_batch(self):
        layer, x = sn.BatchNorm1d(3, dtype=torch.float64, ghost_batch_size=2), rand(4, 3)
        program = export(layer, (x,))
        assert is_aten_alone(program)
        y = program.module()(x)
        assert_close(y, np.concatenate([batch_norm(x[:2]), batch_norm(x[2:])]), "output")

    @pytest.mark.parametrize("options", [{"eps": 0.0}, {"affine": False}])
    def test_what_aten_refuses(self, options):
        layer = sn.BatchNorm1d(3, **options)
        if "affine" in options:
            layer.double()  # the running statistics are wider than the input
        x, program = rand(5, 3, dtype=torch.float32, seed=1), exported(layer, rand(4, 3, dtype=torch.float32))
        assert NODE not in calls(program)
        assert_close(program.module()(x), batch_norm(x, eps=options.get("eps", 1e-5)), "output")

    def test_a_single_value(self):
        x = rand(1, 3, dtype=torch.float32)
        with pytest.raises(SingleValueError):
            export(sn.BatchNorm1d(3), (x,))
        module = export(sn.BatchNorm1d(3, single_value="beta"), (x,)).module()
        assert module(x).tolist() == [[0, 0, 0]]
        assert module.num_batches_tracked.item() == 0
        module = export(sn.BatchNorm1d(3, eps=3.0, single_value="running"), (x,)).module()
        assert_close(module(x), x / 2, "output")

    def test_the_function(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("mean", torch.zeros(3))
                self.register_buffer("var", torch.ones(3))

            def forward(self, input):
                return functional_batch_norm(input, self.mean, self.var, training=True)

        program = exported(Model(), rand(4, 3, dtype=torch.float32))
        assert is_aten_alone(program)
        x, module = rand(5, 3, seed=1, dtype=torch.float32), program.module()
        assert_close(module(x), batch_norm(x), "output")
        assert_close(module.mean, 0.1 * stats(x).mean, "statistic")

    def test_a_residual_of_another_shape_is_refused_and_not_broadcast(self):
        with pytest.raises(ShapeError, match="residual"):
            export(sn.BatchNorm1d(3), (rand(4, 3).float(),), {"residual": rand(1, 3).float()})

    def test_over_ranks_it_says_what_to_do(self):
        assert ranks.run(_export_over_ranks, 2) == [True, True]


def _export_over_ranks(rank: int, group: Any) -> bool:
    layer, x = sn.BatchNorm1d(3, process_group=group), rand(4, 3).float()
    with pytest.raises(ModelError, match="sync_"):
        export(layer, (x,))
    return calls(export(layer.eval(), (x,))) != []
