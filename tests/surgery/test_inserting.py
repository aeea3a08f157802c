import copy
import io
import json
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import steadynorm as sn
from steadynorm.errors import ArgumentError, ModelError
from support_inserting import (
    Attention,
    Block,
    Branching,
    Functional,
    PreActivated,
    SharedRelu,
    Untraceable,
    batch,
    normalized,
    randomised,
    residual,
)


def placed(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def rows(model: nn.Module) -> list[tuple]:
    return [(r.nonlinearity, r.norm, r.layer, r.bias_dropped) for r in model.insert_report.inserted]


def left(model: nn.Module) -> dict[str, str]:
    return {row.nonlinearity: row.why for row in model.insert_report.left}


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ELU(), nn.Dropout(0.5), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


LAYERS = [
    (nn.Linear(4, 6), (7, 4), nn.Linear(6, 3)),
    (nn.Conv1d(4, 6, 3, padding=1), (3, 4, 9), nn.Conv1d(6, 3, 1)),
    (nn.Conv2d(4, 6, 3, stride=2, groups=2), (3, 4, 9, 8), nn.Conv2d(6, 3, 1)),
    (nn.Conv3d(4, 6, 2, padding_mode="circular", padding=1), (2, 4, 3, 4, 5), nn.Conv3d(6, 3, 1)),
    (nn.ConvTranspose1d(4, 6, 3), (3, 4, 9), nn.Conv1d(6, 3, 1)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (3, 4, 5, 5), nn.Conv2d(6, 3, 1)),
    (nn.ConvTranspose3d(4, 6, 2), (2, 4, 3, 3, 3), nn.Conv3d(6, 3, 1)),
]


class Pair(nn.Module):
    """The same in a forward of its own."""

    def __init__(self, layer, head):
        super().__init__()
        self.layer, self.head = layer, head

    def forward(self, x):
        return self.head(F.elu(self.layer(x)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", [lambda a, b: nn.Sequential(a, nn.ELU(), b), Pair], ids=["sequential", "forward"])
@pytest.mark.parametrize(("layer", "shape", "head"), LAYERS, ids=lambda one: type(one).__name__)
def test_every_layer_by_the_definition(layer, shape, head, form, training):
    plain = randomised(form(copy.deepcopy(layer), copy.deepcopy(head)).double())
    x = batch(*shape)
    layer, head = [m for m in plain.modules() if hasattr(m, "weight")]
    z = layer(x)
    for where in ("before", "after"):
        made = randomised(sn.insert(plain, where), 5).train(training)
        made.load_state_dict({k: v for k, v in plain.state_dict().items() if form is Pair}, strict=False)
        new_layer, new_head = [m for m in made.modules() if isinstance(m, (type(layer), type(head)))][:2]
        new_layer.weight, new_head.weight, new_head.bias = layer.weight, head.weight, head.bias
        (norm,) = [m for m in made.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert (new_layer.bias is None) == (where == "before")
        if where == "before":
            expected = head(F.elu(normalized(z if training else z - _bias(layer, z), norm)))
        else:
            new_layer.bias = layer.bias
            expected = head(normalized(F.elu(z), norm))
        torch.testing.assert_close(made(x), expected, rtol=1e-9, atol=1e-9)


def _bias(layer, z):
    return layer.bias.view(1, -1, *[1] * (z.dim() - 2))


@pytest.mark.parametrize("training", [True, False])
def test_functions_for_nonlinearities_by_the_definition_forward_and_backward(training):
    plain = Functional().double()
    made = randomised(sn.insert(plain)).train(training)
    assert type(made) is Functional
    assert rows(made) == [
        ("relu in the forward", "conv1.batchnorm", "conv1", True),
        ("tanh in the forward", "conv2.batchnorm", "conv2", True),
        ("elu in the forward", "fc1.batchnorm", "fc1", True),
    ]
    x = batch(5, 2, 9, 9)

    def definition():
        z = F.conv2d(x, made.conv1.weight)
        h = F.max_pool2d(F.relu(normalized(z, made.conv1.batchnorm)), 2)
        h = torch.tanh(normalized(F.conv2d(h, made.conv2.weight), made.conv2.batchnorm)).mean((2, 3))
        h = F.dropout(h, 0.5, training)
        h = F.elu(normalized(h @ made.fc1.weight.T, made.fc1.batchnorm), 0.5)
        return F.log_softmax(made.fc2(h), 1)

    parameters = dict(made.named_parameters())
    upstream = batch(5, 3, seed=2)
    results = []
    for forward in (definition, lambda: made(x)):
        torch.manual_seed(3)
        y = forward()
        results.append((y, *torch.autograd.grad(y, list(parameters.values()), upstream)))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_functions_for_nonlinearities_after():
    made = randomised(sn.insert(SharedRelu().double(), "after")).train()
    assert placed(made) == ["layers.1.input_batchnorm", "layers.2.input_batchnorm", "out.input_batchnorm"]
    assert all(layer.bias is not None for layer in (*made.layers, made.out))
    x = h = batch(6, 4)
    for layer, following in zip(made.layers, (*made.layers[1:], made.out), strict=True):
        h = normalized(F.relu(h @ layer.weight.T + layer.bias), following.input_batchnorm)
    torch.testing.assert_close(made(x), h @ made.out.weight.T + made.out.bias, rtol=1e-9, atol=1e-9)


def test_a_nonlinearity_of_its_own_gets_it_behind_itself():
    plain = PreActivated().double()
    made = randomised(sn.insert(plain, "after")).eval()
    assert placed(made) == ["act1.batchnorm", "act2.batchnorm"]
    assert plain.state_dict().keys() == {name for name in made.state_dict() if "batchnorm" not in name}
    x = batch(3, 2, 4, 4)
    h = made.stem(x)
    for layer, act in ((made.one, made.act1), (made.two, made.act2)):
        h = h + layer(normalized(F.relu(h), act.batchnorm))
    torch.testing.assert_close(made(x), made.out(h), rtol=1e-9, atol=1e-9)


def test_the_model_given_stays_as_it_was():
    plain = mlp()
    before, text = copy.deepcopy(plain.state_dict()), str(plain)
    sn.insert(plain, example=batch(2, 4).float(), initialize=True, zero_gamma=True)
    assert str(plain) == text
    assert not hasattr(plain, "insert_report")
    assert all(torch.equal(a, b) for a, b in zip(before.values(), plain.state_dict().values(), strict=True))


def test_children_of_a_sequential_are_renumbered_and_that_is_said():
    made = sn.insert(mlp())
    assert [type(m).__name__ for m in made] == [
        *("Linear", "BatchNorm1d", "ELU", "Dropout", "Linear", "BatchNorm1d", "Tanh", "Linear"),
    ]
    assert [m.bias is None for m in made if isinstance(m, nn.Linear)] == [True, True, False]
    assert made.insert_report.renamed == (("3", "4"), ("5", "7"))
    assert rows(made) == [("2", "1", "0", True), ("6", "5", "4", True)]


def test_children_with_names_keep_them():
    parts = OrderedDict(fc=nn.Linear(4, 6), act=nn.ReLU(), fc_bn=nn.Identity(), head=nn.Linear(6, 2))
    made = sn.insert(nn.Sequential(parts))
    assert [name for name, _ in made.named_children()] == ["fc", "fc_bn_", "act", "fc_bn", "head"]
    assert made.insert_report.renamed == ()
    after = sn.insert(nn.Sequential(parts), "after")
    assert [name for name, _ in after.named_children()] == ["fc", "act", "act_bn", "fc_bn", "head"]


def test_a_shared_nonlinearity_in_nested_sequentials():
    act = nn.ReLU()
    plain = nn.Sequential(nn.Sequential(nn.Linear(4, 6), act), nn.Sequential(nn.Linear(6, 5), act, nn.Linear(5, 2)))
    for where, names in (("before", ["0.1", "1.1"]), ("after", ["0.2", "1.2"])):
        assert placed(sn.insert(plain, where)) == names
    flat = nn.Sequential(nn.Linear(4, 6), act, nn.Linear(6, 5), act, nn.Linear(5, 2))
    assert placed(sn.insert(flat)) == ["1", "4"]
    assert placed(sn.insert(flat, "after")) == ["2", "5"]


def test_copies_and_pickles_compute_the_same():
    made = randomised(sn.insert(Functional())).eval()
    x = batch(3, 2, 9, 9).float()
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    other = sn.insert(Functional()).eval()
    other.load_state_dict(made.state_dict())
    copies = [copy.deepcopy(made), pickle.loads(pickle.dumps(made)), torch.load(file, weights_only=False), other]
    for one in copies:
        assert torch.equal(one(x), made(x))
        assert type(one.fc1) is type(made.fc1)
        assert isinstance(one.fc1, nn.Linear)
        assert list(one.state_dict()) == list(made.state_dict())
    plain = {name for name in made.state_dict() if "batchnorm" not in name}
    assert plain == Functional().state_dict().keys() - {"conv1.bias", "conv2.bias", "fc1.bias"}


class TestResidual:
    def test_the_batch_norm_goes_on_the_branches(self):
        made = sn.insert(residual())
        names = ["1", "3.conv1.batchnorm", "3.conv2.batchnorm"]
        assert placed(made) == [*names, "4.conv1.batchnorm", "4.conv2.batchnorm", "4.down.batchnorm"]
        assert made[4].down.bias is None
        assert made[-1].bias is not None

    def test_with_gamma_zero_each_block_starts_as_its_shortcut(self):
        made = sn.insert(residual(), zero_gamma=True).train()
        zero = [row.norm for row in made.insert_report.inserted if row.zero_gamma]
        assert zero == ["3.conv2.batchnorm", "4.conv2.batchnorm"]
        x = batch(3, 4, 6, 6).float().relu()
        blocks = [m for m in made if isinstance(m, Block)]
        assert torch.equal(blocks[0](x), x)
        assert torch.equal(blocks[1](x), blocks[1].down(x).relu())
        assert all(bool(made.get_submodule(name).weight.any()) for name in placed(made) if name not in zero)

    def test_where_the_sum_has_no_nonlinearity_behind_it(self):
        made = sn.insert(PreActivated(), zero_gamma=True)
        assert placed(made) == ["stem.batchnorm", "one.batchnorm"]
        assert [row.zero_gamma for row in made.insert_report.inserted] == [False, True]
        assert not made.one.batchnorm.weight.any()

    def test_two_branches_alike_have_no_shortcut(self):
        class Parallel(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.out = (
                    nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(3)
                )

            def forward(self, x):
                return self.out(torch.relu(self.a(x) + self.b(x)))

        made = sn.insert(Parallel(), zero_gamma=True)
        assert len(made.insert_report.inserted) == 5
        assert not any(row.zero_gamma for row in made.insert_report.inserted)

    def test_gamma_zero_needs_a_gamma(self):
        with pytest.raises(ArgumentError, match="affine=True"):
            sn.insert(residual(), zero_gamma=True, affine=False)


class TestAxes:
    @pytest.mark.parametrize("example", [None, batch(2, 5, 5).float(), (batch(2, 5, 5).float(), 2.0)])
    def test_a_linear_layer_has_its_channels_last(self, example):
        made = randomised(sn.insert(Attention().double(), example=_double(example))).train()
        assert rows(made) == [("sigmoid in the forward", "up.batchnorm", "up", True)]
        assert made.up.batchnorm.channel_dim == -1
        x = batch(4, 7, 5)  # L is the number of features
        z = normalized(
            F.layer_norm(x, (5,), made.norm.weight, made.norm.bias) @ made.up.weight.T, made.up.batchnorm, -1
        )
        expected = x + (z * torch.sigmoid(z)) @ made.down.weight.T + made.down.bias
        torch.testing.assert_close(made(x), expected, rtol=1e-9, atol=1e-9)

    def test_of_four_and_five(self):
        for shape, kind in (((2, 3, 3, 4), nn.BatchNorm2d), ((2, 2, 3, 3, 4), nn.BatchNorm3d)):
            made = sn.insert(mlp(), example={"input": torch.randn(shape)})
            assert isinstance(made[1], kind)
            assert made[1].channel_dim == -1
            assert made(torch.randn(shape)).shape == (*shape[:-1], 3)

    def test_of_two_where_the_example_shows_it(self):
        made = sn.insert(mlp(), example=torch.randn(2, 4))
        assert [(made[i].channel_dim, made.insert_report.inserted[0].dims) for i in (1, 5)] == [(1, 1)] * 2

    def test_of_one_or_six(self):
        for shape in ((4,), (1, 1, 1, 1, 2, 4)):
            made = sn.insert(mlp(), example=torch.randn(shape))
            assert placed(made) == []
            assert f"{len(shape)}-D" in left(made)["1"]


def _double(example):
    if isinstance(example, tuple):
        return example[0].double(), example[1]
    return None if example is None else example.double()


class TestParts:
    def test_what_cannot_be_traced_needs_an_example(self):
        plain = Untraceable()
        made = sn.insert(plain)
        assert placed(made) == []
        assert "give example=" in left(made)["once.1"]
        assert [name for name, _ in made.insert_report.untraced] == [""]
        assert torch.equal(made(torch.ones(2, 4)), plain(torch.ones(2, 4)))

    def test_an_example_shows_what_is_called_once_and_what_is_last(self):
        made = sn.insert(Untraceable(), example=torch.randn(3, 4))
        assert placed(made) == ["once.1"]
        assert "3 times" in left(made)["often.1"]
        assert "last" in left(made)["often.3"]
        assert made(torch.randn(3, 4)).shape == (3, 4)

    def test_every_way_through(self):
        made = sn.insert(Branching())
        assert placed(made) == ["a.batchnorm", "b.batchnorm", "c.batchnorm"]

    def test_optional_arguments_and_modes_that_change_what_is_around(self):
        class Fickle(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

            def forward(self, x, act=None):
                z = self.a(x)
                z = self.b(torch.relu(z) if act is None else z * act)
                return self.out(torch.tanh(z)) if self.training else self.out(z)

        made = sn.insert(Fickle())
        assert placed(made) == []
        assert all("depends on" in why for why in left(made).values())

    def test_a_forward_that_looks_at_its_layers(self):
        class Looking(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

            def forward(self, x):
                return self.layers(x) if len(self.layers) == 3 else x

        made = sn.insert(Looking())
        assert placed(made) == []
        assert "would not call" in left(made)["layers.1"]

    def test_a_forward_that_fails_without_its_layers(self):
        class Counting(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

            def forward(self, x):
                one, act, two = self.layers
                return self.layers(x) + (act(one(x)).shape[0] * len([two]))

        assert placed(sn.insert(Counting())) == []

    def test_what_the_forward_does_not_call(self):
        plain = SharedRelu()
        plain.spare = nn.ReLU()
        assert "does not call" in left(sn.insert(plain))["spare"]


class TestLeft:
    @pytest.mark.parametrize(
        ("model", "where", "name", "why"),
        [
            (nn.Sequential(nn.Linear(4, 2), nn.Sigmoid()), "before", "1", "the model's last"),
            (nn.Sequential(nn.Linear(4, 2), nn.Sigmoid(), nn.BatchNorm1d(2)), "before", "1", "the model's last"),
            (nn.Sequential(nn.ReLU(), nn.Linear(4, 2)), "before", "0", "no convolution or linear layer"),
            (nn.Sequential(nn.Linear(4, 2), nn.Softmax(1), nn.ReLU(), nn.Linear(2, 2)), "before", "2", "Softmax"),
            (nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Tanh(), nn.Linear(2, 2)), "after", "2", "another nonlinearity"),
            (nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2), nn.ReLU(), nn.Linear(2, 2)), "before", "2", "LayerNorm"),
            (nn.Sequential(nn.Conv1d(4, 2, 1), nn.GroupNorm(1, 2), nn.ReLU(), nn.Conv1d(2, 2, 1)), "before", "2", "Gr"),
            (nn.Sequential(nn.Linear(4, 2), sn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 2)), "before", "2", "already"),
            (nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.BatchNorm1d(2), nn.Linear(2, 2)), "after", "1", "already"),
            (nn.Sequential(nn.Conv1d(4, 2, 1), nn.Flatten(), nn.ReLU(), nn.Linear(6, 2)), "after", "2", "moved"),
            (nn.Sequential(nn.LazyLinear(2), nn.ReLU(), nn.Linear(2, 2)), "before", "1", "run a batch first"),
        ],
    )
    def test_and_said(self, model, where, name, why):
        made = sn.insert(model, where)
        assert made.insert_report.inserted == ()
        assert why in left(made)[name]
        assert why in str(made.insert_report)

    def test_behind_a_normalised_layer_there_is_room(self):
        model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 2))
        assert placed(sn.insert(model, "after")) == ["1", "3"]

    def test_hooks_parametrizations_shared_weights_and_layers_used_twice(self):
        class Many(nn.Module):
            def __init__(self):
                super().__init__()
                self.hooked, self.bounded, self.tied, self.twin, self.twice, self.read, self.out = (
                    nn.Linear(4, 4) for _ in range(7)
                )

            def forward(self, x):
                for layer in (self.hooked, self.bounded, self.tied, self.twin, self.twice, self.twice, self.read):
                    x = torch.relu(layer(x))
                return self.out(x) + self.read.weight.sum()

        model = Many()
        model.hooked.register_forward_hook(lambda *_: None)
        nn.utils.parametrizations.orthogonal(model.bounded)
        model.twin.weight = model.tied.weight
        made = sn.insert(model)
        assert placed(made) == []
        said = list(left(made).values())
        words = ("hooks", "parametrised", "shares", "shares", "called 2 times", "called 2 times", "read by another")
        assert all(word in why for word, why in zip(words, said, strict=True))

    def test_formulas_of_one_layer_s_result(self):
        class Formula(nn.Module):
            def __init__(self, f):
                super().__init__()
                self.f, self.fc, self.out, self.other = f, nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(4, 6)

            def forward(self, x):
                return self.out(self.f(self.fc(x), self.other(x)))

        formulas = [
            lambda z, _: z * torch.sigmoid(1.702 * z),
            lambda z, _: 0.5 * z * (1.0 + torch.tanh(0.8 * (z + 0.04 * torch.pow(z, 3.0)))),
            lambda z, _: F.relu(z / 2 + 1) - 1,
        ]
        for f in formulas:
            assert placed(sn.insert(Formula(f))) == ["fc.batchnorm"]
        for f in formulas[:2]:
            assert "factor" in next(iter(left(sn.insert(Formula(f), "after")).values()))
        gated = sn.insert(Formula(lambda z, other: torch.sigmoid(z) * other))
        assert placed(gated) == ["fc.batchnorm"]
        gated = sn.insert(Formula(lambda z, other: torch.sigmoid(z) * (other + z)))
        assert placed(gated) == ["fc.batchnorm"]
        refused = left(sn.insert(Formula(lambda z, other: torch.sigmoid(z) * (other * z))))
        assert "is used by mul too" in refused["sigmoid in the forward"]

    def test_a_result_that_is_given_out_too_stays_as_it_is(self):
        class Given(nn.Module):
            def __init__(self, act):
                super().__init__()
                self.fc, self.act, self.out = nn.Linear(4, 6), act, nn.Linear(6, 2)

            def forward(self, x):
                z = self.fc(x)
                return self.out(self.act(z)), z

        made = randomised(sn.insert(Given(nn.ELU()).double())).train()
        assert rows(made) == [("act.activation", "act.batchnorm", "fc", False)]
        x = batch(5, 4)
        z = x @ made.fc.weight.T + made.fc.bias
        y = F.elu(normalized(z, made.act.batchnorm)) @ made.out.weight.T + made.out.bias
        for got, expected in zip(made(x), (y, z), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        assert "end of what was traced too" in left(sn.insert(Given(F.elu)))["elu in the forward"]
        assert placed(sn.insert(Given(nn.PReLU()))) == []  # its weight would have another name


class TestOptions:
    def test_they_reach_every_layer(self):
        made = sn.insert(mlp(), eps=1e-3, momentum=0.3, ghost_batch_size=4, affine=False, track_running_stats=False)
        for name in placed(made):
            layer = made.get_submodule(name)
            assert (layer.eps, layer.momentum, layer.ghost_batch_size, layer.weight) == (1e-3, 0.3, 4, None)
            assert layer.running_mean is None

    def test_dtype_and_mode_are_the_layer_s(self):
        plain = mlp().double()
        plain[3].eval()
        made = sn.insert(plain)
        assert [made[i].training for i in (1, 5)] == [True, False]
        assert {made[i].weight.dtype for i in (1, 5)} == {torch.float64}

    def test_only(self):
        assert placed(sn.insert(residual(), only="2")) == ["2.conv1.batchnorm", "2.conv2.batchnorm"]
        made = sn.insert(residual(), only=lambda name, _: name.endswith("conv1"))
        assert placed(made) == ["2.conv1.batchnorm", "3.conv1.batchnorm"]
        assert "only= does not mean 0" in left(made)["1"]

    def test_initialize_draws_as_the_initialisation_does(self):
        torch.manual_seed(4)
        made = sn.insert(mlp(), initialize=True)
        other = sn.insert(mlp())
        torch.manual_seed(4)
        mlp(), sn.init.initialize_(other)
        assert all(torch.equal(a, b) for a, b in zip(made.parameters(), other.parameters(), strict=True))
        assert "followed by" in made.insert_report.initialized

    def test_the_report_is_plain(self):
        report = sn.insert(residual(), zero_gamma=True).insert_report
        plain = json.loads(json.dumps(report.to_dict()))
        assert (plain["inserted"], plain["left"], plain["where"]) == (6, 0, "before")
        assert "3.conv2.batchnorm: BatchNorm2d(4), 3.conv2 -> 3.relu, call 2, bias dropped, gamma 0" in str(report)

    def test_nothing_to_insert_is_no_error(self):
        report = sn.insert(nn.Sequential(nn.Linear(4, 2))).insert_report
        assert (report.rows, str(report)) == ((), "0 batch norms inserted before nonlinearities, 0 dead biases dropped")
        assert sn.insert(nn.ReLU()).insert_report.inserted == ()

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ({"where": "around"}, "before"),
            ({"activation": "relu"}, "applies its own"),
            ({"wrong": 1}, "takes the options"),
            ({"momentum": 2.0}, r"\[0, 1\]"),
            ({"only": "nowhere"}, "fits no convolution or linear layer"),
        ],
    )
    def test_wrong_ones(self, arguments, said):
        with pytest.raises(ArgumentError, match=said):
            sn.insert(mlp(), **arguments)

    def test_wrong_models_and_examples(self):
        with pytest.raises(ArgumentError, match="Module"):
            sn.insert(3)
        with pytest.raises(ModelError, match="TorchScript"):
            sn.insert(torch.jit.trace(mlp().eval(), torch.randn(2, 4)))
        with pytest.raises(ModelError, match="example="):
            sn.insert(mlp(), example=torch.randn(2, 5))


class TestTogether:
    @pytest.mark.parametrize("make", [mlp, Functional, SharedRelu, residual], ids=lambda make: make.__name__)
    def test_all_of_it_folds_away(self, make):
        made = randomised(sn.insert(make().double()), 7).eval()
        shapes = {Functional: (3, 2, 9, 9), residual: (3, 3, 9, 9)}
        folded = sn.fold(made, verify=batch(*shapes.get(make, (3, 4))))
        assert folded.fold_report.folded == len(placed(made)) > 0
        assert folded.fold_report.error < 1e-9

    @pytest.mark.parametrize(("make", "count"), [(SharedRelu, 3), (residual, 5)], ids=["shared", "residual"])
    def test_it_fuses(self, make, count):
        made = randomised(sn.insert(make().double()), 7).eval()
        fused = sn.fuse(made)
        assert fused.fuse_report.fused == count  # of two batch norms that are added, one adds the other
        x = batch(*((3, 3, 9, 9) if make is residual else (3, 4)))
        torch.testing.assert_close(fused(x), made(x), rtol=1e-9, atol=1e-9)

    def test_once_more_puts_in_nothing(self):
        for make in (mlp, Functional, SharedRelu, residual):
            once = sn.insert(make())
            assert sn.insert(once).insert_report.inserted == ()

    def test_reverting_and_tracing(self):
        made = randomised(sn.insert(Functional(), example=batch(2, 2, 9, 9).float())).eval()
        x = batch(3, 2, 9, 9).float()
        y = made(x)
        torch.testing.assert_close(torch.fx.symbolic_trace(made)(x), y)
        torch.testing.assert_close(torch.export.export(made, (x,)).module()(x), y)
        torch.testing.assert_close(torch.compile(made, backend="eager", fullgraph=True)(x), y)
        assert len(sn.revert_(made).converted) == 3
        torch.testing.assert_close(made(x), y)
