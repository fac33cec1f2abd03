"""The definition behind its own plug: the judge never fails what is right."""

from nsa_ref.testing import OracleImplementation, conformance_suite

globals().update(conformance_suite(OracleImplementation()))
