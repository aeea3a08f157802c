"""What renorm remembers of a forward, so that the one that is run again is corrected alike."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import steadynorm as sn
from steadynorm.errors import RecomputationError, SteadynormWarning
from steadynorm.nn import correcting


class TestRenormsMemory:
    """The corrections of a forward are found again for the one that is run again, whatever came between."""

    RENORM = sn.Renorm(1.5, 0.5, warmup=0, ramp=0)

    def layer(self, **options) -> sn.BatchNorm1d:
        layer = sn.BatchNorm1d(3, dtype=torch.float64, renorm=self.RENORM, momentum=0.5, **options)
        for name, buffer in layer.named_buffers():
            if name.startswith("num_batches"):
                buffer.fill_(1)
        return layer

    def check(self, step, **options) -> None:
        """`step(forward, layer, x)` returns a loss; its gradient is that of the same step without a checkpoint."""
        found = []
        for again in (False, True):
            layer = self.layer(**options)
            x = torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()

            def forward(value, layer=layer, again=again):
                return checkpoint(layer, value, use_reentrant=False) if again else layer(value)

            loss = step(forward, layer, x)
            if loss is not None:
                loss.backward()
            found.append([x.grad, *(p.grad for p in layer.parameters())])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)

    def test_the_same_batch_twice(self):
        self.check(lambda forward, layer, x: (forward(x).pow(3) + 2 * forward(x).pow(3)).sum())

    def test_more_chunks_and_forwards_than_one_would_think(self):
        self.check(lambda forward, layer, x: sum(forward(x + i).pow(3).sum() for i in range(70)))
        self.check(
            lambda forward, layer, x: forward(torch.cat([x + i for i in range(30)])).pow(3).sum(), ghost_batch_size=4
        )

    def test_a_look_in_between_that_commits_nothing(self):
        def step(forward, layer, x):
            y = forward(x)
            with sn.no_commit(layer):
                layer(x)
            return y.pow(3).sum()

        self.check(step)

    def test_the_same_batch_in_two_domains(self):
        def step(forward, layer, x):
            with sn.domain(layer, "a"):
                y = forward(x)
            with sn.domain(layer, "b"):
                forward(x)
            with sn.domain(layer, "a"):
                y.pow(3).sum().backward()

        self.check(step, domains=("a", "b"))

    def test_a_graph_that_is_kept_is_run_again_once_more(self):
        layer = self.layer()
        x = torch.randn(5, 3, dtype=torch.float64).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=False).pow(3).sum()
        first = torch.autograd.grad(y, x, retain_graph=True)[0]
        assert torch.equal(torch.autograd.grad(y, x)[0], first)

    def test_nothing_is_kept_where_there_is_no_checkpoint(self):
        layer = self.layer()
        for _ in range(3):
            layer(torch.randn(5, 3, dtype=torch.float64).requires_grad_()).sum().backward()
        assert layer._corrector._made == []

    def test_what_was_forgotten_is_an_error_not_a_wrong_number(self, monkeypatch):
        monkeypatch.setattr(correcting, "capacity", lambda channels: 2)
        layer = self.layer()
        x = torch.randn(5, 3, dtype=torch.float64).requires_grad_()
        losses = [checkpoint(layer, x + i, use_reentrant=False).pow(3).sum() for i in range(4)]
        with pytest.raises(RecomputationError, match="Run backward earlier"):
            sum(losses).backward()

    @pytest.mark.parametrize("outer", [True, False])
    @pytest.mark.parametrize("inner", [True, False])
    def test_nested_with_the_same_batch_twice(self, outer, inner):
        found = []
        for again in (False, True):
            layer = self.layer()
            x = torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()

            def block(value, layer=layer, again=again):
                return checkpoint(layer, value, use_reentrant=inner) if again else layer(value)

            y = sum(checkpoint(block, x, use_reentrant=outer) if again else block(x) for _ in range(2))
            y.pow(3).sum().backward()
            found.append(x.grad)
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)

    def test_a_layer_built_on_meta(self):
        torch._dynamo.reset()
        with torch.device("meta"):
            layer = sn.BatchNorm1d(3, renorm=self.RENORM)
        layer.to_empty(device="cpu").reset_parameters()
        same, x = sn.BatchNorm1d(3, renorm=self.RENORM), torch.randn(6, 3)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            assert torch.equal(compiled(x), same(x))

    def test_a_reset_forgets_and_so_do_forwards_that_cannot_run_again(self):
        layer = self.layer()
        with torch.no_grad():
            layer(torch.randn(5, 3, dtype=torch.float64))
        assert len(layer._corrector._made) == 1
        layer.reset_running_stats()
        with torch.inference_mode():
            layer(torch.randn(5, 3, dtype=torch.float64))
        assert layer._corrector._made == []

    def test_a_second_forward_that_is_another_is_warned_about(self):
        layer, noise = self.layer(), iter(range(10))
        x = torch.randn(5, 3, dtype=torch.float64).requires_grad_()
        y = checkpoint(lambda v: layer(v + next(noise)), x, use_reentrant=False)
        with pytest.warns(SteadynormWarning, match="does not repeat the first one's arithmetic"):
            y.pow(3).sum().backward()

    def test_one_graph_serves_all_layers(self):
        torch._dynamo.reset()
        counter = CompileCounter()
        for _ in range(3):
            torch.compile(self.layer(), backend=counter, fullgraph=True)(torch.randn(5, 3, dtype=torch.float64))
        assert counter.frame_count == 1
