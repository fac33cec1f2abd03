"""nsa_fast before the judge, at the quick level, on the device that --device names."""

from nsa_ref.testing import conformance_suite, plugin
from nsa_ref.testing.loading import load, resolve_device

globals().update(conformance_suite(*load("nsa_fast", resolve_device(plugin.device))))
