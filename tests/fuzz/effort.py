"""How much is tried: FERRY_FUZZ_EXAMPLES examples of every property; a few in `make test`, 5,000 in `make simulate`.

The few are the same in every run, so that `make test` says the same to everybody; the many differ from run to run, and
a failure prints the blob that repeats it.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

FEW = 40  # all of tests/fuzz takes some ten seconds then
EXAMPLES = int(os.environ.get("FERRY_FUZZ_EXAMPLES", FEW))
TIMEOUT_S = 120 + EXAMPLES * 0.1  # of one test: to end what hangs, not what is slow

# A decorator, not a loaded profile: that would be every other folder's as well.
fuzz = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES <= FEW, database=None, print_blob=True,
    phases=(Phase.explicit, Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
)  # fmt: skip
one = settings(fuzz, max_examples=2, derandomize=True)  # where each example is hundreds by itself
