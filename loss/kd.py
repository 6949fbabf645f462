"""Per-token distillation (GKD, Agarwal et al. 2023, arXiv 2306.13649): how far the model is from its teacher, in the mean over a completion.

Which divergence that is, from whom, under which prompt and at which tokens says the train step (`teacher`, `divergence`); here tokens become
a row. The mean over tokens is the paper's equation 1.
"""


def kd(divergence, mask, total=False):
    """Return the loss of each row: the mean of its tokens, or their sum with `total` (for `average: tokens`, where long completions weigh more).

    >>> import torch
    >>> kd(torch.tensor([[0.5, 0.25, 0.0]]), torch.tensor([[True, True, False]])).tolist()
    [0.375]
    >>> kd(torch.tensor([[0.5, 0.25, 0.0]]), torch.tensor([[True, True, False]]), total=True).tolist()
    [0.75]
    """
    tokens = (divergence * mask).sum(1)
    return tokens if total else tokens / mask.sum(1)
