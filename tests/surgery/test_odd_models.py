"""Models that surgery must at least leave as they are: what comes back computes the same, or one line says why not."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm

import steadynorm as sn
from steadynorm.errors import ModelError
from support_converting import near, stirred

CALLS = {
    "fuse": lambda model: sn.fuse(model),
    "fold": lambda model: sn.fold(model),
    "insert": lambda model: sn.insert(model, only=lambda name, _: False),
    "convert": lambda model: sn.convert_(twin := copy.deepcopy(model)) and twin,
}


class Doubling(nn.Module):
    def forward(self, x):
        return 2 * x


class Shared(nn.Module):
    """One block under two names, called twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
        self.second = self.first

    def forward(self, x):
        return self.second(self.first(x))


class Looping(nn.Module):
    """As often as the input asks for."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x):
        calls = 0
        while x.abs().mean() > 1e-3 and calls < 3:
            x, calls = F.relu(self.block(x)), calls + 1
        return x


class PerExample(nn.Module):
    """A loop over the batch, which nothing can trace."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()

    def forward(self, x):
        return torch.stack([self.act(self.norm(self.conv(one[None])))[0] for one in x])


def plain(conv: nn.Module | None = None, norm: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(conv or nn.Conv2d(3, 4, 1), norm or nn.BatchNorm2d(4), nn.ReLU())


def parametrized() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    parametrize.register_parametrization(norm, "weight", Doubling())
    return plain(norm=norm)


def stubs() -> nn.Module:
    model = nn.Sequential(torch.ao.quantization.QuantStub(), plain(), torch.ao.quantization.DeQuantStub())
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    return model


# Each with how many batch norms are fused, and how many folded.
MODELS = {
    "a parametrised batch norm": (parametrized, 0, 0),
    "weight_norm by a parametrisation": (lambda: plain(parametrizations.weight_norm(nn.Conv2d(3, 4, 1))), 1, 0),
    "spectral_norm by a hook": (lambda: plain(spectral_norm(nn.Conv2d(3, 4, 1))), 1, 0),
    "stubs of quantisation": (stubs, 1, 1),
    "prepared for quantisation": (lambda: torch.ao.quantization.prepare_qat(stubs().train()), 0, 0),
    "a shared block": (Shared, 0, 0),
    "a loop that asks": (Looping, 0, 0),
    "a loop over the batch": (PerExample, 0, 0),
    "DataParallel": (lambda: nn.DataParallel(plain()), 1, 1),
    "compiled": (lambda: torch.compile(plain(), backend="eager"), 1, 1),
    "averaged": (lambda: torch.optim.swa_utils.AveragedModel(plain()), 1, 1),
    "a graph": (lambda: torch.fx.symbolic_trace(plain()), 1, 1),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", MODELS)
def test_computes_the_same(name, call):
    build, fused, folded = MODELS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own deprecations
        model = stirred(build()).eval()
        x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
        wanted = copy.deepcopy(model)(x)
        state = copy.deepcopy(model.state_dict())
        made = CALLS[call](model)
        near(made.eval()(x), wanted, 1e-5)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    if call == "fuse":
        assert made.fuse_report.fused == fused, str(made.fuse_report)
    if call == "fold":
        assert made.fold_report.folded == folded, str(made.fold_report)


@pytest.mark.parametrize("call", ["fuse", "fold", "insert"])
def test_a_hook_that_keeps_a_history_of_gradients_is_said(call):
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = plain(weight_norm(nn.Conv2d(3, 4, 1))).eval()
    with pytest.raises(ModelError, match="weight_norm's"):
        CALLS[call](model)
