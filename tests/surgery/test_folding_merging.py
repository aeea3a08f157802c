"""Parallel branches that become one convolution."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import steadynorm as sn
from support_folding import CONV, NORM, agree, image, randomised

KINDS = {
    "sum": sum,
    "+": lambda parts: parts[0] + (parts[1] + parts[2]),
    "torch.add": lambda parts: torch.add(torch.add(parts[0], parts[1]), parts[2]),
    "add": lambda parts: parts[0].add(parts[1]).add(parts[2]),
    "add_": lambda parts: parts[0].add_(parts[1]).add_(parts[2]),
}


class Parallel(nn.Module):
    """RepVGG's block: a convolution of three points, one of one, and a batch norm alone."""

    def __init__(self, n=2, add="sum", first=0, **options):
        super().__init__()
        self.before = CONV[n](4, 4, 1)
        self.three = nn.Sequential(CONV[n](4, 4, 3, padding=1, bias=False, **options), NORM[n](4))
        self.one, self.alone = nn.Sequential(CONV[n](4, 4, 1, **options), NORM[n](4)), NORM[n](4)
        self.add, self.first = KINDS[add], first

    def forward(self, x):
        x = self.before(x)
        parts = [self.three(x), self.one(x), self.alone(x)]
        return F.relu(self.add(parts[self.first :] + parts[: self.first]))


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_all_branches_become_one(n, groups):
    folded = agree(Parallel(n, groups=groups), image(n), 3)
    assert list(folded.state_dict()) == ["before.weight", "before.bias", "three.0.weight", "three.0.bias"]
    hows = {layer.how for layer in folded.fold_report.layers}
    assert hows == {"into three.0, merged with its parallel branches"}
    assert {layer.into for layer in folded.fold_report.layers} == {("three.0",)}


@pytest.mark.parametrize("add", KINDS)
@pytest.mark.parametrize("first", [0, 1, 2])
def test_however_it_is_added(add, first):
    # a sum that is written into the batch norm alone needs that one
    count = 2 if add == "add_" and first == 2 else 3
    agree(Parallel(2, add, first), image(2), count)


class IAdd(Parallel):
    def forward(self, x):
        x = self.before(x)
        y = self.one(x)
        y += self.three(x)
        y += self.alone(x)
        return y


def test_written_into_in_place():
    folded = agree(IAdd(), image(2), 2 + 1)
    assert "one.0.weight" in folded.state_dict()  # written into, and too small for the other


class Pair(nn.Module):
    """Two convolutions of one input, added."""

    def __init__(self, one, other, norms=(True, True)):
        super().__init__()
        self.one, self.other = one, other
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(c.out_channels) if norm else nn.Identity()
            for c, norm in zip((one, other), norms, strict=True)
        )

    def forward(self, x):
        return self.norms[0](self.one(x)) + self.norms[1](self.other(x))


def conv(kernel, padding=0, out=4, **options):
    return nn.Conv2d(4, out, kernel, padding=padding, **options)


@pytest.mark.parametrize(
    ("one", "other", "merged"),
    [
        (conv((5, 3), (2, 1)), conv(3, 1), True),
        (conv((3, 1), (1, 0)), conv(1), True),
        (conv((3, 1), (1, 0)), conv((1, 3), (0, 1)), False),  # neither holds the other
        (conv(3, 1, stride=2), conv(1, stride=2), True),
        (conv(3, 1, stride=1), conv(1, stride=1, groups=2), False),
        (conv(3, 2, dilation=2), conv(1), True),
        (conv(3, 2, dilation=2), conv(3, 1), False),  # taps between those of the larger
        (conv(5, 4, dilation=2), conv(3, 2, dilation=2), True),
        (conv(5, 0), conv((5, 1), (0, 0), padding_mode="zeros"), None),  # outputs of other sizes
        (conv(3, 2, dilation=2), conv(2, 1, dilation=2), False),  # between them, by another start
        (conv(7, 6, dilation=2), conv(5, 2), False),
        (conv(4, "same"), conv(2, "same"), True),
        (conv((4, 5), "same"), conv(3, 1), True),  # not in the middle
        (conv(3, "same"), conv(3, 1, padding_mode="reflect"), False),
        (conv(3, 1), conv(1, out=1), False),  # added to all channels
    ],
)
def test_which_convolutions_fit(one, other, merged):
    torch.manual_seed(0)
    model = randomised(Pair(one, other)).double()
    if merged is None:
        assert all(" before it" in layer.how for layer in sn.fold(model).fold_report.layers)
        return
    folded = agree(model, image(2), 2)
    assert ("other.weight" not in folded.state_dict()) == merged
    kept = sn.fold(model, merge=False, verify=image(2).double())
    assert list(kept.state_dict()) == ["one.weight", "one.bias", "other.weight", "other.bias"]


@pytest.mark.parametrize("other", [conv(1), None])
def test_outputs_of_other_sizes_that_a_sum_broadcasts(other):
    """Two by two become one by one: added to what stays two by two."""

    class Broadcast(nn.Module):
        def __init__(self):
            super().__init__()
            self.strided, self.other = nn.Sequential(conv(3, 1, stride=2), nn.BatchNorm2d(4)), other
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            x = x * 1
            return self.strided(x) + self.norm(x if self.other is None else self.other(x))

    agree(Broadcast(), image(2)[..., :2, :2], 1 if other is None else 2)


def test_only_branches_with_batch_norms_are_merged():
    folded = agree(Pair(conv(3, 1), conv(1), (True, False)), image(2), 1)
    assert "other.weight" in folded.state_dict()


class Beside(Parallel):
    """The output of a branch is used elsewhere too."""

    def forward(self, x):
        x = self.before(x)
        one = self.one(x)
        return (self.three(x) + one + self.alone(x)) * one.sigmoid()


def test_a_branch_that_is_used_elsewhere_stays():
    folded = agree(Beside(), image(2), 3)
    assert "one.0.weight" in folded.state_dict()


class Written(Parallel):
    """The second branch sees other values."""

    def forward(self, x):
        x = self.before(x)
        y = self.three(x)
        x.relu_()
        return y + self.one(x)


def test_an_input_that_is_written_into_between():
    folded = agree(Written(), image(2), 2)
    assert "one.0.weight" in folded.state_dict()


class Partial(Parallel):
    """A sum on the way is read by others too, through what it is written into."""

    def forward(self, x):
        x = self.before(x)
        first = self.three(x)
        y = first.add_(self.one(x)) + self.alone(x)
        return y * first


def test_a_partial_sum_that_others_read_stays():
    agree(Partial(), image(2), 2)


def test_a_transposed_convolution_and_an_activation_stay():
    class Other(Parallel):
        def __init__(self):
            super().__init__()
            self.one[0], self.alone = nn.ConvTranspose2d(4, 4, 1), sn.BatchNorm2d(4, activation="relu")

    folded = agree(Other(), image(2), 2)
    assert "one.0.weight" in folded.state_dict()


def test_a_batch_norm_alone_over_other_places_stays():
    model = Parallel()
    model.three[0] = nn.Conv2d(4, 4, 3, padding=1, stride=2)
    model.one[0] = nn.Conv2d(4, 4, 1, stride=2)
    model.add = lambda parts: parts[0] + parts[1] + F.max_pool2d(parts[2], 2, ceil_mode=True)
    agree(model, image(2), 2)


def test_it_is_exported_and_traced():
    model = randomised(Parallel()).double()
    x = image(2).double()
    folded, wanted = sn.fold(model), model(x)
    for made in (torch.jit.trace(folded, x), torch.export.export(folded, (x,)).module(), sn.fold(folded)):
        assert (made(x) - wanted).abs().max() <= 1e-12 * wanted.abs().max()


class Sometimes(Parallel):
    """One way adds less."""

    def forward(self, x):
        x = self.before(x)
        y = self.three(x) + self.one(x)
        return y if x.sum() > 0 else y + self.alone(x)


def test_a_forward_that_adds_less_at_times_is_not_merged():
    for sign in (1, -1):
        folded = agree(Sometimes(), sign * image(2), 2)
        assert "one.0.weight" in folded.state_dict()


def test_it_moves_with_the_model():
    model = randomised(Parallel())
    folded = sn.fold(model).double()
    wanted = model.double()(image(2).double())
    assert (folded(image(2).double()) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert folded.float()(image(2)).dtype == torch.bfloat16
