"""nsa_fast before the judge, at the quick level, on the device that --device names.

On a CPU a tenth of the cases, as of a port that is slow: `nsa-ref verify nsa_fast` asks all.
"""

from nsa_ref.testing import conformance_suite, plugin
from nsa_ref.testing.loading import load, resolve_device

ASKED = load("nsa_fast", resolve_device(plugin.device))
for implementation in ASKED:
    if implementation.device == "cpu":
        implementation.pace = "slow"

globals().update(conformance_suite(*ASKED))
