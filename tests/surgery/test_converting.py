"""convert_: the model computes and learns what it did, with the very same tensors, and whatever cannot be is said."""

import copy
import io
import json
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import steadynorm as sn
from steadynorm.errors import ArgumentError, ModelError, SingleValueError
from steadynorm.surgery.stand_ins import FrozenBatchNorm2d as OursFrozen
from steadynorm.surgery.stand_ins import SyncedBatchNorm
from support_converting import (
    CASES,
    BatchNormAct2d,
    Doubled,
    FrozenBatchNorm2d,
    Renamed,
    Shared,
    assert_same,
    built,
    by_definition,
    inputs,
    step,
    stirred,
)


def norms(model: nn.Module) -> list[nn.Module]:
    return [
        m for m in model.modules() if isinstance(m, (sn.BatchNorm1d, sn.BatchNorm2d, sn.BatchNorm3d, SyncedBatchNorm))
    ]


def reason(layer: nn.Module, **options) -> str:
    """Why a layer is left, which then must be as it was."""
    kind, state = type(layer), dict(vars(layer))
    report = sn.convert_(nn.Sequential(layer), **options)
    assert type(layer) is kind
    assert vars(layer) == state
    assert report.converted == ()
    return report.left[0].note


class TestTheSameModel:
    @pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
    @pytest.mark.parametrize("name", CASES)
    def test_outputs_gradients_and_updates_equal_the_definition(self, name, training):
        model = built(name)
        definition = by_definition(model)
        report = sn.convert_(model)
        assert len(report.converted) == CASES[name].layers == len(norms(model))
        for seed in (0, 1):  # the second step starts from what the first has left
            assert_same(step(model, inputs(name, seed), training), step(definition, inputs(name, seed), training))

    @pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
    @pytest.mark.parametrize("name", ["residual", "channels_last", "features", "3d", "with activation", "frozen"])
    def test_in_float32_the_error_is_at_most_twice_the_originals(self, name, training):
        exact = step(by_definition(built(name)), inputs(name), training).y
        original = built(name).float()
        model = copy.deepcopy(original)
        sn.convert_(model)
        ours, theirs = ((step(m, inputs(name).float(), training).y - exact).norm() for m in (model, original))
        assert ours <= 2 * theirs
        assert ours > 0

    @pytest.mark.parametrize("name", CASES)
    def test_every_parameter_and_buffer_is_the_very_same(self, name):
        model = built(name)
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        modules = dict(model.named_modules())
        sn.convert_(model)
        assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
        now = {n: b for n, b in model.named_buffers() if not n.endswith("_rejected")}
        assert {n: id(b) for n, b in now.items()} == {n: id(b) for n, b in buffers.items()}
        assert all(module is modules[n] for n, module in model.named_modules())

    @pytest.mark.parametrize("name", CASES)
    def test_state_dicts_load_both_ways(self, name):
        original, converted = built(name), built(name)
        sn.convert_(converted)
        assert list(converted.state_dict()) == list(original.state_dict())
        step(original, inputs(name), training=True)
        converted.load_state_dict(original.state_dict(), strict=True)
        assert_same(step(converted, inputs(name), False), step(original, inputs(name), False))
        step(converted, inputs(name), training=True)
        original.load_state_dict(converted.state_dict(), strict=True)
        assert_same(step(converted, inputs(name), False), step(original, inputs(name), False))

    @pytest.mark.parametrize("name", CASES)
    def test_copies_and_pickles_compute_the_same(self, name):
        model = built(name)
        sn.convert_(model)
        expected = step(copy.deepcopy(model), inputs(name), training=True)
        assert_same(step(pickle.loads(pickle.dumps(model)), inputs(name), True), expected)
        kept = io.BytesIO()
        torch.save(model, kept)
        kept.seek(0)
        assert_same(step(torch.load(kept, weights_only=False), inputs(name), True), expected)

    def test_an_optimizer_made_before_keeps_its_state(self):
        model = built("residual")
        definition = by_definition(model)
        optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (model, definition)]
        for seed in (0, 1, 2):
            if seed == 1:
                sn.convert_(model)
            both = [
                step(m, inputs("residual", seed), True, o) for m, o in zip((model, definition), optimizers, strict=True)
            ]
            assert_same(*both)

    def test_the_model_may_be_a_batch_norm_itself(self):
        layer = nn.BatchNorm1d(3)
        report = sn.convert_(layer)
        assert type(layer) is sn.BatchNorm1d
        assert [row.name for row in report.converted] == [""]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_statistics_are_widened_and_that_is_said(self, dtype):
        model = stirred(nn.Sequential(nn.BatchNorm2d(3))).to(dtype)
        weight, mean = model[0].weight, model[0].running_mean.clone()
        report = sn.convert_(model)
        assert report.converted[0].note == "running_mean and running_var in float32 from here on"
        assert model[0].weight is weight
        assert model[0].weight.dtype == dtype
        assert model[0].running_mean.dtype == torch.float32
        assert torch.equal(model[0].running_mean.to(dtype), mean)
        assert model(torch.randn(2, 3, 4, 4).to(dtype)).dtype == dtype

    def test_on_the_meta_device(self):
        with torch.device("meta"):
            model = nn.Sequential(nn.BatchNorm2d(3), FrozenBatchNorm2d(3), BatchNormAct2d(3, nn.ReLU()))
        assert len(sn.convert_(model).converted) == 3
        assert {b.device.type for b in model.buffers()} == {"meta"}

    def test_a_compiled_model_compiles_anew(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).train()
        compiled = torch.compile(model, backend="eager")
        compiled(torch.randn(4, 3))
        sn.convert_(model)
        with pytest.raises(SingleValueError):
            compiled(torch.randn(1, 3))


class TestWhatHangsOnALayer:
    def test_hooks_of_every_kind_go_on_and_their_handles_remove_them(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        layer, called = model[1], []
        handles = [
            layer.register_forward_hook(lambda *_: called.append("forward")),
            layer.register_forward_hook(lambda m, args, kwargs, out: called.append("kwargs"), with_kwargs=True),
            layer.register_forward_pre_hook(lambda *_: called.append("before")),
            layer.register_full_backward_hook(lambda *_: called.append("backward")),
            layer.register_full_backward_pre_hook(lambda *_: called.append("before backward")),
            layer.register_state_dict_post_hook(lambda *_: called.append("saved")),
            layer.register_state_dict_pre_hook(lambda *_: called.append("before saving")),
            layer.register_load_state_dict_pre_hook(lambda *_: called.append("before loading")),
            layer.register_load_state_dict_post_hook(lambda *_: called.append("loaded")),
        ]
        sn.convert_(model)

        def use() -> list[str]:
            called.clear()
            model(torch.randn(4, 3)).sum().backward()
            model.load_state_dict(model.state_dict())
            return called

        assert use() == [
            *("before", "forward", "kwargs", "before backward", "backward"),
            *("before saving", "saved", "before loading", "loaded"),
        ]
        for handle in handles:
            handle.remove()
        assert use() == []

    def test_flags_modes_and_attributes(self):
        model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)).eval()
        model[0].weight.requires_grad_(False)
        model[0].train()
        model[1].colour = "red"
        sn.convert_(model)
        assert [m.training for m in model] == [True, False]
        assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
        assert model[1].colour == "red"

    def test_a_shared_layer_is_one_row_with_all_its_places(self):
        model = Shared()
        report = sn.convert_(model)
        assert [(row.name, row.also) for row in report.layers] == [("first", ("blocks.0.1",))]
        assert model.first is model.blocks[0][1] is model.beside[0]

    def test_what_was_kept_under_another_name(self):
        model = nn.Sequential(nn.BatchNorm1d(3))
        kept = nn.ModuleList([model[0]])
        sn.convert_(model)
        assert type(kept[0]) is sn.BatchNorm1d

    def test_a_frozen_layer_stays_frozen_and_the_model_keeps_its_parameters(self):
        model = built("frozen")
        count = len(list(model.parameters()))
        sn.convert_(model)
        assert type(model[1]) is OursFrozen
        assert model[1].frozen
        assert model[1].frozen_affine
        assert len(list(model.parameters())) == count
        before = model[1].running_mean.clone()
        model.train().requires_grad_(True)
        step(model, inputs("frozen"), training=True)
        assert torch.equal(model[1].running_mean, before)
        assert model[1].weight.grad is None

    def test_a_frozen_layer_loads_what_was_not_frozen(self):
        trained = stirred(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Tanh()))
        model = nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4), nn.Tanh())
        sn.convert_(model)
        model.load_state_dict(trained.state_dict(), strict=True)
        x = torch.randn(2, 3, 4, 4)
        torch.testing.assert_close(model.train()(x), trained.eval()(x))

    def test_the_activation_is_the_layers_own(self):
        model = nn.Sequential(BatchNormAct2d(3, nn.LeakyReLU(0.2)))
        sn.convert_(model)
        assert str(model[0].activation) == "leaky_relu(0.2)"
        assert list(model[0].children()) == []


class TestOptions:
    def test_are_given_to_every_layer(self):
        model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm2d(3))
        sn.convert_(
            model, momentum=0.3, ghost_batch_size=4, single_value="beta", renorm=sn.Renorm(), process_group="world"
        )
        for layer in model:
            assert layer.momentum == 0.3
            assert layer.ghost_batch_size == 4
            assert layer.single_value == "beta"
            assert layer.renorm == sn.Renorm()
            assert layer.process_group == "world"

    def test_domains_start_from_what_is_there(self):
        model = stirred(nn.Sequential(nn.BatchNorm1d(3)))
        sn.convert_(model, domains=("photo", "sketch"), domain_affine=True)
        layer = model[0]
        assert torch.equal(layer.running_mean_sketch, layer.running_mean)
        assert torch.equal(layer.weight_sketch, layer.weight)
        with sn.domain(model, "sketch"):
            model(torch.randn(5, 3) + 9)
        assert not torch.equal(layer.running_mean_sketch, layer.running_mean)

    def test_are_no_business_of_frozen_layers(self):
        model = nn.Sequential(FrozenBatchNorm2d(3))
        sn.convert_(model, momentum=0.3, ghost_batch_size=4)
        assert model[0].ghost_batch_size is None

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"activation": "relu"}, "applies its own"),
            ({"masked": "pass"}, "hands no mask"),
            ({"dtype": torch.float64}, "keep their tensors"),
            ({"no_such": 1}, "got 'no_such'."),
            ({"momentum": 2.0}, "momentum must lie in"),
            ({"domain_affine": True}, "needs affine=True and domains"),
        ],
    )
    def test_wrong_ones_change_nothing(self, options, message):
        model = nn.Sequential(nn.BatchNorm1d(3))
        with pytest.raises(ArgumentError, match=message):
            sn.convert_(model, **options)
        assert type(model[0]) is nn.BatchNorm1d

    def test_a_layer_that_one_does_not_fit_is_left(self):
        assert "needs track_running_stats=True" in reason(
            nn.BatchNorm1d(3, track_running_stats=False), renorm=sn.Renorm()
        )


class TestOnly:
    def model(self) -> nn.Module:
        return nn.ModuleDict({f"layer{i}": nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for i in (1, 2, 10)})

    @pytest.mark.parametrize(
        ("only", "expected"),
        [
            ("layer1.1", ["layer1.1"]),
            ("layer1", ["layer1.1"]),
            ("layer1*", ["layer1.1", "layer10.1"]),
            ("layer?.1", ["layer1.1", "layer2.1"]),
            (["layer2", "layer10.1"], ["layer2.1", "layer10.1"]),
            (lambda name, module: name.endswith("1") and "2" in name and module.num_features == 3, ["layer2.1"]),
            (None, ["layer1.1", "layer2.1", "layer10.1"]),
        ],
    )
    def test_names_patterns_and_predicates(self, only, expected):
        report = sn.convert_(self.model(), only=only)
        assert [row.name for row in report.converted] == expected
        assert {row.note for row in report.left} <= {"only= does not mean it"}

    @pytest.mark.parametrize(
        ("only", "message"), [("layer3", "fits no batch norm"), ([3], "predicate"), (["layer1", "x"], "'x'")]
    )
    def test_what_fits_nothing_is_an_error(self, only, message):
        model = self.model()
        with pytest.raises(ArgumentError, match=message):
            sn.convert_(model, only=only)
        assert norms(model) == []

    def test_any_of_its_names_means_a_shared_layer(self):
        assert len(sn.convert_(Shared(), only="blocks").converted) == 1


class TestLeft:
    def test_a_subclass_that_does_something_of_its_own(self):
        assert reason(Doubled(3)) == "it is a subclass that does something of its own: forward"

    def test_a_subclass_of_torchs_base(self):
        class Odd(nn.modules.batchnorm._BatchNorm):
            def _check_input_dim(self, input):
                pass

        assert "_check_input_dim" in reason(Odd(3))

    def test_a_mixin(self):
        class Mixin:
            def forward(self, x):
                return x

        class Mixed(nn.BatchNorm2d, Mixin):
            pass

        assert "something of its own: forward" in reason(Mixed(3))

    def test_lazy_ones_without_tensors(self):
        assert "run one forward" in reason(nn.LazyBatchNorm2d())
        assert "number of channels" in reason(nn.LazyBatchNorm2d(affine=False, track_running_stats=False))

    def test_a_parametrized_one(self):
        class Double(nn.Module):
            def forward(self, x):
                return 2 * x

        layer = nn.BatchNorm1d(3)
        parametrize.register_parametrization(layer, "weight", Double())
        assert "parametrized" in reason(layer)

    def test_one_whose_forward_was_replaced(self):
        layer = nn.BatchNorm1d(3)
        layer.forward = lambda x: x
        assert "replaced" in reason(layer)

    def test_an_attribute_in_the_way(self):
        layer = nn.BatchNorm1d(3)
        layer.frozen = True
        assert "means something else in steadynorm's layers: frozen" in reason(layer)

    def test_a_weight_that_is_made_anew_in_each_forward(self):
        layer = nn.BatchNorm1d(3)
        weight = layer.weight
        del layer.weight
        layer.weight = weight.detach()
        assert "neither a parameter nor a buffer" in reason(layer)

    @pytest.mark.parametrize("change", [{"track_running_stats": False}, {"running_mean": None}, {"running_var": None}])
    def test_statistics_that_do_not_agree_with_the_flag(self, change):
        layer = nn.BatchNorm1d(3)
        for name, value in change.items():
            setattr(layer, name, value)
        assert "do not agree" in reason(layer)

    def test_a_cumulative_average_without_its_count(self):
        layer = nn.BatchNorm1d(3, momentum=None)
        layer.num_batches_tracked = None
        assert "needs num_batches_tracked" in reason(layer)

    def test_a_momentum_outside_of_its_range(self):
        assert "momentum 1.5" in reason(nn.BatchNorm1d(3, momentum=1.5))

    def test_tensors_of_several_lengths(self):
        layer = nn.BatchNorm1d(3)
        layer.weight = nn.Parameter(torch.ones(4))
        assert "differ in shape" in reason(layer)

    def test_a_class_whose_instances_cannot_change_theirs(self):
        slotted = type("BatchNormAct2d", (BatchNormAct2d,), {"__slots__": ("more",)})
        assert "its class cannot be changed (" in reason(slotted(3, nn.ReLU()))

    @pytest.mark.parametrize(
        ("layer", "message"),
        [
            (BatchNormAct2d(3, nn.Softshrink()), "activation .Softshrink. is none"),
            (BatchNormAct2d(3, nn.ReLU(), nn.Dropout(0.1)), "drop .Dropout. comes between"),
        ],
    )
    def test_an_activation_or_drop_that_cannot_be_fused(self, layer, message):
        assert re.search(message, reason(layer))

    def test_somebody_elses_module_of_a_known_name_is_tried_out(self):
        gelu = type("GELU", (nn.Module,), {"forward": lambda self, x: x * torch.special.ndtr(x)})
        model = nn.Sequential(BatchNormAct2d(3, gelu()))
        assert sn.convert_(model).converted[0].after == "steadynorm.BatchNorm2d (activation=gelu)"
        sn.revert_(model)
        assert type(model[0].act) is gelu
        sigmoid = type("GELU", (nn.Module,), {"forward": lambda self, x: x * torch.sigmoid(1.7 * x)})
        assert "computes something else" in reason(BatchNormAct2d(3, sigmoid()))

    def test_hooks_on_the_activation(self):
        layer = BatchNormAct2d(3, nn.ReLU())
        layer.act.register_forward_hook(lambda *_: None)
        assert "act has hooks" in reason(layer)

    def test_children_that_are_not_known(self):
        layer = BatchNormAct2d(3, nn.ReLU())
        layer.pool = nn.Identity()
        assert "not known here: pool" in reason(layer)

    def test_ones_own_batch_norms_of_a_known_name(self):
        def named(name: str, base: type, forward) -> type:
            return type(name, (base,), {"forward": forward})

        doubled = named("BatchNormAct2d", BatchNormAct2d, lambda self, x: 2 * BatchNormAct2d.forward(self, x))
        assert "computes something else" in reason(doubled(3, nn.ReLU()))
        ends = named("BatchNormAct2d", BatchNormAct2d, lambda self, x: 1 / 0)
        assert "could not be tried out (ZeroDivisionError" in reason(ends(3, nn.ReLU()))
        nothing = named("BatchNormAct2d", BatchNormAct2d, lambda self, x: None)
        assert "computes something else" in reason(nothing(3, nn.ReLU()))

        def forgets(self, x):
            kept = self.running_mean.clone()
            y = BatchNormAct2d.forward(self, x)
            self.running_mean.copy_(kept)
            return y

        assert "in training its forward" in reason(named("BatchNormAct2d", BatchNormAct2d, forgets)(3, nn.ReLU()))
        other = named("FrozenBatchNorm2d", FrozenBatchNorm2d, lambda self, x: x * self.weight[:, None, None])
        assert "in evaluation its forward" in reason(other(3))

    def test_a_frozen_one_with_other_tensors(self):
        layer = FrozenBatchNorm2d(3)
        layer.more = nn.Parameter(torch.ones(3))
        assert "four buffers" in reason(layer)
        layer = FrozenBatchNorm2d(3)
        layer.act = nn.Softshrink()
        assert "Softshrink" in reason(layer)

    def test_trying_out_calls_no_hook_and_draws_no_number(self):
        layer = BatchNormAct2d(3, nn.ReLU())
        layer.register_forward_hook(lambda *_: pytest.fail("called"))
        before = torch.get_rng_state()
        assert len(sn.convert_(nn.Sequential(layer)).converted) == 1
        assert torch.equal(torch.get_rng_state(), before)


class TestOddButFine:
    def test_a_pruned_layer_has_as_many_features_as_its_tensors(self):
        layer = nn.BatchNorm1d(3)
        for name in ("weight", "bias"):
            setattr(layer, name, nn.Parameter(getattr(layer, name)[:2].detach()))
        layer.running_mean, layer.running_var = layer.running_mean[:2], layer.running_var[:2]
        report = sn.convert_(layer)
        assert report.converted[0].note == "num_features was 3, its tensors have 2"
        assert layer(torch.randn(4, 2)).shape == (4, 2)

    def test_a_lazy_layer_that_got_its_tensors_from_a_checkpoint(self):
        source = stirred(nn.Sequential(nn.BatchNorm2d(3)))
        model = nn.Sequential(nn.LazyBatchNorm2d())
        model.load_state_dict(source.state_dict())
        sn.convert_(model)
        assert type(model[0]) is sn.BatchNorm2d
        assert model[0].num_features == 3
        x = torch.randn(2, 3, 4, 4)
        torch.testing.assert_close(model.eval()(x), source.eval()(x))
        assert len(model[0]._forward_pre_hooks) == len(model[0]._load_state_dict_pre_hooks) == 0

    def test_converting_twice(self):
        model = nn.Sequential(nn.BatchNorm1d(3))
        sn.convert_(model)
        assert [row.note for row in sn.convert_(model).left] == ["it is steadynorm's already"]

    def test_a_model_that_holds_itself(self):
        model = nn.Sequential(nn.BatchNorm1d(3))
        model[0].parent = model
        assert [row.name for row in sn.convert_(model).converted] == ["0"]

    def test_a_synchronised_layer_holds_its_group_once(self):
        layer = nn.SyncBatchNorm(3)
        sn.convert_(layer)
        assert layer.process_group == "world"
        assert "process_group" not in vars(layer)  # a group cannot be pickled

    def test_a_synchronised_layer_refuses_input_without_channels(self):
        layer = nn.SyncBatchNorm(3)
        sn.convert_(layer)
        with pytest.raises(ValueError, match=r"expected input \(N, C\)"):
            layer(torch.randn(3))


class TestRefused:
    def test_no_module(self):
        with pytest.raises(ArgumentError, match=r"needs a torch.nn.Module, got str"):
            sn.convert_("model")

    def test_torchscript(self):
        scripted = torch.jit.script(nn.Sequential(nn.BatchNorm1d(3)))
        with pytest.raises(ModelError, match=r"before torch\.jit\.script"):
            sn.convert_(scripted)
        report = sn.convert_(nn.Sequential(scripted, nn.BatchNorm1d(3)))
        assert [row.name for row in report.converted] == ["1"]
        assert "TorchScript" in report.left[0].note

    def test_torchscript_of_a_converted_model_says_to_revert(self):
        model = nn.Sequential(nn.BatchNorm1d(3))
        sn.convert_(model)
        with pytest.raises(ModelError, match=r"steadynorm.revert_\(model\) first"):
            torch.jit.script(model)


class TestReport:
    def test_says_what_became_of_each(self):
        model = nn.Sequential(nn.BatchNorm1d(3), nn.SyncBatchNorm(3), nn.BatchNorm1d(3), Renamed(3), Doubled(3))
        report = sn.convert_(model)
        assert str(report).splitlines() == [
            "4 of 5 batch norms converted",
            "  2 torch.nn.BatchNorm1d -> steadynorm.BatchNorm1d",
            "  1 torch.nn.SyncBatchNorm -> steadynorm.SyncedBatchNorm (synchronised)",
            "  1 support_converting.Renamed -> steadynorm.BatchNorm2d",
            "  left 4, support_converting.Doubled: it is a subclass that does something of its own: forward",
        ]
        plain = json.loads(json.dumps(report.to_dict()))
        assert (plain["action"], plain["converted"], plain["left"]) == ("convert", 4, 1)
        assert plain["layers"][0] == {
            **{"name": "0", "from": "torch.nn.BatchNorm1d", "to": "steadynorm.BatchNorm1d", "note": "", "also": []}
        }

    def test_of_a_model_without_batch_norm(self):
        assert str(sn.convert_(nn.Linear(3, 3))) == "no batch norm to convert"

    def test_of_a_layer_with_activation_and_of_the_model_itself(self):
        report = sn.convert_(BatchNormAct2d(3, nn.ReLU()))
        assert report.converted[0].after == "steadynorm.BatchNorm2d (activation=relu)"
        assert "left the model itself, " in str(sn.convert_(Doubled(3)))
