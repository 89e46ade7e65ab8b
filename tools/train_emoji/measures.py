"""Distances between two sets of pictures: Frechet distance in a small fixed feature space, and edge strength."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GRID = 4


def features(pictures: Tensor) -> Tensor:
    """[n, 3, size, size] in -1..1 to [n, 64]: mean colours and mean edge strength in each cell of a 4 x 4 grid.

    So few, because a few hundred pictures can't fill the covariance of more.
    """
    colours = F.adaptive_avg_pool2d(pictures, GRID).flatten(1)
    edges = F.adaptive_avg_pool2d(edge_strength(pictures), GRID).flatten(1)
    return torch.cat([colours, edges], 1).double()


def edge_strength(pictures: Tensor) -> Tensor:
    """How much neighbouring pixels differ, [n, 1, size, size]."""
    across = F.pad((pictures[..., 1:] - pictures[..., :-1]).abs(), (0, 1, 0, 0))
    down = F.pad((pictures[..., 1:, :] - pictures[..., :-1, :]).abs(), (0, 0, 0, 1))
    return (across + down).mean(1, keepdim=True)


def frechet_distance(made: Tensor, real: Tensor) -> float:
    """Between normal distributions fitted to two sets of features [n, d] (as FID does, in another space)."""
    covariance_a, covariance_b = torch.cov(made.T), torch.cov(real.T)
    # The trace of the root of A B is the sum of the roots of its eigenvalues, which are real and not negative.
    roots = torch.linalg.eigvals(covariance_a @ covariance_b).real.clamp(min=0).sqrt().sum()
    apart = (made.mean(0) - real.mean(0)).square().sum()
    return float(apart + covariance_a.trace() + covariance_b.trace() - 2 * roots)


def sharpness(made: Tensor, drawn: Tensor) -> float:
    """Edge strength of pictures relative to the drawn scenes that were asked for; below 1 is blurred."""
    return float(edge_strength(made).mean() / edge_strength(drawn).mean())
