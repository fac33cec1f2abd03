"""What `nsa-ref verify` hands to pytest: the suite of the implementation that it names."""

from nsa_ref.testing import plugin
from nsa_ref.testing.suites import conformance_suite, warming_suite

_suite = warming_suite if plugin.warming else conformance_suite
globals().update(_suite(*plugin.implementations))
