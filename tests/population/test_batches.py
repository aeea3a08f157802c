"""How batches of many forms reach a model, by the signature of its forward; and what is said where they cannot."""

import re
from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn

import steadynorm as sn
from steadynorm.errors import ArgumentError, ModelError
from steadynorm.population.batches import Caller, examples_in

X, Y, Z = torch.full((4, 2), 1.0), torch.full((4, 2), 2.0), torch.zeros(4)
Pair = namedtuple("Pair", ["x", "y"])


def model(signature: str) -> nn.Module:
    """A model that notes what it was called with."""
    space: dict = {}
    names = [p.split("=")[0].strip().lstrip("*") for p in signature.split(",") if p.strip() not in ("*", "/")]
    given = ", ".join(f"{n}={n}" for n in names)
    exec(f"def forward(self, {signature}):\n    self.got = dict({given})", space)
    return type("Noted", (nn.Module,), {"forward": space["forward"]})()


def got(signature, batch):
    one = model(signature)
    caller = Caller(one, None)
    caller(batch)
    return {k: v for k, v in one.got.items() if v is not None}, caller.note


@pytest.mark.parametrize(
    ("signature", "batch", "wanted"),
    [
        ("x", X, {"x": X}),
        ("x", [X], {"x": X}),
        ("x", (X, Z), {"x": X}),
        ("x", Pair(X, Z), {"x": X}),
        ("x, y", (X, Y), {"x": X, "y": Y}),
        ("x, y", (X, Y, Z), {"x": X, "y": Y}),
        ("x, y", ((X, Y), Z), {"x": X, "y": Y}),
        ("x, y", ([X, Y], Z), {"x": X, "y": Y}),
        ("x=None", (X, Z), {"x": X}),
        ("*x", X, {"x": (X,)}),
        ("x, y", {"x": X, "y": Y}, {"x": X, "y": Y}),
        ("x, labels=None", {"x": X, "labels": Z}, {"x": X}),
        ("x, labels", {"x": X, "labels": Z}, {"x": X, "labels": Z}),
        ("x, y=None", UserDict({"x": X}), {"x": X}),
        ("**x", {"a": X, "target": Z}, {"x": {"a": X}}),
        ("x, *, y", {"x": X, "y": Y}, {"x": X, "y": Y}),
        ("a, b=None", ({"a": X, "b": Y}, Z), {"a": X, "b": Y}),
        ("x", ({"a": X}, Z), {"x": {"a": X}}),
    ],
)
def test_inputs_arrive_and_labels_do_not(signature, batch, wanted):
    found, note = got(signature, batch)
    assert repr(found) == repr(wanted)
    assert note is None


def test_what_could_have_been_otherwise_is_noted():
    found, note = got("x, mask=None", (X, Z))
    assert list(found) == ["x"]
    assert "mask, pass forward=" in note
    assert "(x, mask=None)" in note
    found, note = got("x", {"x": X, "id": Z, "labels": Z})
    assert list(found) == ["x"]
    assert note == "the entries id of each batch are no parameters of model.forward and were left out."


@pytest.mark.parametrize(
    ("signature", "batch", "said"),
    [
        ("x, y", X, r"\(x, y\) cannot be called with 1 inputs.* a tensor \(4, 2\)"),
        ("x, y, z", (X, Z), "cannot be called with 2 inputs.* tuple of 2"),
        ("x, *, y", (X, Z), "cannot be called"),
        ("*, x", X, "cannot be called"),
        ("*x", (X, Z), "any number of inputs"),
        ("x, y", {"x": X}, "needs y, and batch has the entries x"),
        ("x=None", {"a": X}, "none of the entries a"),
        ("x", (), "empty tuple"),
        ("x, y", {"z": {"a": X}}, "forward="),
        ("x, y", 3, "a int"),
        ("x, y", {1, 2}, "a set"),
    ],
)
def test_what_cannot_be_decided_is_said_with_the_signature(signature, batch, said):
    with pytest.raises(ArgumentError, match=said):
        got(signature, batch)


def test_an_error_of_the_model_says_what_it_was_called_with():
    for batch, said in (((X, Z), r"model\(batch\[0\]\) for a batch of a tuple"), ({"input": X}, r"a dict of input")):
        with pytest.raises(RuntimeError) as raised:
            Caller(nn.Linear(3, 1), None)(batch)
        (note,) = raised.value.__notes__
        assert re.search(said, note)


def test_forward_takes_the_batch_as_it_is():
    layer, batch = sn.BatchNorm1d(2), {"deep": [(X * torch.arange(4.0)[:, None],)]}
    report = sn.recalibrate_(layer, [batch], forward=lambda b: layer(b["deep"][0][0]))
    assert layer.running_mean.tolist() == [1.5, 1.5]
    assert report.examples == 4
    assert not report.notes


def test_tensors_inside_are_moved_to_the_model():
    one = model("x, y")
    one.register_buffer("place", torch.zeros(1, device="meta"))
    Caller(one, None)(({"a": X, "n": 3}, [Y, "text"], Z))
    assert one.got["x"]["a"].device.type == "meta"
    assert one.got["x"]["n"] == 3
    assert one.got["y"][0].device.type == "meta"


def test_a_forward_without_a_signature_takes_one_input():
    one = nn.Sequential(nn.BatchNorm1d(2))
    one.forward = type("Opaque", (), {"__call__": lambda *a: None, "__signature__": "none"})()
    assert Caller(one, None).note is None


def test_one_tensor_is_one_batch_and_examples_are_counted_by_the_first_tensor():
    assert sn.recalibrate_(sn.BatchNorm1d(2), X * torch.arange(4.0)[:, None]).batches == 1
    assert examples_in({"a": ["text", (X,)]}) == 4
    assert examples_in(["text", 3]) is None
    assert examples_in(torch.tensor(1.0)) is None
    with pytest.raises(ModelError, match="has none"):
        sn.recalibrate_(model("x"), X)
