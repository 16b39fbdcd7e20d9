"""What a whole run costs: from a wish for the run to the density of its sparse steps."""

from __future__ import annotations

from dataclasses import dataclass

from dit_accel.compensate import WorkSizes, make_compensation
from dit_accel.geometry import TokenGeometry
from dit_accel.planner import Planner
from dit_accel.policy import Policy

__all__ = ["LayerRoles"]


@dataclass(frozen=True)
class LayerRoles:
    """Who is dense, who plans and who follows.

    Attributes:
        leader: the layer whose plans each layer uses, its own number for those that plan.
        dense: layers that are dense throughout.
    """

    leader: tuple[int, ...] = ()
    dense: frozenset[int] = frozenset()

    @classmethod
    def of(cls, policy: Policy, layers: int) -> LayerRoles:
        """Roles of a model's layers.

        Raises:
            ValueError: if a dense layer or a leader does not exist.
        """
        dense = policy.method.dense_layers
        bad = [i for i in dense if not -layers <= i < layers]
        if bad:
            raise ValueError(f"dense_layers must lie in {-layers}..{layers - 1}, got {bad}")
        rules = policy.method.reuse_rules
        leader = rules.leader_of(layers)
        leading = rules.leading(layers) if rules.leaders_dense else ()
        return cls(leader, frozenset(i % layers for i in dense).union(leading))

    @property
    def planners(self) -> frozenset[int]:
        """Layers whose plans somebody uses."""
        return frozenset(leader for layer, leader in enumerate(self.leader) if layer not in self.dense)

    def leads(self, layer: int) -> int:
        """The layer whose plans ``layer`` uses."""
        return self.leader[layer] if layer < len(self.leader) else layer

    def sparse_density(
        self,
        run_density: float,
        steps: int,
        policy: Policy,
        planner: Planner,
        geometry: TokenGeometry,
        branches: int,
        dim: int = 128,
    ) -> float:
        """Density of sparse steps that gives ``run_density`` over a whole run of all layers.

        Args:
            run_density: work over the work of a dense run.
            steps: denoising steps.
            policy: the schedule.
            planner: knows what plans cost.
            geometry: where the tokens sit.
            branches: guidance branches that share one plan.
            dim: channels of a head.

        Raises:
            ValueError: if it cannot be reached.
        """
        count, kept_dense = max(len(self.leader), 1), len(self.dense)
        sparse = max(count - kept_dense, 1)
        target = (run_density * count - kept_dense) / sparse
        planning, method = 0.0, policy.method
        if method.plans_from_data:
            first, again = planner.costs(geometry)
            course = policy.course(steps)
            planning = (first + again * (course.plans - 1)) if course.plans else 0.0
            beforehand = method.warmup > 0 or policy.dense_plans or method.reuse_rules.leaders_dense
            planning += 0.5 if policy.needs_lse and not beforehand else 0.0
            planning *= (len(self.planners) / sparse if self.leader else 1.0) / branches
        compensation = make_compensation(method.compensate)
        sizes = WorkSizes(method.block_q, method.block_k, geometry.tokens, dim)
        extra = compensation.known_work(sizes) + (1 / method.block_k if compensation.pooled else 0.0)
        return policy.sparse_density(target, steps, extra, planning, asked=run_density)
