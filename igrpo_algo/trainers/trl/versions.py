"""Which versions of TRL the trainer was tested with."""

import warnings

import trl
from packaging.version import Version

OLDEST, NEWEST = "1.14", "1.16"


def warn_of_untested_trl() -> None:
    """Warn, naming both, if the installed TRL is outside of what the tests run with."""
    found = Version(trl.__version__)
    if not Version(OLDEST) <= Version(f"{found.major}.{found.minor}") <= Version(NEWEST):
        warnings.warn(
            f"IGRPOTrainer is tested with TRL {OLDEST} to {NEWEST}, and TRL {found} is installed: "
            "it overrides methods that TRL may have changed",
            stacklevel=4,
        )
