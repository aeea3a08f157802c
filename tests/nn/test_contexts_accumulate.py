"""accumulate: one batch of many micro-batches, of which some may be bad, on one process and over ranks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ranks
import steadynorm as sn
from steadynorm.errors import RejectedBatchWarning, SingleValueError
from support import assert_close, batch_norm, stats
from support_contexts import NAN, assert_remembers, buffers, layer_of, parts_of, rand, unchanged


class TestAccumulate:
    @given(st.lists(st.integers(2, 6), min_size=1, max_size=5), st.integers(0, 2**16), st.sampled_from([0.0, 1e4]))
    @settings(max_examples=30, deadline=None)
    def test_is_the_batch_that_the_micro_batches_make_up(self, sizes, seed, offset):
        layer = layer_of(momentum=0.25)
        parts = [rand(size, 3, seed=seed + i) + i + offset for i, size in enumerate(sizes)]
        with sn.accumulate(layer):
            outputs = [layer(part) for part in parts]
            assert layer.num_batches_tracked.item() == 0
            assert layer.running_mean.tolist() == [0, 0, 0]
        assert_remembers(layer, stats(torch.cat(parts)), share=0.25)
        for part, y in zip(parts, outputs, strict=True):  # each still is normalised by its own
            np.testing.assert_allclose(y.detach().numpy(), batch_norm(part).astype(float), rtol=1e-8, atol=1e-8)

    def test_in_float32_as_in_float64(self):
        layer, parts = sn.BatchNorm1d(3), [part.float() + 1000 for part in parts_of(2, 5, 3)]
        with sn.accumulate(layer):
            for part in parts:
                layer(part)
        assert_remembers(layer, stats(torch.cat(parts)))

    @pytest.mark.parametrize("momentum", [None, 1.0, 0.0])
    def test_other_momenta(self, momentum):
        layer, blocks = layer_of(momentum=momentum), [parts_of(2, 5), parts_of(3, 3, 4)]
        for parts in blocks:
            with sn.accumulate(layer):
                for part in parts:
                    layer(part)
        whole = [stats(torch.cat(parts)) for parts in blocks]
        mean, variance = {
            None: (sum(s.mean for s in whole) / 2, sum(s.unbiased for s in whole) / 2),
            1.0: (whole[1].mean, whole[1].unbiased),
            0.0: (np.zeros(3), np.ones(3)),
        }[momentum]
        assert_close(layer.running_mean, mean, "statistic")
        assert_close(layer.running_var, variance, "variance")
        assert layer.num_batches_tracked.item() == 2

    def test_of_images(self):
        layer, parts = sn.BatchNorm2d(2, dtype=torch.float64), [rand(n, 2, 3, n, seed=n) + n for n in (1, 4, 2)]
        with sn.accumulate(layer):
            for part in parts:
                layer(part)
        assert_remembers(layer, stats(torch.cat([part.movedim(1, 0).flatten(1).T for part in parts])))

    def test_masked(self):
        layer, lengths = layer_of(), (torch.tensor([4, 1]), torch.tensor([0, 0]), torch.tensor([3, 2, 2]))
        masks = [torch.arange(4) < each[:, None] for each in lengths]
        parts = [torch.where(m[:, None], rand(len(m), 3, 4, seed=len(m)), NAN) for m in masks]
        with sn.accumulate(layer):
            for part, mask in zip(parts, masks, strict=True):
                layer(part, mask=mask)
        assert_remembers(layer, stats(torch.cat(parts), weight=torch.cat(masks)))

    def test_weighted(self):
        layer, parts = layer_of(), parts_of(3, 2)
        weights = [torch.tensor([0.5, 3.0, 0.0]), torch.tensor([0.25, 0.5])]  # the second alone is too light to commit
        with sn.accumulate(layer):
            for part, weight in zip(parts, weights, strict=True):
                layer(part, sample_weight=weight)
        assert_remembers(layer, stats(torch.cat(parts), weight=torch.cat(weights)))
        assert layer.rejected_batches == 0

    def test_weights_that_are_too_light_together_are_said(self):
        layer = layer_of()
        with pytest.warns(RejectedBatchWarning, match="mean of 1"), sn.accumulate(layer):  # noqa: PT031
            for part in parts_of(3, 2):
                layer(part, sample_weight=torch.full((len(part),), 0.25))
        assert (layer.rejected_batches, layer.num_batches_tracked.item()) == (1, 0)

    @pytest.mark.parametrize("bad", [NAN, float("inf")])
    def test_a_bad_micro_batch_is_left_out_and_counted(self, bad):
        layer, parts = layer_of(), parts_of(4, 3, 2)
        parts[1][0, 2] = bad
        with sn.accumulate(layer):
            layer(parts[0])
            with pytest.warns(RejectedBatchWarning, match="BatchNorm1d"):
                layer(parts[1])
            layer(parts[2])
        assert_remembers(layer, stats(torch.cat([parts[0], parts[2]])))
        assert layer.rejected_batches == 1

    def test_nothing_but_bad_ones_changes_nothing(self):
        layer = layer_of()
        with sn.accumulate(layer), pytest.warns(RejectedBatchWarning):
            layer(torch.full((4, 3), NAN, dtype=torch.float64))
        assert (layer.rejected_batches, layer.num_batches_tracked.item()) == (1, 0)
        assert layer.running_var.tolist() == [1, 1, 1]

    def test_a_sum_that_does_not_fit_the_buffer_is_rejected_at_the_end(self):
        layer = sn.BatchNorm1d(1)
        with pytest.warns(RejectedBatchWarning, match="too large for the buffer"), sn.accumulate(layer):  # noqa: PT031
            for centre in (-2e19, 2e19):  # each finite and narrow, together a variance of 4e38
                layer(torch.tensor([[centre], [centre]]))
        assert (layer.rejected_batches, layer.running_var.item()) == (1, 1)

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
    def test_if_the_block_raises_nothing_is_committed(self, error):
        layer, x = layer_of(), rand(5, 3)
        before = buffers(layer)
        with pytest.raises(error), sn.accumulate(layer):  # noqa: PT012
            layer(x)
            raise error
        assert unchanged(layer, before)
        layer(x)
        assert_remembers(layer, stats(x))

    def test_a_forward_that_is_refused_is_an_error_like_any(self):
        layer = layer_of()
        with pytest.raises(SingleValueError), sn.accumulate(layer):  # noqa: PT012
            layer(rand(4, 3))
            layer(rand(1, 3))
        assert layer.num_batches_tracked.item() == 0

    def test_nested(self):
        layer, (first, second, third) = layer_of(), parts_of(4, 3, 2)
        with sn.accumulate(layer):
            layer(first)
            with sn.accumulate(layer):
                layer(second)
            with pytest.raises(ValueError, match="inside"), sn.accumulate(layer):  # noqa: PT012
                layer(rand(4, 3, seed=9))
                raise ValueError("inside")
            layer(third)
            assert layer.num_batches_tracked.item() == 0
        assert_remembers(layer, stats(torch.cat([first, second, third])))

    def test_inside_and_outside_of_no_commit(self):
        layer, (first, second, third) = layer_of(), parts_of(4, 3, 2)
        with sn.no_commit(layer), sn.accumulate(layer):
            layer(first)
        assert layer.num_batches_tracked.item() == 0
        with sn.accumulate(layer):
            layer(first)
            with sn.no_commit(layer):
                layer(second)
            layer(third)
        assert_remembers(layer, stats(torch.cat([first, third])))

    def test_batches_of_one(self):
        layer, x = layer_of(single_value="beta"), rand(5, 3)
        with sn.accumulate(layer):
            for one in x.split(1):
                assert layer(one).tolist() == [[0, 0, 0]]
        assert_remembers(layer, stats(x))

    def test_a_single_example_in_all_has_no_variance_to_commit(self):
        layer = layer_of(single_value="beta")
        with sn.accumulate(layer):
            layer(rand(1, 3))
        assert layer.num_batches_tracked.item() == 0
        assert layer.rejected_batches == 0

    def test_layers_that_were_not_run_and_those_that_remember_nothing(self):
        model, x = nn.ModuleList([layer_of(), layer_of(), layer_of(track_running_stats=False)]), rand(5, 3)
        with sn.accumulate(model):
            model[0](x)
            model[2](x)
        assert_remembers(model[0], stats(x))
        assert model[1].num_batches_tracked.item() == 0
        assert model[1].running_var.tolist() == [1, 1, 1]

    def test_a_layer_that_the_model_has_twice_is_one_layer(self):
        norm, x = layer_of(), rand(5, 3)
        model = nn.Sequential(norm, nn.Tanh(), norm)
        with sn.accumulate(model):
            model(x)
        hidden = np.tanh(batch_norm(x))
        assert_remembers(norm, stats(np.concatenate([x.numpy(), hidden])))

    @pytest.mark.parametrize(
        "options",
        [{"ghost_batch_size": 2}, {"renorm": sn.Renorm(warmup=0, ramp=0)}, {"activation": "relu"}],
        ids=lambda options: next(iter(options)),
    )
    def test_what_the_layer_does_besides_changes_nothing_in_it(self, options):
        layer, parts = layer_of(**options), parts_of(4, 3, 6)
        with sn.accumulate(layer):
            for part in parts:
                layer(part)
        assert_remembers(layer, stats(torch.cat(parts)))

    def test_each_domain_has_its_own(self):
        layer, (first, second, third) = layer_of(domains=("photo", "sketch")), parts_of(4, 3, 2)
        with sn.accumulate(layer):
            for name, part in (("photo", first), ("sketch", second), ("photo", third)):
                with sn.domain(layer, name):
                    layer(part)
        photo, sketch = stats(torch.cat([first, third])), stats(second)
        assert_close(layer.running("photo").mean, 0.1 * photo.mean, "statistic")
        assert_close(layer.running("sketch").var, 0.9 + 0.1 * sketch.unbiased, "variance")
        assert [layer.running(name).num_batches_tracked.item() for name in layer.domains] == [1, 1]

    def test_a_frozen_layer_stays_as_it_is(self):
        layer = sn.freeze_(layer_of())
        before = buffers(layer)
        with sn.accumulate(layer):
            layer(rand(5, 3))
        assert unchanged(layer, before)

    def test_gradients_are_those_of_each_micro_batch(self):
        layer, parts, upstream = layer_of(), parts_of(4, 3), parts_of(4, 3)[::-1]
        with sn.accumulate(layer):
            for part, up in zip(parts, (upstream[1], upstream[0]), strict=True):
                layer(part).backward(up)
        expected = sum((batch_norm(part) * up.numpy()).sum(0) for part, up in zip(parts, upstream[::-1], strict=True))
        assert_close(layer.weight.grad, expected, "gradient")
        assert_remembers(layer, stats(torch.cat(parts)))


def _synced(rank: int, group, micro_batches: list[list[Tensor]], masks: list[list[Tensor]] | None) -> list[Tensor]:
    """Two blocks on every rank: one that is not to be remembered, one that is."""
    layer = layer_of()
    sn.sync_(layer, group)
    calls = [{} if masks is None else {"mask": mask} for mask in (masks[rank] if masks else [None] * 2)]
    with sn.no_commit(layer):
        layer(micro_batches[rank][0], **calls[0])
    assert layer.num_batches_tracked.item() == 0
    with sn.accumulate(layer):
        for x, call in zip(micro_batches[rank], calls, strict=True):
            layer(x, **call)
    return [layer.running_mean, layer.running_var, layer.num_batches_tracked]


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("masked", [False, True])
def test_over_ranks_it_is_the_batch_that_all_their_micro_batches_make_up(masked):
    first, second = parts_of(3, 5), parts_of(4, 0)  # by rank; rank 1's second one is empty
    micro_batches, masks = [first, [part + 20 for part in second]], None
    if masked:
        masks = [[torch.arange(len(part)) % 3 != 1 for part in parts] for parts in micro_batches]
        for part, mask in zip([*micro_batches[0], *micro_batches[1]], [*masks[0], *masks[1]], strict=True):
            part[~mask] = NAN
    whole = torch.cat([*micro_batches[0], *micro_batches[1]])
    weight = None if masks is None else torch.cat([*masks[0], *masks[1]])
    expected = stats(whole, weight=weight)
    for mean, variance, tracked in ranks.run(_synced, 2, micro_batches, masks):
        assert_close(mean, 0.1 * expected.mean, "statistic")
        assert_close(variance, 0.9 + 0.1 * expected.unbiased, "variance")
        assert tracked.item() == 1
