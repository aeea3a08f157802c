"""Padding changes nothing, whatever it is made of and in whichever order the examples come; nor does it in training."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import grad

import steadynorm as sn
from support_masks import NAN, RENORM, at_positions, layer_of, lengths, rand

GARBAGE = st.sampled_from([0.0, -0.0, 1.0, -1e300, 1e300, float("inf"), float("-inf"), NAN, 5e-324])


@st.composite
def batches(draw) -> tuple[Tensor, Tensor]:
    """A batch of sequences with at least two real positions, and which ones are."""
    n, length = draw(st.integers(1, 5)), draw(st.integers(2, 6))
    real = draw(st.lists(st.integers(0, length), min_size=n, max_size=n))
    real[0] = max(real[0], 2)
    seed = draw(st.integers(0, 10_000))
    offset, scale = draw(st.sampled_from([(0.0, 1.0), (1e3, 1.0), (-3.0, 1e-3)]))
    return rand(n, 2, length, seed=seed) * scale + offset, lengths(*real, longest=length)


def step(x: Tensor, mask: Tensor, upstream: Tensor, options: dict) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, input's gradient, and all that has one shape whatever the batch: parameters' gradients, buffers."""
    x = x.clone().requires_grad_()
    layer = layer_of(x, activation="silu", **options)
    y = layer(x, mask=mask)
    dx, *parameters = grad(y, [x, *layer.parameters()], upstream)
    return y.detach(), dx, [*parameters, *layer.buffers()]


OPTIONS = st.sampled_from([{}, {"renorm": RENORM}, {"masked": "pass"}, {"momentum": None}])


@settings(max_examples=60, deadline=None)
@given(batches(), GARBAGE, st.integers(0, 2), st.integers(0, 3), OPTIONS)
def test_padding_of_any_kind_and_amount_changes_nothing(batch, garbage, more_examples, more_positions, options):
    x, mask = batch
    upstream = rand(*x.shape, seed=1)
    n, c, length = x.shape
    padded = torch.full((n + more_examples, c, length + more_positions), garbage, dtype=x.dtype)
    real = torch.zeros(n + more_examples, length + more_positions, dtype=torch.bool)
    wider = torch.full_like(padded, NAN)
    inside = at_positions(mask, x)
    padded[:n, :, :length] = torch.where(inside, x, garbage)
    real[:n, :length] = mask
    wider[:n, :, :length] = torch.where(inside, upstream, NAN)
    y, dx, others = step(x, mask, upstream, options)
    y_padded, dx_padded, others_padded = step(padded, real, wider, options)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(y_padded[:n, :, :length][inside], y[inside], **close)
    torch.testing.assert_close(dx_padded[:n, :, :length][inside], dx[inside], **close)
    for a, b in zip(others_padded, others, strict=True):
        torch.testing.assert_close(a, b, **close)


@settings(max_examples=30, deadline=None)
@given(batches(), st.randoms(use_true_random=False), OPTIONS)
def test_the_order_of_the_examples_is_no_matter(batch, random, options):
    x, mask = batch
    order = list(range(len(x)))
    random.shuffle(order)
    upstream = rand(*x.shape, seed=1)
    y, dx, others = step(x, mask, upstream, options)
    y_shuffled, dx_shuffled, others_shuffled = step(x[order], mask[order], upstream[order], options)
    for a, b in zip([y_shuffled, dx_shuffled, *others_shuffled], [y[order], dx[order], *others], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


class RowsAsSequences(nn.Module):
    """Digits read row by row: a network per row with a norm after it, and the mean over the real rows."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.rows = nn.Conv1d(16, 32, 1, bias=False)
        self.norm = norm
        self.classes = nn.Linear(32, 10)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.rows(x)
        y = self.norm(y, mask=mask) if isinstance(self.norm, sn.BatchNorm1d) else self.norm(y)
        y = torch.where(mask[:, None], torch.relu(y), 0)
        return self.classes(y.sum(2) / mask.sum(1, keepdim=True))


def padded(images: Tensor, longest: int, garbage: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each digit's first 5 to 8 rows, each with its number in one-hot code, padded with large garbage."""
    real = lengths(*torch.randint(5, 9, (len(images),), generator=generator).tolist(), longest=longest)
    x = garbage * torch.randn(len(images), 16, longest, generator=generator)
    rows = torch.cat([images.transpose(1, 2), torch.eye(8).expand(len(images), 8, 8)], 1)
    x[:, :, :8] = torch.where(real[:, None, :8], rows, x[:, :, :8])
    return x, real


def accuracy_after_training(norm: nn.Module) -> float:
    from sklearn.datasets import load_digits

    images, labels = (torch.from_numpy(t) for t in load_digits(return_X_y=True))
    images = images.float().reshape(-1, 8, 8) / 16
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = RowsAsSequences(norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for _ in range(150):
        chosen = torch.randint(0, 1200, (64,), generator=generator)
        longest = int(torch.randint(8, 25, (), generator=generator))
        x, mask = padded(images[chosen], longest, 300.0, generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x, mask), labels[chosen]).backward()
        optimizer.step()
    model.eval()
    x, mask = padded(images[1200:], 8, 300.0, generator)
    with torch.no_grad():
        return (model(x, mask).argmax(1) == labels[1200:]).double().mean().item()


def test_training_on_padded_sequences():
    """Everything else masks already: the padding reaches the network through the plain layer's statistics alone."""
    assert accuracy_after_training(sn.BatchNorm1d(32)) > 0.7
    assert accuracy_after_training(nn.BatchNorm1d(32)) < 0.3
