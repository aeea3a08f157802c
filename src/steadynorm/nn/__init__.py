"""The layers: subclasses of `torch.nn`'s batch norms with the same arguments and the same state_dict."""

from steadynorm.nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]
