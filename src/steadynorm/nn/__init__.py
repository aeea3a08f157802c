"""The layers: subclasses of `torch.nn`'s batch norms with the same arguments and the same state_dict."""

from steadynorm.nn.averaging import average_
from steadynorm.nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from steadynorm.nn.contexts import accumulate, domain, no_commit
from steadynorm.nn.freezing import freeze_, unfreeze_
from steadynorm.nn.renorm import Renorm
from steadynorm.nn.stateless import functional_call
from steadynorm.nn.syncing import sync_

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Renorm",
    "accumulate",
    "average_",
    "domain",
    "freeze_",
    "functional_call",
    "no_commit",
    "sync_",
    "unfreeze_",
]
