"""Python control flow on tensors in `forward`, as a graph in which every decision is a `choose`.

`torch.export` runs `forward` on tensors without values and gives up where Python asks for one. Here the functions
that ask are interpreted from their source instead, everything else runs as it is. A decision forks the state of the
program (local variables, lists, dicts, attributes), both sides are run, and where they meet again what differs
becomes `skive::choose(condition, a, b)`: 20 gated blocks are 20 decisions, not 2**20 paths. The idea of splitting a
dynamic network by its control flow is that of Chen et al., DyCL, 2023; merging values at joins that of Torlak,
Bodik: A Lightweight Symbolic Virtual Machine for Solver-Aided Host Languages, 2014. See docs/decisions/0009.
"""
