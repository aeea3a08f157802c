"""batch_norm and batch_norm_with_moments: every option against the definition, and the errors at the boundary."""

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

import steadynorm as sn
from steadynorm.errors import (
    ArgumentError,
    DeviceError,
    DtypeError,
    RejectedBatchWarning,
    ShapeError,
    SingleValueError,
    UnknownActivationError,
    WeightError,
)
from steadynorm.functional import batch_norm as bn
from steadynorm.functional import batch_norm_with_moments as bn_moments
from support import ACTIVATIONS, LAYOUTS, assert_close, batch_norm, laid_out, normalized, stats

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def affine(channels: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return rand(channels, seed=1, dtype=dtype), rand(channels, seed=2, dtype=dtype)


class TestTraining:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_output_equals_the_definition(self, dtype, layout):
        x, (gamma, beta) = (rand(6, 3, 4, 5) * 3 + 2).to(dtype), affine(3, dtype)
        y = bn(laid_out(x, layout), None, None, gamma, beta, training=True)
        assert y.dtype == dtype
        assert_close(y, batch_norm(x, gamma, beta), "output")

    @pytest.mark.parametrize("shape", [(7, 3), (5, 3, 4), (4, 3, 2, 5), (3, 3, 2, 2, 3)], ids=str)
    @pytest.mark.parametrize("channel_dim", [1, -1])
    def test_any_dimensions_and_channel_axis(self, shape, channel_dim):
        x = rand(*shape)
        gamma, beta = affine(shape[channel_dim])
        y = bn(x, None, None, gamma, beta, training=True, channel_dim=channel_dim)
        assert_close(y, batch_norm(x, gamma, beta, channel_dim=channel_dim), "output")

    def test_memory_format_is_kept(self):
        for channel_dim in (1, -1):
            x = rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
            for training in (True, False):
                c = x.shape[channel_dim]
                y = bn(x, torch.zeros(c), torch.ones(c), training=training, channel_dim=channel_dim, momentum=0)
                assert y.stride() == x.stride()

    @pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
    def test_eps_is_added_to_the_variance(self, eps):
        x = rand(9, 2)
        assert_close(bn(x, None, None, training=True, eps=eps), batch_norm(x, eps=eps), "output")

    @pytest.mark.parametrize("momentum", [0.0, 0.1, 0.75, 1.0])
    def test_running_statistics_move_towards_mean_and_unbiased_variance(self, momentum):
        x, mean, variance = rand(6, 3, 2), rand(3, seed=3), rand(3, seed=4).abs()
        before = mean.clone(), variance.clone()
        bn(x, mean, variance, training=True, momentum=momentum)
        batch = stats(x)
        keep = 1 - momentum
        assert_close(mean, keep * before[0].numpy() + momentum * batch.mean, "statistic")
        assert_close(variance, keep * before[1].numpy() + momentum * batch.unbiased, "statistic")

    def test_a_batch_that_is_not_finite_is_not_committed(self):
        mean, variance = torch.zeros(2), torch.ones(2)
        with pytest.warns(RejectedBatchWarning, match="was not committed"):
            bn(torch.tensor([[1.0, 1.0], [float("nan"), 2.0]]), mean, variance, training=True)
        assert mean.tolist() == [0, 0]
        assert variance.tolist() == [1, 1]


class TestEvaluation:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_output_is_by_the_running_statistics_and_nothing_is_written(self, dtype, layout):
        x, (gamma, beta) = rand(6, 3, 4, 5, dtype=dtype), affine(3, dtype)
        mean, variance = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.25, 1.0, 4.0])
        y = bn(laid_out(x, layout), mean, variance, gamma, beta)
        assert y.dtype == dtype
        expected = normalized(x, mean.double().numpy(), variance.double().numpy(), gamma, beta)
        assert_close(y, expected, "output", torch.float32 if dtype == torch.float64 else dtype)
        assert mean.tolist() == [0.5, -1.0, 2.0]
        assert variance.tolist() == [0.25, 1.0, 4.0]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a_half_precision_input_is_centred_in_float32(self, dtype):
        x = torch.tensor([[512.0], [516.0], [508.0]], dtype=dtype)
        mean, variance = torch.tensor([512.3]), torch.tensor([9.0])  # in half precision the mean would round to 512.5
        assert_close(bn(x, mean, variance, eps=0.0), (x.double().numpy() - mean.double().numpy()) / 3, "output")

    def test_takes_every_option(self):
        x, residual, (gamma, beta) = rand(4, 3, 5), rand(4, 3, 5, seed=5), affine(3)
        mean, variance, mask = rand(3, seed=6), rand(3, seed=7).abs(), rand(4, 5, seed=8) > 0
        holed = torch.where(mask.unsqueeze(1), x, torch.nan)
        y = bn(holed, mean, variance, gamma, beta, activation="elu", residual=residual, mask=mask)
        expected = normalized(
            x, mean.numpy(), variance.numpy(), gamma, beta, activation=ACTIVATIONS["elu"], residual=residual, mask=mask
        )
        assert_close(y, expected, "output")


class TestOptions:
    @pytest.mark.parametrize("name", ACTIVATIONS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_order_is_normalize_affine_add_activate(self, name, dtype):
        x, residual = rand(8, 3, 5, dtype=dtype), 2 * rand(8, 3, 5, seed=5, dtype=dtype)
        gamma, beta = affine(3, dtype)
        y = bn(x, None, None, gamma, beta, training=True, activation=name, residual=residual)
        expected = batch_norm(x, gamma, beta, activation=ACTIVATIONS[name], residual=residual)
        assert_close(y, expected, "output")
        without = bn(x, None, None, gamma, beta, training=True, activation=name)
        assert_close(without, batch_norm(x, gamma, beta, activation=ACTIVATIONS[name]), "output")

    @pytest.mark.parametrize("shape", [(5,), (5, 4), (1, 4)], ids=str)
    @pytest.mark.parametrize("activation", [None, "sigmoid"])  # sigmoid(0) is not 0, yet a masked output is
    def test_mask_leaves_positions_out_and_returns_0_there(self, shape, activation):
        x, (gamma, beta), residual = rand(5, 3, 4), affine(3), rand(5, 3, 4, seed=5)
        mask = (torch.arange(torch.Size(shape).numel()) % 3 != 1).reshape(shape)
        inside = mask.reshape(*shape, *(1,) * (2 - len(shape))).unsqueeze(1).expand_as(x)
        mean, variance = torch.zeros(3, dtype=x.dtype), torch.ones(3, dtype=x.dtype)
        y = bn(
            torch.where(inside, x, torch.nan), mean, variance, gamma, beta, training=True, momentum=1.0,
            activation=activation, residual=torch.where(inside, residual, torch.inf), mask=mask,
        )  # fmt: skip
        f = ACTIVATIONS[activation] if activation else None
        assert_close(y, batch_norm(x, gamma, beta, activation=f, residual=residual, mask=mask), "output")
        assert (y[~inside] == 0).all()
        assert_close(mean, stats(x, weight=mask).mean, "statistic")
        assert_close(variance, stats(x, weight=mask).unbiased, "statistic")

    def test_weight_2_is_the_row_twice_and_weight_0_still_gets_an_output(self):
        x, times = rand(6, 3, 4), torch.tensor([1, 2, 0, 1, 3, 1])
        means, variances = torch.zeros(2, 3, dtype=x.dtype), torch.ones(2, 3, dtype=x.dtype)
        y = bn(x, means[0], variances[0], training=True, sample_weight=times)
        repeated = x.repeat_interleave(times, 0)
        bn(repeated, means[1], variances[1], training=True)
        torch.testing.assert_close(means[0], means[1])
        torch.testing.assert_close(variances[0], variances[1])
        batch = stats(repeated)
        assert_close(y, normalized(x, batch.mean, batch.biased), "output")

    def test_mask_and_weights_together(self):
        x, mask, weight = rand(6, 3, 4), rand(6, 4, seed=9) > 0, rand(6, seed=10).abs()
        y = bn(x, None, None, training=True, mask=mask, sample_weight=weight)
        assert_close(y, batch_norm(x, mask=mask, sample_weight=weight), "output")

    def test_a_wrong_weight_is_harmless_to_nobody_but_says_so(self):
        for bad in (-1.0, float("nan")):
            with pytest.raises(WeightError, match="sample_weight must be >= 0 and finite"):
                bn(rand(3, 2), None, None, training=True, sample_weight=torch.tensor([1.0, bad, 1.0]))


class TestWithMoments:
    def test_returns_the_batchs_moments(self):
        x, weight = rand(5, 3, 4), rand(5, 4, seed=11).abs()
        y, m = bn_moments(x, sample_weight=weight)
        expected = stats(x, weight=weight)
        assert isinstance(m, sn.Moments)
        for found, wanted in zip(m, expected, strict=True):
            assert_close(found, wanted, "statistic")
        assert_close(y, batch_norm(x, sample_weight=weight), "output")

    def test_is_the_training_step_without_its_side_effect(self):
        x, residual, (gamma, beta) = rand(5, 3, 4), rand(5, 3, 4, seed=5), affine(3)
        given = [t.clone() for t in (x, residual, gamma, beta)]
        options = {"activation": "silu", "residual": residual, "mask": rand(5, seed=12) > -1}
        y, _ = bn_moments(x, gamma, beta, **options)
        assert torch.equal(y, bn(x, None, None, gamma, beta, training=True, **options))
        assert all(torch.equal(a, b) for a, b in zip(given, (x, residual, gamma, beta), strict=True))

    def test_a_single_value_is_normalised_to_0(self):
        y, m = bn_moments(torch.tensor([[3.0, -7.0]]), None, torch.tensor([0.5, 2.0]))
        assert y.tolist() == [[0.5, 2.0]]
        assert m.variance().tolist() == [0, 0]


class TestTransforms:
    """torch.func: a transform equals what it abbreviates, each computed by a loop or from the definition."""

    x = rand(4, 3)
    upstream = rand(4, 3, seed=20)
    gamma, beta = affine(3)

    def step(self, x):
        return bn_moments(x, self.gamma, self.beta, activation="tanh")[0]

    def loss(self, x):
        return (self.step(x) * self.upstream).sum()

    def eager_grad(self):
        x = self.x.clone().requires_grad_()
        return torch.autograd.grad(self.step(x), x, self.upstream)[0]

    def test_grad_and_vjp(self):
        torch.testing.assert_close(grad(self.loss)(self.x), self.eager_grad())
        torch.testing.assert_close(vjp(self.step, self.x)[1](self.upstream)[0], self.eager_grad())

    def test_jvp_is_the_directional_derivative(self):
        direction = rand(4, 3, seed=21)
        _, tangent = jvp(self.step, (self.x,), (direction,))
        h = np.longdouble(1e-6)
        f = lambda t: batch_norm(  # noqa: E731
            self.x.numpy() + t * direction.numpy().astype(np.longdouble), *affine(3), activation=ACTIVATIONS["tanh"]
        )
        assert_close(tangent, (f(h) - f(-h)) / (2 * h), "gradient")

    def test_jacobians_and_hessian(self):
        jacobian = jacrev(self.step)(self.x)
        torch.testing.assert_close(jacfwd(self.step)(self.x), jacobian)
        torch.testing.assert_close(torch.einsum("nc,ncij->ij", self.upstream, jacobian), self.eager_grad())
        hessian = torch.func.hessian(self.loss)(self.x)
        torch.testing.assert_close(hessian, hessian.permute(2, 3, 0, 1))
        torch.testing.assert_close(hessian, torch.autograd.functional.hessian(self.loss, self.x))

    def test_vmap_equals_the_loop(self):
        xs, masks, weights = rand(5, 4, 3, seed=22), rand(5, 4, seed=23) > -1, rand(5, 4, seed=24).abs()

        def one(x, mask, weight):
            return bn_moments(x, mask=mask, sample_weight=weight)

        y, m = vmap(one)(xs, masks, weights)
        loop = [one(*arguments) for arguments in zip(xs, masks, weights, strict=True)]
        torch.testing.assert_close(y, torch.stack([found for found, _ in loop]))
        torch.testing.assert_close(m.m2, torch.stack([found.m2 for _, found in loop]))
        per_example = vmap(grad(self.loss))(xs)
        torch.testing.assert_close(per_example, torch.stack([grad(self.loss)(x) for x in xs]))

    def test_a_layer_in_training_when_its_buffers_are_passed_too(self):
        layer = sn.BatchNorm1d(3).double()
        state = {name: t.clone() for name, t in [*layer.named_parameters(), *layer.named_buffers()]}

        def loss(gamma, state):
            return (functional_call(layer, {**state, "weight": gamma}, (self.x,)) * self.upstream).sum()

        found = grad(loss)(state["weight"], state)
        assert_close(found, (batch_norm(self.x) * self.upstream.numpy()).sum(0), "gradient")
        assert layer.num_batches_tracked.item() == 0


class TestErrors:
    x = torch.zeros(4, 3, 5)

    def test_one_value_per_channel(self):
        for shape in ((1, 3), (1, 3, 1, 1)):
            with pytest.raises(SingleValueError, match=r"more than one value per channel.*\(1, 3.*larger batch.*eval"):
                bn(torch.zeros(shape), None, None, training=True)
        assert bn(torch.zeros(1, 3), torch.zeros(3), torch.ones(3)).shape == (1, 3)

    @pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
    def test_a_wrong_number_of_channels_names_the_tensor(self, name):
        fitting = {key: torch.ones(3) for key in ("running_mean", "running_var", "weight", "bias")}
        with pytest.raises(ShapeError, match=rf"{name} must have one value per channel, shape \(3,\).*got \(2,\)"):
            bn(self.x, **{**fitting, name: torch.ones(2)}, training=True)

    @pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
    def test_another_device_names_the_tensor(self, name):
        fitting = {key: torch.ones(3) for key in ("running_mean", "running_var", "weight", "bias")}
        with pytest.raises(DeviceError, match=rf"{name} must be on the input's device cpu, got meta"):
            bn(self.x, **{**fitting, name: torch.ones(3, device="meta")}, training=True)

    def test_an_option_on_another_device(self):
        meta = {"device": "meta"}
        for option in (
            {"residual": torch.zeros(4, 3, 5, **meta)},
            {"mask": torch.ones(4, dtype=torch.bool, **meta)},
            {"sample_weight": torch.ones(4, **meta)},
        ):
            with pytest.raises(DeviceError, match=rf"{next(iter(option))} must be on the input's device cpu, got meta"):
                bn(self.x, None, None, training=True, **option)

    @pytest.mark.parametrize(
        ("x", "parameter"),
        [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float32, torch.float16),
         (torch.float16, torch.bfloat16)],
        ids=str,
    )  # fmt: skip
    def test_parameters_of_another_dtype(self, x, parameter):
        for name in ("weight", "bias"):
            with pytest.raises(DtypeError, match=rf"{name} must have the input's dtype {x}.*got {parameter}"):
                bn(self.x.to(x), None, None, **{name: torch.ones(3, dtype=parameter)}, training=True)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_float32_parameters_beside_a_half_precision_input_are_fine(self, dtype):
        x, (gamma, beta) = rand(5, 3, dtype=dtype), affine(3, torch.float32)
        assert_close(bn(x, None, None, gamma, beta, training=True), batch_norm(x, gamma, beta), "output")

    def test_no_floats(self):
        with pytest.raises(DtypeError, match=r"floating-point input, got torch.int64"):
            bn(self.x.long(), None, None, training=True)
        with pytest.raises(DtypeError, match=r"residual must be floating-point"):
            bn(self.x, None, None, training=True, residual=self.x.long())

    def test_a_mask_is_boolean_and_fits(self):
        with pytest.raises(DtypeError, match=r"mask must be boolean.*torch.float32.*sample_weight="):
            bn(self.x, None, None, training=True, mask=torch.ones(4))
        for shape in ((3,), (5,), (4, 3), (4, 5, 1)):
            with pytest.raises(ShapeError, match=r"mask must be broadcastable to the positions .*\(4, 5\)"):
                bn(self.x, None, None, training=True, mask=torch.ones(shape, dtype=torch.bool))

    def test_a_residual_has_the_inputs_shape(self):
        with pytest.raises(ShapeError, match=r"residual must have the input's shape \(4, 3, 5\), got \(4, 3, 1\)"):
            bn(self.x, None, None, training=True, residual=torch.zeros(4, 3, 1))

    def test_running_statistics_come_in_pairs_and_evaluation_needs_them(self):
        with pytest.raises(ArgumentError, match="belong together"):
            bn(self.x, torch.zeros(3), None, training=True)
        with pytest.raises(ArgumentError, match=r"evaluation needs running_mean and running_var.*training=True"):
            bn(self.x, None, None)

    @pytest.mark.parametrize("eps", [-1e-5, float("nan")])
    def test_eps_is_not_negative(self, eps):
        with pytest.raises(ArgumentError, match=rf"eps must be >= 0, got {eps}"):
            bn(self.x, None, None, training=True, eps=eps)

    def test_unknown_activation(self):
        with pytest.raises(UnknownActivationError, match="no_such"):
            bn(self.x, None, None, training=True, activation="no_such")

    def test_no_channel_axis(self):
        with pytest.raises(ShapeError, match=r"at least 2 dimensions.*got shape \(3,\).*unsqueeze"):
            bn(torch.zeros(3), None, None, training=True)
