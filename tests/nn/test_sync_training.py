"""Training over ranks on real data is training of one process on the ranks' batches together.

The one process is given by the definition, written in plain operations; the ranks train this package's layers.
"""

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ranks
import steadynorm as sn
from support import assert_close, stats
from support_sync_training import STEPS, Batches, batches, digits, loss_of, network, wrapped

pytestmark = pytest.mark.xdist_group("ranks")

SPLITS = {  # examples of each batch that every rank gets
    "two ranks": (20, 12),
    "two ranks, one empty": (32, 0),
    "four ranks, one empty": (13, 2, 0, 17),
}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    state = {name.removeprefix("module."): t for name, t in model.state_dict().items()}
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for name, t in state.items()}


def in_one_process(norms: str) -> dict[str, Tensor]:
    model = network(norms)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches():
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
    return state_of(model)


def add_up(model: nn.Module, group: Any) -> None:
    """The gradients of all ranks, in place."""
    grads = [p.grad for p in model.parameters()]
    together = nn.utils.parameters_to_vector(grads)
    dist.all_reduce(together, group=group)
    nn.utils.vector_to_parameters(together, grads)


def on_ranks(
    rank: int, group: Any, batches: Batches, sizes: tuple[int, ...], wrapper: str | None, norms: str
) -> dict[str, Tensor]:
    """The same training with each batch split over the ranks."""
    model = network(norms)
    if norms == "steadynorm":
        sn.sync_(model, group)
    model = wrapped(model, wrapper, group)
    scale = 1 if wrapper is None else len(sizes)  # the wrappers average the gradients over the ranks
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches:
        optimizer.zero_grad()
        (scale * loss_of(model, x.split(sizes)[rank], y.split(sizes)[rank])).backward()
        if wrapper is None:
            add_up(model, group)
        optimizer.step()
    return state_of(model)


def furthest(state: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of any tensor from what it should be, relative to that tensor's size."""
    assert state.keys() == expected.keys()
    return max(float((state[name] - t).double().norm() / t.double().norm()) for name, t in expected.items())


@cache
def expected() -> dict[str, Tensor]:
    return in_one_process("definition")


def test_one_process_of_ours_is_the_definition_and_learns():
    model = network("definition")
    model.load_state_dict(expected())
    images, labels = digits()
    assert (model.eval()(images).argmax(1) == labels).double().mean() > 0.6
    assert furthest(in_one_process("steadynorm"), expected()) < 1e-9


@pytest.mark.parametrize(
    ("name", "wrapper"),
    [
        *((name, None) for name in SPLITS),
        ("two ranks", "DDP"),
        ("two ranks", "FSDP2"),
        ("four ranks, one empty", "FSDP2"),
    ],
)  # four ranks under DDP: the example that torchrun runs compares itself with one process
def test_fifty_steps_on_ranks_are_those_of_one_process(name, wrapper):
    states = ranks.run(on_ranks, len(SPLITS[name]), batches(), SPLITS[name], wrapper, "steadynorm")
    for state in states:
        assert furthest(state, expected()) < 1e-9
        assert all(torch.equal(t, states[0][key]) for key, t in state.items())  # the ranks agree to the bit
        assert state["1.num_batches_tracked"].item() == STEPS


def test_those_of_torch_under_ddp_are_not():
    states = ranks.run(on_ranks, 2, batches(), SPLITS["two ranks"], "DDP", "torch.nn")
    assert min(furthest(state, expected()) for state in states) > 0.01


# Float32, and less


def gradients(model: nn.Module, x: Tensor, y: Tensor, group: Any = None) -> list[Tensor]:
    loss_of(model, x, y).backward()
    if group is not None:
        add_up(model, group)
    return [p.grad for p in model.parameters()]


def single_steps() -> Batches:
    """Every other one far from zero, as pixels in 0 to 255 are: there float32 loses digits."""
    return [(x + 100 * (step % 2), y) for step, (x, y) in enumerate(batches()[:4])]


def of_single_steps(rank: int, group: Any, batches: Batches, sizes: tuple[int, ...]) -> list[list[Tensor]]:
    found = []
    for x, y in ([t.split(sizes)[rank] for t in batch] for batch in batches):
        found.append(gradients(sn.sync_(network(dtype=torch.float32), group), x.float(), y, group))
    return found


@pytest.mark.parametrize("name", SPLITS)
def test_in_float32_a_steps_gradient_errs_at_most_twice_as_much_as_one_process(name):
    on_ranks = ranks.run(of_single_steps, len(SPLITS[name]), single_steps(), SPLITS[name])[0]
    for (x, y), found in zip(single_steps(), on_ranks, strict=True):
        exact = gradients(network("definition"), x, y)
        alone = gradients(network(dtype=torch.float32), x.float(), y)
        of_ranks, of_one_process = (
            torch.cat([(a - b).flatten() for a, b in zip(some, exact, strict=True)]).norm() for some in (found, alone)
        )
        assert 0 < of_ranks <= 2 * of_one_process


def in_mixed_precision(
    rank: int, group: Any, x: Tensor, y: Tensor, reduce_dtype: torch.dtype | None
) -> tuple[torch.dtype, Tensor, Tensor, Tensor]:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
    model = wrapped(sn.sync_(network(dtype=torch.float32), group), "FSDP2", group, mp_policy=policy)
    into_the_norm = []
    model[1].register_forward_pre_hook(lambda _, inputs: into_the_norm.append(inputs[0].detach()))
    output = model(x.split((20, 12))[rank].float())
    nn.functional.cross_entropy(output.float(), y.split((20, 12))[rank]).backward()
    assert all(p.grad.full_tensor().isfinite().all() for p in model.parameters())
    return output.dtype, into_the_norm[0], model[1].running_mean, model[1].running_var


@pytest.mark.parametrize("reduce_dtype", [None, torch.float32])
def test_fsdp_in_bfloat16_keeps_the_running_statistics_in_float32(reduce_dtype):
    results = ranks.run(in_mixed_precision, 2, *batches()[0], reduce_dtype)
    into_the_norm = torch.cat([seen for _, seen, _, _ in results])
    for dtype, seen, mean, variance in results:
        assert dtype == seen.dtype == torch.bfloat16
        assert mean.dtype == variance.dtype == torch.float32
        assert_close(mean, 0.1 * stats(into_the_norm).mean, "statistic")
        assert_close(variance, 0.9 + 0.1 * stats(into_the_norm).unbiased, "variance")


# Ranks that see other data


def seen_at(site: int, images: Tensor) -> Tensor:
    """The second site's images are a third as bright."""
    return images / 3 if site else images


def at_two_sites(rank: int, group: Any, batches: Batches, norms: str) -> dict[str, Tensor]:
    model = network(norms)
    if norms == "steadynorm":
        sn.sync_(model, group)
    wrapper = wrapped(model, "DDP", group)
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches * 3:
        optimizer.zero_grad()
        (2 * loss_of(wrapper, seen_at(rank, x[rank::2]), y[rank::2])).backward()
        optimizer.step()
    return state_of(model)


@pytest.mark.parametrize(("norms", "works"), [("steadynorm", True), ("torch.nn", False)])
def test_where_ranks_see_other_data_torchs_layer_fails_at_the_second_site(norms, works):
    model = network(norms)
    model.load_state_dict(ranks.run(at_two_sites, 2, batches(), norms)[0])
    images, labels = digits()
    accuracies = [(model.eval()(seen_at(site, images)).argmax(1) == labels).double().mean().item() for site in range(2)]
    assert accuracies[0] > 0.85
    assert (accuracies[1] > 0.85) is works
    assert (accuracies[1] < 0.6) is not works
