"""What a state_dict holds, where it loads, and num_batches_tracked: which may be missing, and waits for no device."""

import copy
import io

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

import steadynorm as sn
from steadynorm.ops import commit as committing
from steadynorm.ops.backends import reference_only
from support import assert_close, batch_norm, stats

COUNTER = "num_batches_tracked"
DOMAINS = ("photo", "sketch", "clipart")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def checkpoint_of_torch(channels: int = 3) -> dict[str, Tensor]:
    """torch.nn's, after a batch, with parameters that are not those of a fresh layer."""
    layer = nn.BatchNorm1d(channels)
    layer(draw(8, channels))
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, channels + 1))
        layer.bias.fill_(-0.5)
    return layer.state_dict()


def filled(**options) -> sn.BatchNorm1d:
    """A layer with domains whose numbers are all different."""
    layer = sn.BatchNorm1d(3, domains=DOMAINS, **options)
    for value, t in enumerate(layer.state_dict().values()):
        t.copy_(torch.full_like(t, value + 2))
    return layer


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


OPTIONS = {
    "plain": {},
    "activation, mask, ghost, renorm": {
        "activation": "relu", "masked": "pass", "ghost_batch_size": 4, "renorm": sn.Renorm(), "channel_dim": -1,
    },
    "synced": {"process_group": "world"},
    "one domain": {"domains": ("photo",), "domain_affine": True},
}  # fmt: skip


class TestLikeTorch:
    @pytest.mark.parametrize("options", OPTIONS)
    def test_no_option_but_several_domains_adds_a_key(self, options):
        ours, theirs = sn.BatchNorm1d(3, **OPTIONS[options]), nn.BatchNorm1d(3)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict(), strict=True)
        ours.load_state_dict(theirs.state_dict(), strict=True)

    def test_its_metadata_is_torchs(self):
        assert sn.BatchNorm1d(3).state_dict()._metadata[""] == nn.BatchNorm1d(3).state_dict()._metadata[""]

    @pytest.mark.parametrize("assign", [False, True])
    def test_a_whole_model_through_a_file_with_weights_only(self, assign):
        model = nn.Sequential(nn.Linear(3, 3), sn.BatchNorm1d(3), nn.Linear(3, 2))
        model(draw(8, 3))
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        plain = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        plain.load_state_dict(torch.load(file, weights_only=True), assign=assign)
        assert same(plain.state_dict(), model.state_dict())

    def test_loading_leaves_the_callers_checkpoint_as_it_was(self):
        given = checkpoint_of_torch()
        del given[COUNTER]
        before = copy.deepcopy(given)
        filled(domain_affine=True).load_state_dict(given)
        assert same(given, before)


class TestDomains:
    @pytest.mark.parametrize("affine", [False, True])
    def test_the_first_has_torchs_names_and_the_others_theirs_beside_it(self, affine):
        layer = sn.BatchNorm1d(3, domains=("photo", "sketch"), domain_affine=affine)
        parameters = {"weight", "bias"} | ({"weight_sketch", "bias_sketch"} if affine else set())
        buffers = {"running_mean", "running_var", COUNTER}
        assert set(layer.state_dict()) == parameters | buffers | {f"{name}_sketch" for name in buffers}

    @pytest.mark.parametrize("affine", [False, True])
    @pytest.mark.parametrize("assign", [False, True])
    def test_round_trip(self, affine, assign):
        saved = load_safetensors(save_safetensors(filled(domain_affine=affine).state_dict()))
        layer = sn.BatchNorm1d(3, domains=DOMAINS, domain_affine=affine)
        layer.load_state_dict(saved, assign=assign)
        assert same(layer.state_dict(), filled(domain_affine=affine).state_dict())

    @pytest.mark.parametrize("assign", [False, True])
    def test_a_checkpoint_without_domains_starts_all_of_them(self, assign):
        given = checkpoint_of_torch()
        layer = sn.BatchNorm1d(3, momentum=1.0, domains=DOMAINS, domain_affine=True)
        layer.load_state_dict(copy.deepcopy(given), assign=assign)
        for name in DOMAINS:
            running = layer.running(name)
            assert torch.equal(running.mean, given["running_mean"])
            assert torch.equal(running.var, given["running_var"])
            assert running.num_batches_tracked.item() == 1
            assert [t.tolist() for t in layer.affine_of(name)] == [given["weight"].tolist(), given["bias"].tolist()]
        assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in layer.parameters())
        with sn.domain(layer, "sketch"):  # and from here on they go their own ways
            layer(draw(8, 3, seed=1)).backward(draw(8, 3, seed=2))
        with torch.no_grad():
            layer.weight_sketch.zero_()
        assert_close(layer.running("sketch").mean, stats(draw(8, 3, seed=1)).mean, "statistic")
        assert torch.equal(layer.running("photo").mean, given["running_mean"])
        assert torch.equal(layer.weight, given["weight"])

    def test_torchs_layer_refuses_the_other_domains_keys_and_nothing_else(self):
        saved, theirs = filled(domain_affine=True).state_dict(), nn.BatchNorm1d(3)
        with pytest.raises(RuntimeError, match="Unexpected key"):
            theirs.load_state_dict(saved)
        missing, unexpected = theirs.load_state_dict(saved, strict=False)
        assert missing == []
        assert set(unexpected) == {name for name in saved if name.endswith(("_sketch", "_clipart"))}
        assert same(theirs.state_dict(), {name: saved[name] for name in theirs.state_dict()})

    @pytest.mark.parametrize(
        ("domains", "message"),
        [(("photo", "sketch"), "Unexpected.*running_mean_clipart"), ((*DOMAINS, "cartoon"), "Missing.*_mean_cartoon"),
         (("sketch", "photo", "clipart"), "Missing.*running_mean_photo")],  # another first one: other names
    )  # fmt: skip
    def test_one_of_other_domains_or_another_order_is_refused_by_name(self, domains, message):
        with pytest.raises(RuntimeError, match=f"(?s){message}"):
            sn.BatchNorm1d(3, domains=domains).load_state_dict(filled().state_dict())

    def test_shared_parameters_start_those_of_the_domains_only_from_a_checkpoint_without_domains(self):
        with pytest.raises(RuntimeError, match=r"(?s)Missing.*weight_sketch"):
            sn.BatchNorm1d(3, domains=DOMAINS, domain_affine=True).load_state_dict(filled().state_dict())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("assign", [False, True])
    def test_one_in_half_precision_comes_back_as_float32(self, assign, dtype):
        given = {name: t.to(dtype) if t.is_floating_point() else t for name, t in checkpoint_of_torch().items()}
        layer = sn.BatchNorm1d(3, domains=DOMAINS)
        layer.load_state_dict(copy.deepcopy(given), assign=assign)
        for name in DOMAINS:
            assert layer.running(name).mean.dtype == layer.running(name).var.dtype == torch.float32
            assert torch.equal(layer.running(name).var, given["running_var"].float())

    def test_assigned_to_a_layer_built_on_meta(self):
        layer = sn.BatchNorm1d(3, domains=DOMAINS, domain_affine=True, device="meta")
        given = checkpoint_of_torch()
        del given[COUNTER]
        layer.load_state_dict(given, assign=True)
        assert not any(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
        with sn.domain(layer, "clipart"):
            layer(draw(8, 3))
        assert [layer.running(name).num_batches_tracked.item() for name in DOMAINS] == [0, 0, 1]


def forms(given: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A state_dict with torch's metadata, one that says it is of a time before the counter, and a plain dictionary."""
    old = copy.deepcopy(given)
    old._metadata[""]["version"] = 1
    return {"metadata": given, "old metadata": old, "plain": load_safetensors(save_safetensors(dict(given)))}


class TestCounterIsMissing:
    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("domains", [None, DOMAINS])
    @pytest.mark.parametrize("form", ["metadata", "old metadata", "plain"])
    def test_loads_strictly_and_the_layer_keeps_its_own(self, form, domains, assign):
        given = checkpoint_of_torch()
        del given[COUNTER]
        layer = sn.BatchNorm1d(3, domains=domains)
        layer.num_batches_tracked.fill_(5)
        layer.load_state_dict(forms(given)[form], strict=True, assign=assign)
        assert torch.equal(layer.running_mean, given["running_mean"])
        assert [layer.running(d).num_batches_tracked.item() for d in domains or (None,)] == [5, 0, 0][
            : len(domains or "1")
        ]

    def test_within_a_model(self):
        model = nn.Sequential(nn.Linear(3, 3), sn.BatchNorm1d(3))
        saved = {name: t for name, t in model.state_dict().items() if COUNTER not in name}
        assert len(saved) == 6
        assert model.load_state_dict(saved, strict=True).missing_keys == []

    def test_of_the_domains_that_lack_it(self):
        saved = {name: t for name, t in filled().state_dict().items() if COUNTER not in name}
        layer = sn.BatchNorm1d(3, domains=DOMAINS)
        layer.load_state_dict(saved, strict=True)
        assert torch.equal(layer.running_mean_sketch, saved["running_mean_sketch"])
        assert layer.num_batches_tracked_sketch.item() == 0

    def test_the_cumulative_average_goes_on_from_the_layers_own_count(self):
        given, x = checkpoint_of_torch(), draw(8, 3, seed=1)
        del given[COUNTER]
        layer = sn.BatchNorm1d(3, momentum=None)
        layer.num_batches_tracked.fill_(3)
        layer.load_state_dict(given)
        layer(x)  # the fourth
        mean = given["running_mean"].double().numpy()
        assert_close(layer.running_mean, mean + (stats(x).mean - mean) / 4, "statistic")

    def test_a_layer_without_running_statistics_invents_none(self):
        layer = sn.BatchNorm1d(3, track_running_stats=False)
        layer.load_state_dict({"weight": torch.ones(3), "bias": torch.ones(3)}, strict=True)
        assert layer.num_batches_tracked is None


class NoReading(torch.overrides.TorchFunctionMode):
    """Refuses whatever makes the host wait for the value of a tensor."""

    WAITS = (
        "item",
        "tolist",
        "numpy",
        "cpu",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "nonzero",
        "__contains__",
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.WAITS:
            raise RuntimeError(f"the host waits: {func.__name__}")
        return func(*args, **(kwargs or {}))


REGIMES = {
    "plain": {},
    "activation": {"activation": "silu"},
    "ghost": {"ghost_batch_size": 4},
    "renorm": {"renorm": sn.Renorm(warmup=0, ramp=0)},
    "single_value": {"single_value": "running"},
    "domains": {"domains": DOMAINS},
}


class TestCounterCostsNoSynchronisation:
    @pytest.mark.parametrize("momentum", [0.1, None])
    @pytest.mark.parametrize("regime", REGIMES)
    def test_a_step_reads_no_value_of_a_tensor_on_a_device(self, regime, momentum):
        """On "meta" there are no values: torch raises where one is asked for."""
        layer = sn.BatchNorm1d(3, device="meta", momentum=momentum, **REGIMES[regime])
        x = torch.empty(8, 3, 5, device="meta", requires_grad=True)
        with pytest.raises(RuntimeError, match="meta"):
            x.sum().item()

        def steps():
            layer(x).backward(torch.empty_like(x))
            layer(x, mask=torch.empty(8, 5, device="meta", dtype=torch.bool))
            layer(x, sample_weight=torch.empty(8, device="meta"))
            with sn.accumulate(layer):
                layer(x)
                layer(x)
            sn.functional_call(layer, {}, x)

        if layer.domains:
            with sn.domain(layer, "sketch"):
                steps()
        else:
            steps()

    @pytest.mark.parametrize("momentum", [0.25, None])
    def test_what_is_written_without_looking_is_the_same(self, momentum, monkeypatch):
        layer, batches = sn.BatchNorm1d(3, momentum=momentum), [draw(6, 3, seed=seed) for seed in range(3)]
        with reference_only(), NoReading(), pytest.raises(RuntimeError, match="the host waits: item"):
            layer(batches[0])  # on the CPU a look is free, and taken
        monkeypatch.setattr(committing, "_host_may_look", lambda statistics: False)
        with reference_only(), NoReading():
            for x in batches:
                y = layer(x)
        mean, variance = np.zeros(3), np.ones(3)
        for k, x in enumerate(batches, start=1):
            share = momentum or 1 / k
            mean, variance = mean + share * (stats(x).mean - mean), variance + share * (stats(x).unbiased - variance)
        assert_close(y, batch_norm(batches[-1]), "output")
        assert_close(layer.running_mean, mean, "statistic")
        assert_close(layer.running_var, variance, "variance")
        assert layer.num_batches_tracked.item() == 3
