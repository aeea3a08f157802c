import pytest

from steadynorm.errors import ArgumentError
from steadynorm.experiment.settings import Settings

GOOD = {
    "seeds": 2,
    "tuning_seeds": 1,
    "steps": 10,
    "batch_size": 2,
    "target": "auto",
    "optimizer": "sgd",
    "studies": ("timing",),
    "jobs": 1,
    "first_seed": 0,
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seeds", 1),
        ("seeds", 2.0),
        ("tuning_seeds", 0),
        ("steps", 9),
        ("batch_size", 1),
        ("jobs", 0),
        ("jobs", True),
        ("first_seed", -1),
        ("optimizer", "lion"),
        ("studies", ("timing", "astrology")),
        ("target", 0),
        ("target", 1.01),
        ("target", float("nan")),
        ("target", "high"),
        ("target", True),
    ],
)
def test_what_is_out_of_range_is_named(name, value):
    with pytest.raises(ArgumentError, match=name):
        Settings(**{**GOOD, name: value})


def test_the_number_of_workers_is_not_among_the_settings_of_the_results():
    assert Settings(**GOOD).as_json() == {
        key: list(v) if key == "studies" else v for key, v in GOOD.items() if key != "jobs"
    }
