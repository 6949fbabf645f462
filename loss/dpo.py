"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290), as a function of a row: what `loss: dpo` computes.

`nll` adds IRPO's term (Pang et al. 2024, arXiv 2404.19733): the chosen answer's negative log-likelihood per token.
"""

from torch.nn.functional import logsigmoid


def dpo(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_mask, rejected_mask, beta=0.1, nll=0.0):
    """Return -log sigmoid(beta * margin) of each pair, the margin being how much more the policy prefers the chosen answer.

    >>> import torch
    >>> said = torch.tensor([[-1.0, -1.0]])
    >>> yes = torch.tensor([[True, True]])
    >>> round(dpo(said, said, said, said, yes, yes).item(), 4)  # no margin yet: log 2
    0.6931
    """
    chosen = ((chosen_logps - ref_chosen_logps) * chosen_mask).sum(1)
    rejected = ((rejected_logps - ref_rejected_logps) * rejected_mask).sum(1)
    per_token = -(chosen_logps * chosen_mask).sum(1) / chosen_mask.sum(1)
    return -logsigmoid(beta * (chosen - rejected)) + nll * per_token
