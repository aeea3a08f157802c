import pytest
import torch
from torch import nn

from steadynorm.errors import ModelError
from steadynorm.experiment import models
from steadynorm.experiment.models import check_output, resolve


def widths(model: nn.Module) -> list[tuple[int, int]]:
    return [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize(
    ("name", "hidden", "activation"),
    [("sigmoid-mlp", 3, nn.Sigmoid), ("elu-mlp-20", 20, nn.ELU), ("relu-mlp", 10, nn.ReLU)],
)
def test_fully_connected_networks_are_what_their_names_say(name, hidden, activation):
    model = resolve(name).build((1, 8, 8), 10)
    assert widths(model) == [(64, 100), *[(100, 100)] * (hidden - 1), (100, 10)]
    modules = list(model.children())
    assert [type(m) for m in modules[2::2]] == [activation] * hidden


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 5), (1, 1, 5)])
def test_the_cnn_fits_any_image_size(shape):
    model = resolve("small-cnn").build(shape, 4)
    check_output(model, shape, 4, "small-cnn")


def test_the_cnn_refuses_a_table():
    with pytest.raises(ModelError, match="fully connected"):
        resolve("small-cnn").build((12,), 4)


def test_every_name_has_a_description():
    assert all(resolve(name).description.endswith(".") or ":" in resolve(name).description for name in models.NAMES)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ModelError, match=r"sigmoid-mlp.*small-cnn"):
        resolve("vgg")


@pytest.mark.parametrize("bad", [3, None, ("a", "b")])
def test_something_that_is_no_model_is_refused(bad):
    with pytest.raises(ModelError, match="must be a name"):
        resolve(bad)


def test_a_factory_gets_what_it_asks_for_by_name():
    seen = {}

    def factory(classes, *, norm=None, where="x", input_shape, width=5):
        seen.update(classes=classes, norm=norm, where=where, input_shape=input_shape, width=width)
        return nn.Linear(3, classes)

    source = resolve(factory)
    source.build((3,), 2, norm=nn.BatchNorm1d, where="after")
    assert seen == {"classes": 2, "norm": nn.BatchNorm1d, "where": "after", "input_shape": (3,), "width": 5}
    assert source.places_norm


def test_a_factory_without_arguments_does_not_place_batch_norm():
    assert not resolve(lambda: nn.Linear(3, 2)).places_norm


def test_a_factory_that_asks_for_something_else_is_refused():
    def factory(depth):
        return nn.Linear(depth, 2)

    with pytest.raises(ModelError, match="'depth'"):
        resolve(factory)


def test_a_factory_that_returns_no_module_is_refused():
    with pytest.raises(ModelError, match=r"torch\.nn\.Module, got int"):
        resolve(lambda: 3).build((3,), 2)


def test_a_factory_that_fails_is_one_clear_error():
    def broken():
        return {}["no such key"]

    with pytest.raises(ModelError, match=r"calling .*broken failed at .*test_models\.py.*no such key"):
        resolve(broken).build((3,), 2)


def test_a_factory_is_found_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "somenets.py").write_text("import torch\ndef make():\n    return torch.nn.Linear(2, 2)\n")
    monkeypatch.chdir(tmp_path)
    assert isinstance(resolve("somenets:make").build((2,), 2), nn.Linear)


@pytest.mark.parametrize("path", ["no_such_package_at_all:make", "math:nothing_like_it", "math:pi"])
def test_a_path_that_leads_nowhere_is_an_error(path):
    with pytest.raises(ModelError, match=path.partition(":")[0]):
        resolve(path)


def test_a_callable_without_a_signature_is_an_error():
    class Odd:
        __signature__ = "none"

        def __call__(self):
            return nn.Linear(2, 2)

    with pytest.raises(ModelError, match="plain function"):
        resolve(Odd())


def test_a_module_is_copied_and_drawn_anew_for_each_seed():
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    before = [p.clone() for p in module.parameters()]
    source = resolve(module)

    def weights(seed):
        torch.manual_seed(seed)
        return source.build((3,), 2)[0].weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_a_module_that_cannot_be_drawn_anew_is_refused():
    class Stuck(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3))

    with pytest.raises(ModelError, match="reset_parameters"):
        resolve(nn.Sequential(nn.Linear(3, 3), Stuck()))


def test_an_output_of_another_shape_is_an_error():
    with pytest.raises(ModelError, match=r"\(N, 4\), got \(2, 3\)"):
        check_output(nn.Linear(5, 3), (5,), 4, "mine")
    with pytest.raises(ModelError, match=r"on a batch of shape \(2, 5\) failed"):
        check_output(nn.Linear(6, 4), (5,), 4, "mine")
    with pytest.raises(ModelError, match="got tuple"):
        check_output(nn.LSTM(5, 4), (1, 5), 4, "mine")


def test_the_deep_network_s_runs_are_shorter():
    assert [resolve(name).default_steps for name in ("sigmoid-mlp", "elu-mlp-20", "relu-mlp")] == [2000, 400, 2000]
