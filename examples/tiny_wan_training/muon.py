"""Muon for the matrices, AdamW for the rest.

Muon orthogonalises the momentum of every weight matrix (Newton-Schulz, five steps). Matrices of one shape
are stacked, so that a step costs a few batched products. The step is scaled by 0.2 * sqrt(longer side), the
usual factor that gives it AdamW's size, so that both share one learning rate.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn


@torch.no_grad()
def orthogonalise(stack: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Bring the singular values of each matrix in the stack near one."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = stack.to(torch.bfloat16 if stack.is_cuda else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Momentum and orthogonal steps for a list of matrices."""

    def __init__(self, matrices: list[nn.Parameter], momentum: float = 0.95, decay: float = 0.01) -> None:
        self.momentum, self.decay = momentum, decay
        shapes: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for matrix in matrices:
            shapes[tuple(matrix.shape)].append(matrix)
        self.groups = list(shapes.values())
        self.buffers = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Take one step with Nesterov momentum."""
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            grads = torch.stack([p.grad if p.grad is not None else torch.zeros_like(p) for p in group])
            buffer.lerp_(grads, 1 - self.momentum)
            update = orthogonalise(grads.lerp(buffer, self.momentum))
            size = 0.2 * max(group[0].shape) ** 0.5
            torch._foreach_mul_(list(group), 1 - rate * self.decay)
            torch._foreach_add_(list(group), list((update * (-rate * size)).to(group[0].dtype).unbind(0)))


class Optimizer:
    """Both optimisers behind one learning rate."""

    def __init__(self, model: nn.Module, others: list[nn.Module]) -> None:
        blocks = dict(model.named_parameters())
        matrices = {name for name, p in blocks.items() if p.ndim == 2 and name.startswith("blocks.")}
        rest = [p for name, p in blocks.items() if name not in matrices]
        rest += [p for other in others for p in other.parameters()]
        self.muon = Muon([blocks[name] for name in sorted(matrices)])
        fused = rest[0].is_cuda
        self.adam = torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=fused)
        self.parameters = list(blocks.values()) + [p for other in others for p in other.parameters()]

    def step(self, rate: float) -> torch.Tensor:
        """Clip, step, and forget the gradients; return the gradient's norm."""
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.muon.step(rate)
        for parameter in self.parameters:
            parameter.grad = None
        return norm
