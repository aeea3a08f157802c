"""Training over ranks on real data is training of one process on the ranks' batches together; and lost ranks.

The one process is given by the definition, written in plain operations; the ranks train this package's layers.
"""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

import ranks
import steadynorm as sn
from steadynorm.ops import collective, rollcall
from support import assert_close, stats

pytestmark = pytest.mark.xdist_group("ranks")

STEPS, BATCH = 50, 32
SPLITS = {  # examples of each batch that every rank gets
    "two ranks": (20, 12),
    "two ranks, one empty": (32, 0),
    "four ranks, one empty": (13, 2, 0, 17),
}


@cache
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images).view(-1, 1, 8, 8) / 16, torch.from_numpy(labels)


class Definition(nn.BatchNorm2d):
    """Batch norm as it is written down, for one process; the state_dict of torch.nn's layer."""

    def forward(self, input: Tensor) -> Tensor:
        axes = [d for d in range(input.dim()) if d != 1]
        rows = (-1, *(1,) * (input.dim() - 2))
        if not self.training:
            mean, variance = self.running_mean, self.running_var
        else:
            mean, variance = input.mean(axes), input.var(axes, correction=0)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(input.var(axes, correction=1), self.momentum)
                self.num_batches_tracked += 1
        centred = (input - mean.view(rows)) / (variance + self.eps).sqrt().view(rows)
        return centred * self.weight.view(rows) + self.bias.view(rows)


NORMS = {
    "steadynorm": (sn.BatchNorm1d, sn.BatchNorm2d),
    "torch.nn": (nn.BatchNorm1d, nn.BatchNorm2d),
    "definition": (Definition, Definition),
}


def network(norms: str = "steadynorm", dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    flat, images = NORMS[norms]
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, bias=False), images(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, bias=False), images(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(8, 16), flat(16), nn.ReLU(), nn.Linear(16, 10),
    ).to(dtype)  # fmt: skip


Batches = list[tuple[Tensor, Tensor]]


@cache
def batches() -> Batches:
    """Made here and handed to the ranks, which need not all import what reads them."""
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: STEPS * BATCH]
    return [(images[rows], labels[rows]) for rows in order.split(BATCH)]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """This part's share of the mean over the whole batch."""
    return nn.functional.cross_entropy(model(x), y, reduction="sum") / BATCH


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


def wrapped(model: nn.Module, wrapper: str | None, group: Any, **options: Any) -> nn.Module:
    if wrapper == "DDP":
        return DistributedDataParallel(model, process_group=group, **options)
    if wrapper == "FSDP2":
        from torch.distributed.fsdp import fully_shard  # slow to import: not for the sake of the other bodies

        mesh = DeviceMesh.from_group(group, "cpu")
        for layer in (model[4], model[8]):  # two norms with a shard of their own, and the rest together
            fully_shard(layer, mesh=mesh, **options)
        fully_shard(model, mesh=mesh, **options)
    return model


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


# A rank without data left


def early_end(rank: int, group: Any, batches: Batches) -> tuple[int, str]:
    model = wrapped(sn.sync_(network(), group), "DDP", group)
    steps = 0
    try:
        with model.join(throw_on_early_termination=True):
            for x, y in batches[: 2 + rank]:
                loss_of(model, x, y).backward()
                steps += 1
    except RuntimeError as error:
        return steps, str(error)
    return steps, ""


def test_ddps_join_with_throw_on_early_termination_ends_all_ranks_at_once():
    (ended, first), (went_on, second) = ranks.run(early_end, 2, batches()[:3])
    assert (ended, went_on) == (2, 2)
    assert "exhausted" in first
    assert "exhausted" in second


# A rank that is lost


def loses(rank: int, group: Any, batches: Batches, lost: int, where: str, wrapper: str | None) -> None:
    """Three steps of training; in the second one a rank ends between two layers, or on the way back."""
    collective._LOOK_EVERY, rollcall.PATIENCE = timedelta(seconds=0.5), 3.0
    model = wrapped(sn.sync_(network(), group), wrapper, group)
    layers = model.module if wrapper == "DDP" else model
    step = 0

    def end(*_: Any) -> None:
        if step == 1 and rank == lost:
            if where == "raises":
                raise ValueError("a mistake of this rank alone")
            os.kill(os.getpid(), signal.SIGKILL)

    if where == "backward":  # between the second norm and the first
        layers[2].register_full_backward_pre_hook(end)
    else:  # between the first norm and the second
        layers[3].register_forward_pre_hook(end)
    for x, y in batches:
        loss_of(model, x[rank::2], y[rank::2]).backward()
        step += 1


LOST = {
    "in forward": (2, 1, "forward", None),
    "rank 0 in forward": (2, 0, "forward", None),
    "in forward, of four": (4, 2, "forward", None),
    "in backward": (2, 1, "backward", None),
    "in backward, of four": (4, 1, "backward", None),
    "by an exception": (2, 1, "raises", None),
    "under DDP, in forward": (2, 1, "forward", "DDP"),
    "under DDP, in backward": (2, 1, "backward", "DDP"),
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[ranks.Outcome]]:
    """All of them at once: most of the time their processes wait for one another."""
    data = batches()[:3]
    with ThreadPoolExecutor(len(LOST)) as pool:
        started = {name: pool.submit(ranks.launch, loses, world, data, *how) for name, (world, *how) in LOST.items()}
        return {name: outcome.result() for name, outcome in started.items()}


@pytest.mark.parametrize("name", LOST)
def test_a_rank_lost_in_mid_step_ends_the_others_with_its_name(name, outcomes):
    world, lost, where, _ = LOST[name]
    for rank, outcome in enumerate(outcomes[name]):
        if rank == lost:
            assert outcome.exit_code == (1 if where == "raises" else -signal.SIGKILL), outcome
        else:
            assert outcome.exit_code == 1, outcome
            last = outcome.error.split("steadynorm.errors.DistributedError: ")[-1]
            assert f"Rank {lost} of {world} has gone" in last
            assert ("summing the batch's gradients" in last) == (where == "backward")
