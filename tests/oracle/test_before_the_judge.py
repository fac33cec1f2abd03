"""The definition behind its own plug: the judge never fails what is right.

A tenth of the cases, as of a port that is slow: `nsa-ref verify oracle` asks all of them.
"""

from nsa_ref.testing import OracleImplementation, conformance_suite


class Oracle(OracleImplementation):
    pace = "slow"


globals().update(conformance_suite(Oracle()))
