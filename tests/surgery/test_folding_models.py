"""fold on small models of every form: how many batch norms go is counted by hand, in the lines beside."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import steadynorm as sn
from support_converting import (
    BatchNormAct2d,
    Doubled,
    FrozenBatchNorm2d,
    FrozenBatchNormAct2d,
    by_definition,
    near,
    stirred,
)
from support_folding import Block, Control, Optional, Twice, agree, fewest, image, randomised


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
        (RepVGG, 3),
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
    assert sn.fold(model).fold_report.folded >= fewest(model) > 0 or kind is PreResNet


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
