"""sync_ on whole models, and torch's conversion of them."""

import warnings

import pytest
from torch import nn

import steadynorm as sn
from steadynorm.errors import ArgumentError, ConversionWarning, ModelError, SteadynormWarning


def test_sync_sets_every_layer_and_keeps_its_options():
    model = nn.Sequential(sn.BatchNorm1d(3, activation="relu"), nn.Sequential(sn.BatchNorm2d(3, ghost_batch_size=2)))
    layers = [model[0], model[1][0]]
    assert sn.sync_(model) is model
    assert [layer.process_group for layer in layers] == ["world", "world"]
    assert [model[0], model[1][0]] == layers
    assert "activation=relu" in repr(layers[0])
    assert "process_group='world'" in repr(layers[1])
    assert sn.sync_(model, None) is model
    assert [layer.process_group for layer in layers] == [None, None]


@pytest.mark.parametrize("group", ["all", 3, [0, 1]])
def test_what_is_no_group_is_refused(group):
    with pytest.raises(ArgumentError, match=r'process_group must be a ProcessGroup.*"world" or None'):
        sn.sync_(sn.BatchNorm1d(3), group)


def test_layers_of_torch_that_are_left_over_are_named():
    model = nn.Sequential(sn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.SyncBatchNorm(3))
    with pytest.warns(SteadynormWarning, match=r"1 batch norms of torch.nn .*unsynchronised: 1\."):
        sn.sync_(model)
    with pytest.raises(ModelError, match="sync_"):
        sn.sync_(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))


@pytest.mark.parametrize(
    ("options", "lost"),
    [({"activation": "relu"}, "activation"), ({"channel_dim": -1, "masked": "pass"}, "channel_dim, masked")],
)
def test_torchs_conversion_warns_of_what_it_drops(options, lost):
    model = nn.Sequential(nn.Linear(3, 3), sn.BatchNorm1d(3, process_group="world", **options))
    with pytest.warns(ConversionWarning, match=rf"convert_sync_batchnorm drops {lost} of .*steadynorm.sync_"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)


def test_torchs_conversion_warns_that_it_thaws_a_frozen_layer():
    with pytest.warns(ConversionWarning, match="drops frozen"):
        nn.SyncBatchNorm.convert_sync_batchnorm(sn.freeze_(nn.Sequential(sn.BatchNorm1d(3))))


def test_torchs_conversion_of_a_plain_layer_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(sn.BatchNorm1d(3)))
    assert type(converted[0]) is nn.SyncBatchNorm
