"""The layers as modules: torch.nn's arguments and state, options, evaluation one example at a time, and errors."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

import steadynorm as sn
from steadynorm.activations import Activation
from steadynorm.errors import DeviceError, DtypeError, ShapeError, UnknownActivationError
from support import ACTIVATIONS, assert_close, batch_norm, normalized, stats

PAIRS = [
    (sn.BatchNorm1d, nn.BatchNorm1d, (6, 3)),
    (sn.BatchNorm1d, nn.BatchNorm1d, (6, 3, 4)),
    (sn.BatchNorm2d, nn.BatchNorm2d, (4, 3, 2, 5)),
    (sn.BatchNorm3d, nn.BatchNorm3d, (3, 3, 2, 2, 4)),
]
ARGUMENTS = [
    {},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"momentum": None, "eps": 1e-2},
    {"affine": False, "track_running_stats": False},
    {"dtype": torch.float64},
]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def trained(layer: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """A layer whose every parameter and buffer has moved away from where it starts."""
    for seed, parameter in enumerate(layer.parameters()):
        nn.init.trunc_normal_(parameter, generator=torch.Generator().manual_seed(seed))
    dtype = next((p.dtype for p in layer.parameters()), torch.float32)
    layer(rand(*shape, seed=9, dtype=dtype) * 2 + 1)
    return layer


def emptied(layer: nn.Module) -> nn.Module:
    """`layer.to_empty(device="cpu")`, whose arbitrary memory is made sure to be no number that happens to be right."""
    return layer._apply(lambda t: torch.full_like(t, 7, device="cpu"))


def as_kwargs(layer: nn.Module) -> dict:
    affine, bias = layer.weight is not None, layer.bias is not None
    return {"eps": layer.eps, "gamma": layer.weight if affine else None, "beta": layer.bias if bias else None}


class TestLikeTorch:
    @pytest.mark.parametrize(("ours", "theirs", "shape"), PAIRS)
    def test_is_a_subclass_with_the_same_positional_arguments(self, ours, theirs, shape):
        assert issubclass(ours, theirs)
        positional = [p for p in inspect.signature(theirs).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        mine = inspect.signature(ours).parameters
        assert list(mine)[: len(positional)] == [p.name for p in positional]
        assert all(mine[p.name].default == p.default for p in positional)
        assert mine["bias"].default is True

    @pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
    @pytest.mark.parametrize(("ours", "theirs", "shape"), PAIRS)
    def test_state_dict_is_interchangeable_both_ways(self, ours, theirs, shape, arguments):
        for source, target in ((ours, theirs), (theirs, ours)):
            state = trained(source(3, **arguments), shape).state_dict()
            loaded = target(3, **arguments)
            assert loaded.load_state_dict(state, strict=True) == nn.modules.module._IncompatibleKeys([], [])
            after = loaded.state_dict()
            assert list(after) == list(state)
            assert all(torch.equal(after[k], state[k]) and after[k].dtype == state[k].dtype for k in state)
            assert after._metadata == state._metadata

    @pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
    @pytest.mark.parametrize(("ours", "theirs", "shape"), PAIRS)
    def test_training_and_evaluation_equal_the_definition(self, ours, theirs, shape, arguments):
        layer = trained(ours(3, **arguments), shape)
        dtype = arguments.get("dtype", torch.float32)
        x = rand(*shape, dtype=dtype) * 3 - 1
        assert_close(layer(x), batch_norm(x, **as_kwargs(layer)), "output")
        y = layer.eval()(x)
        if layer.track_running_stats:
            mean, variance = layer.running_mean.double().numpy(), layer.running_var.double().numpy()
            assert_close(y, normalized(x, mean, variance, **as_kwargs(layer)), "output")
        else:
            assert_close(y, batch_norm(x, **as_kwargs(layer)), "output")

    def test_a_sequence_of_steps_of_training_equals_torchs_in_float64(self):
        """Not the oracle, but what a user sees who swaps the layers: the same training to rounding."""
        results = []
        for kind in (sn.BatchNorm1d, nn.BatchNorm1d):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(4, 8), kind(8), nn.Tanh(), nn.Linear(8, 1)).double()
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
            for step in range(10):
                optimizer.zero_grad()
                x = rand(16, 4, seed=step, dtype=torch.float64)
                (net(x) - x.prod(1, keepdim=True)).square().mean().backward()
                optimizer.step()
            results.append(net.eval()(rand(5, 4, seed=99, dtype=torch.float64)))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


OPTIONS = {"activation": nn.ELU(0.5), "channel_dim": -1, "single_value": "beta", "momentum": 0.3, "eps": 1e-3}


class TestModule:
    @pytest.mark.parametrize(
        "copied",
        [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), copy.copy],
        ids=["deepcopy", "pickle", "copy"],
    )
    def test_copies_compute_the_same(self, copied):
        layer = trained(sn.BatchNorm1d(3, **OPTIONS), (5, 4, 3))
        other, x = copied(layer), rand(4, 4, 3)
        assert repr(other) == repr(layer)
        assert torch.equal(other.eval()(x), layer.eval()(x))

    def test_deepcopy_is_independent(self):
        layer = sn.BatchNorm1d(3)
        other = copy.deepcopy(layer)
        other(rand(5, 3))
        assert layer.num_batches_tracked.item() == 0
        assert layer.running_mean.tolist() == [0, 0, 0]

    def test_saves_and_loads_through_a_file_with_weights_only(self):
        layer, file = trained(sn.BatchNorm2d(3), (4, 3, 2, 2)), io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        other = nn.BatchNorm2d(3)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other.running_var, layer.running_var)

    def test_repr_says_what_differs_from_the_defaults(self):
        assert repr(sn.BatchNorm2d(8)) == repr(nn.BatchNorm2d(8))
        found = repr(sn.BatchNorm1d(3, **OPTIONS))
        assert found.endswith("activation=elu(0.5), channel_dim=-1, single_value='beta')")

    def test_dtypes_follow_to(self):
        layer = trained(sn.BatchNorm1d(3), (5, 3))
        wide = copy.deepcopy(layer).double()
        assert wide.running_mean.dtype == wide.weight.dtype == torch.float64
        assert wide(rand(4, 3, dtype=torch.float64)).dtype == torch.float64
        for narrow in (torch.float16, torch.bfloat16):
            small = copy.deepcopy(layer).to(narrow)
            assert small.weight.dtype == narrow
            assert small.running_mean.dtype == torch.float32
            assert torch.equal(small.running_mean, layer.running_mean)
            assert small.num_batches_tracked.dtype == torch.int64
            assert small(rand(4, 3, dtype=narrow)).dtype == narrow
            assert torch.equal(small.float().running_var, small.running_var)
        inside = nn.Sequential(copy.deepcopy(layer)).half()
        assert inside[0].running_var.dtype == torch.float32

    def test_half_precision_state_loads_into_and_out_of_torch(self):
        ours, theirs = trained(sn.BatchNorm1d(3), (5, 3)).half(), nn.BatchNorm1d(3).half()
        theirs.load_state_dict(ours.state_dict())
        ours.load_state_dict(theirs.state_dict())
        assert ours.running_mean.dtype == torch.float32
        assert torch.equal(ours.running_mean, theirs.running_mean.float())

    def test_meta_device_and_back(self):
        for load in (
            lambda layer: emptied(layer).load_state_dict(nn.BatchNorm1d(3).state_dict()),
            lambda layer: layer.load_state_dict(nn.BatchNorm1d(3).state_dict(), assign=True),
            lambda layer: emptied(layer).reset_parameters(),
        ):
            layer = sn.BatchNorm1d(3, device="meta")
            assert all(t.is_meta for t in [*layer.parameters(), *layer.buffers()])
            assert layer(torch.zeros(4, 3, device="meta")).is_meta
            load(layer)
            assert not any(t.is_meta for t in [*layer.parameters(), *layer.buffers()])
            layer(rand(4, 3))
            assert layer.num_batches_tracked.item() == 1
            assert layer.rejected_batches == 0

    def test_meta_layers_narrow_too(self):
        assert sn.BatchNorm1d(3, device="meta").half().running_var.dtype == torch.float32


class TestOptions:
    @pytest.mark.parametrize("name", ACTIVATIONS)
    def test_activation_by_name_equals_its_definition(self, name):
        layer, x = sn.BatchNorm1d(3, activation=name), rand(6, 3, 4)
        for _ in range(2):
            residual = rand(6, 3, 4, seed=2)
            measured = stats(x).mean, stats(x).biased
            if not layer.training:
                measured = layer.running_mean.numpy(), layer.running_var.numpy()
            expected = normalized(x, *measured, activation=ACTIVATIONS[name], residual=residual)
            assert_close(layer(x, residual=residual), expected, "output")
            layer.eval()

    def test_activation_by_module_takes_its_parameters(self):
        x, layer = rand(6, 3), sn.BatchNorm1d(3, activation=nn.LeakyReLU(0.3))
        assert layer.activation == Activation("leaky_relu", (0.3,))
        z = batch_norm(x)
        assert_close(layer(x), z * (1 - 0.7 * (z < 0)), "output")
        assert str(layer.activation) == "leaky_relu(0.3)"
        assert sn.BatchNorm1d(3).activation is None
        assert not list(layer.children()), "a submodule would change the state_dict and the hooks"

    def test_unknown_activation_is_refused_by_the_constructor(self):
        with pytest.raises(UnknownActivationError, match="PReLU"):
            sn.BatchNorm1d(3, activation=nn.PReLU())

    @pytest.mark.parametrize(
        ("kind", "shape"),
        [(sn.BatchNorm1d, (6, 3)), (sn.BatchNorm1d, (6, 4, 3)), (sn.BatchNorm2d, (4, 2, 5, 3)),
         (sn.BatchNorm3d, (2, 3, 2, 4, 3))],
    )  # fmt: skip
    def test_channels_last_by_channel_dim(self, kind, shape):
        layer, x = trained(kind(3, channel_dim=-1), shape), rand(*shape)
        assert_close(layer(x), batch_norm(x, channel_dim=-1, **as_kwargs(layer)), "output")
        mask = torch.arange(shape[0]) % 3 != 1
        assert_close(layer(x, mask=mask), batch_norm(x, mask=mask, channel_dim=-1, **as_kwargs(layer)), "output")
        mean, variance = layer.running_mean.double().numpy(), layer.running_var.double().numpy()
        assert_close(layer.eval()(x), normalized(x, mean, variance, channel_dim=-1, **as_kwargs(layer)), "output")

    def test_padding_may_hold_nan_in_training_and_evaluation(self):
        layer, x, mask = sn.BatchNorm1d(3), rand(4, 3, 5), torch.arange(20).reshape(4, 5) % 4 != 0
        holed = torch.where(mask.unsqueeze(1), x, torch.nan)
        assert_close(layer(holed, mask=mask), batch_norm(x, mask=mask), "output")
        assert torch.isfinite(layer.running_var).all()
        assert torch.equal(layer.eval()(holed, mask=mask), layer(x, mask=mask))

    def test_sample_weights_are_ignored_in_evaluation(self):
        layer, x = trained(sn.BatchNorm1d(3), (5, 3)).eval(), rand(4, 3)
        assert torch.equal(layer(x, sample_weight=torch.rand(4)), layer(x))

    def test_options_are_keyword_only(self):
        with pytest.raises(TypeError):
            sn.BatchNorm1d(3)(rand(4, 3), rand(4, 3))


class TestOneExampleAtATime:
    @pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
    def test_one_example_alone_gets_what_it_gets_in_a_batch(self, activation):
        layer = trained(sn.BatchNorm2d(3, activation=activation), (4, 3, 5, 7)).eval()
        x, residual = rand(9, 3, 5, 7), rand(9, 3, 5, 7, seed=1)
        for layout in (torch.contiguous_format, torch.channels_last):
            together = layer(x.contiguous(memory_format=layout), residual=residual)
            for i in range(len(x)):
                alone = layer(x[i : i + 1], residual=residual[i : i + 1])
                torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-6, atol=1e-6)

    def test_without_an_activation_to_the_bit_and_in_any_company(self):
        layer, x = trained(sn.BatchNorm1d(3), (5, 3)).eval(), rand(64, 3) * 100
        together = layer(x)
        assert torch.equal(torch.cat([layer(row) for row in x.split(1)]), together)
        spoilt = x.clone()
        spoilt[5:] = float("nan")
        assert torch.equal(layer(spoilt)[:5], together[:5])


class TestErrors:
    @pytest.mark.parametrize("training", [True, False])
    def test_a_wrong_number_of_channels(self, training):
        layer = sn.BatchNorm2d(4).train(training)
        with pytest.raises(
            ShapeError, match=r"BatchNorm2d\(4.*expected 4 channels in dimension 1, got 3.*\(2, 3, 4, 4\)"
        ):
            layer(torch.zeros(2, 3, 4, 4))
        with pytest.raises(ShapeError, match=r"dimension -1, got 5"):
            sn.BatchNorm1d(3, channel_dim=-1)(torch.zeros(2, 3, 5))

    @pytest.mark.parametrize(
        ("kind", "wrong"), [(sn.BatchNorm1d, 4), (sn.BatchNorm2d, 3), (sn.BatchNorm3d, 4), (sn.BatchNorm1d, 1)]
    )
    def test_a_wrong_number_of_dimensions(self, kind, wrong):
        with pytest.raises(ShapeError, match=rf"{kind.__name__}.* expected .*-D input \(N, C.*got shape"):
            kind(3)(torch.zeros((3,) * wrong))

    @pytest.mark.parametrize("training", [True, False])
    def test_a_wrong_dtype(self, training):
        layer = sn.BatchNorm1d(3).train(training)
        with pytest.raises(DtypeError, match=r"floating-point input, got torch.int64"):
            layer(torch.zeros(2, 3, dtype=torch.int64))
        with pytest.raises(DtypeError, match=r"weight must have the input's dtype torch.float64.*\.to\(dtype\)"):
            layer(torch.zeros(2, 3, dtype=torch.float64))

    @pytest.mark.parametrize("training", [True, False])
    def test_a_wrong_device(self, training):
        for options in ({}, {"affine": False}):
            layer = sn.BatchNorm1d(3, **options).train(training)
            with pytest.raises(DeviceError, match=r"must be on the input's device meta, got cpu"):
                layer(torch.zeros(2, 3, device="meta"))

    def test_they_are_what_a_caller_of_torch_would_have_caught(self):
        with pytest.raises(ValueError, match="expected 4-D input"):
            sn.BatchNorm2d(3)(torch.zeros(2, 3))
        with pytest.raises(ValueError, match="more than one value per channel"):
            sn.BatchNorm1d(3)(torch.zeros(1, 3))
