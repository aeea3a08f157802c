"""Ghost batches: every chunk by its own statistics, the pooled ones remembered, alone and beside other options."""

import copy
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad, gradcheck, gradgradcheck

import ranks
import steadynorm as sn
from steadynorm.errors import ArgumentError, RejectedBatchWarning, SingleValueError
from support import ACTIVATIONS, Array, assert_close, batch_norm, central_differences, normalized, stats

NAN = float("nan")


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1).to(dtype)


def layer_of(x: Tensor, **options) -> sn.BatchNorm1d | sn.BatchNorm2d:
    """A layer for x, with γ, β and running statistics away from where they start."""
    kind = sn.BatchNorm2d if x.dim() == 4 else sn.BatchNorm1d
    layer = kind(x.shape[options.get("channel_dim", 1)], dtype=x.dtype, **options)
    for seed, t in enumerate((*layer.parameters(), layer.running_mean)):
        nn.init.trunc_normal_(t, generator=torch.Generator().manual_seed(seed + 50))
    layer.running_var.fill_(2.25)
    return layer


def chunked(sizes: list[int], x: Array, *args, mask=None, sample_weight=None, residual=None, **options) -> Array:
    """The definition: `support.batch_norm` of each chunk by itself."""
    ends = np.cumsum([0, *sizes])
    parts = [slice(a, b) for a, b in pairwise(ends)]

    def of(t, part):
        return t if t is None or len(t) == 1 else t[part]

    outputs = [
        batch_norm(
            x[part], *args,
            mask=of(mask, part), sample_weight=of(sample_weight, part), residual=of(residual, part), **options,
        )
        for part in parts
    ]  # fmt: skip
    return np.concatenate(outputs)


SIZES = {
    "even": ((8, 3), 4, [4, 4]),
    "remainder": ((10, 3), 4, [4, 4, 2]),
    "a rest of one value joins": ((5, 3), 2, [2, 3]),
    "a rest of one image": ((5, 3, 2, 2), 2, [2, 2, 1]),
    "larger than the batch": ((5, 3), 16, [5]),
    "every image by itself": ((3, 2, 2, 3), 1, [1, 1, 1]),
    "a batch of one image": ((1, 3, 2, 2), 4, [1]),
    "channels last": ((5, 4, 3), 2, [2, 2, 1]),
}


class TestAgainstTheDefinition:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("name", SIZES)
    def test_output_gradients_and_what_is_remembered(self, name, dtype):
        shape, ghost, sizes = SIZES[name]
        dim = -1 if name == "channels last" else 1
        x, residual, upstream = (rand(*shape, seed=seed, dtype=dtype) for seed in range(3))
        layer = layer_of(x, ghost_batch_size=ghost, activation="silu", momentum=0.5, channel_dim=dim)
        before = layer.running_mean.clone()
        inputs = [x.requires_grad_(), layer.weight, layer.bias, residual.requires_grad_()]
        y = layer(x, residual=residual)
        at = [t.detach().double().numpy() for t in inputs]

        def definition(x, gamma, beta, residual):
            f = ACTIVATIONS["silu"]
            return chunked(sizes, x, gamma, beta, residual=residual, activation=f, channel_dim=dim)

        assert_close(y, definition(*at), "output")
        for i, derivative in enumerate(grad(y, inputs, upstream)):
            expected = central_differences(
                lambda v, i=i: (definition(*at[:i], v, *at[i + 1 :]) * upstream.double().numpy()).sum(), at[i]
            )
            assert_close(derivative, expected, "gradient")
        batch = stats(x, dim)
        assert_close(layer.running_mean, (before.numpy() + batch.mean) / 2, "statistic")
        assert_close(layer.running_var, (2.25 + batch.unbiased) / 2, "variance")
        assert layer.num_batches_tracked.item() == 1

    def test_second_order(self):
        layer = layer_of(torch.empty(5, 2, dtype=torch.float64), ghost_batch_size=2, activation="tanh", momentum=0.0)
        x = rand(5, 2).requires_grad_()
        assert gradcheck(layer, (x,))
        assert gradgradcheck(layer, (x,))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype):
        x = rand(6, 3, 4, dtype=dtype)
        layer = layer_of(x, ghost_batch_size=4, momentum=1.0)
        assert_close(layer(x), chunked([4, 2], x, layer.weight, layer.bias), "output")
        assert_close(layer.running_var, stats(x).unbiased, "variance")


def test_chunks_far_apart_are_pooled_not_averaged():
    """The variance between chunks is most of what evaluation meets; an average of the chunks' variances lacks it."""
    x = torch.cat([rand(4, 1), rand(4, 1, seed=1) + 100, rand(2, 1, seed=2) - 50])
    layer = layer_of(x, ghost_batch_size=4, momentum=1.0)
    layer(x)
    assert layer.running_var.item() > 2000
    assert_close(layer.running_mean, stats(x).mean, "statistic")
    assert_close(layer.running_var, stats(x).unbiased, "variance")


def test_an_example_changes_its_own_chunk_only():
    x, layer = rand(7, 3), layer_of(rand(7, 3), ghost_batch_size=3)
    other = x.clone()
    other[4] += 10
    before, after = layer(x), layer(other)
    assert (before != after).any(1).tolist() == [False] * 3 + [True] * 4  # the last one has joined


def test_evaluation_knows_no_chunks():
    x, layer = rand(7, 3), layer_of(rand(7, 3), ghost_batch_size=2).eval()
    before = copy.deepcopy(layer.state_dict())
    running = (t.numpy().astype(np.longdouble) for t in (layer.running_mean, layer.running_var))
    assert_close(layer(x), normalized(x, *running, layer.weight, layer.bias), "output")
    assert torch.equal(layer(x[:1]), layer(x)[:1])
    assert all(torch.equal(before[name], t) for name, t in layer.state_dict().items())


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("shape", [(5, 3, 4, 6), (5, 1, 4, 6), (1, 3, 4, 6), (5, 3, 1, 1)], ids=str)
def test_memory_format_is_kept(shape, memory_format):
    x = rand(*shape).contiguous(memory_format=memory_format)
    y = layer_of(x, ghost_batch_size=2, single_value="beta")(x)
    assert y.stride() == x.stride()
    sizes = [2, 2, 1] if len(x) == 5 and x[0, 0].numel() > 1 else [2, 3] if len(x) == 5 else [1]
    assert_close(y, chunked(sizes, x, *layer_of(x).parameters()), "output")


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)], ids=str)
def test_an_empty_batch_changes_nothing(shape):
    x = torch.empty(shape, requires_grad=True)
    layer = layer_of(x, ghost_batch_size=2)
    before = copy.deepcopy(layer.state_dict())
    y = layer(x)
    y.backward(torch.empty(shape))
    assert y.shape == x.grad.shape == shape
    assert layer.weight.grad.tolist() == [0, 0, 0]
    assert all(torch.equal(before[name], t) for name, t in layer.state_dict().items())


class TestSingleValue:
    """A chunk of one value per channel has no variance, whatever the size of the batch around it."""

    @pytest.mark.parametrize(("batch", "ghost"), [(1, 4), (1, 1), (6, 1)])
    def test_is_an_error(self, batch, ghost):
        layer = sn.BatchNorm1d(3, ghost_batch_size=ghost)
        with pytest.raises(SingleValueError, match=rf"ghost_batch_size={ghost}.*\({batch}, 3\)") as caught:
            layer(torch.ones(batch, 3))
        assert ("a larger ghost_batch_size" in str(caught.value)) == (batch > 1)
        assert layer.num_batches_tracked.item() == 0

    def test_is_an_error_with_renorm_too_where_nothing_would_ever_be_committed(self):
        layer = sn.BatchNorm1d(3, ghost_batch_size=1, renorm=sn.Renorm())
        with pytest.raises(SingleValueError, match="a larger ghost_batch_size"):
            layer(torch.ones(6, 3))
        assert layer(torch.ones(1, 3)).shape == (1, 3)

    @pytest.mark.parametrize(("batch", "ghost"), [(1, 4), (6, 1)])
    def test_or_gets_beta(self, batch, ghost):
        x = rand(batch, 3)
        layer = layer_of(x, ghost_batch_size=ghost, single_value="beta", activation="relu")
        assert_close(layer(x), np.broadcast_to(layer.bias.detach().relu().numpy(), (batch, 3)), "output")

    def test_or_the_running_statistics(self):
        x = rand(1, 3)
        layer = layer_of(x, ghost_batch_size=4, single_value="running")
        running = [t.numpy().astype(np.longdouble) for t in (layer.running_mean, layer.running_var)]
        assert_close(layer(x), normalized(x, *running, layer.weight, layer.bias), "output")
        assert layer.num_batches_tracked.item() == 0


@pytest.mark.parametrize("size", [0, -3, 2.5, "4"])
def test_a_chunk_is_a_number_of_examples(size):
    with pytest.raises(ArgumentError, match=rf"ghost_batch_size must be a number of examples >= 1.*got {size!r}"):
        sn.BatchNorm1d(3, ghost_batch_size=size)


def test_one_bad_chunk_leaves_the_running_statistics_alone():
    x = rand(6, 3)
    x[5, 1] = float("inf")
    layer = layer_of(x, ghost_batch_size=2)
    before = copy.deepcopy(layer.state_dict())
    with pytest.warns(RejectedBatchWarning):
        y = layer(x)
    assert torch.isfinite(y[:4]).all()
    assert layer.rejected_batches == 1
    assert all(torch.equal(before[name], t) for name, t in layer.state_dict().items())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_keep_the_option_and_the_state_dict_is_torchs(copied):
    layer, x = layer_of(rand(6, 3), ghost_batch_size=2), rand(6, 3)
    other = copied(layer)
    assert "ghost_batch_size=2" in repr(other)
    assert torch.equal(other(x), layer(x))
    nn.BatchNorm1d(3).load_state_dict(layer.state_dict(), strict=True)


MASKS = {
    "per position": torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1]]).bool(),
    "per example": torch.tensor([True, True, False, False, True]),
    "for all alike": torch.tensor([[True, False, True, True]]),
    "a chunk with one position": torch.tensor([[1] * 4, [1] * 4, [0] * 4, [0, 0, 1, 0], [1] * 4]).bool(),
}


class TestMasksAndWeights:
    """Each chunk takes along what belongs to its examples."""

    @pytest.mark.parametrize("weighted", [None, (5,), (5, 4), (1, 4)], ids=str)
    @pytest.mark.parametrize("name", MASKS)
    def test_against_the_definition(self, name, weighted):
        mask, weight = MASKS[name], None if weighted is None else rand(*weighted, seed=3).abs() + 0.1
        inside = mask.reshape(*mask.shape, *(1,) * (2 - mask.dim()))[:, None].expand(5, 3, 4)
        x, residual, upstream = (rand(5, 3, 4, seed=seed) for seed in range(3))
        holed, holed_residual = (torch.where(inside, t, NAN).requires_grad_() for t in (x, residual))
        layer = layer_of(x, ghost_batch_size=2, activation="silu", momentum=1.0)
        inputs = [holed, layer.weight, layer.bias, holed_residual]
        y = layer(holed, residual=holed_residual, mask=mask, sample_weight=weight)
        at = [t.detach().numpy() for t in (x, layer.weight, layer.bias, residual)]

        def definition(x, gamma, beta, residual):
            valid = mask.reshape(len(mask), -1)
            options = {"activation": ACTIVATIONS["silu"], "mask": valid, "sample_weight": weight}
            return chunked([2, 2, 1], x, gamma, beta, residual=residual, **options)

        assert_close(y, definition(*at), "output")
        for i, derivative in enumerate(grad(y, inputs, torch.where(inside, upstream, NAN))):
            expected = central_differences(
                lambda v, i=i: (definition(*at[:i], v, *at[i + 1 :]) * upstream.numpy()).sum(), at[i]
            )
            assert_close(derivative, expected, "gradient")
        counted = inside[:, 0] * (1 if weight is None else weight.reshape(len(weight), -1))
        assert_close(layer.running_mean, stats(x, weight=counted).mean, "statistic")
        assert_close(layer.running_var, stats(x, weight=counted).unbiased, "variance")


def test_compiled():
    torch._dynamo.reset()  # or the sizes of other tests' batches are remembered
    x, mask, upstream = rand(5, 3, 4), torch.arange(20).reshape(5, 4) % 4 > 0, rand(5, 3, 4, seed=1)
    mask[2:4] = False
    x = torch.where(mask[:, None], x, NAN).requires_grad_()
    layer = layer_of(x, ghost_batch_size=2, momentum=1.0)
    eager = copy.deepcopy(layer)
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, mask=mask)
    expected = chunked([2, 2, 1], x.detach().nan_to_num().numpy(), layer.weight, layer.bias, mask=mask)
    assert_close(y, expected, "output")
    assert_close(layer.running_var, stats(x.detach(), weight=mask).unbiased, "variance")
    torch.testing.assert_close(grad(y, x, upstream)[0], grad(eager(x, mask=mask), x, upstream)[0])


def test_compiled_for_any_batch_size():
    """A last batch is shorter: the compiler then takes the batch size for a symbol."""
    layer = layer_of(rand(1, 3), ghost_batch_size=4, momentum=1.0)
    step = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for n, sizes in ((8, [4, 4]), (10, [4, 4, 2]), (5, [5]), (3, [3])):
        x = rand(n, 3, seed=n)
        assert_close(step(x), chunked(sizes, x.numpy(), layer.weight, layer.bias), "output")
        assert_close(layer.running_var, stats(x).unbiased, "variance")


# Over ranks: chunks stay where they are; what is remembered is what all ranks saw.


def synced(rank, group, parts, masks, upstreams):
    x = parts[rank].clone().requires_grad_()
    layer = layer_of(x, ghost_batch_size=2, activation="silu", momentum=0.5, process_group=group)
    y = layer(x, mask=None if masks is None else masks[rank])
    y.backward(upstreams[rank])
    return y.detach(), x.grad, layer.running_mean, layer.running_var, layer.num_batches_tracked


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("counts", [(5, 2), (4, 0), (3, 1, 0, 2)], ids=str)
def test_over_ranks_chunks_stay_and_what_is_remembered_is_merged(counts, masked):
    x, upstream = rand(sum(counts), 3, 2), rand(sum(counts), 3, 2, seed=1)
    mask = torch.arange(2 * sum(counts)).reshape(-1, 2) % 5 != 1
    mask[: 2 * masked] = False  # the first rank's first chunk
    masks = mask.split(counts) if masked else None
    results = ranks.run(synced, len(counts), x.split(counts), masks, upstream.split(counts))
    layer = layer_of(x)
    sizes = [size for n in counts for size in [2] * (n // 2) + [1] * (n % 2)]

    def definition(x):
        options = {"activation": ACTIVATIONS["silu"], "mask": mask if masked else None}
        return chunked(sizes, x, layer.weight, layer.bias, **options)

    y, dx = (torch.cat([r[i] for r in results]) for i in range(2))
    assert_close(y, definition(x.numpy()), "output")
    assert_close(dx, central_differences(lambda v: (definition(v) * upstream.numpy()).sum(), x), "gradient")
    seen = stats(x, weight=mask if masked else None)
    for *_, mean, var, tracked in results:
        assert_close(mean, (layer.running_mean.numpy() + seen.mean) / 2, "statistic")
        assert_close(var, (2.25 + seen.unbiased) / 2, "variance")
        assert tracked.item() == 1


@pytest.mark.xdist_group("ranks")
def test_a_rank_with_a_single_value_gets_beta_and_counts():
    """It may not be refused, since the other ranks wait for what it has measured."""
    x, upstream = rand(4, 3), rand(4, 3, seed=1)
    results = ranks.run(synced, 2, x.split([3, 1]), None, upstream.split([3, 1]))
    layer = layer_of(x)
    f = ACTIVATIONS["silu"]
    assert_close(results[0][0], chunked([3], x[:3].numpy(), layer.weight, layer.bias, activation=f), "output")
    assert_close(results[1][0], f(layer.bias.detach().numpy())[None], "output")
    assert (results[1][1] == 0).all()
    for *_, mean, var, _tracked in results:
        assert_close(mean, (layer.running_mean.numpy() + stats(x).mean) / 2, "statistic")
        assert_close(var, (2.25 + stats(x).unbiased) / 2, "variance")
