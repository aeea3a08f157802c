"""The schedule of renorm's limits, by itself and in a layer."""

import pytest
import torch
from torch import nn

import steadynorm as sn
from steadynorm.errors import ArgumentError, RejectedBatchWarning
from support import assert_close, normalized, stats, wide
from support_renorm import AT_ONCE, LOOSE, NAN, TIGHT, Running, corrections, layer_of, rand, renormed


class TestSchedule:
    def test_the_papers(self):
        """Ioffe 2017, section 4: r_max 1 and d_max 0 for 5,000 steps, then to 3 at 40,000 and to 5 at 25,000."""
        by_hand = {
            0: (1, 0), 4_999: (1, 0), 5_000: (1, 0), 15_000: (1 + 2 * 10 / 35, 2.5), 25_000: (1 + 2 * 20 / 35, 5),
            40_000: (3, 5), 1_000_000: (3, 5),
        }  # fmt: skip
        for step, expected in by_hand.items():
            for given in (step, torch.tensor(step)):
                assert [t.item() for t in sn.Renorm().limits(given)] == pytest.approx(expected, rel=1e-14)

    @pytest.mark.parametrize(
        ("warmup", "ramp", "by_hand"),
        [
            (0, 0, {0: (2, 4), 1: (2, 4)}),  # at once
            (3, 0, {2: (1, 0), 3: (2, 4), 4: (2, 4)}),
            (2, 4, {2: (1, 0), 3: (1.25, 1), 4: (1.5, 2), 6: (2, 4), 7: (2, 4)}),
            (2, (4, 0), {1: (1, 0), 2: (1, 4), 4: (1.5, 4)}),
            (2, (0, 4), {1: (1, 0), 2: (2, 0), 4: (2, 2)}),
        ],
        ids=str,
    )
    def test_limits_by_hand(self, warmup, ramp, by_hand):
        renorm = sn.Renorm(2.0, 4.0, warmup, ramp)
        for step, expected in by_hand.items():
            assert [t.item() for t in renorm.limits(step)] == pytest.approx(expected)

    def test_a_layer_follows_it_by_the_batches_it_has_committed(self):
        renorm = sn.Renorm(2.0, 1.0, warmup=2, ramp=4)
        layer = layer_of(rand(4, 3), renorm, counted=0, momentum=0.01)
        for step, limits in enumerate([(1, 0), (1, 0), (1, 0), (1.25, 0.25), (1.5, 0.5), (1.75, 0.75), (2, 1), (2, 1)]):
            x, running = rand(4, 3, seed=step) * 3, Running.of(layer)
            with pytest.warns(RejectedBatchWarning):
                layer(torch.full_like(x, NAN))  # not committed, not counted
            assert layer.num_batches_tracked.item() == step
            r, d = corrections(wide(x), running, sn.Renorm(*limits, **AT_ONCE))
            assert_close(layer(x), renormed(wide(x), layer.weight.detach(), layer.bias.detach(), r, d), "output")

    @pytest.mark.parametrize(
        "wrong",
        [{"r_max": 0.5}, {"r_max": NAN}, {"r_max": float("inf")}, {"d_max": -1.0}, {"d_max": NAN},
         {"d_max": float("inf")}, {"warmup": -1}, {"ramp": -1}, {"ramp": (1, -1)}, {"ramp": (1, 2, 3)}],
        ids=str,
    )  # fmt: skip
    def test_out_of_range(self, wrong):
        with pytest.raises(ArgumentError, match="Renorm needs"):
            sn.Renorm(**wrong)

    def test_the_first_batch_is_plain_for_there_is_nothing_to_be_corrected_towards(self):
        x = rand(4, 3) * 5 + 30
        layer, plain = sn.BatchNorm1d(3, dtype=x.dtype, renorm=LOOSE), sn.BatchNorm1d(3, dtype=x.dtype)
        assert torch.equal(layer(x), plain(x))
        assert not torch.equal(layer(x), plain(x))

    def test_statistics_measured_by_update_bn_stay_within_biased_and_unbiased(self):
        model = nn.Sequential(
            sn.BatchNorm1d(3, renorm=TIGHT), nn.Linear(3, 4), sn.BatchNorm1d(4, renorm=TIGHT)
        ).double()
        same = [rand(32, 3)] * 3  # of which each batch is the whole
        torch.optim.swa_utils.update_bn(same, model)
        hidden = model[1](
            torch.from_numpy(normalized(same[0], stats(same[0]).mean, stats(same[0]).biased).astype(float))
        )
        # The first batch is normalised by its biased variance, the others by the unbiased one, 32/31 of it.
        expected = stats(hidden).unbiased * (1 + 31 / 32 + 31 / 32) / 3
        assert_close(model[2].running_var, expected, "output", torch.float32)

    @pytest.mark.parametrize("wrong", [{"warmup": "5"}, {"ramp": [1, 2]}, {"r_max": None}], ids=str)
    def test_no_numbers(self, wrong):
        with pytest.raises(ArgumentError, match="Renorm is made of numbers"):
            sn.Renorm(**wrong)

    def test_a_layer_wants_a_schedule_and_running_statistics(self):
        with pytest.raises(ArgumentError, match=r"renorm must be a steadynorm\.Renorm or None, got True"):
            sn.BatchNorm1d(3, renorm=True)
        with pytest.raises(ArgumentError, match="renorm needs track_running_stats=True"):
            sn.BatchNorm1d(3, renorm=TIGHT, track_running_stats=False)
