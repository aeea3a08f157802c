"""The layers under torch.export: aten's batch norm in training, aten's arithmetic in evaluation."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad

import steadynorm as sn
from support import ACTIVATIONS, TOLERANCE, assert_close, batch_norm, central_differences, normalized, stats, wide
from support_exporting import NODE, calls, exported, is_aten_alone, rand, ready, saved_and_loaded


class TestTheNode:
    @pytest.mark.parametrize("strict", [False, True])
    def test_it_is_the_one_that_torch_gives(self, strict):
        x = rand(4, 3, 6, 6, dtype=torch.float32)

        def nodes(*after_the_convolution: nn.Module) -> list[tuple[str, Any]]:
            program = exported(nn.Sequential(nn.Conv2d(3, 4, 3), *after_the_convolution), x, strict)
            return [(str(n.target), n.args[5:]) for n in program.graph.nodes if n.op == "call_function"]

        torchs = nodes(nn.BatchNorm2d(4, eps=1e-3, momentum=0.2), nn.ReLU())
        assert NODE in dict(torchs)
        assert nodes(sn.BatchNorm2d(4, eps=1e-3, momentum=0.2), nn.ReLU()) == torchs
        assert nodes(sn.BatchNorm2d(4, eps=1e-3, momentum=0.2, activation="relu")) == torchs

    def test_its_buffers_and_parameters_are_the_layers(self):
        program = exported(sn.BatchNorm1d(3), rand(4, 3, dtype=torch.float32))
        node = next(n for n in program.graph.nodes if str(n.target) == NODE)
        names = {**program.graph_signature.inputs_to_buffers, **program.graph_signature.inputs_to_parameters}
        assert [names[argument.name] for argument in node.args[1:5]] == [
            "weight",
            "bias",
            "running_mean",
            "running_var",
        ]

    @pytest.mark.parametrize("training", [True, False])
    def test_without_running_statistics_it_is_torchs_in_evaluation_too(self, training):
        program = exported(sn.BatchNorm1d(3, track_running_stats=False).train(training), rand(4, 3).float())
        assert calls(program) == [NODE]


# the class, the shape of an input, options, whether a residual is added
CASES = {
    "rows": (sn.BatchNorm1d, (4, 3), {}, False),
    "1d": (sn.BatchNorm1d, (4, 3, 2), {"activation": "silu"}, True),
    "2d": (sn.BatchNorm2d, (3, 2, 2, 3), {"activation": "relu"}, True),
    "3d": (sn.BatchNorm3d, (3, 2, 2, 1, 2), {"eps": 0.1, "momentum": 0.3}, False),
    "channels last": (sn.BatchNorm2d, (3, 2, 3, 2), {"channel_dim": -1, "activation": "hardswish"}, True),
    "no affine": (sn.BatchNorm1d, (4, 3), {"affine": False}, False),
    "no bias": (sn.BatchNorm1d, (4, 3), {"bias": False}, True),
    "no statistics": (sn.BatchNorm1d, (4, 3), {"track_running_stats": False}, False),
    "cumulative": (sn.BatchNorm1d, (4, 3), {"momentum": None}, False),
}


class TestTraining:
    @pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
    def test_two_steps_of_a_program_against_the_definition(self, case):
        kind, shape, options, with_residual = case
        dim = options.get("channel_dim", 1)
        layer = ready(kind(shape[dim], dtype=torch.float64, **options))
        given = {"residual": rand(*shape, seed=9)} if with_residual else {}
        program = exported(layer, rand(*shape), **given)
        assert calls(program).count(NODE) == 1
        assert is_aten_alone(program)
        module = program.module()
        batches = [rand(shape[0] + more, *shape[1:], seed=more) * 2 + 1 for more in (1, 2)]
        for x in batches:
            self._check_a_step(module, x, options, rand(*x.shape, seed=7) if with_residual else None)
        if layer.tracks:
            assert module.num_batches_tracked.item() == 2
            first, second = (stats(x, dim) for x in batches)
            m = options.get("momentum", 0.1)
            a, b = (m, m) if m is not None else (1, 0.5)
            mean = (1 - b) * a * first.mean + b * second.mean
            var = (1 - b) * ((1 - a) + a * first.unbiased) + b * second.unbiased
            assert_close(module.running_mean, mean, "statistic")
            assert_close(module.running_var, var, "variance")

    def _check_a_step(self, module: Any, x: Tensor, options: dict[str, Any], residual: Tensor | None) -> None:
        gamma, beta = (getattr(module, name, None) for name in ("weight", "bias"))
        inputs = [None if t is None else t.detach().requires_grad_() for t in (x, residual)] + [gamma, beta]
        y = module(inputs[0]) if residual is None else module(inputs[0], residual=inputs[1])
        at = [None if t is None else t.detach().numpy() for t in inputs]
        activation, eps, dim = options.get("activation"), options.get("eps", 1e-5), options.get("channel_dim", 1)

        def definition(x, residual, gamma, beta):
            f = ACTIVATIONS.get(activation)
            return batch_norm(x, gamma, beta, eps, activation=f, residual=residual, channel_dim=dim)

        assert_close(y, definition(*at), "output")
        upstream = rand(*x.shape, seed=8)
        wanted = [i for i, t in enumerate(inputs) if t is not None]
        for i, found in zip(wanted, grad(y, [inputs[i] for i in wanted], upstream), strict=True):
            expected = central_differences(
                lambda v, i=i: (definition(*at[:i], v, *at[i + 1 :]) * upstream.numpy()).sum(), at[i]
            )
            assert np.abs(expected).max() > 1e-2
            assert_close(found, expected, "gradient")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("half_layer", [True, False])
    def test_half_precision(self, dtype, half_layer):
        layer = ready(sn.BatchNorm1d(3, activation="relu"))
        layer = layer.to(dtype) if half_layer else layer
        x = rand(16, 3, dtype=dtype)
        program = exported(layer, rand(4, 3, dtype=dtype), residual=rand(4, 3))
        assert NODE in calls(program)
        module, residual = program.module(), rand(16, 3, seed=1)
        y = module(x, residual=residual)
        assert y.dtype == dtype
        plain = batch_norm(x, *(p.detach().double().numpy() for p in layer.parameters()))
        # aten rounds before the sum, and then the sum is rounded
        tolerance = 2 * TOLERANCE["output"][dtype][0]
        expected = (plain + wide(residual)).clip(0)
        np.testing.assert_allclose(wide(y), expected, rtol=tolerance, atol=tolerance * np.abs(plain).max())
        assert module.running_mean.dtype == torch.float32
        assert_close(module.running_mean, 0.1 * stats(x).mean, "statistic")
        assert_close(module.running_var, 0.9 + 0.1 * stats(x).unbiased, "variance")

    def test_it_trains_on(self):
        program = exported(
            nn.Sequential(ready(nn.Linear(2, 3)), sn.BatchNorm1d(3, activation="relu")), rand(4, 2).float()
        )
        module = program.module()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = (module(rand(32, 2).float()) - rand(32, 3, seed=1).float()).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]
        assert module.get_buffer("1.num_batches_tracked").item() == 20

    def test_lowered_it_still_writes_the_running_statistics(self):
        program = saved_and_loaded(exported(sn.BatchNorm1d(3, dtype=torch.float64), rand(4, 3))).run_decompositions()
        assert "aten._native_batch_norm_legit_functional.default" in calls(program)
        x, module = rand(5, 3, seed=1), program.module()
        module(x)
        assert_close(module.running_mean, 0.1 * stats(x).mean, "statistic")
        assert module.num_batches_tracked.item() == 1


class TestEvaluation:
    @pytest.mark.parametrize("strict", [False, True])
    @pytest.mark.parametrize(("freeze", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
    def test_against_the_definition(self, strict, freeze, dtype):
        layer = ready(sn.BatchNorm2d(3, activation="gelu"))
        layer.running_mean.copy_(rand(3, seed=4))
        layer.running_var.copy_(rand(3, seed=5).abs() + 1)
        layer = sn.freeze_(layer) if freeze else layer.eval()
        program = saved_and_loaded(
            exported(layer, rand(4, 3, 2, 2, dtype=dtype), strict, residual=rand(4, 3, 2, 2, dtype=dtype))
        )
        assert not {NODE, "aten.promote_types.default"} & set(calls(program))  # a dtype is no value of a program
        assert is_aten_alone(program)
        x, residual = rand(5, 3, 2, 2, seed=1, dtype=dtype), rand(5, 3, 2, 2, seed=2, dtype=dtype)
        affine = [p.detach().double().numpy() for p in layer.parameters()]
        expected = normalized(
            x, wide(layer.running_mean), wide(layer.running_var), *affine,
            activation=ACTIVATIONS["gelu"], residual=residual,
        )  # fmt: skip
        assert_close(program.module()(x, residual=residual), expected, "output")
        assert_close(program.module()(x[:2], residual=residual[:2]), layer(x, residual=residual)[:2], "output")
