"""Who computes for a tensor on a GPU. The CPU stands for one here, and a stand-in for the kernels."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from steadynorm.errors import ArgumentError, BackendError, BackendWarning, MissingDependencyError
from steadynorm.ops import accelerator, backends, reference
from steadynorm.ops.reference import Operands


@pytest.fixture
def asked(monkeypatch):
    """The CPU counts as a GPU; what is asked for by the environment, and what a trial of the kernels says."""
    monkeypatch.setattr(accelerator, "GPUS", {"cpu"})
    monkeypatch.setattr(accelerator, "_found", {})
    tried = []

    def ask(variable: str | None, failure: str | None = None, installed: bool = True) -> list[torch.device]:
        monkeypatch.delenv(accelerator.NAME, raising=False)
        if variable is not None:
            monkeypatch.setenv(accelerator.NAME, variable)

        def trial(device):
            tried.append(device)
            return failure

        stand_in = SimpleNamespace(backend=KERNELS, trial=SimpleNamespace(failure=trial)) if installed else None
        monkeypatch.setitem(sys.modules, "steadynorm.ops.gpu", stand_in)
        return tried

    return ask


KERNELS = SimpleNamespace(train="kernels")


def test_kernels_compute_where_their_trial_goes_well_which_is_held_once(asked):
    tried = asked(None)
    assert accelerator.kernels("cpu") is KERNELS
    assert accelerator.has_kernels("cpu")
    assert tried == [torch.device("cpu")]


def test_other_devices_have_none_which_is_said_once_at_debug_level(asked, caplog):
    tried = asked("triton")
    x = torch.empty(4, 3, device="meta")
    with caplog.at_level(logging.DEBUG, logger="steadynorm.ops.accelerator"):
        assert backends.backend_for(Operands(x)) is reference
        assert backends.committing("meta") is None
    assert [record.getMessage() for record in caplog.records] == [
        "There are no kernels for meta: torch's own operations compute there."
    ]
    assert tried == []


def test_torchs_operations_where_they_are_asked_for(asked):
    tried = asked("reference")
    assert accelerator.kernels("cpu") is None
    assert tried == []


def test_without_triton_it_is_said_once_at_debug_level(asked, caplog):
    asked(None, installed=False)
    with caplog.at_level(logging.DEBUG, logger="steadynorm.ops.accelerator"):
        assert accelerator.kernels("cpu") is None
        assert accelerator.kernels("cpu") is None
    assert [record.levelname for record in caplog.records] == ["DEBUG"]
    assert "Triton cannot be imported" in caplog.text


def test_kernels_that_fail_are_not_used_which_is_a_warning(asked):
    asked(None, failure="they are off by 3.0e-01 of a standard deviation")
    with pytest.warns(BackendWarning, match=r"tried on cpu and are not used: they are off by 3\.0e-01"):
        accelerator.kernels("cpu")
    assert accelerator.kernels("cpu") is None  # and no second warning, which would be an error


def test_asked_for_by_name_and_missing_is_an_error(asked):
    asked("triton", installed=False)
    with pytest.raises(MissingDependencyError, match="Triton, which cannot be imported"):
        accelerator.kernels("cpu")


def test_asked_for_by_name_and_failing_is_an_error(asked):
    asked("triton", failure="RuntimeError: no compiler")
    with pytest.raises(BackendError, match="the kernels fail on cpu: RuntimeError: no compiler"):
        accelerator.kernels("cpu")


def test_asked_for_something_else(asked):
    asked("cudnn")
    with pytest.raises(ArgumentError, match="must be auto, reference or triton, got 'cudnn'"):
        accelerator.kernels("cpu")


def test_nothing_is_tried_or_decided_while_others_look_on(asked):
    tried = asked(None)
    with Watching():
        assert accelerator.kernels("cpu") is None
    assert torch.func.vmap(lambda x: x + (accelerator.kernels("cpu") is not None))(torch.zeros(2)).sum() == 0
    assert tried == []
    assert accelerator.kernels("cpu") is KERNELS


class Watching(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_a_compiler_takes_it_for_a_constant_and_may_be_the_first_to_ask(asked):
    tried = asked(None)
    step = torch.compile(lambda x: x + 1 if accelerator.has_kernels("cpu") else x - 1, backend="eager", fullgraph=True)
    assert step(torch.zeros(2)).tolist() == [1, 1]
    assert tried == [torch.device("cpu")]
