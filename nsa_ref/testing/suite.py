"""What the command hands to pytest: a suite of the implementation that it names."""

from nsa_ref.testing import plugin
from nsa_ref.testing.suites import (
    conformance_suite,
    replaying_suite,
    suite_in_turns,
    warming_suite,
)

if plugin.kept:
    _tests = replaying_suite(plugin.kept, plugin.implementations)
else:
    _suite = conformance_suite
    if plugin.warming or plugin.in_turns:
        _suite = warming_suite if plugin.warming else suite_in_turns
    _tests = _suite(*plugin.implementations)
if plugin.round:
    _asked = plugin.round.properties
    _tests = {n: t for n, t in _tests.items() if t.nsa_ref_property in _asked}  # type: ignore[attr-defined]
globals().update(_tests)
