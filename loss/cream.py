"""Consistency-regularised preferences (CREAM, Wang et al. 2024, arXiv 2410.12735): DPO, mixed with DPO of the flipped pair."""

from torch.nn.functional import logsigmoid


def cream(
    chosen_logps,
    rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    chosen_mask,
    rejected_mask,
    agreement,
    beta=0.1,
):
    """Return the loss of each pair; `agreement` is how far two models agree on the order of answers, 0 to 1. At 1 it is DPO.

    >>> import torch
    >>> said, yes = torch.tensor([[-1.0]]), torch.tensor([[True]])
    >>> round(cream(said, said, said, said, yes, yes, torch.tensor([0.7])).item(), 4)  # no margin yet: log 2
    0.6931
    """
    chosen = ((chosen_logps - ref_chosen_logps) * chosen_mask).sum(1)
    rejected = ((rejected_logps - ref_rejected_logps) * rejected_mask).sum(1)
    margin = beta * (chosen - rejected)
    return -agreement * logsigmoid(margin) - (1 - agreement) * logsigmoid(-margin)
