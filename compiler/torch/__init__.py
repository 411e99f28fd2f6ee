"""Helpers for users of PyTorch. Importing this package imports torch.

    network = skive.torch.prune("net.onnx", skive.Prune(macs=0.5, calibration=x))   # or a torch module
    skive.torch.finetune(network, loader, epochs=4, lr=0.02, distill=teacher)
    skive.compile(network.graph(), ...)

What is trained here is the compiler's own form of the network, so models of both front ends can be trained, and
nothing of a pruned network's code has to be rewritten. Early exits are trained in the user's module.
"""

from __future__ import annotations

from skive.torch.exits import WithExits, add_exits, exit_point, suggest_exits, train_exits
from skive.torch.gates import fit_gates, train_gates
from skive.torch.hesso import hesso
from skive.torch.network import Network, network
from skive.torch.training import finetune, importance, prune, sparsify
from skive.torch.widths import search_widths

__all__ = ["Network", "WithExits", "add_exits", "exit_point", "finetune", "fit_gates", "hesso", "importance", "network",
           "prune", "search_widths", "sparsify", "suggest_exits", "train_exits", "train_gates"]
