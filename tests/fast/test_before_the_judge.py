"""nsa_fast before the judge, at the quick level, on the device that --device names.

On a CPU a tenth of the cases, as of a port that is slow, and none of what torch compiles for it:
`nsa-ref verify nsa_fast` asks all.
"""

from nsa_ref.testing import conformance_suite, plugin
from nsa_ref.testing.loading import load, resolve_device

ASKED = load("nsa_fast", resolve_device(plugin.device))
if ASKED[0].device == "cpu":
    ASKED = [port for port in ASKED if port.name != "nsa_fast compiled"]
    for port in ASKED:
        port.pace = "slow"

globals().update(conformance_suite(*ASKED))
