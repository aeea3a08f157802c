"""recalibrate_ over ranks: the float64 statistics of the union of their shards, identical on all."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import ranks
import steadynorm as sn
from steadynorm.errors import DataError, DistributedError, SteadynormWarning
from support_population import bits, check, expected, images, network, norms, same

SHARDS = ((16, 7), (5,), (), (3, 3, 1))  # batches of each rank; one has none


def shards(world: int) -> list[list[Tensor]]:
    left, parts = list(images(sum(map(sum, SHARDS)))), []
    for sizes in SHARDS[:world]:
        parts.append([torch.stack([left.pop(0) for _ in range(size)]) for size in sizes])
    return parts


def recalibrated(rank, group, kind, order, world):
    model = network(kind)
    report = sn.recalibrate_(model, shards(world)[rank], order=order, process_group=group)
    return {k: v for k, v in bits(model).items() if "running" in k or "tracked" in k}, report.to_dict()


@pytest.mark.parametrize(
    ("kind", "order", "world"),
    [("ours", "joint", 2), ("torch", "sequential", 2), ("ours", "sequential", 3), ("torch", "joint", 4)],
)
def test_ranks_end_identical_with_the_statistics_of_the_union(kind, order, world):
    found = ranks.run(recalibrated, world, kind, order, world)
    for state, report in found[1:]:
        assert same(state, found[0][0])
        assert report == found[0][1]
    union = [batch for shard in shards(world) for batch in shard]
    model = network(kind)
    wanted = expected(copy.deepcopy(model), union, order)
    model.load_state_dict(found[0][0], strict=False)
    check(model, wanted)
    assert found[0][1]["ranks"] == world
    assert found[0][1]["examples"] == sum(map(len, union))
    assert all(m.num_batches_tracked == len(union) for m in norms(model).values())


def test_a_group_of_some_ranks_and_synchronised_layers():
    for state, _ in ranks.run(synchronised, 2):
        torch.testing.assert_close(
            state["running_var"].double(), images(23)[:, :, 0, 0].double().var(0), rtol=1e-6, atol=0
        )


def synchronised(rank, group):
    layer = sn.BatchNorm1d(3, process_group=group)
    x = images(23)[:, :, 0, 0]
    report = sn.recalibrate_(layer, [x[:20].split(4), [x[20:]]][rank], process_group=group)
    assert "synchronised in training" in report.notes[0]
    assert layer.process_group is group
    return layer.state_dict(), report


def failing(rank, group, order):
    model = network()
    before = bits(model)

    def loader():
        yield images(4)
        if rank == 1:
            raise OSError("disk gone")

    batches = loader() if order == "joint" else [images(4), *([None] if rank == 1 else [])]
    try:
        sn.recalibrate_(model, batches, order=order, process_group=group)
    except Exception as error:
        return type(error), str(error), same(before, bits(model))


@pytest.mark.parametrize("order", ["joint", "sequential"])
def test_a_rank_that_fails_is_known_to_the_others_and_no_model_is_changed(order):
    (first, message, same_first), (second, _, same_second) = ranks.run(failing, 2, order)
    assert first is DistributedError
    assert "failed on 1 of 2 ranks" in message
    assert second is not DistributedError
    assert same_first
    assert same_second


def short(rank, group):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = sn.recalibrate_(network(), shards(2)[rank], batches=2, process_group=group)
    return report.notes, [one.category for one in caught]


def test_a_shard_that_runs_short_is_said_on_all_ranks():
    for notes, categories in ranks.run(short, 2):
        assert "3 batches, 1 fewer" in notes[0]
        assert categories == [SteadynormWarning]


def nothing(rank, group):
    with pytest.raises(DataError, match="no batch"):
        sn.recalibrate_(nn.BatchNorm1d(2), [], process_group=group)


def test_no_batch_on_any_rank_is_an_error_on_all():
    ranks.run(nothing, 2)
