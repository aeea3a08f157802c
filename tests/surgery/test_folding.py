"""fold on single layers: convolutions of every kind, linear ones, and what may lie between; counts are by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import steadynorm as sn
from steadynorm.errors import ShapeError
from support_folding import CONV, NORM, OURS, TRANSPOSE, Called, agree, image, randomised


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


def flattened(x, norm, linear):
    y = norm(x)
    return linear(y.view(y.shape[0], -1))


CONV_NORM = (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
CONV_ROWS = (nn.Conv2d(4, 6, 3), nn.BatchNorm1d(6))
NORM_LINEAR = (nn.BatchNorm2d(4), nn.Linear(4, 3))
NORM_ROWS = (nn.BatchNorm2d(4), nn.Linear(4 * 7 * 6, 3))
NORM_PADDED = (nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1))


@pytest.mark.parametrize(
    ("function", "parts", "count"),
    [
        (lambda x, a, b: b(F.avg_pool2d(a(x), 2)), CONV_NORM, 1),
        (lambda x, a, b: b(F.avg_pool2d(a(x), 2, padding=1, count_include_pad=False)), CONV_NORM, 1),
        (lambda x, a, b: b(F.avg_pool2d(a(x), 2, 1, (0, 0), True)), NORM_PADDED, 0),  # it would average the padding
        (lambda x, a, b: b(F.avg_pool2d(a(x), 2, padding=1)), CONV_NORM, 0),  # zeros of the padding count
        (lambda x, a, b: b(F.avg_pool2d(a(x), 2, divisor_override=3)), CONV_NORM, 0),
        (lambda x, a, b: b(F.adaptive_avg_pool2d(a(x), 2)), CONV_NORM, 1),
        (lambda x, a, b: b(a(x).mean((2, 3), keepdim=True)), CONV_NORM, 1),
        (lambda x, a, b: b(a(x).mean(dim=[-1, -2])), CONV_ROWS, 1),
        (lambda x, a, b: b(torch.mean(a(x), 3)), CONV_ROWS, 1),
        (lambda x, a, b: b(F.relu(a(x)).mean(1, keepdim=True).expand(-1, 6, -1, -1)), CONV_NORM, 0),
        (lambda x, a, b: b(a(x).mean((2, 3))), NORM_LINEAR, 1),
        (lambda x, a, b: b(torch.mean(a(x), (-2, -1))), NORM_LINEAR, 1),
        (lambda x, a, b: b(a(x).mean((2, 3), True).flatten(1)), NORM_LINEAR, 1),
        (lambda x, a, b: b(a(x).mean(2).mean(2)), NORM_LINEAR, 1),
        (lambda x, a, b: b(a(x).flatten(2).contiguous().mean(-1)), NORM_LINEAR, 1),
        (lambda x, a, b: b(a(x).mean((1, 3))), (nn.BatchNorm2d(4), nn.Linear(7, 3)), 0),
        (lambda x, a, b: b(a(x).view(x.size(0), -1)), NORM_ROWS, 1),
        (lambda x, a, b: b(torch.reshape(a(x), (x.size()[0], -1))), NORM_ROWS, 1),
        (flattened, NORM_ROWS, 1),
        (lambda x, a, b: b(a(x).view(x.size(1) // 2, -1)), NORM_ROWS, 0),  # any number could come from there
        (lambda x, a, b: b(a(x).reshape(-1, 4 * 7 * 6)), NORM_ROWS, 0),
        (lambda x, a, b: b(F.adaptive_avg_pool2d(a(x), 1).view(x.shape[0], -1)), CONV_ROWS, 1),
        (lambda x, a, b: b(a(x)) / a(x).shape[2], NORM_PADDED, 0),  # called twice
        (lambda x, a, b: (lambda y: b(y) * y.shape[2])(a(x)), NORM_PADDED, 0),  # a padded output is larger
    ],
)
def test_functions_between(function, parts, count):
    torch.manual_seed(0)
    agree(Called(function, *copy.deepcopy(parts)), image(2), count)


def test_a_mean_over_the_channels_is_none_over_places():
    model = Called(lambda x, a, b: b(a(x).mean((1, 3))), nn.BatchNorm2d(7), nn.Linear(7, 3))
    agree(model, image(2, 7), 0)
