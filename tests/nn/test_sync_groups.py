"""Over which ranks: parts of the world, the world before there is one, one rank alone, and what copies keep of it."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import grad

import ranks
import steadynorm as sn
from steadynorm.errors import ArgumentError, SteadynormWarning
from support import assert_close, batch_norm
from support_sync import layer_of, rand

pytestmark = pytest.mark.xdist_group("ranks")

# Which ranks


def halves(rank, group):
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    layer = sn.sync_(layer_of(rand(2, 3)), pairs[rank // 2])
    with pytest.raises(ArgumentError, match=r"a ProcessGroup that this rank is a member of"):
        sn.sync_(layer, pairs[1 - rank // 2])
    with pytest.raises(ArgumentError, match="unsynced there"):
        sn.BatchNorm1d(3, process_group=pairs[1 - rank // 2])
    assert layer.process_group is pairs[rank // 2]
    return layer(rand(1 + rank, 3, seed=rank)).detach(), layer.weight.detach(), layer.bias.detach()


def test_a_group_may_be_a_part_of_the_world_and_others_are_told_so():
    results = ranks.run(halves, 4)
    for pair in ((0, 1), (2, 3)):
        x = torch.cat([rand(1 + rank, 3, seed=rank) for rank in pair])
        _, gamma, beta = results[0]
        assert_close(torch.cat([results[rank][0] for rank in pair]), batch_norm(x, gamma, beta), "output")


def with_the_world(rank, group, layer):
    return layer(rand(4, 3)[rank : rank + 1]).detach()


def test_the_world_is_looked_up_when_it_is_needed():
    """Built here, where torch.distributed is not initialised: alone it is a plain layer, on ranks a synced one."""
    assert not dist.is_initialized()
    layer, x = layer_of(rand(4, 3), process_group="world"), rand(4, 3)
    assert torch.equal(copy.deepcopy(layer)(x), layer_of(x)(x))
    y = torch.cat(ranks.run(with_the_world, 4, layer))
    assert_close(y, batch_norm(x, layer.weight, layer.bias), "output")


def alone(rank, group):
    x, upstream = rand(4, 3).requires_grad_(), rand(4, 3, seed=1)
    results = []
    for one in (None, group):
        layer = layer_of(x, process_group=one)
        y = layer(x)
        results.append((y, *grad(y, [x, layer.weight], upstream), layer.running_mean, layer.running_var))
    with pytest.raises(sn.errors.SingleValueError):
        layer(x[:1])
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_group_of_one_is_no_group():
    assert ranks.run(alone, 1) == [True]


# Copies


def copied(rank, group):
    layer = sn.BatchNorm1d(3, process_group=group)
    assert copy.deepcopy(layer).process_group is group
    with pytest.warns(SteadynormWarning, match=r"over the ranks \[0, 1\].*sync_"):
        assert pickle.loads(pickle.dumps(layer)).process_group is None
    file = io.BytesIO()
    torch.save(nn.Sequential(layer), file)
    file.seek(0)
    with pytest.warns(SteadynormWarning, match="sync_"):
        assert torch.load(file, weights_only=False)[0].process_group is None
    for world in ("world", dist.group.WORLD):
        assert pickle.loads(pickle.dumps(sn.BatchNorm1d(3, process_group=world))).process_group == "world"
    assert layer.state_dict().keys() == nn.BatchNorm1d(3).state_dict().keys()


def test_copies_share_the_group_and_pickles_keep_the_world_alone():
    ranks.run(copied, 2)


def compile_before_there_is_a_world(rank, group, place):
    torch._dynamo.reset()
    dist.destroy_process_group()
    layer = sn.sync_(sn.BatchNorm1d(1, momentum=1.0))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.tensor([[1.0], [3.0]]) + 10 * rank
    compiled(x)
    assert layer.running_mean.item() == 2 + 10 * rank
    dist.init_process_group("gloo", store=dist.FileStore(f"{place}/store", 2), rank=rank, world_size=2)
    compiled(x)
    assert layer.running_mean.item() == 7


def test_a_graph_compiled_before_there_is_a_world_does_not_stay_alone(tmp_path):
    outcomes = ranks.launch(compile_before_there_is_a_world, 2, str(tmp_path))
    assert [(outcome.exit_code, outcome.error) for outcome in outcomes] == [(0, None)] * 2
