"""Functions in a forward that no trace can enter: one call of which nothing is known, or what holds them is left."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import steadynorm as sn
from support_folding import agree, image, randomised

LOOSE = nn.Conv2d(4, 4, 1)


def same_padding(x, conv):
    """As TensorFlow pads, by the input's size in Python's numbers."""
    height, width = int(x.shape[-2]), int(x.shape[-1])
    pads = [max((-(-size // 2) - 1) * 2 + conv.kernel_size[0] - size, 0) for size in (width, height)]
    return F.pad(x, [part for pad in pads for part in (pad // 2, pad - pad // 2)])


def through_another(x, conv):
    return same_padding(x, conv) if conv.groups == 1 else x


def called_layer(x, conv):
    return conv(x) * int(x.shape[0])


def read_weight(x, conv):
    return x * int(x.shape[0]) + conv.weight.mean()


def kept_layer(x, conv):
    layers = [conv]
    return layers[0](x) * int(x.shape[0])


def own_layer(x, conv):
    return LOOSE(x) * int(conv.groups * x.shape[0])


def gathered(x, found):
    found.append(int(x.shape[0]))
    return x * found[-1]


def squared(x, conv):
    return twice(x)


def twice(x, power=2):
    if not isinstance(x, torch.Tensor):
        raise TypeError("a tensor is wanted")
    return x**power


def by_pair(x, conv):
    return scaled((x, (2.0, None)), 3) * scaled((1.0, (1.0, None)), 1)


def scaled(pair, times):
    x, (factor, _) = pair
    return x * times * factor if isinstance(x, float) else x * float(int(x.shape[0])) * factor


def without_source(x, conv):
    return made(x, conv)


exec("def made(x, conv):\n    return x * int(x.shape[0]) * conv.groups", space := {"__name__": "written"})
made = space["made"]


class Helped(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.conv, self.norm = nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(globals()[self.function](x, self.conv)))


class Blocks(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.block = Helped(function)

    def forward(self, x):
        return self.block(self.first(x))


@pytest.mark.parametrize("function", ["same_padding", "through_another", "squared", "by_pair"])
def test_a_function_that_needs_numbers(function):
    folded = agree(Blocks(function), image(2), 2)
    assert folded.fold_report.untraced == ()
    space = globals()
    assert space[function].__module__ == space["twice"].__module__ == __name__  # what was exchanged is back


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("called_layer", "called_layer is handed a Conv2d, and may call it"),
        ("read_weight", "read_weight is handed a Conv2d, and may call it"),
        ("kept_layer", "kept_layer is handed a Conv2d, and may call it"),
        ("without_source", "without_source is handed a Conv2d, and may call it"),
        ("own_layer", "own_layer may call a module of its own"),
    ],
)
def test_a_function_that_may_call_its_layer_stays_outside(function, why):
    model = randomised(Blocks(function))
    folded = sn.fold(model, verify=image(2))
    assert [layer.folded for layer in folded.fold_report.layers] == [True, False]
    assert dict(folded.fold_report.untraced).keys() == {"block"}
    assert why in str(folded.fold_report)


class Gathering(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        found = []
        return self.norm(self.conv(gathered(x, found))) * len(found)


def test_a_function_that_may_change_a_list_stays_outside():
    report = sn.fold(randomised(Gathering()), verify=image(2)).fold_report
    assert report.folded == 0
    assert dict(report.untraced) == {"": "TraceError: gathered is handed a list, and may change it"}


class Wrong(nn.Module):
    """What a function that is taken whole lies between."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(twice(self.conv(x)))


def test_a_function_between_is_no_map():
    folded = agree(Wrong(), image(2), 0)
    assert "twice comes before it" in folded.fold_report.layers[0].how


def test_a_question_about_a_list_of_tensors():
    class Asks(nn.Sequential):
        def forward(self, x):
            if torch.cat([x.sum()[None]]):
                x = x + 1
            return super().forward(x)

    assert agree(Asks(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), image(2), 1).fold_report.untraced == ()
