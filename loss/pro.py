"""Preference ranking optimisation (Song et al. 2023, arXiv 2306.17492): each answer against all that are worse, and the best one's likelihood.

The score of an answer is its log-likelihood per token, multiplied with the difference of the two answers' rewards (the inverse
temperature of the paper; the better answer's own is the largest of its differences). The likelihood counts `share` x (answers - 1)^2.
"""

import torch


def pro(logps, mask, scores, share=0.05):
    """Return the loss of each row of answers, the best first.

    >>> logps = torch.tensor([[[-1.0], [-1.0]]])
    >>> found = pro(logps, logps < 0, torch.tensor([[1.0, 0.0]]))
    >>> round(found.item(), 4)  # log 2, and 0.05 x 1 x 1
    0.7431
    """
    there = mask.any(-1)
    mean = (logps * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    others = (there.sum(1) - 1).to(logps.dtype)
    total = -share * others**2 * (logps * mask)[:, 0].sum(-1)
    for k in range(mask.shape[1] - 1):
        apart = (scores[:, k : k + 1] - scores[:, k + 1 :]) * there[:, k + 1 :]
        own = mean[:, k] * apart.amax(1)
        worse = (mean[:, k + 1 :] * apart).masked_fill(~there[:, k + 1 :], -torch.inf)
        one = torch.logsumexp(torch.cat([own[:, None], worse], 1), 1) - own
        total = total + one * there[:, k + 1]
    return total
