"""A graph of the compiler as a `torch.nn.Module`, and back."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from skive.errors import PruningError, UnsupportedOpError
from skive.ir import Graph, Node, constant
from skive.torch.operations import FUNCTIONS, computed

TOLERANCE = 1e-3  # relative, of a batch against its samples one by one


class Network(nn.Module):
    """The canonical float `graph` as a module whose parameters are its float32 constants.

    Called with tensors of the graph's inputs, of any number of samples along dimension 0; returns the
    output, or a tuple of them. UnsupportedOpError for operations that cannot be trained, and for
    networks that do not treat the samples of a batch alike.

    `normalise(inputs)` puts batch normalisation, which compilers fold away, back behind every convolution:
    training needs it. It starts as the identity on `inputs` and is folded again by `graph()`.
    `masks` are the weights that are zero and stay zero, whatever loop trains the network.
    """

    def __init__(self, graph: Graph):
        super().__init__()
        missing = {n for n in graph.nodes if n.op not in FUNCTIONS and n.op not in ("input", "const")}
        if missing:
            raise UnsupportedOpError([(n.label(), n.op, "train the model in its own framework") for n in missing])
        self._graph = graph
        self.sparsity: dict[str, Any] = {}
        self._weights = nn.ParameterList()
        self._place: dict[Node, int] = {}
        for node in graph.nodes:
            tables = all(u.op == "resize2d" for u in graph.users[node])
            if node.is_const and node.dtype.is_float and node.type.size > 1 and not tables:
                self._place[node] = len(self._weights)
                self._weights.append(nn.Parameter(torch.from_numpy(np.array(node.value))))
        self._fixed = {n: torch.from_numpy(np.array(n.value)) for n in graph.nodes
                       if n.is_const and n not in self._place}
        self._norms = nn.ModuleDict()
        self._norm_of: dict[Node, str] = {}
        self._masks: dict[Node, torch.Tensor] = {}
        self._fades: dict[Node, torch.Tensor] = {}
        self._check()

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        """Shares the graph, whose nodes are compared by identity."""
        twin = Network(self._graph)
        twin._norms, twin._norm_of = copy.deepcopy(self._norms, memo), dict(self._norm_of)
        twin.load_state_dict(self.state_dict())
        twin._masks, twin._fades = dict(self._masks), dict(self._fades)
        twin.train(self.training)
        return twin

    @property
    def source(self) -> Graph:
        """The graph that the network was made of, with the weights that it had."""
        return self._graph

    @property
    def constants(self) -> dict[Node, nn.Parameter]:
        """The parameter of each constant of the graph that is trained."""
        return {n: self._weights[i] for n, i in self._place.items()}

    @property
    def masks(self) -> dict[Node, np.ndarray]:
        """By constant, which of its weights stay (bool of its shape); the others are zero in every result."""
        return {n: m.detach().numpy() > 0 for n, m in self._masks.items()}

    @masks.setter
    def masks(self, masks: Mapping[Node, np.ndarray]) -> None:
        for node, stays in masks.items():
            if node not in self._place or stays.shape != node.shape:
                raise PruningError(f"{node.label()} is no constant of this network that a mask of {list(stays.shape)} "
                                   "fits: take the nodes of `constants`")
        self._masks = {n: torch.from_numpy(m.astype(np.float32)) for n, m in masks.items()}

    def fade(self, factors: Mapping[Node, Mapping[int, np.ndarray | torch.Tensor]]) -> None:
        """Multiplies constants from now on: by constant and axis, a factor per index; gradients reach factors that are
        tensors. Where batch normalisation would undo it, behind a convolution, its result is multiplied instead."""
        for node, by_axis in factors.items():
            user = self._graph.users[node][0]
            total = torch.ones(node.shape)
            for axis, given in by_axis.items():
                factor = torch.as_tensor(given, dtype=torch.float32)
                if user in self._norm_of and axis == 0:
                    if node is user.inputs[1]:
                        self._fades[user] = factor
                else:
                    total = total * factor.reshape([-1 if a == axis else 1 for a in range(total.dim())])
            if node in self._place:
                self._masks[node] = total

    def weight(self, node: Node) -> torch.Tensor:
        """The parameter of a constant, zero where its mask says so."""
        w = self._weights[self._place[node]]
        return w * self._masks[node] if node in self._masks else w

    def forward(self, *inputs: torch.Tensor) -> Any:
        values = self._run(inputs, {})
        results = tuple(values[o] for o in self._graph.outputs)
        return results[0] if len(results) == 1 else results

    def _run(self, inputs: Sequence[torch.Tensor], watched: dict[Node, torch.Tensor]) -> dict[Node, torch.Tensor]:
        """Every value of the graph; `watched` gets what convolutions compute before they are normalised."""
        values: dict[Node, torch.Tensor] = dict(zip(self._graph.inputs, inputs, strict=True))
        left = {n: len(u) for n, u in self._graph.users.items()}
        for node in self._graph.nodes:
            if node.is_const:
                values[node] = self.weight(node) if node in self._place else self._fixed[node]
                continue
            if node.op == "input":
                continue
            y = computed(node.op, [values[i] for i in node.inputs], node.attrs)
            if node in watched:
                watched[node] = y
            if node in self._norm_of:
                y = self._norms[self._norm_of[node]](y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
                if node in self._fades:
                    y = y * self._fades[node]
            values[node] = y
            for i in node.inputs:
                left[i] -= 1
                if not left[i] and i not in self._graph.outputs:
                    del values[i]
        return values

    @torch.no_grad()
    def _check(self) -> None:
        """Samples of a batch must give what they give one by one."""
        generator = torch.Generator().manual_seed(0)
        if any(not i.dtype.is_float or i.shape[:1] != (1,) for i in self._graph.inputs):
            return  # the caller's batches are the graph's
        batch = [torch.randn(2, *i.shape[1:], generator=generator) for i in self._graph.inputs]
        try:
            whole = self(*batch)
            parts = [self(*(b[i:i + 1] for b in batch)) for i in range(2)]
        except (RuntimeError, NotImplementedError) as e:
            raise UnsupportedOpError([(self._graph.name, str(e).splitlines()[0],
                                       "train the model in its own framework")]) from None
        for k, got in enumerate(whole if isinstance(whole, tuple) else (whole,)):
            want = torch.cat([p[k] if isinstance(p, tuple) else p for p in parts])
            if got.shape != want.shape or (got - want).abs().max() > TOLERANCE * (want.abs().max() + 1e-6):
                raise UnsupportedOpError([(self._graph.name, "a batch is not its samples one by one",
                                           "give the network a batch of 1 along dimension 0")])

    @torch.no_grad()
    def normalise(self, *inputs: torch.Tensor) -> Network:
        """Batch normalisation behind every convolution, the identity on `inputs`; returns the network itself."""
        users = self._graph.users
        watched: dict[Node, torch.Tensor] = {
            n: torch.empty(0) for n in self._graph.nodes
            if n.op == "conv2d" and n not in self._norm_of and not n.attrs.get("epilogue")
            and all(i in self._place and len(users[i]) == 1 for i in n.inputs[1:])}
        self._run(inputs, watched)
        for node, y in watched.items():
            flat = y.reshape(-1, y.shape[-1])
            norm = nn.BatchNorm2d(y.shape[-1]).train(self.training)
            variance, mean = torch.var_mean(flat, 0, unbiased=False)
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
            norm.weight.copy_((variance + norm.eps).sqrt())
            norm.bias.copy_(mean)
            key = str(len(self._norms))
            self._norms[key], self._norm_of[node] = norm, key
        return self

    @torch.no_grad()
    def graph(self) -> Graph:
        """The network with the weights it has now, batch normalisation folded: what `skive.compile` takes."""
        values = {n: self.weight(n).detach().numpy().astype(np.float64) for n in self._place}
        biases: dict[Node, np.ndarray] = {}
        for node, key in self._norm_of.items():
            norm: Any = self._norms[key]
            scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).double().numpy()
            shift = norm.bias.double().numpy() - norm.running_mean.double().numpy() * scale
            if node in self._fades:
                scale, shift = (v * self._fades[node].detach().double().numpy() for v in (scale, shift))
            w, *bias = node.inputs[1:3]
            values[w] = values[w] * scale[:, None, None, None]
            if bias:
                values[bias[0]] = values[bias[0]] * scale + shift
            else:
                biases[node] = shift
        new: dict[Node, Node] = {}
        for n in self._graph.nodes:
            if n in values:
                new[n] = constant(values[n].astype(np.float32), name=n.name, origin=n.origin)
            else:
                inputs = tuple(new[i] for i in n.inputs)
                if n in biases:
                    inputs += (constant(biases[n].astype(np.float32), origin=n.origin),)
                new[n] = dataclasses.replace(n, inputs=inputs) if inputs else n
        return self._graph.with_nodes(new)

    @torch.no_grad()
    def reset(self, seed: int = 0) -> Network:
        """Weights drawn anew (He et al., 2015), biases zero, normalisation as at the start: what a network of this
        shape learns from scratch. Returns the network itself."""
        generator = torch.Generator().manual_seed(seed)
        for node, w in self.constants.items():
            if w.dim() > 1 and any(u.inputs[1] is node for u in self._graph.users[node] if len(u.inputs) > 1):
                w.copy_(torch.randn(w.shape, generator=generator) * (2 / w[0].numel()) ** 0.5)
            elif w.dim() == 1:
                w.zero_()
        for norm in self._norms.values():
            norm.reset_parameters()
        return self


def network(model: Any, example_inputs: Any = None) -> Network:
    """The Network of anything that `skive.compile` reads."""
    return Network(canonical_graph(model, example_inputs))


def canonical_graph(model: Any, example_inputs: Any = None) -> Graph:
    """The graph on which channels are found."""
    from skive import frontend, passes

    if isinstance(model, Network):
        return model.graph()
    graph = frontend.open_model(model, example_inputs=example_inputs).graph()
    return passes.canonical(graph, check="never")[0]
