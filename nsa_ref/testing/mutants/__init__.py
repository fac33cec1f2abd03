"""The zoo: right implementations with one mistake each, and the clause that must find it.

A mutant overrides one step of the definition (masks), or of a second implementation that is right
as it stands (attention, compression, selection, the layer).
"""

from nsa_ref.testing.mutants import arithmetic, compression, layers, masks, selection
from nsa_ref.testing.mutants.zoo import ZOO, Mutant, mutant

__all__ = ["ZOO", "Mutant", "arithmetic", "compression", "layers", "masks", "mutant", "selection"]
