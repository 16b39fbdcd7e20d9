"""The window simulator: what a neighbourhood window costs once a kernel computes it in tiles.

The paper of Generalized Neighborhood Attention (arXiv 2504.16922) describes such a simulator, NATTENSim; it has not been
released. This one counts by the definition and is checked by brute force.
"""

from __future__ import annotations

from dit_accel.simulator.counts import TileCounts
from dit_accel.simulator.propose import Proposal, propose
from dit_accel.simulator.simulation import Simulation, simulate

__all__ = ["Proposal", "Simulation", "TileCounts", "propose", "simulate"]
