"""Negative log-likelihood: what `loss: sft` computes, as a function of a row. With `average: tokens` the two are one number."""


def sft(logps, mask):
    """Return -log p(completion | prompt) of each row.

    >>> import torch
    >>> sft(torch.tensor([[-1.0, -0.5], [-2.0, 0.0]]), torch.tensor([[True, True], [True, False]])).tolist()
    [1.5, 2.0]
    """
    return -(logps * mask).sum(1)
