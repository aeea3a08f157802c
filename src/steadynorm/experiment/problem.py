"""What all runs of one comparison share: the data, the network, and how a seed's split is presented to it."""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor

from steadynorm.errors import ModelError
from steadynorm.experiment.arms import norm_layer
from steadynorm.experiment.data.labelled import LabelledData
from steadynorm.experiment.models import NAMES, ModelSource, check_output
from steadynorm.experiment.split import Split, split, standardisation
from steadynorm.files import user_code

__all__ = ["Problem", "Scaling", "derived_seed"]

Scaling: TypeAlias = Literal["as split", "wild", "wild, standardised"]
"""How features are presented: as `split` gives them; each raw one multiplied by its own 10^U(-3, 3); or those
standardised again by the training part."""

_KEPT_SPLITS: Final = 2
_splits: OrderedDict[tuple[str, int, Scaling], Split] = OrderedDict()


def derived_seed(*parts: object) -> int:
    """A 63-bit seed that depends on all parts, so that streams of different purposes never coincide."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class Problem:
    """The data and the network of one comparison.

    Attributes:
        data: The labelled examples.
        source: Makes fresh copies of the network.
        fingerprint: Identifies both; the key of finished runs contains it.
    """

    data: LabelledData
    source: ModelSource
    fingerprint: str

    @staticmethod
    def of(data: LabelledData, source: ModelSource) -> "Problem":
        """A problem with the fingerprint of what its runs depend on: data, network, torch.

        A user's own network can change without its name or its printed form changing, so what it computes counts too.
        """
        shape, classes = tuple(data.x.shape[1:]), len(data.classes)
        with torch.random.fork_rng(devices=[]):
            network = source.build(shape, classes)
        contents = f"{data.fingerprint()} {source.name} {network} {torch.__version__}"
        if source.name not in NAMES:
            contents += f" {_behaviour(source, shape, classes)}"
        return Problem(data, source, hashlib.blake2b(contents.encode(), digest_size=16).hexdigest())

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return tuple(self.data.x.shape[1:])

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.data.classes)

    def split(self, seed: int, scaling: Scaling = "as split") -> Split:
        """The training, validation and test part of one seed; the last few are kept in memory."""
        key = self.fingerprint, seed, scaling
        if key in _splits:
            _splits.move_to_end(key)
            return _splits[key]
        parts = split(self.data, seed)
        if scaling != "as split":
            parts = _wild(parts, seed, standardised=scaling == "wild, standardised")
        _splits[key] = parts
        while len(_splits) > _KEPT_SPLITS:
            _splits.popitem(last=False)
        return parts


def _behaviour(source: ModelSource, shape: tuple[int, ...], classes: int) -> str:
    """What a user's factory makes, without batch norm and with it where the factory puts it: form, weights, scores."""
    digest = hashlib.blake2b(digest_size=16)
    places: list[str | None] = [None, "before", "after"] if source.places_norm else [None]
    for where in places:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            network = source.build(shape, classes, norm_layer if where else None, where).train()
            check_output(network, shape, classes, source.name)
            scores: object = user_code.call(network, torch.randn(8, *shape), name=source.name, error=ModelError)
        digest.update(str(network).encode())
        for tensor in (*network.state_dict().values(), scores):
            if isinstance(tensor, Tensor):
                digest.update(tensor.detach().double().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _raw(x: Tensor, mean: Tensor | None, scale: Tensor | None) -> Tensor:
    if mean is None or scale is None:
        return x
    return torch.where(scale > 0, x / scale, 0.0) + mean


def _wild(parts: Split, seed: int, *, standardised: bool) -> Split:
    generator = torch.Generator().manual_seed(derived_seed(seed, "feature scales"))
    factor = 10 ** (torch.rand(parts.x_train.shape[1:], generator=generator) * 6 - 3)
    train, val, test = (_raw(x, parts.mean, parts.scale) * factor for x in (parts.x_train, parts.x_val, parts.x_test))
    if standardised:
        mean, scale = standardisation(train)
        train, val, test = ((x - mean) * scale for x in (train, val, test))
    return replace(parts, x_train=train, x_val=val, x_test=test)
