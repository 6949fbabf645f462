"""Self-play preference optimisation (Wu et al. 2024, arXiv 2405.00675, eq. 4.7): a squared error to estimated chances to win.

TRL's `sppo_hard` is twice this with chances of 1 and 0.
"""


def sppo(
    chosen_logps,
    rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    chosen_mask,
    rejected_mask,
    chosen_win,
    rejected_win,
    beta=0.001,
):
    """Return the loss of each pair; `chosen_win` and `rejected_win` are chances to win against the model's own answers.

    >>> import torch
    >>> said, yes = torch.tensor([[-1.0]]), torch.tensor([[True]])
    >>> sppo(said, said, said, said, yes, yes, torch.tensor([0.75]), torch.tensor([0.25]), beta=0.5).tolist()
    [0.25]
    """
    chosen = ((chosen_logps - ref_chosen_logps) * chosen_mask).sum(1)
    rejected = ((rejected_logps - ref_rejected_logps) * rejected_mask).sum(1)
    return ((chosen - (chosen_win - 0.5) / beta) ** 2 + (rejected - (rejected_win - 0.5) / beta) ** 2) / 2
