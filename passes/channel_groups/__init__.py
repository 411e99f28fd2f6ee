"""Which channels of a network can only be removed together, and the network without them.

Every axis of every value carries one label per index. Operations join labels: the input channels of a
convolution are those of its operand, the operands of an addition have the same channels, a concatenation
has those of its operands one after the other, a reshape maps them through its index arithmetic. What is
joined is a group: its indices live or die together, in every weight and every value, wherever branches,
shared weights or attention heads lead. What an operation mixes (a softmax's axis, the axes of a
normalisation, the network's inputs and outputs) is kept, with the reason.

Removing a group is exact: with all its weights zero the network computes the same as without it.

`labels.py` has the labels and how they are joined; the rules of the operations stand in `elementwise.py`,
`movement.py`, `reductions.py`, `products.py`, `windows.py` and `recurrent.py`; `groups.py` collects what is
joined, `removal.py` cuts it out.

Wang, Rachwan, Guennemann, Charpentier: Structurally Prune Anything, 2024 (mask propagation between
coupled channels); Chen et al.: OTOv3, 2023 (groups whose removal leaves a valid network).
"""

from __future__ import annotations

from skive.passes.channel_groups.groups import Group, Groups, channel_groups
from skive.passes.channel_groups.labels import WINDOW
from skive.passes.channel_groups.removal import emptied, without, zeroed

__all__ = ["WINDOW", "Group", "Groups", "channel_groups", "emptied", "without", "zeroed"]
