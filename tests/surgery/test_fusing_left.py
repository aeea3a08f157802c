"""fuse: what could change the result is left as it is, and the report says why."""

import torch
import torch.nn.functional as F
from torch import nn

import steadynorm as sn
from support_fusing import Modal, inputs, reasons


class TestLeft:
    def test_hooks(self):
        model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU())
        model[1].register_forward_hook(lambda *_: None)
        model[4].register_forward_hook(lambda *_: None)
        left = reasons(model)
        assert "1 has forward hooks" in left["1"]
        assert "4 has forward hooks" in left["3"]

    def test_hooks_of_what_lies_between(self):
        class Around(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

            def forward(self, x):
                return F.relu(self.body(x) + x)

        model = Around()
        calls = []
        model.body.register_forward_hook(lambda *_: calls.append(1))
        assert reasons(model) == {"body.1": "hooks of what lies between would not be called any more"}
        assert calls

    def test_an_output_that_is_used_twice_too(self):
        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = nn.BatchNorm2d(3)

            def forward(self, x):
                y = self.bn(x)
                return F.relu(y) * y

        assert reasons(Both()) == {"bn": "its output is used 2 times"}

    def test_a_layer_that_is_called_twice(self):
        class Same(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = nn.BatchNorm2d(3)

            def forward(self, x):
                return F.relu(self.bn(F.relu(self.bn(x))))

        assert reasons(Same()) == {"bn": "bn is called 2 times"}

    def test_what_depends_on_the_mode(self):
        class Mode(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = nn.BatchNorm2d(3)

            def forward(self, x):
                return F.relu(self.bn(x)) if self.training else torch.tanh(self.bn(x))

        assert "depends on training" in reasons(Mode())["bn"]

    def test_what_depends_on_an_optional_argument(self):
        class Optional(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = nn.BatchNorm2d(3)

            def forward(self, x, act=None):
                y = self.bn(x)
                return F.relu(y) if act is None else torch.tanh(y)

        assert "optional arguments" in reasons(Optional())["bn"]

    def test_a_forward_to_rewrite_that_depends_on_an_optional_argument(self):
        class Optional(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = nn.BatchNorm2d(3)

            def forward(self, x, scale=None):
                y = F.relu(self.bn(x) + x)
                return y if scale is None else scale * y

        assert reasons(Optional()) == {"bn": "the forward of what holds it depends on its optional arguments"}

    def test_an_optional_shortcut(self):
        class Shortcut(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = nn.BatchNorm2d(3)

            def forward(self, x, shortcut=None):
                if shortcut is None:
                    shortcut = x
                return F.relu(self.bn(x) + shortcut)

        assert reasons(Shortcut()) == {"bn": "the forward of what holds it depends on its optional arguments"}

    def test_an_optional_argument_that_is_only_handed_on(self):
        class Inner(nn.Module):
            def forward(self, x, factor, shift=None):
                return x * factor if shift is None else x * factor + shift

        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn, self.inner = nn.BatchNorm2d(3), Inner()

            def forward(self, x, factor=2.0, shift=None):
                return self.inner(F.relu(self.bn(x) + x), factor, shift=shift)

        assert reasons(Outer()) == {}

    def test_an_activation_that_serves_another_branch_too(self):
        class Branch(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn, self.act = nn.BatchNorm2d(3), nn.SiLU()

            def forward(self, x):
                return self.act(self.bn(x) if x.sum() < 1e9 else x)

        assert reasons(Branch()) == {"bn": "act is called without it, too"}

    def test_branches_that_agree(self):
        class Branch(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn, self.act, self.other = nn.BatchNorm2d(3), nn.SiLU(), nn.BatchNorm2d(3)

            def forward(self, x, scale=None):
                if x.shape[1] != 3:
                    raise ValueError("three channels are wanted")
                y = self.act(self.bn(x))
                if x.sum() > 1e9:
                    y = self.other(y)
                return y if scale is None else scale * y

        assert list(reasons(Branch())) == ["other"]

    def test_a_forward_that_draws_at_random(self):
        class Random(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn, self.p = nn.BatchNorm2d(3), 0.0

            def forward(self, x):
                y = self.bn(x) + x
                return F.relu(y) if torch.rand(()).item() >= self.p else y

        assert "draws at random" in reasons(Random())["bn"]

    def test_a_forward_that_changes_attributes(self):
        class Counting(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn, self.calls = nn.BatchNorm2d(3), 10**6

            def forward(self, x):
                self.calls += 1
                return F.relu(self.bn(x))

        assert "changes attributes" in reasons(Counting())["bn"]

    def test_a_forward_that_makes_tensors_of_its_own(self):
        class Making(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = nn.BatchNorm2d(3)

            def forward(self, x):
                return F.relu(self.bn(x + torch.ones(3, 1, 1, dtype=torch.float64)))

        assert "tensors of its own" in reasons(Making())["bn"]

    def test_a_sum_written_into_what_is_used_elsewhere(self):
        class Written(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

            def forward(self, x):
                short = same = x * 2
                y = self.bn(self.conv(x))
                short += y
                return F.relu(short) + same

        assert "used elsewhere" in reasons(Written())["bn"]

    def test_what_is_written_in_place_stays_written(self):
        class InPlace(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

            def forward(self, x):
                y = x * 2
                same = y
                y += 1
                return F.relu(self.bn(self.conv(x)) + same)

        assert reasons(InPlace()) == {}

    def test_an_input_that_is_written_into_before_the_sum(self):
        class Late(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = nn.BatchNorm2d(3, affine=False)

            def forward(self, x):
                x = x * 2
                y = self.bn(x.detach()) if False else self.bn(x)
                short = x.clone()
                with torch.no_grad():
                    x.detach().add_(1)
                return F.relu(y + short)

        # Not computed here: eager itself refuses the backward of what was written into.
        assert "written into its input" in {r.name: r.how for r in sn.fuse(Late()).fuse_report.layers}["bn"]

    def test_no_activation_that_a_layer_has(self):
        model = nn.Sequential(nn.BatchNorm2d(3), nn.PReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        assert reasons(model) == {
            "0": "neither an activation nor a sum follows it, but 1 (PReLU)",
            "2": "neither an activation nor a sum follows it, but 3 (Conv2d)",
            "4": "neither an activation nor a sum follows it, but the end of what was traced",
        }

    def test_a_sum_of_a_multiple(self):
        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = nn.BatchNorm2d(3)

            def forward(self, x):
                return F.relu(torch.add(self.bn(x), x, alpha=2))

        assert reasons(Scaled()) == {"bn": "neither an activation nor a sum follows it, but add"}

    def test_a_layer_of_ours_that_adds_already(self):
        class Adding(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = sn.BatchNorm2d(3)

            def forward(self, x):
                return F.relu(self.bn(x, residual=x) + x)

        model = Adding().double()
        fused = sn.fuse(model)
        assert [layer.how for layer in fused.fuse_report.layers] == ["it adds something to its output already"]
        assert torch.equal(fused(inputs()), model(inputs()))

    def test_a_forward_that_was_replaced(self):
        model = Modal()
        model.forward = lambda x: F.relu(model.bn(model.conv(x)) + x)
        fused = sn.fuse(model)
        assert fused.fuse_report.fused == 0

    def test_what_convert_leaves(self):
        class Own(nn.BatchNorm2d):
            def forward(self, input):
                return 2 * super().forward(input)

        fused = sn.fuse(nn.Sequential(Own(3), nn.ReLU()))
        assert fused.fuse_report.layers[0].how.startswith("it is a subclass that does something of its own")

    def test_what_only_does_not_mean(self):
        model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU())
        fused = sn.fuse(model, only="2")
        assert [layer.fused for layer in fused.fuse_report.layers] == [False, True]
        assert "only=" in fused.fuse_report.layers[0].how
        assert type(fused[0]) is nn.BatchNorm2d

    def test_a_forward_that_needs_the_activation_itself(self):
        class Asking(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn, self.act = nn.BatchNorm2d(3), nn.ELU(0.5)

            def forward(self, x):
                return self.act(self.bn(x)) * self.act.alpha

        assert "needs the activation itself" in reasons(Asking())["bn"]

    def test_a_batch_norm_that_is_reached_into(self):
        class Reaching(nn.Module):
            def __init__(self):
                super().__init__()
                self.block = nn.Sequential()
                self.block.add_module("bn", nn.BatchNorm2d(3))
                self.block.add_module("act", nn.ReLU())

            def forward(self, x):
                return self.block.bn(x) if int(x.sum()) > 1e9 else self.block(x)

        assert "directly" in reasons(Reaching())["block.bn"]
