"""export: programs that run without this package give what the model gives, whatever the number of examples."""

import sys

import pytest
import torch
from torch import nn

import steadynorm as sn
from steadynorm.errors import ArgumentError, MissingDependencyError, ModelError
from steadynorm.surgery import export
from support_converting import near, stirred
from support_fusing import Dense, Inverted, PreActivation
from support_transformers import inputs_of, model_of


def image() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def ready(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return stirred(model).eval()


class Masked(nn.Module):
    """Two arguments, of which one has a default, and a dict for an output."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), sn.BatchNorm2d(4, activation="silu")

    def forward(self, x, scale=None):
        y = self.bn(self.conv(x)).mean((2, 3))
        return {"y": y if scale is None else y * scale, "shape": x.shape[1]}


MODELS = {
    "a padded convolution": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1), nn.Flatten()),
    "PreResNet": PreActivation,
    "DenseNet": Dense,
    "MobileNet": Inverted,
    "ours": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), sn.BatchNorm2d(4, activation="elu"), nn.Conv2d(4, 2, 1)),
}
KINDS = ["pt2", "onnx"]


@pytest.fixture(params=KINDS)
def kind(request):
    if request.param == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    return request.param


def run(path, x: torch.Tensor) -> torch.Tensor:
    """The file, by the runtime that it is for."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(x)
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


@pytest.mark.parametrize("way", ["as it is", "folded", "fused"])
@pytest.mark.parametrize("name", MODELS)
def test_gives_what_the_model_gives(name, way, kind, tmp_path):
    model = ready(MODELS[name]())
    changed = {"as it is": lambda m: m, "folded": sn.fold, "fused": sn.fuse}[way](model)
    report = export(changed, image(), tmp_path / f"model.{kind}")
    assert report.error is not None
    assert report.error <= report.bound == 1e-4
    assert report.batch == "any"
    for count in (1, 2, 7):
        x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))
        near(run(tmp_path / f"model.{kind}", x), model(x), 1e-5)


def test_a_folded_program_has_no_batch_norm_left(tmp_path):
    model = ready(MODELS["MobileNet"]())
    for way, expected in ((model, True), (sn.fold(model), False)):
        export(way, image(), tmp_path / "model.pt2")
        nodes = {str(node.target) for node in torch.export.load(tmp_path / "model.pt2").graph.nodes}
        assert any("batch_norm" in target for target in nodes) == expected


def test_a_model_of_transformers_one_example_at_a_time(kind, tmp_path):
    pytest.importorskip("transformers")
    model, x = model_of("ResNet").float().eval(), inputs_of("ResNet").float()
    report = export(sn.fold(model), x, tmp_path / f"model.{kind}")
    assert report.error <= report.bound
    near(run(tmp_path / f"model.{kind}", x[:1]), model(x[:1]), 1e-4)


def test_one_example_is_enough(kind, tmp_path):
    model = ready(MODELS["ours"]())
    assert export(model, image()[:1], tmp_path / f"model.{kind}").batch == "any"
    near(run(tmp_path / f"model.{kind}", image()), model(image()), 1e-5)


def test_named_arguments_and_dicts(kind, tmp_path):
    model = ready(Masked())
    for example in ({"x": image()}, {"x": image(), "scale": torch.tensor(2.0)}, (image(), torch.tensor(0.5))):
        assert export(model, example, tmp_path / f"model.{kind}").error <= 1e-4
        assert not model._forward_hooks


def test_a_fixed_number_of_examples(kind, tmp_path):
    class Four(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(x).reshape(2, 2, -1)

    model = ready(Four())
    with pytest.raises(ModelError, match="fixed_batch=True"):
        export(model, image(), tmp_path / f"model.{kind}")
    assert list(tmp_path.iterdir()) == []
    assert export(model, image(), tmp_path / f"model.{kind}", fixed_batch=True).batch == "4"
    near(run(tmp_path / f"model.{kind}", image()), model(image()), 1e-5)


def test_what_gives_something_else_is_not_written(tmp_path):
    class Drawing(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    with pytest.raises(ModelError, match=r"differs from the model by .* nothing was written"):
        export(Drawing().eval(), image(), tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_what_the_runtime_lacks_is_said(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    model = ready(MODELS["ours"]())
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    report = export(model, image(), tmp_path / "model.onnx")
    assert (report.error, report.bound) == (None, None)
    assert "not run: onnxruntime is not installed" in str(report)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingDependencyError, match=r"steadynorm\[onnx\]"):
        export(model, image(), tmp_path / "other.onnx")


def test_without_the_check(tmp_path, kind):
    class Drawing(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    report = export(Drawing().eval(), image(), tmp_path / f"model.{kind}", verify=False)
    assert (report.error, report.checked) == (None, "not asked for")
    assert (tmp_path / f"model.{kind}").stat().st_size == report.bytes


def test_outputs_that_are_infinite_on_purpose(kind, tmp_path):
    class Masking(nn.Module):
        def forward(self, x):
            return x.masked_fill(x < 0, float("-inf"))

    assert export(Masking().eval(), image(), tmp_path / f"model.{kind}").error == 0


def test_the_operators_of_onnx_are_its_own_and_the_batch_has_a_name(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    for name, make in MODELS.items():
        export(ready(make()), image(), tmp_path / "model.onnx", verify=False)
        graph = onnx.load(tmp_path / "model.onnx").graph
        assert {node.domain for node in graph.node} == {""}, name
        sizes = graph.input[0].type.tensor_type.shape.dim
        assert [size.dim_param or size.dim_value for size in sizes] == ["batch", 3, 8, 8]


def test_errors(tmp_path):
    model = ready(MODELS["ours"]())
    with pytest.raises(ArgumentError, match=r"writes \.pt2 or \.onnx files, got .*model\.bin"):
        export(model, image(), tmp_path / "model.bin")
    with pytest.raises(ArgumentError, match="got str"):
        export("model", image(), tmp_path / "model.pt2")
    with pytest.raises(ModelError, match="in evaluation"):
        export(model.train(), image(), tmp_path / "model.pt2")
    model.eval()
    with pytest.raises(ModelError, match="inputs that the model takes"):
        export(model, image()[:, :2], tmp_path / "model.pt2")
    with pytest.raises(ModelError, match=r"cannot write .*no.model\.pt2: No such file"):
        export(model, image(), tmp_path / "no" / "model.pt2")
    with pytest.raises(ModelError, match="floating-point"):
        export(nn.Identity().eval(), torch.zeros(2, dtype=torch.long), tmp_path / "model.pt2")

    class Listing(nn.Module):
        def forward(self, x):
            return torch.stack([x[0] * 2 for _ in range(int(x.abs().sum() > 0))])

    with pytest.raises(ModelError, match="cannot be exported"):
        export(Listing().eval(), image(), tmp_path / "model.pt2")


def test_the_report(tmp_path):
    report = export(ready(MODELS["ours"]()), image(), tmp_path / "model.pt2")
    plain = report.to_dict()
    assert plain["bytes"] == (tmp_path / "model.pt2").stat().st_size
    assert plain["checked"].startswith("torch ")
    assert "any number of examples; off by" in str(report)
