"""Saved networks: the same predictions bit for bit, and every damaged or foreign file is a ModelError."""

import json
import sys

import pytest
import torch
from torch import nn

from steadynorm.errors import ModelError
from steadynorm.experiment import arms, models
from steadynorm.experiment.saved import load_model, read_spec, save_model

SHAPE = (1, 8, 8)
CLASSES = [str(i) for i in range(10)]


def spec(**changes):
    given = {"model": "sigmoid-mlp", "arm": "before", "where": "before", "input_shape": list(SHAPE), "classes": CLASSES}
    return {**given, **changes}


def trained(model="sigmoid-mlp", where="before", shape=SHAPE, dropout=0.0) -> nn.Module:
    """A network a few steps away from its initialisation, with running statistics of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        arm = arms.Arm("an arm", "an arm", where)
        network = arms.build(models.resolve(model), arm, shape, 10, dropout=dropout)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for _ in range(3):
            loss = nn.functional.cross_entropy(network(torch.randn(32, *shape) * 3 + 1), torch.randint(10, (32,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


def probe(shape=SHAPE) -> torch.Tensor:
    return torch.randn(50, *shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.parametrize("where", [None, "before", "after", "first"])
def test_a_reloaded_network_predicts_the_same_bit_for_bit_and_one_example_at_a_time(tmp_path, name, where):
    network = trained(name, where)
    save_model(tmp_path / "new" / "folder", network, spec(model=name, arm="x", where=where))
    again = load_model(tmp_path / "new" / "folder")
    assert not again.training
    with torch.no_grad():
        expected = network(probe())
        batch = again(probe())
        alone = torch.cat([again(example[None]) for example in probe()])
    assert torch.equal(batch, expected)
    assert float(expected.std()) > 1e-3  # the comparison is not of constants
    torch.testing.assert_close(alone, batch, rtol=0, atol=1e-6)


def test_running_statistics_are_what_travels(tmp_path):
    """Were they lost, evaluation would normalise by mean 0 and variance 1 and give something else."""
    network = trained()
    save_model(tmp_path, network, spec())
    norms = [m for m in load_model(tmp_path).modules() if isinstance(m, nn.BatchNorm1d)]
    assert len(norms) == 3
    assert all(int(norm.num_batches_tracked or 0) == 3 for norm in norms)
    assert all(float(norm.running_mean.abs().max()) > 0 for norm in norms if norm.running_mean is not None)


def test_dropout_is_put_back_where_it_was(tmp_path):
    network = trained(dropout=0.5)
    save_model(tmp_path, network, spec(dropout=0.5))
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(probe()), network(probe()))


def test_the_record_keeps_what_it_is_given(tmp_path):
    save_model(tmp_path, trained(), spec(preprocessing={"mean": [1.5], "scale": [0.25]}))
    found = read_spec(tmp_path)
    assert {key: found[key] for key in spec()} == spec()
    assert found["preprocessing"] == {"mean": [1.5], "scale": [0.25]}
    assert set(found["versions"]) == {"steadynorm", "torch", "python"}
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "model.json"}


def test_loading_leaves_the_random_stream_alone(tmp_path):
    save_model(tmp_path, trained(), spec())
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    load_model(tmp_path)
    assert torch.equal(torch.rand(4), expected)


def test_saving_again_replaces_and_tied_weights_are_kept(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(4, 4, bias=False)
            self.two = nn.Linear(4, 4, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(torch.tanh(self.one(x)))

    network = Tied()
    first = spec(model="Tied", arm="plain", where=None, input_shape=[4], classes=["a", "b", "c", "d"])
    save_model(tmp_path, trained(), spec())
    save_model(tmp_path, network, first)
    assert torch.equal(load_model(tmp_path, Tied)(torch.ones(1, 4)), network(torch.ones(1, 4)))


# --- the user's own models


def own_net(norm=None):
    layers = [nn.Flatten(), nn.Linear(64, 16), *([norm(16)] if norm else []), nn.ReLU(), nn.Linear(16, 10)]
    return nn.Sequential(*layers)


def test_a_factory_has_to_be_passed_since_no_file_decides_what_is_imported(tmp_path, monkeypatch):
    (tmp_path / "own_nets.py").write_text(
        "import torch.nn as nn\nran = []\ndef make(norm=None):\n    ran.append(1)\n"
        "    layers = [nn.Flatten(), nn.Linear(64, 16), *([norm(16)] if norm else []), nn.ReLU(), nn.Linear(16, 10)]\n"
        "    return nn.Sequential(*layers)\n"
    )
    monkeypatch.chdir(tmp_path)
    network = trained(own_net, "own")
    save_model(tmp_path, network, spec(model="own_nets:make", arm="norm", where="own"))
    with pytest.raises(ModelError, match=r"built by 'own_nets:make', which is not part of .*factory='own_nets:make'"):
        load_model(tmp_path)
    assert "own_nets" not in sys.modules
    with torch.no_grad():
        for factory in ("own_nets:make", own_net):
            assert torch.equal(load_model(tmp_path, factory)(probe()), network(probe()))
    sys.modules.pop("own_nets")


def test_a_plain_module_can_be_the_factory(tmp_path):
    network = trained(own_net(), "after")
    save_model(tmp_path, network, spec(model="Sequential", arm="after", where="after"))
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path, own_net())(probe()), network(probe()))


def broken(norm=None):
    raise KeyError("gone")


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda norm=None: nn.Linear(64, 10), "returned a network without one"),
        (
            lambda norm=None: nn.Sequential(own_net(norm), nn.Linear(10, 10)),
            "the weights do not fit the network that own:net",
        ),
        (lambda norm=None: own_net(norm).double(), "is torch.float32, not torch.float64"),
        (broken, "calling broken failed at .*: KeyError: 'gone'"),
        ("nowhere_at_all:f", "importing 'nowhere_at_all'"),
        ("no-such-name", "model must be one of"),
    ],
)
def test_a_factory_that_does_not_fit(tmp_path, factory, message):
    save_model(tmp_path, trained(own_net, "own"), spec(model="own:net", arm="norm", where="own"))
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path, factory)


# --- files that cannot be used


@pytest.fixture
def saved(tmp_path):
    save_model(tmp_path, trained(), spec())
    return tmp_path


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_truncated_weights(saved, keep):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match="is damaged, incomplete or from another save"):
        load_model(saved)


def test_one_flipped_bit_in_the_weights(saved):
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match="is damaged"):
        load_model(saved)


def test_weights_of_another_save(saved, tmp_path_factory):
    other = save_model(tmp_path_factory.mktemp("other"), trained("relu-mlp"), spec(model="relu-mlp"))
    (saved / "model.safetensors").write_bytes(other.read_bytes())
    with pytest.raises(ModelError, match="from another save"):
        load_model(saved)


def test_a_digest_that_fits_a_foreign_file(saved):
    import hashlib

    (saved / "model.safetensors").write_bytes(b"no safetensors")
    record = json.loads((saved / "model.json").read_text())
    record["sha256"] = hashlib.sha256(b"no safetensors").hexdigest()
    (saved / "model.json").write_text(json.dumps(record))
    with pytest.raises(ModelError, match="is no safetensors file"):
        load_model(saved)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("\x00\xff", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "does not describe a saved model"),
        ('{"format": "another"}', "does not describe a saved model"),
        ('{"format": "steadynorm model", "sha256": "", "schema": 99}', "has schema 99, this version reads 1"),
        (
            '{"format": "steadynorm model", "sha256": "", "schema": 1}',
            "'model' must be a model's name .*'nothing'",
        ),
    ],
    ids=["empty", "cut off", "binary", "nested", "list", "foreign", "newer", "incomplete"],
)
def test_a_record_that_cannot_be_used(saved, content, message):
    (saved / "model.json").write_text(content, encoding="latin-1")
    with pytest.raises(ModelError, match=message):
        load_model(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": 3}, "'model' must be"),
        ({"where": "left"}, "'where' must be null, before, after, own or first, got 'left'"),
        ({"where": ["before"]}, "'where' must be"),
        ({"input_shape": []}, "'input_shape' must be a list of positive whole numbers"),
        ({"input_shape": [1, -8]}, "'input_shape' must be"),
        ({"input_shape": [True]}, "'input_shape' must be"),
        ({"classes": ["one"]}, "'classes' must be a list of at least two names"),
        ({"dropout": 1.0}, r"'dropout' must be a number in \[0, 1\), got 1.0"),
        ({"extra": {1, 2}}, "plain JSON values"),
        ({"extra": float("nan")}, "plain JSON values"),
    ],
)
def test_a_spec_that_would_not_rebuild_is_refused_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(ModelError, match=message):
        save_model(tmp_path / "folder", nn.Linear(2, 2), spec(**change))
    assert not (tmp_path / "folder").exists()


def test_another_input_shape_than_the_weights_were_trained_on(saved):
    record = json.loads((saved / "model.json").read_text())
    (saved / "model.json").write_text(json.dumps({**record, "input_shape": [1, 9, 9]}))
    with pytest.raises(ModelError, match="size mismatch"):
        load_model(saved)


def test_missing_files_and_folders(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"cannot read .*model\.safetensors: No such file"):
        load_model(saved)
    with pytest.raises(ModelError, match=r"cannot read .*model\.json: No such file"):
        load_model(saved / "nowhere")


def test_a_state_that_is_not_all_tensors(tmp_path):
    class Noted(nn.Linear):
        def get_extra_state(self):
            return {"note": 1}

    with pytest.raises(ModelError, match="only tensors can be saved, but '_extra_state'"):
        save_model(tmp_path, Noted(2, 2), spec())


def test_a_save_that_fails_leaves_the_old_one_as_it_was(saved, monkeypatch):
    from pathlib import Path

    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full(path, content):
        """Space for the weights, and for half of what follows them."""
        enough = path.name.startswith(".model.safetensors")
        path.write_text(content.decode("latin-1")[: None if enough else len(content) // 2], encoding="latin-1")
        if not enough:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ModelError, match="No space left on device"):
        save_model(saved, trained("relu-mlp"), spec(model="relu-mlp"))
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot write the model into"):
        save_model(tmp_path / "file" / "folder", nn.Linear(2, 2), spec())
