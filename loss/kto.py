"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8), as TRL's KTOTrainer computes it.

`kl` is the mean over the rows of an optimiser step of log(policy / reference) of answers behind other rows' prompts, at least 0.
TRL takes it over the micro-batch of a card; here it is the step's, so that how a step is cut changes nothing, and an answer is never
put behind its own prompt.
"""

import torch


def kto(logps, ref_logps, mask, label, kl, beta=0.1, desirable=1.0, undesirable=1.0):
    """Return the loss of each row; `label` is 1 for a desirable answer, 0 for an undesirable one.

    >>> said = torch.tensor([[-1.0], [-1.0]])
    >>> yes = torch.tensor([[True], [True]])
    >>> kto(said, said, yes, torch.tensor([1.0, 0.0]), torch.tensor(0.0)).tolist()  # no better and no worse than the reference
    [0.5, 0.5]
    """
    reward = ((logps - ref_logps) * mask).sum(1)
    gain = desirable * (1 - torch.sigmoid(beta * (reward - kl)))
    harm = undesirable * (1 - torch.sigmoid(beta * (kl - reward)))
    return label * gain + (1 - label) * harm
