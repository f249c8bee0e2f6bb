"""What an adapter says of a trainer that is missing, or that no test has seen."""

import warnings
from importlib.metadata import version

import pytest

from igrpo_algo.trainers.versions import requires

HERE = version("pytest")


def test_a_missing_trainer_is_an_import_error_that_says_what_to_install() -> None:
    with (
        pytest.raises(ImportError, match=r"a-trainer, .* pip install a-trainer==1\.2\.\*"),
        requires("a-trainer", "1.0", "1.2"),
    ):
        import a_trainer
    with (
        pytest.raises(ImportError, match="not installed: clone it"),
        requires("a-trainer", "1.0", "1.2", install="clone it"),
    ):
        import a_trainer  # noqa: F401


def test_a_trainer_that_is_there_and_broken_shows_its_own_error() -> None:
    with pytest.raises(ImportError, match="no_such_name"), requires("pytest", "1.0", "99.0"):
        import _pytest.no_such_name  # noqa: F401


def test_an_untested_version_that_fails_to_import_is_named_too() -> None:
    with (
        pytest.warns(UserWarning, match=rf"pytest 1\.0, and {HERE} is installed"),
        pytest.raises(ImportError, match="no_such_name"),
        requires("pytest", "1.0", "1.0"),
    ):
        import _pytest.no_such_name  # noqa: F401


@pytest.mark.parametrize(("oldest", "newest"), [("1.0", "2.0"), ("98.0", "99.0")])
def test_an_untested_version_is_a_warning_that_names_both(oldest: str, newest: str) -> None:
    message = rf"pytest {oldest} to {newest}, and {HERE} is installed"
    with pytest.warns(UserWarning, match=message), requires("pytest", oldest, newest):
        pass


def test_a_tested_version_and_a_clone_say_nothing() -> None:
    minor = ".".join(HERE.split(".")[:2])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with requires("pytest", minor, minor):  # later patches count as tested
            pass
        with requires("a-trainer", "1.0", "1.2"):  # imported, but not installed
            pass
    assert said == []
