"""Rank responses to align human feedback (Yuan et al. 2023, arXiv 2304.05302): a hinge on every pair of answers, and the best one's likelihood.

The score of an answer is its log-likelihood per token. The best answer's loss is summed over its tokens, as in the paper.
"""

import torch


def rrhf(logps, mask, scores, likelihood=1.0):
    """Return the loss of each row of answers, the best first: sum of max(0, worse - better) over pairs, plus -log p of the best.

    >>> logps = torch.tensor([[[-2.0, -2.0], [-1.0, 0.0]]])  # two tokens, then one
    >>> rrhf(logps, logps < 0, torch.tensor([[1.0, 0.0]])).tolist()  # -1 - (-2) = 1, and 4
    [5.0]
    """
    there = mask.any(-1)
    mean = (logps * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    better = (scores[:, :, None] > scores[:, None, :]) & there[:, :, None] & there[:, None, :]
    hinge = torch.relu(mean[:, None, :] - mean[:, :, None]) * better
    return hinge.sum((1, 2)) - likelihood * (logps * mask)[:, 0].sum(-1)
