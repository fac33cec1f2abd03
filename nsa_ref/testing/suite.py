"""What `nsa-ref verify` hands to pytest: the conformance suite of the implementation it names."""

from nsa_ref.testing import plugin
from nsa_ref.testing.conformance import conformance_suite

globals().update(conformance_suite(*plugin.implementations))
