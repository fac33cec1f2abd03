"""What the command hands to pytest: a suite of the implementation that it names."""

from nsa_ref.testing import plugin
from nsa_ref.testing.suites import conformance_suite, replaying_suite, warming_suite

if plugin.kept:
    _tests = replaying_suite(plugin.kept, plugin.implementations)
else:
    _suite = warming_suite if plugin.warming else conformance_suite
    _tests = _suite(*plugin.implementations)
globals().update(_tests)
