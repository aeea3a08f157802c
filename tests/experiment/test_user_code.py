"""Functions of the user's own, by name: what fails in them is the error asked for, errors of this package stay."""

import pytest

from steadynorm.errors import ArgumentError, DataError, ModelError
from steadynorm.files import user_code


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("pkg.mod:factory", True),
        ("mod:Class.make", True),
        ("C:\\data", False),
        ("https://host/a", False),
        ("digits", False),
        ("pkg.mod:", False),
        (":f", False),
        ("a:b:c", False),
        ("a:b\n", False),
        ("1a:b", False),
    ],
)
def test_what_reads_as_a_name(text, named):
    assert user_code.is_name(text) is named


def test_anything_else_is_refused():
    with pytest.raises(ModelError, match=r'a factory is named "pkg\.mod:function", got \'os\''):
        user_code.import_named("os", ModelError)


def test_an_error_of_this_package_passes_through_as_it_is():
    def factory():
        raise ArgumentError("eps must be positive")

    with pytest.raises(ArgumentError, match="eps must be positive"):
        user_code.call(factory, name="f", error=DataError)


def test_arguments_and_result_are_handed_over():
    assert user_code.call(divmod, 17, 5, name="divmod", error=DataError) == (3, 2)


def test_an_interruption_is_no_failure_of_the_factory():
    def factory():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        user_code.call(factory, name="f", error=DataError)
