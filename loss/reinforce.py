"""The clipped policy gradient of RAFT++ and Reinforce-Rej (Xiong et al. 2025, arXiv 2504.11343), token by token on fixed answers.

The ratio is of the policy to the model that wrote the answers, which is to be the reference. Clipped is what would move a token further
in the direction that its answer's reward wants; as in PPO, a token that moved the wrong way is not.
"""

import torch


def reinforce(logps, ref_logps, mask, label, clip=0.2):
    """Return the loss of each row: minus the mean over its tokens of min(s · r, clip(s, 1 - clip, 1 + clip) · r); `label` is the reward r.

    >>> start = torch.log(torch.tensor([[0.5], [0.5], [0.5]]))
    >>> now = torch.log(torch.tensor([[0.55], [0.75], [0.75]]))
    >>> yes = torch.tensor([[True], [True], [True]])
    >>> [round(one, 4) for one in reinforce(now, start, yes, torch.tensor([1.0, 1.0, -1.0])).tolist()]  # 1.1; 1.5, clipped; 1.5 of a wrong one, not
    [-1.1, -1.2, 1.5]
    """
    ratio = torch.exp(logps - ref_logps)
    reward = label[:, None]
    tokens = torch.minimum(ratio * reward, ratio.clamp(1 - clip, 1 + clip) * reward)
    return -(tokens * mask).sum(1) / mask.sum(1).clamp(min=1)
