"""no_commit and accumulate: what is remembered of the forwards inside, when, and what of those that went wrong.

The expectation is always the definition's: the statistics of the micro-batches laid end to end, or none at all.
"""

import copy
import pickle
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import ranks
import steadynorm as sn
from steadynorm.errors import ArgumentError, ModelError, RejectedBatchWarning, SingleValueError
from support import Stats, assert_close, batch_norm, central_differences, normalized, stats

NAN = float("nan")
CONTEXTS = [sn.no_commit, sn.accumulate]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1).to(dtype)


def parts_of(*sizes: int, channels: int = 3) -> list[Tensor]:
    """Micro-batches whose means lie far apart: the variance between them is most of the whole."""
    return [rand(size, channels, seed=size + i) + 5 * i for i, size in enumerate(sizes)]


def layer_of(channels: int = 3, **options) -> sn.BatchNorm1d:
    return sn.BatchNorm1d(channels, dtype=torch.float64, **options)


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.named_buffers()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(t, before[name]) for name, t in model.named_buffers())


def assert_remembers(layer: sn.BatchNorm1d, measured: Stats, share: float = 0.1, commits: int = 1) -> None:
    """A layer that began at mean 0 and variance 1 has committed `measured` once."""
    assert_close(layer.running_mean, share * measured.mean, "statistic")
    assert_close(layer.running_var, (1 - share) + share * measured.unbiased, "variance")
    assert layer.num_batches_tracked.item() == commits


class TestNoCommit:
    def test_normalises_by_the_batch_and_writes_nothing(self):
        layer, x, upstream = layer_of(), rand(5, 3).requires_grad_(), rand(5, 3, seed=1)
        before = buffers(layer)
        with sn.no_commit(layer):
            y = layer(x)
        y.backward(upstream)
        assert_close(y, batch_norm(x), "output")
        up = upstream.numpy()
        assert_close(x.grad, central_differences(lambda v: (batch_norm(v) * up).sum(), x.detach()), "gradient")
        assert unchanged(layer, before)
        layer(x)
        assert_remembers(layer, stats(x))

    def test_a_bad_batch_leaves_no_trace(self):
        layer = layer_of(1)
        with sn.no_commit(layer), warnings.catch_warnings():
            warnings.simplefilter("error")
            layer(torch.tensor([[1.0], [NAN]], dtype=torch.float64))
        assert (layer.rejected_batches, layer.running_mean.item()) == (0, 0)

    def test_ends_with_an_exception_too(self):
        layer, x = layer_of(), rand(5, 3)
        with pytest.raises(KeyError), sn.no_commit(layer):
            raise KeyError
        layer(x)
        assert_remembers(layer, stats(x))

    def test_nests(self):
        layer, x = layer_of(), rand(5, 3)
        with sn.no_commit(layer):
            with sn.no_commit(layer):
                layer(x)
            layer(x)
        assert layer.num_batches_tracked.item() == 0
        layer(x)
        assert_remembers(layer, stats(x))

    def test_in_evaluation_there_is_nothing_to_keep_from_being_written(self):
        layer, x = layer_of().eval(), rand(5, 3)
        with sn.no_commit(layer):
            assert torch.equal(layer(x), layer(x))
        assert_close(layer(x), normalized(x, np.zeros(3), np.ones(3)), "output")

    def test_of_a_part_of_a_model(self):
        model, x = nn.Sequential(layer_of(), layer_of()), rand(5, 3)
        with sn.no_commit(model[0]):
            model(x)
        assert [layer.num_batches_tracked.item() for layer in model] == [0, 1]

    def test_with_a_mask(self):
        layer, mask = layer_of(), torch.tensor([True, False, True, True, False])
        x = torch.where(mask[:, None], rand(5, 3), NAN)
        before = buffers(layer)
        with sn.no_commit(layer):
            y = layer(x, mask=mask)
        assert_close(y, batch_norm(x, mask=mask), "output")
        assert unchanged(layer, before)

    def test_a_copy_made_inside_commits(self):
        layer, x = layer_of(), rand(5, 3)
        for context in CONTEXTS:
            with context(layer):
                copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
            for one in copies:
                one(x)
                assert_remembers(one, stats(x))


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


@pytest.mark.parametrize("context", [*CONTEXTS, nullcontext])
@pytest.mark.parametrize("options", [{}, {"ghost_batch_size": 2}, {"activation": "silu"}], ids=str)
def test_what_the_buffers_hold_never_shows_in_training(context, options):
    """Uninitialised memory, say after `to_empty()`: outputs, gradients and what is held are those of the batch."""
    layers, parts, upstream = [layer_of(**options) for _ in range(2)], parts_of(4, 6), rand(10, 3, seed=9)
    nn.init.constant_(layers[0].running_mean, NAN)
    nn.init.constant_(layers[0].running_var, NAN)
    found = []
    for layer in layers:
        x = torch.cat(parts).requires_grad_()
        with context(layer):
            y = torch.cat([layer(part) for part in x.split([4, 6])])
            if context is sn.accumulate:
                (held,) = layer.remember.parts.values()
                assert_close(held.m2, stats(torch.cat(parts)).m2, "statistic")
        found.append([y, *torch.autograd.grad(y, [x, *layer.parameters()], upstream)])
    assert all(torch.isfinite(a).all() and torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_model_without_such_layers_is_told_so(context):
    with (
        pytest.raises(ModelError, match=rf"{context.__name__} needs steadynorm's.*1 of torch.nn"),
        context(nn.BatchNorm1d(2)),
    ):
        pass
    with pytest.raises(ModelError, match=r"none of torch\.nn"), context(nn.Linear(2, 2)):
        pass


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


class TestGradScaler:
    """Mixed precision: a step may be skipped after its forward has been seen."""

    def train(self, layer: nn.Module, batches: list[Tensor], factors: list[float]) -> list[bool]:
        """One scaled step a batch; whether each was taken."""
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        taken = []
        for x, factor in zip(batches, factors, strict=True):
            optimizer.zero_grad()
            before = layer.weight.detach().clone()
            loss = (layer(x) * rand(*x.shape, seed=7)).mean() * factor
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            taken.append(not torch.equal(layer.weight, before))
        return taken

    def test_a_skipped_step_keeps_the_finite_moments_of_its_forward(self):
        layer, batches = layer_of(momentum=None), parts_of(4, 6, 5)
        assert self.train(layer, batches, [1.0, float("inf"), 1.0]) == [True, False, True]
        assert_close(layer.running_mean, sum(stats(x).mean for x in batches) / 3, "statistic")
        assert_close(layer.running_var, sum(stats(x).unbiased for x in batches) / 3, "variance")
        assert (layer.num_batches_tracked.item(), layer.rejected_batches) == (3, 0)

    def test_a_forward_that_overflowed_leaves_no_trace(self):
        layer, batches = layer_of(momentum=None), parts_of(4, 6, 5)
        batches[1][3, 1] = float("inf")
        with pytest.warns(RejectedBatchWarning):
            assert self.train(layer, batches, [1.0, 1.0, 1.0]) == [True, False, True]
        good = [stats(batches[0]), stats(batches[2])]
        assert_close(layer.running_mean, sum(s.mean for s in good) / 2, "statistic")
        assert_close(layer.running_var, sum(s.unbiased for s in good) / 2, "variance")
        assert (layer.num_batches_tracked.item(), layer.rejected_batches) == (2, 1)
        assert torch.isfinite(layer.weight).all()


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


class TestOverlapping:
    """Contexts that do not end in the order they began in, as those of several threads."""

    def test_each_takes_out_its_own(self):
        layer = sn.BatchNorm1d(2)
        first, second = sn.no_commit(layer), sn.accumulate(layer)
        first.__enter__()
        second.__enter__()
        layer(torch.randn(8, 2))
        first.__exit__(None, None, None)
        layer(torch.randn(8, 2))
        assert layer.num_batches_tracked.item() == 0
        second.__exit__(None, None, None)
        assert layer.num_batches_tracked.item() == 1
        layer(torch.randn(8, 2))
        assert layer.num_batches_tracked.item() == 2
        assert "remember" not in layer.__dict__

    def test_domains_too(self):
        layer = sn.BatchNorm1d(2, domains=("a", "b"))
        first, second = sn.domain(layer, "a"), sn.domain(layer, "b")
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert layer.active_domain == "b"
        second.__exit__(None, None, None)
        assert layer.active_domain is None


def test_a_block_entered_in_inference_mode_serves_forwards_outside_of_it():
    layer = sn.BatchNorm1d(2)
    with torch.inference_mode():
        block = sn.accumulate(layer)
        block.__enter__()
    layer(torch.randn(8, 2))
    block.__exit__(None, None, None)
    assert layer.num_batches_tracked.item() == 1


def test_a_model_is_asked_for():
    with pytest.raises(ArgumentError, match=r"needs a torch\.nn\.Module, got list"), sn.no_commit([sn.BatchNorm1d(2)]):
        pass


def test_a_rejected_batch_is_reported_where_the_layer_was_called():
    with pytest.warns(RejectedBatchWarning) as seen:
        sn.BatchNorm1d(2)(torch.full((4, 2), float("nan")))
    assert seen[0].filename == __file__
