"""Whether a contender computes what the definition says: outputs, gradients and running statistics."""

from torch import Tensor

from cpu_oracle import CHUNK, TOLERANCE, Problem, worst_error
from cpu_peers import Peer

__all__ = ["error_of", "running_error"]


def error_of(problem: Problem, peer: Peer) -> float:
    """The largest distance from the truth after one step, in units of what is allowed: inf for a NaN.

    Of y, and of the gradients of x, gamma, beta and the residual with a random gradient of y; and of the running
    statistics. `cpu_oracle.TOLERANCE` says by dtype what is allowed.
    """
    norm = peer.norm
    norm.reset_running_stats()  # of both kinds of layer
    outcome = peer.outcome()
    after = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    return max(worst_error(problem, outcome), running_error(problem.x, *after, norm.momentum))


def running_error(x: Tensor, mean: Tensor, variance: Tensor, steps: Tensor, momentum: float) -> float:
    """Likewise of the running statistics after a first step from 0 and 1.

    m mean(x) and 1 - m + m var(x), the variance unbiased (over n - 1), with the momentum m.
    """
    if int(steps) != 1:
        return float("inf")
    narrow = max(TOLERANCE[mean.dtype])
    channels = x.shape[1]
    step = max(1, CHUNK * channels // x.numel())
    worst = 0.0
    for start in range(0, channels, step):
        values = x.detach()[:, start : start + step].movedim(1, 0).flatten(1).double()
        truths = momentum * values.mean(1), 1 - momentum + momentum * values.var(1, correction=1)
        for found, truth in zip((mean, variance), truths, strict=True):
            distance = (found.detach()[start : start + step].double() - truth).abs() / (narrow * (1 + truth.abs()))
            error = float(distance.amax())
            worst = max(worst, error if error == error else float("inf"))
    return worst
