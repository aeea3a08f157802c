"""Folded models against the originals in float64, each batch norm an explicit affine map; counts are by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse as fx_fuse
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations

import steadynorm as sn
from steadynorm.errors import ArgumentError, ModelError, ShapeError
from support_converting import (
    BatchNormAct2d,
    Doubled,
    FrozenBatchNorm2d,
    FrozenBatchNormAct2d,
    by_definition,
    near,
    stirred,
)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            if layer.running_mean is not None:
                layer.running_mean.normal_(generator=generator)
                layer.running_var.uniform_(0.3, 3, generator=generator)
            with torch.no_grad():
                if layer.weight is not None:
                    layer.weight.uniform_(-2, 2, generator=generator)
                if layer.bias is not None:
                    layer.bias.normal_(generator=generator)
    return model.eval()


class Explicit(nn.Module):
    """The definition: (x - mean) / sqrt(var + eps) * gamma + beta, along axis 1."""

    def __init__(self, layer: _BatchNorm):
        super().__init__()
        self.layer = layer
        self.activation = getattr(layer, "activation", None)
        self.axis = getattr(layer, "channel_dim", 1)

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        def along(v: Tensor | None, default: float) -> Tensor:
            v = torch.full((x.shape[self.axis],), default, dtype=x.dtype) if v is None else v.double()
            shape = [1] * x.dim()
            shape[self.axis] = -1
            return v.reshape(shape)

        bn = self.layer
        y = (x - along(bn.running_mean, 0)) / (along(bn.running_var, 1) + bn.eps).sqrt()
        y = y * along(bn.weight, 1) + along(bn.bias, 0)
        y = y if residual is None else y + residual
        return y if self.activation is None else self.activation(y)


def explicit(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).double()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
            parent, _, own = name.rpartition(".")
            model.get_submodule(parent)._modules[own] = Explicit(layer)
    return model


def agree(model: nn.Module, x: Tensor, count: int, **options) -> nn.Module:
    """Folds in both precisions; returns the model folded in float64."""
    model = randomised(model)
    before = copy.deepcopy(model.state_dict())
    wanted = explicit(model)(x.double())
    for dtype, bound in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        folded = sn.fold(copy.deepcopy(model).to(dtype), **{k: v.to(dtype) for k, v in options.items()})
        error = (folded(x.to(dtype)).double() - wanted).abs().max() / wanted.abs().max()
        assert error <= bound
        assert folded.fold_report.folded == count, str(folded.fold_report)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    sn.fold(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    left = [m for m in folded.modules() if isinstance(m, _BatchNorm)]
    assert len(left) == len(folded.fold_report.layers) - count
    return folded


CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
OURS = {1: sn.BatchNorm1d, 2: sn.BatchNorm2d, 3: sn.BatchNorm3d}


def image(n: int, channels: int = 4) -> Tensor:
    return torch.randn(2, channels, *[7, 6, 5][:n], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("norms", [NORM, OURS])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"groups": 2, "bias": False, "stride": 2},
        {"padding": 1, "dilation": 2},
        {"padding": "same"},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": 1, "padding_mode": "circular", "groups": 2},
        {"padding": 1, "padding_mode": "replicate"},
    ],
)
def test_convolution_with_a_batch_norm_on_each_side(n, norms, options):
    if n == 3 and options.get("padding_mode") == "reflect":
        options = {"padding": 1}
    model = nn.Sequential(norms[n](4), CONV[n](4, 6, 3, **options), norms[n](6))
    agree(model, image(n), 2)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"groups": 2, "bias": False}, {"stride": 2, "padding": 1, "output_padding": 1}]
)
def test_transposed_convolution(n, options):
    agree(nn.Sequential(TRANSPOSE[n](4, 6, 3, **options), NORM[n](6)), image(n), 1)
    behind = agree(nn.Sequential(NORM[n](4), TRANSPOSE[n](4, 6, 3, **options)), image(n), 0)
    assert "transposed" in behind.fold_report.layers[0].how
    agree(nn.Sequential(NORM[n](4), TRANSPOSE[n](4, 6, 1, groups=2)), image(n), 1)


def test_linear_on_both_sides():
    agree(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4)), torch.randn(6, 5), 2)
    agree(nn.Sequential(nn.Linear(5, 4), sn.BatchNorm1d(4, channel_dim=-1)), torch.randn(6, 3, 5), 1)


def test_linear_before_a_batch_norm_over_another_axis_of_the_same_length():
    x = torch.randn(2, 5, 5)
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
    left = agree(model, x, 0, example=x)
    assert "3-D" in left.fold_report.layers[0].how
    with pytest.raises(ShapeError, match="2-D"):
        sn.fold(model)(x)
    agree(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(3)), torch.randn(2, 3, 5), 0)


@pytest.mark.parametrize("affine", [True, False])
def test_without_weight_or_bias(affine):
    agree(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=affine)), image(2), 1)
    agree(nn.Sequential(nn.Conv2d(4, 6, 3), sn.BatchNorm2d(6, affine=affine, bias=False)), image(2), 1)
    agree(nn.Sequential(sn.BatchNorm2d(4, bias=False), nn.Conv2d(4, 6, 3)), image(2), 1)


def test_through_identity_dropout_pooling_and_flatten():
    model = nn.Sequential(
        *(nn.Conv2d(4, 6, 3), nn.Identity(), nn.Dropout2d(), nn.AvgPool2d(2, padding=1, count_include_pad=False)),
        *(nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout()),
        *(nn.Linear(24, 3), nn.Flatten(), nn.BatchNorm1d(3)),
    )
    agree(model, image(2), 3)
    agree(nn.Sequential(nn.Conv2d(4, 6, 3), nn.AvgPool2d(2, padding=1), nn.BatchNorm2d(6)), image(2), 0)
    agree(nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(2), nn.BatchNorm1d(6)), image(2), 1)
    agree(nn.Sequential(nn.Conv1d(4, 6, 3), nn.Flatten(), nn.BatchNorm1d(30)), image(1), 0)


def test_chains_are_rounded_into_one_layer():
    agree(nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)),
          image(2), 4)  # fmt: skip


def test_no_input_maps_to_zero():
    model = randomised(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)))
    model[0].weight.data[1] = 0
    folded = sn.fold(model, verify=image(2))
    assert folded.fold_report.folded == 0
    assert "scale 0" in folded.fold_report.layers[0].how


class Block(nn.Module):
    def __init__(self, norm=sn.BatchNorm2d):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), norm(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = norm(4)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(x + y)


class Fused(Block):
    def __init__(self):
        super().__init__()
        self.bn1, self.bn2 = sn.BatchNorm2d(4, activation="relu"), sn.BatchNorm2d(4, activation="elu")

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x))), residual=x)


class PreResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 2 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(4 + 2 * i, 2, 3, padding=1) for i in range(3))

    def forward(self, x):
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(norm(x))], 1)
        return x


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 3, 3, padding=1)
        self.na, self.nb, self.after = nn.BatchNorm2d(2), nn.BatchNorm2d(3), nn.BatchNorm2d(5)

    def forward(self, x):
        return self.after(torch.cat([self.na(self.a(x)), self.nb(self.b(x))], dim=1))


class Shuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.na = nn.Conv2d(4, 4, 1, groups=2), nn.BatchNorm2d(4)
        self.b, self.nb = nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.na(self.a(x))
        n, c, h, w = y.size()
        return self.nb(self.b(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)))


class RepVGG(nn.Module):
    def __init__(self):
        super().__init__()
        self.three, self.n3 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.one, self.n1, self.n0 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.n3(self.three(x)) + self.n1(self.one(x)) + self.n0(x)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.b(self.conv(self.a(self.conv(x))))


class Control(nn.Module):
    """The middle does not trace; what is around it and inside it does."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.block = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), Branching()

    def forward(self, x):
        return self.block(self.norm(self.conv(x)))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.loose, self.loose_norm = Block(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        if int(x.sum()) > 1e9:
            return x
        return self.loose_norm(self.loose(self.inner(x)))


class Ways(nn.Module):
    """Each input takes one of two ways; a third is an error."""

    def __init__(self, shared: bool):
        super().__init__()
        self.one, self.other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm, self.other_norm = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.last, self.last_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.shared = shared

    def forward(self, x, scale=None):
        if x.shape[1] != 4:
            raise ValueError("four channels are wanted")
        other = self.one if self.shared else self.other
        y = self.norm(self.one(x)) if x.sum() > 0 else self.other_norm(other(x))
        y = self.last_norm(self.last(y))
        return y if scale is None else y * scale


@pytest.mark.parametrize(("shared", "count"), [(False, 3), (True, 1)])
def test_a_forward_that_takes_one_way_or_another(shared, count):
    for sign in (1, -1):
        agree(Ways(shared), sign * image(2).abs(), count)
    report = sn.fold(randomised(Ways(shared))).fold_report
    assert report.untraced == ()
    assert all("depends on the input" in layer.how for layer in report.layers if not layer.folded)


def test_others_batch_norms_that_are_known_by_name():
    layers = [BatchNormAct2d(6, nn.LeakyReLU(0.2)), FrozenBatchNorm2d(6), FrozenBatchNormAct2d(6, nn.ELU()), Doubled(6)]
    model = nn.Sequential(*[part for i, one in enumerate(layers) for part in (nn.Conv2d(6 if i else 4, 6, 1), one)])
    model = stirred(model).double().eval()
    x = image(2).double()
    folded = sn.fold(model, verify=x)
    assert [layer.folded for layer in folded.fold_report.layers] == [True, True, True, False]
    assert folded.fold_report.layers[3].how == "Doubled computes something of its own"
    assert type(folded[7]) is Doubled
    wanted = by_definition(model[:6])(x)
    near(folded(x), 2 * nn.BatchNorm2d.forward(model[7], model[6](wanted)), 1e-9)


def test_too_many_ways():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            for limit in range(12):
                x = x + 1 if x.sum() > limit else x
            return self.norm(self.conv(x))

    ((name, why),) = sn.fold(randomised(Many())).fold_report.untraced
    assert name == ""
    assert "more than 16 ways" in why


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x, scale=None):
        y = self.conv(x)
        return self.norm(y) if scale is not None else self.norm(torch.tanh(y))


class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        y = self.linear(x)
        return self.norm(y.flatten(0, 1)).reshape_as(y)


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        (Block, 2),
        (Fused, 2),
        (PreResNet, 1),
        (Dense, 3),
        (Inception, 3),
        (Shuffle, 2),
        (RepVGG, 2),
        (Twice, 0),
        (Control, 3),
        (Optional, 0),
        (Rows, 1),
    ],
)
def test_small_models(kind, count):
    torch.manual_seed(0)
    agree(kind(), torch.randn(2, 5, 6) if kind is Rows else image(2), count)


@pytest.mark.parametrize("kind", [Block, PreResNet, Inception, Shuffle, RepVGG])
def test_never_fewer_than_fx(kind):
    model = randomised(kind(nn.BatchNorm2d) if kind is Block else kind())
    fused = fx_fuse(model)
    left = sum(
        node.op == "call_module" and isinstance(fused.get_submodule(node.target), _BatchNorm)
        for node in fused.graph.nodes
    )
    assert sn.fold(model).fold_report.folded >= len([m for m in model.modules() if isinstance(m, _BatchNorm)]) - left


def hooked():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    return model


def tied():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model[2].weight = model[0].weight
    return model


def prepared():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model[0].qconfig = object()
    return model


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (hooked, "hooks"),
        (tied, "shares its weights"),
        (prepared, "quantisation"),
        (lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)), "parametrised"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), "no running"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)), "ReLU"),
        (Twice, "called 2 times"),
        (Optional, "optional arguments"),
    ],
)
def test_left_and_said(make, why):
    model = randomised(make())
    folded = sn.fold(model, verify=image(2))
    assert folded.fold_report.folded == 0
    assert why in str(folded.fold_report)
    assert folded.fold_report.error == 0


def test_domains_fold_with_the_one_in_use():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), sn.BatchNorm2d(4, domains=("day", "night")))
    model[1].running("night").mean.normal_()
    model.eval()
    assert "domain" in str(sn.fold(model).fold_report)
    with sn.domain(model, "night"):
        folded = sn.fold(model, verify=[image(2), (image(2),), {"input": image(2)}])
    assert folded.fold_report.folded == 1


def test_errors_of_use():
    with pytest.raises(ModelError, match="eval"):
        sn.fold(Block())
    with pytest.raises(ArgumentError, match="Module"):
        sn.fold("model")
    model = randomised(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    model[0].kept = model[0].weight * 2
    with pytest.raises(ModelError, match="copied"):
        sn.fold(model)


def test_an_input_that_the_model_refuses_is_said():
    with pytest.raises(ModelError, match="inputs that the model takes"):
        sn.fold(randomised(Block()), verify=image(1))


def test_a_forward_that_needs_the_layer_itself_keeps_it():
    class Reads(Block):
        def forward(self, x):
            return super().forward(x) * self.bn1.num_features

    folded = sn.fold(randomised(Reads()), verify=image(2))
    assert folded.fold_report.folded == 0
    assert "needs the layer itself" in folded.fold_report.layers[0].how


def test_report_is_plain():
    folded = sn.fold(randomised(Control()), verify=image(2))
    plain = folded.fold_report.to_dict()
    assert plain["folded"] == 3
    assert {one["name"] for one in plain["untraced"]} == {"block"}
    assert plain["error"] <= plain["bound"] == 1e-4
    assert "could not be traced: block" in str(folded.fold_report)


def huggingface(name: str, **options):
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**options))


SMALL = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 2, 1, 1]}
EFFICIENT = {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.2, "hidden_dim": 320}
LEVIT = {"hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("ResNet", {**SMALL, "layer_type": "basic"}, 14),
        ("RegNet", {**SMALL, "groups_width": 8}, 20),
        ("MobileNetV1", {"image_size": 64, "depth_multiplier": 0.25, "tf_padding": False}, 27),
        ("MobileNetV2", {"image_size": 64, "depth_multiplier": 0.35, "tf_padding": False}, 52),
        ("Levit", {"image_size": 64, **LEVIT}, 26),
        ("EfficientNet", EFFICIENT, 22),
    ],
)
def test_models_of_transformers(name, options, count):
    model = randomised(huggingface(name, **options)).double()
    folded = sn.fold(model, verify=torch.randn(2, 3, 64, 64, dtype=torch.float64))
    assert folded.fold_report.folded == count, str(folded.fold_report)
    assert folded.fold_report.error <= 1e-9
