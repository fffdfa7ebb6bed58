"""What it means that a head has no number: four things that are not the same.

At each measured step a head is in one of these states. A head that has no value because of what it is (eigenvalues
of cross-attention), one that did not run, one that ran on nothing that counts, and one that is not finite are told
apart by how much was measured of them, and not by the NaN that all of them leave.
"""

KNOWN = 0
"""It was measured; single statistics may have no value."""
NO_VALUE = 1
"""By design: what is asked of other layers does not exist for this one, which is healthy."""
DID_NOT_RUN = 2
"""Its layer was not run at this step."""
NO_DATA = 3
"""Its layer was run, on nothing that counts: padding alone, or too few tokens."""
NOT_FINITE = 4
"""It was measured and holds NaN or inf."""
LEFT_OUT = 5
"""It cannot be measured, for a reason that is kept beside the history."""

EMPTY = (DID_NOT_RUN, NO_DATA)
"""States that tell of the step and not of the head: numbers of an earlier step still hold."""
