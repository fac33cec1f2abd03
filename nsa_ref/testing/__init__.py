"""What a port imports: the plug, and the suite that judges what is plugged in."""

from nsa_ref.testing.case import Case
from nsa_ref.testing.implementation import (
    Attention,
    Implementation,
    NotOffered,
    OracleImplementation,
    TorchImplementation,
)
from nsa_ref.testing.suites import conformance_suite

__all__ = [
    "Attention",
    "Case",
    "Implementation",
    "NotOffered",
    "OracleImplementation",
    "TorchImplementation",
    "conformance_suite",
]
