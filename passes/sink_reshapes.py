"""`sink-reshapes`: reshapes move behind elementwise operations, so that these meet their producers.

A 1-D convolution is a 2-D one between two reshapes; without this pass its activation and residual
addition would stay outside its epilogue. A reshape moves no data, so nothing is lost either way.
"""

from __future__ import annotations

from skive import ops
from skive.ir import Graph, Node, constant
from skive.pipeline import pass_
from skive.rewrite import Match, op, rewrite, rule

ELEMENTWISE = "|".join(n for n, o in ops.OPS.items() if o.kind == "elementwise")


def _unit_axes_only(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return [d for d in a if d != 1] == [d for d in b if d != 1]


def reshaped_operand(node: Node, shape: tuple[int, ...], target: tuple[int, ...]) -> Node | None:
    """`node`, which broadcasts to `shape`, so that it broadcasts alike to the reshaped `target`."""
    if node.type.size == 1:
        new: tuple[int, ...] = ()
    elif node.shape == shape:
        new = target
    elif _unit_axes_only(shape, target):
        full = (1,) * (len(shape) - len(node.shape)) + node.shape
        wide = iter([d for d, s in zip(full, shape) if s != 1])
        new = tuple(1 if t == 1 else next(wide) for t in target)
    elif shape and target and node.shape[-1:] == shape[-1:] == target[-1:] and node.type.size == shape[-1]:
        new = shape[-1:]
    else:
        return None
    if new == node.shape:
        return node
    if node.is_const:
        return constant(node.value.reshape(new), name=node.name, origin=node.origin)
    return ops.make("reshape", node, shape=new, origin=node.origin)


def _leads(node: Node) -> list[Node]:
    """What the operands of `node` reshape, where a kernel or an elementwise operation computes it: a
    reshaped input or a view gains nothing from standing directly before `node`."""
    sources = [i.inputs[0] for i in node.inputs if i.op == "reshape" and i.shape == node.shape]
    return [i for i in sources if ops.op_of(i.op).epilogue is not None or ops.op_of(i.op).kind == "elementwise"]


@rule(op(ELEMENTWISE, where=lambda n: any(i.op == "reshape" and i.shape == n.shape for i in n.inputs)))
def behind_elementwise(m: Match) -> Node | None:
    root = m.root
    leads = _leads(root)
    for lead in leads:
        inputs = []
        for i in root.inputs:
            same = i.op == "reshape" and i.shape == root.shape and i.inputs[0].shape == lead.shape
            inputs.append(i.inputs[0] if same else reshaped_operand(i, root.shape, lead.shape))
        if any(i is None for i in inputs):
            continue
        moved = ops.make(root.op, *inputs, origin=root.origin, label=root.name, **root.attrs)  # type: ignore[arg-type]
        # Fewer computed operands stand behind a reshape than before: two operands of different
        # shapes cannot take turns for ever.
        if moved.shape == lead.shape and len(_leads(moved)) < len(leads):
            return ops.make("reshape", moved, shape=root.shape, origin=root.origin)
    return None


@rule(op(ELEMENTWISE, where=lambda n: any(i.op in ("reshape", "transpose") for i in n.inputs)))
def before_movement(m: Match) -> Node | None:
    """f(transpose(kernel(x))) = transpose(f(kernel(x))) for an f of one tensor, so that f joins the kernel."""
    root = m.root
    data = [i for i in root.inputs if i.type.size != 1 or not i.is_const]
    if len(data) != 1 or data[0].shape != root.shape:
        return None
    chain: list[Node] = []
    source = data[0]
    while source.op in ("reshape", "transpose") and m.only_use(source):
        chain.append(source)
        source = source.inputs[0]
    if not chain or not m.only_use(source) or ops.op_of(source.op).epilogue is None or source.dtype is not root.dtype:
        return None
    # Constants of one element may carry axes: only their value counts.
    operands = [source if i is data[0] else constant(i.value.reshape(()), origin=i.origin) for i in root.inputs]
    node = ops.make(root.op, *operands, origin=root.origin, label=root.name, **root.attrs)
    for movement in reversed(chain):
        node = ops.make(movement.op, node, origin=movement.origin, **movement.attrs)
    return node


@rule(op("reshape", op("reshape", name="inner")))
def reshape_of_reshape(m: Match) -> Node | None:
    x = m["inner"].inputs[0]
    return x if x.shape == m.root.shape else ops.make("reshape", x, shape=m.root.shape, origin=m.root.origin)


@pass_("sink-reshapes", exact=True)
def sink_reshapes(graph: Graph, options: object) -> Graph:
    """Reshapes of what a kernel or an elementwise operation computes, behind the elementwise users."""
    return rewrite(graph, [reshape_of_reshape, before_movement, behind_elementwise])
