"""Muon (K. Jordan et al. 2024) for matrices and for convolutions seen as matrices, many at once.

``torch.optim.Muon`` refuses parameters that are not matrices, and takes them one by one; a small
network's some two hundred are of a dozen shapes, and all of one shape make one batched product.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Of the quintic iteration that brings all singular values near 1.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ROUNDS = 5
_MOMENTUM = 0.95
_RMS = 0.2  # with AdamW's size of a step one rate serves both (Liu et al., arXiv 2502.16982)


def is_matrix(parameter: Tensor) -> bool:
    """A matrix, or a convolution of (out, in, h, w) as one of (out, in h w); not a vector."""
    return parameter.ndim >= 2


def orthogonal(matrices: Tensor, computed_in: torch.dtype = torch.bfloat16) -> Tensor:
    """(N,R,C) -> (N,R,C) of the type it is ``computed_in``, with the same singular vectors and
    singular values between about 0.7 and 1.2; a matrix of zeros stays one."""
    turned = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if turned else matrices
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)).to(computed_in)
    for _ in range(_ROUNDS):
        square = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=_B, alpha=_C), x, beta=_A)
    return x.transpose(1, 2) if turned else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum of the gradients, made orthogonal, as steps of root mean square 0.2
    ``lr``. ``computed_in``: of that product. A processor without units for bfloat16 took 10.7 s a
    step of the mini base in it and 0.55 s in float32. ValueError for a parameter that is no
    matrix."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float,
        computed_in: torch.dtype = torch.bfloat16,
    ) -> None:
        given = list(parameters)
        wrong = [tuple(p.shape) for p in given if not is_matrix(p)]
        if wrong:
            raise ValueError(f"Muon: got parameters of shapes {wrong}, expected matrices")
        super().__init__(given, {"lr": lr, "weight_decay": weight_decay})
        self._computed_in = computed_in

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; parameters without a gradient stay as they are."""
        assert closure is None
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault(parameter.flatten(1).shape, []).append(parameter)
            for shape, parameters in alike.items():
                self._update(parameters, shape, group["lr"], group["weight_decay"])

    def _update(self, parameters: list[Tensor], shape: torch.Size, lr: float, decay: float) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        buffers: list[Tensor] = []
        for parameter, gradient in zip(parameters, gradients, strict=True):
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
            buffers.append(state["momentum"])
        torch._foreach_mul_(buffers, _MOMENTUM)
        torch._foreach_add_(buffers, gradients)
        ahead = torch._foreach_add(gradients, buffers, alpha=_MOMENTUM)
        stacked = torch.stack([a.flatten(1) for a in ahead])
        steps = orthogonal(stacked, self._computed_in).to(gradients[0])
        steps *= lr * _RMS * max(shape) ** 0.5
        torch._foreach_mul_(parameters, 1 - lr * decay)
        changes = [one.view_as(p) for one, p in zip(steps, parameters, strict=True)]
        torch._foreach_sub_(parameters, changes)
