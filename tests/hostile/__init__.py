"""What somebody who means harm may send: generators, a class of attack each.

Each runs small in `make test`, and 10,000 times in `make test-slow`, or FOVEATE_TRIES times.
"""

import os

from hypothesis import HealthCheck, settings

_COMMON = {
    "deadline": None,  # the machine may be busy; what has to be quick has a test of its own
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}


def tries(count: int) -> settings:
    """So many examples, the same ones every time."""
    return settings(max_examples=count, derandomize=True, **_COMMON)


TRIES = int(os.environ.get("FOVEATE_TRIES", "10000"))
MANY = tries(TRIES)
