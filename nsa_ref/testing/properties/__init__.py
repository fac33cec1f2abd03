"""Every property once, each citing its clause.

A property is a row of the table in `catalogue`: which clause, how it is checked, on which cases.
Its check is a function of the property, an implementation and a case. It returns an `Outcome`, or
raises `Broken` (the clause does not hold), `Inconclusive` (this case could not tell) or
`NotOffered`. `judging.judge` runs one, sets right which clause is to blame, and draws suspicions
again. There is a file of checks for each question; `adjust` brings about what a case is to show.
"""

from nsa_ref.testing.properties.catalogue import PROPERTIES
from nsa_ref.testing.properties.common import Outcome, Property

__all__ = ["PROPERTIES", "Outcome", "Property"]
