"""The exception tree: every error is ours and also the built-in that a caller would have caught before."""

import inspect
import warnings

import pytest

from steadynorm import errors

BUILT_IN = {
    "ArgumentError": ValueError,
    "ShapeError": ValueError,
    "SingleValueError": ValueError,  # torch.nn raises ValueError for a batch of one
    "WeightError": ValueError,
    "UnknownActivationError": ValueError,
    "DtypeError": TypeError,
    "DeviceError": ValueError,
    "DataError": ValueError,
    "ModelError": ValueError,
    "BackendError": RuntimeError,
    "DistributedError": RuntimeError,
    "RecomputationError": RuntimeError,
    "TransformError": RuntimeError,
    "MissingDependencyError": ImportError,
}
WARNINGS = {"BackendWarning", "ConversionWarning", "RejectedBatchWarning", "StaleStatisticsWarning"}


def test_every_error_is_ours_and_the_built_in_one():
    defined = {name for name, kind in inspect.getmembers(errors, inspect.isclass)}
    assert defined == set(errors.__all__) == {*BUILT_IN, "SteadynormError", "SteadynormWarning", *WARNINGS}
    for name, built_in in BUILT_IN.items():
        kind = getattr(errors, name)
        assert issubclass(kind, errors.SteadynormError)
        assert issubclass(kind, built_in)


def test_the_tree_drawn_at_the_top_is_the_tree():
    drawn: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        for name in errors.__all__:
            at = line.find(name)
            if at >= 0 and not line[:at].strip(" │├└─"):
                while above and above[-1][0] >= at:
                    above.pop()
                drawn[name] = above[-1][1] if above else ""
                above.append((at, name))
    assert drawn.keys() == set(errors.__all__)
    for name, parent in drawn.items():
        first_base = getattr(errors, name).__bases__[0]
        assert first_base.__name__ == (parent or ("UserWarning" if name == "SteadynormWarning" else "Exception"))


def test_warnings_are_warnings():
    assert all(issubclass(getattr(errors, name), errors.SteadynormWarning) for name in WARNINGS)
    assert issubclass(errors.SteadynormWarning, UserWarning)
    with pytest.raises(errors.SteadynormWarning):  # the suite turns them into errors: none may pass unseen
        warnings.warn("seen", errors.RejectedBatchWarning, stacklevel=1)
