"""Moments: against the definition, and by the algebra that a mergeable statistic must obey."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steadynorm import Moments
from steadynorm.errors import ArgumentError, DeviceError, DtypeError, ShapeError, WeightError
from support import LAYOUTS, assert_close, laid_out, stats

FEW = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 1)


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Values with a different mean and width in each channel (dimension 1)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    channels = torch.arange(shape[1], dtype=torch.float64).view(1, -1, *(1,) * (len(shape) - 2))
    return ((channels + 1) * x + 3 * channels - 1).to(dtype)


def assert_same(a: Moments, b: Moments) -> None:
    for name, one, other in zip(Moments._fields, a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def assert_measured(m: Moments, expected, dtype: torch.dtype) -> None:
    assert_close(m.count, expected.count, "statistic", torch.float64)
    assert_close(m.mean, expected.mean, "statistic", dtype)
    assert_close(m.m2, expected.m2, "statistic", dtype)


class TestOf:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_equals_the_definition_in_any_dtype_and_layout(self, dtype, layout):
        x = numbers(0, 6, 3, 4, 5, dtype=dtype)
        m = Moments.of(laid_out(x, layout))
        assert all(t.dtype == torch.float64 and t.shape == (3,) for t in m)
        assert_measured(m, stats(x), dtype)
        assert_close(m.variance(), stats(x).biased, "variance", dtype)
        assert_close(m.variance(unbiased=True), stats(x).unbiased, "variance", dtype)

    @pytest.mark.parametrize(
        ("shape", "channel_dim"),
        [((7, 3), 1), ((7, 3), -1), ((5, 3, 4), 1), ((5, 3, 4), -1), ((4, 3, 2, 5), 2), ((4, 3, 2, 5), -2),
         ((3, 3, 2, 2, 3), 1), ((3, 3, 2, 2, 3), -1)],
        ids=str,
    )  # fmt: skip
    def test_channel_dim(self, shape, channel_dim):
        x = numbers(1, *shape)
        assert_measured(Moments.of(x, channel_dim=channel_dim), stats(x, channel_dim), x.dtype)

    def test_expanded_input_counts_each_position(self):
        x = numbers(2, 4, 3, 1).expand(4, 3, 5)
        assert x.stride(-1) == 0
        assert_measured(Moments.of(x), stats(x), x.dtype)

    @pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)], ids=str)
    def test_nothing_measured_is_the_identity(self, shape):
        for m in (Moments.of(torch.empty(shape)), Moments.of(torch.empty(shape), weight=torch.ones(shape[0]))):
            assert [t.tolist() for t in m] == [[0.0] * 3] * 3
            assert m.variance().isnan().all()

    def test_one_value_has_a_biased_variance_of_0_and_no_unbiased_one(self):
        m = Moments.of(torch.tensor([[5.0]]))
        assert m.variance().item() == 0
        assert m.variance(unbiased=True).isnan().all()

    def test_non_finite_data_is_measured_not_hidden(self):
        x = torch.tensor([[1.0, 1.0], [float("inf"), 2.0], [3.0, float("nan")], [0.0, 0.0]])
        m = Moments.of(x)
        assert not torch.isfinite(m.mean).any()
        assert not torch.isfinite(m.m2).any()

    def test_gradients_flow_to_x(self):
        x = numbers(3, 4, 2, 3).requires_grad_()
        torch.autograd.gradcheck(lambda x: Moments.of(x)[1:], (x,))
        torch.autograd.gradgradcheck(lambda x: Moments.of(x)[1:], (x,))
        mask = torch.tensor([True, False, True, True])
        torch.autograd.gradcheck(lambda x: Moments.of(x, weight=mask)[1:], (x,))

    def test_is_a_tuple_that_pickles(self):
        m = Moments.of(numbers(4, 5, 2))
        assert_same(pickle.loads(pickle.dumps(m)), m)
        assert_same(Moments(*m), m)


class TestWeights:
    @FEW
    @given(seeds)
    def test_any_weights_equal_the_definition(self, seed):
        rng = np.random.default_rng(seed)
        w = torch.from_numpy(rng.exponential(size=(5, 4)) * (rng.random((5, 4)) > 0.3))
        x = numbers(seed, 5, 3, 4)
        assert_measured(Moments.of(x, weight=w), stats(x, weight=w), x.dtype)

    @FEW
    @given(seeds, st.lists(st.integers(0, 4), min_size=6, max_size=6))
    def test_a_weight_is_a_number_of_repetitions(self, seed, times):
        x, times = numbers(seed, 6, 2, 3), torch.tensor(times)
        assert_same(Moments.of(x, weight=times), Moments.of(x.repeat_interleave(times, 0)))

    @FEW
    @given(seeds, st.lists(st.booleans(), min_size=6, max_size=6))
    def test_weight_0_leaves_out_whatever_is_there(self, seed, kept):
        kept = torch.tensor(kept)
        x = numbers(seed, 6, 2, 3)
        left = Moments.of(x[kept])
        for hidden in (float("nan"), float("inf"), -1e300):
            holed = torch.where(kept.view(-1, 1, 1), x, hidden)
            assert_same(Moments.of(holed, weight=kept), left)
            assert_same(Moments.of(holed, weight=kept.to(x.dtype)), left)

    def test_no_gradient_reaches_what_was_left_out(self):
        x = torch.tensor([[1.0], [float("nan")], [4.0], [6.0]], dtype=torch.float64, requires_grad=True)
        m = Moments.of(x, weight=torch.tensor([True, False, True, True]))
        (found,) = torch.autograd.grad([m.mean, m.m2], x, [torch.tensor([3.0]), torch.tensor([5.0])])
        mean = 11 / 3  # dμ/dx = 1/3 and dm2/dx = 2 (x - μ)
        assert found.flatten().tolist() == pytest.approx(
            [1 + 10 * (1 - mean), 0, 1 + 10 * (4 - mean), 1 + 10 * (6 - mean)]
        )

    @pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 5), (1, 5), (4, 5, 6), (4, 1, 6), ()], ids=str)
    def test_lines_up_from_the_batch_axis_on(self, shape):
        x = numbers(5, 4, 3, 5, 6)
        w = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert_measured(Moments.of(x, weight=w), stats(x, weight=w), x.dtype)
        last = x.movedim(1, -1)
        assert_measured(Moments.of(last, -1, w), stats(x, weight=w), x.dtype)

    def test_one_weight_per_example_is_never_taken_for_one_per_position(self):
        x = numbers(6, 4, 2, 4)
        w = torch.tensor([1.0, 0.0, 0.0, 2.0])
        assert_same(Moments.of(x, weight=w), Moments.of(torch.cat([x[0], x[3], x[3]], -1).unsqueeze(0)))

    @pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), float("-inf")])
    def test_negative_and_non_finite_weights_are_refused(self, bad):
        with pytest.raises(WeightError, match=rf"weight must be >= 0 and finite.*Got {bad}"):
            Moments.of(torch.zeros(3, 2), weight=torch.tensor([1.0, bad, 1.0]))

    @pytest.mark.parametrize("shape", [(3,), (4, 2), (5,), (4, 5, 1), (2, 4)], ids=str)
    def test_weights_that_do_not_fit_are_refused(self, shape):
        with pytest.raises(ShapeError, match=r"broadcastable to the positions \(N, \*\) = \(4, 5\).*shape \(4,\)"):
            Moments.of(torch.zeros(4, 2, 5), weight=torch.ones(shape))

    def test_weights_of_another_device_or_kind_are_refused(self):
        with pytest.raises(DeviceError, match=r"weight must be on the input's device cpu, got meta"):
            Moments.of(torch.zeros(4, 2), weight=torch.ones(4, device="meta"))
        with pytest.raises(DtypeError, match=r"weight must be boolean or real"):
            Moments.of(torch.zeros(4, 2), weight=torch.ones(4, dtype=torch.complex64))


class TestMerge:
    @FEW
    @given(seeds, st.lists(st.integers(0, 5), min_size=1, max_size=5), st.randoms(use_true_random=False))
    def test_merging_equals_concatenating_in_any_split_and_order(self, seed, sizes, random):
        x = numbers(seed, sum(sizes), 2, 3)
        parts = [Moments.of(part) for part in x.split(sizes)]
        random.shuffle(parts)
        merged = Moments.empty(2)
        for part in parts:
            merged = merged.merge(part)
        expected = stats(x)
        assert_measured(merged, expected, x.dtype)
        assert_measured(Moments.merge_all(parts), expected, x.dtype)

    @FEW
    @given(seeds)
    def test_weighted_parts_merge_too(self, seed):
        x, w = numbers(seed, 9, 2), torch.rand(9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        parts = [Moments.of(a, weight=b) for a, b in zip(x.split(4), w.split(4), strict=True)]
        assert_measured(Moments.merge_all(parts), stats(x, weight=w), x.dtype)

    @FEW
    @given(seeds)
    def test_is_commutative_and_associative(self, seed):
        a, b, c = (Moments.of(part) for part in numbers(seed, 12, 2).split([3, 4, 5]))
        assert_same(a.merge(b), b.merge(a))
        assert_same(a.merge(b).merge(c), a.merge(b.merge(c)))

    def test_empty_is_the_identity_on_both_sides_bit_for_bit(self):
        m, nothing = Moments.of(numbers(7, 5, 3)), Moments.empty(3)
        for merged in (m.merge(nothing), nothing.merge(m)):
            assert all(torch.equal(a, b) for a, b in zip(merged, m, strict=True))
        assert_same(nothing.merge(nothing), nothing)
        assert_same(Moments.merge_all([nothing, m, nothing]), m)

    def test_loses_no_digits_to_a_large_mean(self):
        x = numbers(8, 1000, 2) + 1e8
        merged = Moments.merge_all([Moments.of(part) for part in x.split(7)])
        np.testing.assert_allclose(merged.m2.numpy(), stats(x).m2.astype(float), rtol=1e-6)

    def test_refuses_what_does_not_go_together(self):
        for merge in (Moments.merge, lambda a, b: Moments.merge_all([a, b])):
            with pytest.raises(ShapeError, match=r"as many channels can be merged, got \[\(2,\), \(3,\)\]"):
                merge(Moments.empty(2), Moments.empty(3))
            with pytest.raises(DeviceError, match=r"on one device can be merged, got \['cpu', 'meta'\]"):
                merge(Moments.empty(2), Moments.empty(2, "meta"))
        with pytest.raises(ArgumentError, match=r"at least one Moments.*Moments\.empty"):
            Moments.merge_all([])


class TestAffineMaps:
    @FEW
    @given(seeds, st.floats(-1e4, 1e4))
    def test_adding_a_constant_shifts_the_mean_alone(self, seed, constant):
        x = numbers(seed, 8, 2, 3)
        before, after = Moments.of(x), Moments.of(x + constant)
        assert_same(after, Moments(before.count, before.mean + constant, before.m2))

    @FEW
    @given(seeds, st.floats(-100, 100))
    def test_scaling_scales_m2_by_its_square(self, seed, scale):
        x = numbers(seed, 8, 2, 3)
        before, after = Moments.of(x), Moments.of(x * scale)
        expected = Moments(before.count, before.mean * scale, before.m2 * scale**2)
        torch.testing.assert_close(tuple(after), tuple(expected), rtol=1e-9, atol=1e-8)


class TestMix:
    old = Moments.of(torch.tensor([[0.0], [2.0]]))  # mean 1, variance 1
    new = Moments.of(torch.tensor([[4.0], [8.0], [6.0]]))  # mean 6, variance 8/3, count 3

    @pytest.mark.parametrize(("prior", "examples"), [(1, None), (16, None), (0.5, 2), (0, None), (5, 0), (16, 100)])
    def test_is_schneiders_formula(self, prior, examples):
        n = 3 if examples is None else examples
        a = prior / (prior + n)
        mixed = self.old.mix(self.new, prior, examples=examples)
        assert mixed.count.item() == prior + n
        assert mixed.mean.item() == pytest.approx(a * 1 + (1 - a) * 6, rel=1e-12)
        assert mixed.variance().item() == pytest.approx(a * 1 + (1 - a) * 8 / 3, rel=1e-12)

    def test_with_nothing_seen_keeps_what_is_remembered(self):
        mixed = self.old.mix(Moments.empty(1), prior=4)
        assert (mixed.mean.item(), mixed.variance().item(), mixed.count.item()) == (1, 1, 4)

    def test_with_nothing_remembered_takes_what_is_seen(self):
        assert_same(Moments.empty(1).mix(self.new, prior=4), self.new)

    @pytest.mark.parametrize("bad", [-1, float("nan"), float("inf")])
    def test_refuses_a_prior_that_is_no_count(self, bad):
        with pytest.raises(ArgumentError, match=f"prior={bad}"):
            self.old.mix(self.new, bad)
        with pytest.raises(ArgumentError, match=f"examples={bad}"):
            self.old.mix(self.new, 1, examples=bad)

    def test_refuses_other_channels_and_devices(self):
        with pytest.raises(ShapeError, match=r"can be mixed, got \[\(1,\), \(2,\)\]"):
            self.old.mix(Moments.empty(2), 1)
        with pytest.raises(DeviceError, match=r"can be mixed, got \['cpu', 'meta'\]"):
            self.old.mix(Moments.empty(1, "meta"), 1)


class TestErrors:
    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
    def test_no_floats_no_moments(self, dtype):
        with pytest.raises(DtypeError, match=rf"expected a floating-point tensor, got {dtype}.*x\.float\(\)"):
            Moments.of(torch.ones(3, 2, dtype=dtype))

    @pytest.mark.parametrize(("shape", "channel_dim"), [((3,), 1), ((), 1), ((3, 2), 2), ((3, 2), -3)], ids=str)
    def test_no_such_channel_axis(self, shape, channel_dim):
        with pytest.raises(ShapeError, match=rf"channels in dimension {channel_dim}, got shape"):
            Moments.of(torch.ones(shape), channel_dim)

    @pytest.mark.parametrize("channel_dim", [0, -2])
    def test_the_batch_axis_holds_no_channels(self, channel_dim):
        with pytest.raises(ShapeError, match=r"is the batch dimension"):
            Moments.of(torch.ones(3, 2), channel_dim)


def test_every_layout_helper_keeps_the_values():
    """The test's own tools: layouts differ in strides only, and the non-contiguous ones are that."""
    x = numbers(9, 4, 3, 2, 5)
    assert all(torch.equal(laid_out(x, layout), x) for layout in LAYOUTS)
    assert laid_out(x, "offset").storage_offset() > 0
    assert len({laid_out(x, layout).stride() for layout in LAYOUTS if layout != "offset"}) == len(LAYOUTS) - 1
