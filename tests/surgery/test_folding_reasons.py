"""Each reason for which a batch norm stays, on a model of its own: what is said, and that nothing has changed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import steadynorm as sn
from steadynorm.errors import ModelError, ShapeError
from support_folding import Called, agree, explicit, image, randomised

CONV_NORM = (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


def conv_and(norm):
    return nn.Sequential(nn.Conv2d(4, 4, 1), norm)


def with_values(model, **values):
    """With these numbers in the batch norm, once all others are random."""
    randomised(model)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for name, value in values.items():
                getattr(layer, name).data.fill_(value)
    return model


def hooked_between():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Identity(), nn.BatchNorm2d(4))
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    return model


def whole_numbers():
    model = conv_and(nn.BatchNorm2d(4))
    model[0].weight = nn.Parameter(torch.ones(4, 4, 1, 1, dtype=torch.int8), requires_grad=False)
    return model


class ReadsWeights(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * self[0].weight.mean()


class Reaches(nn.Module):
    """A forward that no trace can follow, which calls what lies deeper by itself."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential()
        self.inner.conv, self.inner.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.inner.conv(x) if int(x.sum()) == 10**9 else self.inner(x)


class Shared(nn.Module):
    """A layer in a part that can be traced, and in one that cannot."""

    def __init__(self):
        super().__init__()
        self.part = conv_and(nn.BatchNorm2d(4))
        self.other = Reaches()
        self.other.inner.conv = self.part[0]

    def forward(self, x):
        return self.other(self.part(x))


def row(*parts):
    return Called(*parts)


LEFT = {
    "mask": (
        lambda: row(lambda x, a, b: b(a(x), mask=x[:, :1, :, :].bool()), nn.Conv2d(4, 4, 1), sn.BatchNorm2d(4)),
        "a mask or weights",
    ),
    "not finite": (lambda: with_values(conv_and(nn.BatchNorm2d(4)), running_var=-1.0), "its map is not finite"),
    "weights too large": (
        lambda: with_values(conv_and(nn.BatchNorm2d(4)), weight=3e38, running_var=1e-6),
        "the folded weights of 0 are not finite in torch.float32",
    ),
    "no such value": (
        lambda: with_values(
            nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)), weight=1e-30, bias=1e30, running_mean=0.0
        ),
        "does not fit torch.float32",
    ),
    "twice in a concatenation": (
        lambda: row(lambda x, a, b: b(torch.cat([a(x), a(x + 1)], 1)), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(8)),
        "parts.0 is called 2 times",
    ),
    "twice behind": (
        lambda: row(lambda x, a, b: (lambda y: b(y) + b(F.dropout(y, 0.5, False)))(a(x)), *reversed(CONV_NORM)),
        "parts.1 is called 2 times",
    ),
    "dropout that draws": (lambda: row(lambda x, a, b: b(F.dropout(a(x), 0.0, True)), *CONV_NORM), "dropout comes"),
    "activation": (
        lambda: nn.Sequential(sn.BatchNorm2d(4, activation="relu"), nn.Conv2d(4, 4, 1)),
        "its activation or residual stands between",
    ),
    "features of another axis": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Linear(6, 3)),
        "its 4 channels are not the 6 inputs of 1",
    ),
    "last axis behind a convolution": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 1), sn.BatchNorm2d(6, channel_dim=-1)),
        "channel_dim is not 1",
    ),
    "middle axis behind a linear layer": (
        lambda: nn.Sequential(nn.Linear(6, 7), sn.BatchNorm2d(7, channel_dim=2)),
        "channel_dim is neither 1 nor -1",
    ),
    "pooled features": (
        lambda: row(lambda x, a, b: b(F.avg_pool2d(a(x), 2)), nn.Linear(6, 8), nn.BatchNorm2d(4)),
        "the pooling between parts.0 and it goes over the features",
    ),
    "mean of all": (lambda: row(lambda x, a, b: b(a(x)).mean() + a(x), *CONV_NORM), "is called 2 times"),
    "mean of an unknown": (lambda: row(lambda x, a, b: a(x.mean(-1, True)) + b(x.mean(-1, True)), *CONV_NORM), "mean"),
    "rows by number": (
        lambda: row(lambda x, a, b: b(a(x).view(2, -1)), nn.BatchNorm2d(4), nn.Linear(4 * 42, 3)),
        "view comes after it",
    ),
    "rows of another": (
        lambda: row(lambda x, a, b: b(a(x).view(x.mean(1).size(0), -1)), nn.BatchNorm2d(4), nn.Linear(4 * 42, 3)),
        "view comes after it",
    ),
    "input written into": (
        lambda: row(lambda x, a, b: (lambda y, z: b(y) + z)(a(x), x.mul_(2)), *reversed(CONV_NORM)),
        "its input may be written into before parts.1 reads it",
    ),
    "input written into by a view": (
        lambda: row(
            lambda x, a, b: (lambda y, z: b(y) + z.sum())(a(x), F.relu(x[:, :1], inplace=True)), *reversed(CONV_NORM)
        ),
        "its input may be written into before parts.1 reads it",
    ),
    "input written into by a module": (
        lambda: row(
            lambda x, a, b, c: (lambda y, z: b(y) + z)(a(x), c(x)), *reversed(CONV_NORM), nn.ReLU(inplace=True)
        ),
        "its input may be written into before parts.1 reads it",
    ),
    "unused": (lambda: row(lambda x, a, b: (b(x), a(x))[1], *CONV_NORM), "no convolution or linear layer takes"),
    "hooks between": (hooked_between, "1 (Identity) comes before it"),
    "weights that are read": (lambda: ReadsWeights(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), "read by another part"),
    "reached into": (Reaches, "may be called by the model directly"),
    "shared with what is not read": (Shared, "part of what could not be traced too"),
    "whole numbers": (whole_numbers, "torch.int8"),
}


@pytest.mark.parametrize("name", LEFT)
def test_is_said(name):
    make, why = LEFT[name]
    torch.manual_seed(0)
    model = make()
    model = model if name in ("not finite", "weights too large", "no such value") else randomised(model)
    folded = sn.fold(model)
    assert folded.fold_report.folded == 0
    assert why in str(folded.fold_report)
    if name not in ("whole numbers", "mask"):
        assert torch.equal(folded(image(2)).nan_to_num(), model(image(2)).nan_to_num())


def test_what_is_written_elsewhere_does_no_harm():
    def forward(x, norm, conv, act, other):
        y = norm(x)
        z = act(conv(y))  # in place, into what the convolution gave
        return z + other(y)

    model = Called(forward, nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))
    agree(model, image(2), 1)


def test_flattened_before_a_convolution_without_a_batch():
    model = randomised(nn.Sequential(nn.BatchNorm1d(4), nn.Flatten(), nn.Conv1d(2, 3, 1)))
    folded = sn.fold(model, verify=torch.randn(2, 4, 7))
    assert "a flattening lies between it and 2" in folded.fold_report.layers[0].how


def test_a_convolution_without_a_batch():
    """Where all axes are as long, that would not be seen."""
    x = torch.randn(4, 4, 4)
    model = randomised(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Flatten(2), nn.BatchNorm1d(4)))
    report = sn.fold(model, verify=x).fold_report
    assert report.layers[0].how.startswith("0 takes inputs without a batch")
    model = randomised(nn.Sequential(nn.BatchNorm1d(4), nn.Conv2d(4, 4, 1)))
    assert "not what 1 has with a batch" in sn.fold(model).fold_report.layers[0].how
    model = randomised(Called(lambda x, a, b: b(a(x).mean(3)), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)))
    assert "parts.1 takes inputs without a batch" in sn.fold(model).fold_report.layers[0].how


def test_a_shift_of_zero_needs_no_padding():
    model = nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 4, 3, padding=1), nn.ConvTranspose2d(4, 4, 3))
    model[0].running_var.fill_(4.0)
    folded = sn.fold(model.eval(), verify=image(2))
    assert folded.fold_report.layers[0].how == "into 1 after it"
    assert torch.allclose(folded(image(2)), explicit(model)(image(2).double()).float(), atol=1e-5)


def test_not_initialised():
    model = nn.Sequential(nn.LazyConv2d(4, 1), nn.BatchNorm2d(4)).eval()
    assert "0 is not initialised: run a batch first" in str(sn.fold(model).fold_report)


def test_a_forward_that_always_fails():
    class Fails(nn.Sequential):
        def forward(self, x):
            raise ValueError("not today")

    report = sn.fold(Fails(*CONV_NORM).eval()).fold_report
    assert dict(report.untraced)[""] == "its forward ends in an error whatever it is given"


def test_torchscript():
    with pytest.raises(ModelError, match="TorchScript"):
        sn.fold(torch.jit.script(conv_and(nn.BatchNorm2d(4)).eval()))


def test_an_error_of_our_own_keeps_its_words():
    with pytest.raises(ShapeError, match="expected"):
        sn.fold(randomised(nn.Sequential(sn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))), example=torch.randn(2, 4))


def test_outputs_that_cannot_be_compared():
    class Words(nn.Sequential):
        def forward(self, x):
            super().forward(x)
            return "done"

    with pytest.raises(ModelError, match="tensors"):
        sn.fold(randomised(Words(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))), verify=image(2))


def test_beyond_the_bound():
    class Noise(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + torch.rand(())

    with pytest.raises(ModelError, match="beyond 1e-04"):
        sn.fold(randomised(Noise(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))), verify=image(2))
