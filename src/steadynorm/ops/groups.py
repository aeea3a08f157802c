"""Which ranks a layer's batch is merged over: a process group of torch.distributed, or the whole world by name."""

import sys
import warnings
from typing import TYPE_CHECKING, Any, cast

from steadynorm.errors import ArgumentError, SteadynormWarning

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    GroupLike = ProcessGroup | str
else:
    GroupLike = Any  # torch.distributed is not imported for the sake of an annotation

__all__ = ["GroupLike", "GroupReference", "resolve_group"]


def resolve_group(group: "GroupLike | None") -> "ProcessGroup | None":
    """The ranks to sum over, or None where there is nobody to sum with.

    Args:
        group: A ProcessGroup; `"world"` for all ranks, looked up when it is needed, so that a model may be built before
            `init_process_group`, and that a script runs in a single process too; None for no other ranks.

    Raises:
        ArgumentError: It is something else, or a group that this rank is not a member of.
    """
    if group is None:
        return None
    import torch.distributed as dist

    # This attribute, and not `is_initialized()`, which torch.compile would take for a constant.
    alone = not dist.is_available() or dist.distributed_c10d._world.default_pg is None  # pyright: ignore
    if alone and group == "world":
        return None
    if alone and dist.is_available() and isinstance(group, dist.ProcessGroup):
        raise ArgumentError(
            "process_group is a group of a torch.distributed that is not initialised any more. Make a new one and hand "
            'it to steadynorm.sync_, or use "world", which is looked up in each forward.'
        )
    if isinstance(group, str):
        if group != "world":
            raise ArgumentError(f'process_group must be a ProcessGroup, "world" or None, got {group!r}.')
        group = cast("ProcessGroup", dist.group.WORLD)
    if not isinstance(group, dist.ProcessGroup):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(
            f'process_group must be a ProcessGroup that this rank is a member of, "world" or None, got {group!r}. '
            "torch.distributed.new_group returns no group to ranks outside of it: leave the layer unsynced there."
        )
    return group if group.size() > 1 else None


class GroupReference:
    """Holds a process group inside a layer that can be copied and pickled, which a group itself cannot.

    A copy refers to the same group. Unpickled, the world is the world of the process that it is in; any other group
    does not exist there, so the layer comes back unsynced and says so.
    """

    def __init__(self, group: "GroupLike | None" = None) -> None:
        dist = sys.modules.get("torch.distributed")
        known = group is None or group == "world" or (dist is not None and isinstance(group, dist.ProcessGroup))
        if not known:
            resolve_group(group)
            raise ArgumentError(f'process_group must be a ProcessGroup, "world" or None, got {group!r}.')
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> "GroupReference":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.group is None or self.group == "world":
            return GroupReference, (self.group,)
        import torch.distributed as dist

        if dist.is_initialized() and self.group is dist.group.WORLD:
            return GroupReference, ("world",)
        return _without_group, (dist.get_process_group_ranks(cast("ProcessGroup", self.group)),)


def _without_group(ranks: list[int]) -> GroupReference:
    warnings.warn(
        f"a layer that was synchronised over the ranks {ranks} was unpickled: a process group cannot be pickled, so "
        "the layer is not synchronised now. Call steadynorm.sync_(model, process_group) again.",
        SteadynormWarning,
        stacklevel=2,
    )
    return GroupReference(None)
