"""convert_ on SyncBatchNorm: the statistics of all ranks' batches, over the group that torch's layer had, and back."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ranks
import steadynorm as sn
from support import assert_close, batch_norm, stats
from support_converting import stirred
from support_sync import rand

pytestmark = pytest.mark.xdist_group("ranks")


def converted(rank, group, own_group):
    torch.manual_seed(0)
    model = stirred(
        nn.Sequential(nn.SyncBatchNorm(3, momentum=1.0, process_group=group if own_group else None))
    ).double()
    sn.convert_(model)
    assert model[0].process_group == (group if own_group else "world")
    y = model(rand(2 + rank, 3, seed=rank)).detach()
    result = y, model[0].weight.detach(), model[0].bias.detach(), model[0].running_var.clone()
    sn.revert_(model)
    assert type(model[0]) is nn.SyncBatchNorm
    assert model[0].process_group is (group if own_group else None)
    sn.convert_(model, process_group=dist.group.WORLD)
    assert model[0].process_group is dist.group.WORLD
    return result


@pytest.mark.parametrize(("own_group", "ranks_in_it"), [(True, 2), (False, ranks.SIZE)])
def test_the_statistics_are_those_of_all_ranks(own_group, ranks_in_it):
    results = ranks.run(converted, ranks_in_it, own_group)
    x = torch.cat([rand(2 + rank, 3, seed=rank) for rank in range(ranks_in_it)])
    _, gamma, beta, running_var = results[0]
    assert_close(torch.cat([result[0] for result in results]), batch_norm(x, gamma, beta), "output")
    assert_close(running_var, stats(x).unbiased, "variance")
