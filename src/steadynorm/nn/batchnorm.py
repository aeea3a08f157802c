"""BatchNorm1d, BatchNorm2d, BatchNorm3d."""

from torch import nn

from steadynorm.nn.base import BatchNorm

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


class BatchNorm1d(BatchNorm, nn.BatchNorm1d):
    """Batch normalization of features: input (N, C) or (N, C, L).

        training      y = f(γ (x - μ_B) / sqrt(σ²_B + ε) + β + residual)    μ_B, σ²_B: the batch's, biased variance
                      r <- (1 - momentum) r + momentum m                     m: the batch's, unbiased variance
        evaluation    the same with the running statistics r: one example alone gets what it gets in any batch

    A subclass of `torch.nn.BatchNorm1d` with its arguments and its state_dict, so that optimisers, checkpoints and
    `isinstance` checks go on working. Statistics are as exact as in float64; running ones stay in float32 at least,
    also after `.half()`; a batch whose statistics are not finite is counted (`rejected_batches`) and not committed.

    Args:
        num_features: C.
        eps: ε >= 0, added to the variance; with 0 a constant channel gives NaN.
        momentum: The share of the new batch in the running statistics, in [0, 1]; None for the cumulative average of
            all batches.
        affine: Learn γ (`weight`, starts at 1) and β (`bias`, starts at 0).
        track_running_stats: Keep running statistics; without them evaluation uses the batch's own.
        device: Of the parameters and buffers.
        dtype: Of the parameters; the buffers' too, float32 at least.
        bias: With `affine`, whether to learn β.
        activation: f, fused into the layer: a name (`"relu"`, `"elu"`, ...; see `steadynorm.activations.NAMES`) or the
            `torch.nn` module with its parameters; None for the identity.
        channel_dim: The axis of the channels; -1 for channels last.
        single_value: What a training batch of one value per channel gets: `"error"` raises SingleValueError;
            `"running"` normalises it by the running statistics; `"beta"` takes its variance for 0, so y = f(β +
            residual). It is never committed: one value has no variance. Decided by the shape: where a mask leaves one
            position of several, that one is taken as by `"beta"` (and corrected by `renorm`). With `renorm` the default
            is `"running"`; with a process group of several ranks the ranks' values count together, and none is refused.
        masked: What a masked position gets: `"zero"`, or `"pass"` for the input itself and its gradient.
        ghost_batch_size: Normalise each chunk of so many examples by its own statistics; the chunks' pooled Moments are
            committed. The rest of a batch is a chunk of its own, unless it is a single value: then it joins the last.
            Without running statistics evaluation goes by chunks, too.
        renorm: A `steadynorm.Renorm`: correct the batch's statistics towards the running ones.
        domains: Names of domains that have running statistics of their own; `with steadynorm.domain(model, name)` says
            which one a forward is of. The state_dict has the first one under torch.nn's names and the others beside it
            (`running_mean_<name>`); a checkpoint without domains starts all of them.
        domain_affine: Give each domain a γ and β of its own, too.
        process_group: Take the statistics over the batches of all ranks of a process group of `torch.distributed`, or
            of the `"world"`; see `steadynorm.sync_`. Ghost chunks stay local, and only what is committed is merged.

    `forward` takes, beside the input:

    - `residual`: added after the affine map and before the activation; the input's shape.
    - `mask`: boolean, broadcastable to the positions from the batch axis on; False leaves a position out of the
      statistics and sets its output and gradient to 0 (see `masked`).
    - `sample_weight`: weights >= 0, broadcastable likewise: how often each position counts in the statistics. A batch
      whose weights sum to less than 2 is not committed, so scale them to a mean of 1. No gradient flows to them.

    torch's own converters and fusers take this layer for their own and know nothing of its options: they drop a fused
    activation. `SyncBatchNorm.convert_sync_batchnorm` is caught at it with a ConversionWarning (`steadynorm.sync_` is
    what to call instead); `fuse_conv_bn_eval` is not.

    Raises:
        SingleValueError: See `single_value`.
        ShapeError, DtypeError, DeviceError, WeightError: The input does not fit the layer.
        ArgumentError: An option is out of range, or a layer with domains is called outside of `steadynorm.domain`.
        DistributedError: A rank has gone; the message names it.
        TransformError: `torch.func.vmap` over a layer in training that is to commit.
        RecomputationError: With `renorm`, more forwards than are remembered waited for a checkpoint's backward.

    Source:
        Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
        Shift" (2015).

    Example:
        >>> import torch
        >>> layer = BatchNorm1d(1, momentum=1.0)
        >>> y = layer(torch.tensor([[3.0], [5.0], [8.0], [9.0], [11.0], [24.0]]))
        >>> layer.running_mean.item(), round(layer.running_var.item(), 4)     # the unbiased variance is remembered
        (10.0, 55.2)
        >>> one = layer.eval()(torch.tensor([[24.0]]))                        # one example on its own
        >>> round(one.item(), 4)
        1.8843
    """

    _dims = (2, 3)
    _shape = "(N, C) or (N, C, L)"


class BatchNorm2d(BatchNorm, nn.BatchNorm2d):
    """Batch normalization of image channels: input (N, C, H, W), contiguous or channels_last.

    Statistics per channel over N, H and W. Formula, arguments and behaviour as in `BatchNorm1d`.

    Example:
        >>> import torch
        >>> layer = BatchNorm2d(8, activation="relu")
        >>> x, shortcut = torch.randn(4, 8, 5, 5), torch.randn(4, 8, 5, 5)
        >>> layer(x, residual=shortcut).shape
        torch.Size([4, 8, 5, 5])
    """

    _dims = (4,)
    _shape = "(N, C, H, W)"


class BatchNorm3d(BatchNorm, nn.BatchNorm3d):
    """Batch normalization of volume channels: input (N, C, D, H, W).

    Statistics per channel over N, D, H and W. Formula, arguments and behaviour as in `BatchNorm1d`.

    Example:
        >>> import torch
        >>> BatchNorm3d(3)
        BatchNorm3d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """

    _dims = (5,)
    _shape = "(N, C, D, H, W)"
