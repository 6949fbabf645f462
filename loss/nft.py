"""Negative-aware fine-tuning (Chen et al. 2025, arXiv 2505.18116), by the formula of the authors' code (NVlabs/NFT) in its token form.

A right answer is made likelier. A wrong one makes an implicit policy of wrong answers likelier, which is the rest that the start
leaves once `rate` of it went to right ones; that pushes the policy away from it. Where the policy is the reference, the gradient is that
of Dr. GRPO. The paper's clamp of the negative ratio is a small number; the released training script uses 1, and so does this.
"""

import torch

MOST = 10.0  # of log(policy / reference), per token
SPAN = (0.02, 0.98)  # of `rate`


def nft(logps, ref_logps, mask, label, rate, negative=1.0, normalize=1, clamp=1.0, length=1000.0):
    """Return the loss of each row: its tokens' sum, divided by the constant `length`.

    `label` is 1 for right, 0 for wrong; `rate` is the share of the prompt's answers that are right. `negative` weighs wrong answers: 0 is
    rejection-sampling fine-tuning. `normalize` weighs prompts: 1 by 1 - rate (as Dr. GRPO), 2 by sqrt((1 - rate) / rate) (as GRPO), 0 not.

    >>> start = torch.log(torch.tensor([[0.5], [0.5]]))
    >>> now = torch.log(torch.tensor([[0.6], [0.4]]))
    >>> yes = torch.tensor([[True], [True]])
    >>> right, wrong = nft(now, start, yes, torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]), length=1).tolist()
    >>> round(right, 4), round(wrong, 4)  # -(1 - 0.5) log 1.2, and -(1 - 0.5) log((1 - 0.5 * 0.8) / 0.5)
    (-0.0912, -0.0912)
    """
    away = (logps - ref_logps).clamp(max=MOST)
    rate = rate.clamp(*SPAN)[:, None]
    rest = (1 - rate * torch.exp(away)) / (1 - rate)
    bounded = rest + (rest.clamp(min=clamp) - rest).detach()  # clamped in value, while the gradient passes
    tokens = -(label[:, None] * away + negative * (1 - label[:, None]) * torch.log(bounded))
    weight = {0: torch.ones_like(rate), 1: 1 - rate, 2: torch.sqrt((1 - rate) / rate)}[normalize]
    return (weight * tokens * mask).sum(1) / length
