"""Operators of PyTorch that its translation to ONNX lacks or gets wrong, in terms of others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from skive.errors import UnsupportedOpError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

aten = torch.ops.aten


def repaired(program: ExportedProgram) -> ExportedProgram:
    """`program` without operators that PyTorch's translation to ONNX computes otherwise or does not know, as far as
    others can say the same; itself where it has none of them. UnsupportedOpError for what no others can say."""
    _refuse(program)
    table = {target: make for target, (make, wanted) in REPAIRS.items()
             if any(wanted(node) for node in _calls(program, target))}
    return program.run_decompositions(table) if table else program


def _refuse(program: ExportedProgram) -> None:
    """UnsupportedOpError for what the translation forgets: the smoothing of labels, the projection of an LSTM's state,
    and the scale of antialiased resizing where it makes no whole length."""
    problems = [(node.name, "labels are smoothed", "leave the loss out of forward, or give label_smoothing=0")
                for node in _calls(program, aten.cross_entropy_loss.default)
                if _argument(node, 5, "label_smoothing", 0.0)]
    for node in _calls(program, aten.lstm.input):
        state, cell = (_value(v) for v in node.args[1])
        if state.shape[-1] != cell.shape[-1]:
            problems.append((node.name, "an LSTM projects its state (proj_size)", "leave proj_size out"))
    for target in (aten._upsample_bilinear2d_aa.vec, aten._upsample_bicubic2d_aa.vec):
        for node in _calls(program, target):
            sizes, scales = _argument(node, 0, "input").shape[-2:], _argument(node, 3, "scale_factors")
            if scales is not None and not _argument(node, 2, "align_corners") and any(
                    float(n * s) != round(n * s) for n, s in zip(sizes, scales, strict=True)):
                problems.append((node.name, f"antialiased resizing of {list(map(int, sizes))} by {list(scales)} ends "
                                 "within a pixel", "give size=(height, width), or recompute_scale_factor=True"))
    if problems:
        raise UnsupportedOpError(problems)


def _calls(program: ExportedProgram, target: Any) -> Iterator[Any]:
    """The nodes that call `target` or its form in place, in all graphs of `program`."""
    name, _, overload = str(target).partition("aten.")[2].rpartition(".")
    names = {f"aten.{name}.{overload}", f"aten.{name}_.{overload}"}
    for part in program.graph_module.modules():
        if isinstance(part, torch.fx.GraphModule):
            yield from (n for n in part.graph.nodes if n.op == "call_function" and str(n.target) in names)


def _value(argument: Any) -> Any:
    """What is known of an argument of a node: a tensor without values, or the argument."""
    return argument.meta.get("val") if isinstance(argument, torch.fx.Node) else argument


def _argument(node: Any, i: int, name: str, default: Any = None) -> Any:
    return _value(node.args[i] if i < len(node.args) else node.kwargs.get(name, default))


def _put(x: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False) -> Any:
    """`x[mask] = value` as `torch.where`, where `value` does not depend on how many are chosen."""
    masks = [i for i in indices if i is not None]
    lead = next((k for k, i in enumerate(indices) if i is not None), 0)
    if len(masks) != 1 or len(indices) != lead + 1 or masks[0].dtype != torch.bool or accumulate:
        return NotImplemented
    behind = x.dim() - lead - masks[0].dim()  # axes that the mask leaves whole
    if values.dim() == 0 or all(type(n) is int and n == 1 for n in values.shape):
        values = values.reshape(())
    elif values.dim() > behind:
        return NotImplemented
    return torch.where(masks[0].reshape(*masks[0].shape, *[1] * behind), values, x)


def _softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """The translation computes in the type of `x`, an integer too, and casts the result."""
    return aten._softmax(x if dtype is None else x.to(dtype), dim, False)


def _log_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    return aten._log_softmax(x if dtype is None else x.to(dtype), dim, False)


def _add(a: Tensor, b: Any, alpha: Any = 1) -> Any:
    """A sum of masks is their union."""
    if a.dtype != torch.bool or not isinstance(b, Tensor) or b.dtype != torch.bool or not alpha:
        return NotImplemented
    return torch.logical_or(a, b)


def _shifted(shift: Callable[[Tensor, Any], Tensor]) -> Callable[[Tensor, Any], Any]:
    """A shift of uint8, which the translation gives the type int8, in 32 bits."""

    def make(x: Tensor, by: Any) -> Any:
        if x.dtype != torch.uint8:
            return NotImplemented
        return shift(x.to(torch.int32), by.to(torch.int32) if isinstance(by, Tensor) else by).to(torch.uint8)

    return make


def _squeeze(x: Tensor, dims: int | list[int]) -> Tensor:
    """Axes longer than 1 stay, which the translation refuses."""
    unit = {d for d in _axes(x, dims) if type(x.shape[d]) is int and x.shape[d] == 1}
    return x.reshape([n for i, n in enumerate(x.shape) if i not in unit]) if unit else aten.clone(x)


def _axes(x: Tensor, dims: int | list[int]) -> list[int]:
    return [d % x.dim() for d in _each(dims, 1)] if x.dim() else []


def _fitting(index: Tensor, source: Tensor) -> Tensor:
    """The part of `source` that `index` has places for; ONNX wants equal shapes."""
    return source[tuple(slice(0, n) for n in index.shape)]


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
               is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False) -> Any:
    """Attention of four axes, which is what the translation takes; under a mask of bools queries that may look nowhere
    get zeros, where the translation averages."""
    usual = q.dim() == 4
    if usual and (attn_mask is None or attn_mask.dtype != torch.bool or dropout_p or (scale or 1.0) <= 0):
        return NotImplemented
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    if not usual:
        lead = torch.broadcast_shapes(*(t.shape[:-2] for t in (q, k, v)))
        q, k, v = (_of_four_axes(t, lead) for t in (q, k, v))
        mask = attn_mask if attn_mask is None or attn_mask.dim() <= 2 else _of_four_axes(attn_mask, lead)
        y = aten.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, scale=scale)
        return y.reshape(*lead, *y.shape[-2:])
    assert attn_mask is not None
    root = math.sqrt(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    seen = torch.where(attn_mask, 0.0, torch.finfo(q.dtype).min)
    weights = aten._softmax(torch.matmul(q * root, k.transpose(-2, -1) * root) + seen, -1, False)
    return torch.where(attn_mask.any(-1, keepdim=True), torch.matmul(weights, v), 0.0)


def _of_four_axes(x: Tensor, lead: Any) -> Tensor:
    """`x` over the axes `lead` in front of its last two, joined or filled up to two."""
    x = x.expand(*lead, *x.shape[-2:])
    return x.flatten(0, -4) if x.dim() > 4 else x.reshape(*[1] * (4 - x.dim()), *x.shape)


def _scatter_add(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Any:
    if source.shape == index.shape:
        return NotImplemented
    return aten.scatter_add(x, dim, index, _fitting(index, source))


def _scatter(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Any:
    if source.shape == index.shape:
        return NotImplemented
    return aten.scatter(x, dim, index, _fitting(index, source))


def _scatter_reduce(x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, include_self: bool = True) -> Any:
    """A mean is a sum divided by how many were added; the translation leaves the last one."""
    if reduce != "mean":
        if source.shape == index.shape:
            return NotImplemented
        return aten.scatter_reduce(x, dim, index, _fitting(index, source), reduce, include_self=include_self)
    source = _fitting(index, source)
    start = x if include_self else aten.scatter(x, dim, index, 0)
    count = aten.scatter_add(torch.ones_like(x) if include_self else torch.zeros_like(x), dim, index,
                             torch.ones_like(source))
    total = aten.scatter_add(start, dim, index, source)
    return torch.div(total, count.clamp(min=1), rounding_mode=None if x.is_floating_point() else "floor")


def _sort(x: Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """Ours is always stable."""
    return torch.sort(x, dim, descending)


def _argsort(x: Tensor, *, stable: bool, dim: int = -1, descending: bool = False) -> Tensor:
    return torch.sort(x, dim, descending)[1]


def _adaptive(axes: int, reduce: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, list[int]], Tensor]:
    """Windows of unequal sizes, joined: result i of n along an axis of `size` is of size i / n to size (i + 1) / n."""

    def make(x: Tensor, sizes: list[int]) -> Tensor:
        for axis, n in zip(range(-axes, 0), sizes, strict=True):
            size = x.shape[axis]
            if n in (None, size):
                continue
            windows = [x.narrow(axis, i * size // n, -(-(i + 1) * size // n) - i * size // n) for i in range(n)]
            x = torch.cat([reduce(w, axis) for w in windows], axis)
        return x

    return make


def _divided(axes: int) -> Callable[..., Any]:
    """Sums of windows by the divisor given, which the translation forgets: means of windows that are all whole."""

    def make(x: Tensor, kernel: list[int], stride: list[int] | None = None, padding: list[int] | int = 0,
             ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None) -> Any:
        if divisor_override is None:
            return NotImplemented
        sizes, moves, pads = (_each(v, axes) for v in (kernel, stride or kernel, padding))
        margins: list[int] = []
        for n, k, s, p in zip(x.shape[-axes:], sizes, moves, pads, strict=True):
            count = (-((k - n - 2 * p) // s) if ceil_mode else (n + 2 * p - k) // s) + 1
            if ceil_mode and (count - 1) * s >= n + p:
                count -= 1  # a window must not start in the padding behind
            margins = [p, max(p, (count - 1) * s + k - n - p), *margins]
        pool = {2: aten.avg_pool2d.default, 3: aten.avg_pool3d.default}[axes]
        return pool(aten.constant_pad_nd(x, margins), sizes, moves) * (math.prod(sizes) / divisor_override)

    return make


def _conv3d(x: Tensor, w: Tensor, bias: Tensor | None = None, *rest: Any) -> Any:
    """The translation adds zeros of a wrong shape where there is no bias."""
    return NotImplemented if bias is not None else aten.conv3d(x, w, w.new_zeros(w.shape[0]), *rest)


def _rrelu(x: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, generator: Any = None) -> Any:
    return NotImplemented if training else aten.leaky_relu(x, (lower + upper) / 2)


def _atan2(y: Tensor, x: Tensor) -> Tensor:
    """The translation takes 0 for negative: it gives -pi instead of pi on the negative axis."""
    angle = torch.atan(y / x)
    turned = torch.where(y >= 0, angle + math.pi, angle - math.pi)
    return torch.where((x == 0) & (y == 0), torch.zeros_like(angle), torch.where(x < 0, turned, angle))


def _angle(z: Tensor) -> Tensor:
    if z.is_complex():
        parts = torch.view_as_real(z)
        return _atan2(parts.select(-1, 1), parts.select(-1, 0))
    angle = torch.where(z < 0, math.pi, 0.0)
    return torch.where(z.isnan(), z, angle) if z.is_floating_point() else angle


def _cdist(a: Tensor, b: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    return torch.linalg.vector_norm(a.unsqueeze(-2) - b.unsqueeze(-3), p, -1)


def _searchsorted(bounds: Tensor, x: Tensor, *, out_int32: bool = False, right: bool = False, side: str | None = None,
                  sorter: Tensor | None = None) -> Any:
    """How many bounds lie before each value."""
    if sorter is not None:
        return NotImplemented
    bounds, x = bounds if bounds.dim() == 1 else bounds.unsqueeze(-2), x.unsqueeze(-1)
    before = bounds <= x if right or side == "right" else bounds < x
    return before.sum(-1, dtype=torch.int32 if out_int32 else torch.int64)


def _kthvalue(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    values, places = (t.narrow(dim, k - 1, 1) for t in torch.sort(x, dim))
    return (values, places) if keepdim else (values.squeeze(dim), places.squeeze(dim))


def _median(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return _kthvalue(x, (x.shape[dim] + 1) // 2, dim, keepdim)


def _median_of_all(x: Tensor) -> Tensor:
    return _median(x.reshape(-1), 0)[0]


def _aminmax(x: Tensor, *, dim: int | None = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    axes = list(range(x.dim())) if dim is None else [dim]
    return torch.amin(x, axes, keepdim), torch.amax(x, axes, keepdim)


def _log_sigmoid(x: Tensor) -> Tensor:
    """The logarithm of a sigmoid that has become zero says nothing."""
    return -torch.nn.functional.softplus(-x)


def _logaddexp(x: Tensor, y: Tensor) -> Tensor:
    """log(exp(x) + exp(y)) without exponentials that overflow."""
    apart = torch.where(x == y, torch.zeros_like(x - y), (x - y).abs())  # infinities, too
    return torch.maximum(x, y) + torch.nn.functional.softplus(-apart)


def _logaddexp2(x: Tensor, y: Tensor) -> Tensor:
    return _logaddexp(x * math.log(2), y * math.log(2)) / math.log(2)


def _logcumsumexp(x: Tensor, dim: int) -> Tensor:
    return _scanned((x,), dim, lambda before, behind: (_logaddexp(before[0], behind[0]),))[0]


def _binary_cross_entropy(x: Tensor, target: Tensor, weight: Tensor | None = None, pos_weight: Tensor | None = None,
                          reduction: int = 1) -> Tensor:
    """Of logits: -(target log(sigmoid(x)) + (1 - target) log(1 - sigmoid(x)))."""
    positive = 1 if pos_weight is None else 1 + (pos_weight - 1) * target
    loss = (1 - target) * x - positive * _log_sigmoid(x)
    loss = loss if weight is None else loss * weight
    return (loss, loss.mean(), loss.sum())[reduction]


def _hypot(x: Tensor, y: Tensor) -> Tensor:
    """Squares of the quotient neither overflow nor vanish."""
    x, y = torch.broadcast_tensors(x.abs(), y.abs())
    large, small = torch.maximum(x, y), torch.minimum(x, y)
    ratio = torch.where(small == large, torch.ones_like(large), small / large)
    return large * torch.sqrt(1 + ratio * ratio)


def _number(extreme: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """fmax and fmin: of a NaN and a number, the number."""
    return lambda x, y: torch.where(x != x, y, torch.where(y != y, x, extreme(x, y)))


def _copysign(x: Tensor, y: Tensor | float) -> Tensor:
    if not isinstance(y, Tensor):
        return -x.abs() if math.copysign(1, y) < 0 else x.abs()
    negative = (y < 0) | (y == 0) & (1 / y < 0)  # -0, too
    return torch.where(negative, -x.abs(), x.abs())


def _scanned(x: tuple[Tensor, ...], dim: int, join: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """`x` joined with all before it along `dim` in log2(n) steps (Hillis, Steele: Data Parallel Algorithms, 1986)."""
    step, length = 1, x[0].shape[dim] if x[0].dim() else 1
    while step < length:
        joined = join([t.narrow(dim, 0, length - step) for t in x], [t.narrow(dim, step, length - step) for t in x])
        x = tuple(torch.cat([t.narrow(dim, 0, step), j], dim) for t, j in zip(x, joined, strict=True))
        step *= 2
    return x


def _extreme_so_far(beats: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, int], tuple[Tensor, ...]]:
    """cummax and cummin: (values, places), of equal ones the last place; a NaN stays."""
    def join(before: list[Tensor], behind: list[Tensor]) -> tuple[Tensor, ...]:
        taken = beats(behind[0], before[0]) | (behind[0] != behind[0])
        return tuple(torch.where(taken, b, a) for a, b in zip(before, behind, strict=True))

    def make(x: Tensor, dim: int) -> tuple[Tensor, ...]:
        along = [1] * x.dim()
        if x.dim():
            along[dim] = -1
        places = torch.arange(x.shape[dim] if x.dim() else 1, device=x.device).reshape(along).expand(x.shape)
        return _scanned((x, places), dim, join)

    return make


def _cumprod(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    x = x.to(dtype or (x.dtype if x.is_floating_point() else torch.int64))
    return _scanned((x,), dim, lambda before, behind: (before[0] * behind[0],))[0]


def _pdist(x: Tensor, p: float = 2.0) -> Tensor:
    first, second = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return torch.linalg.vector_norm(x[first] - x[second], p, -1)


def _masked_scatter(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """The n-th place of the mask takes the n-th value of the source; a source that is too short gives its last."""
    x, mask = torch.broadcast_tensors(x, mask)
    turn = torch.cumsum(mask.reshape(-1).to(torch.int64), 0).clamp(1, source.numel()) - 1
    return torch.where(mask, source.reshape(-1)[turn].reshape(mask.shape), x)


def _each(v: list[int] | int, axes: int) -> list[int]:
    values = [v] if isinstance(v, int) else list(v)
    return values * axes if len(values) == 1 else values


def _mean(x: Tensor, axis: int) -> Tensor:
    return x.mean(axis, keepdim=True)


def _largest(x: Tensor, axis: int) -> Tensor:
    return x.amax(axis, keepdim=True)


def _with_indices(make: Callable[[Tensor, list[int]], Tensor]) -> Callable[[Tensor, list[int]], tuple[Tensor, Tensor]]:
    def both(x: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
        y = make(x, sizes)
        return y, torch.zeros_like(y, dtype=torch.int64)  # used by no one: see `wanted`

    return both


def _uneven(axes: int) -> Callable[[Any], bool]:
    """Whether an adaptive pooling has windows of unequal sizes; ordinary ones are translated as they are."""

    def wanted(node: Any) -> bool:
        x, sizes = _argument(node, 0, "self"), _argument(node, 1, "output_size")
        pairs = list(zip(x.shape[-axes:], sizes, strict=True))
        known = all(type(d) is int for d, _ in pairs) and all(n is None or type(n) is int and n > 0 for _, n in pairs)
        return known and any(n is not None and d % n for d, n in pairs) and not _indices_used(node)

    return wanted


def _indices_used(node: Any) -> bool:
    """Whether anything reads the places of the largest values of this pooling or of its like in the graph."""
    return any(u.op == "call_function" and u.args[1:] == (1,) and u.users
               for like in node.graph.nodes if like.target == node.target for u in like.users
               if getattr(u.target, "__name__", "") == "getitem")


def _integers(node: Any) -> bool:
    return not _argument(node, 0, "self").is_floating_point()


def _masks(node: Any) -> bool:
    return getattr(node.meta.get("val"), "dtype", None) == torch.bool


def _bytes(node: Any) -> bool:
    return _argument(node, 0, "self").dtype == torch.uint8


def _keeps(node: Any) -> bool:
    """Whether a squeezed axis is longer than 1."""
    x = _argument(node, 0, "self")
    return any(type(x.shape[d]) is not int or x.shape[d] != 1 for d in _axes(x, _argument(node, 1, "dim")))


def _unlike(node: Any) -> bool:
    """Whether a scattered source is larger than its index."""
    return _argument(node, 2, "index").shape != _argument(node, 3, "src").shape


def _unlike_or_mean(node: Any) -> bool:
    return _argument(node, 4, "reduce") == "mean" or _unlike(node)


def _unusual(node: Any) -> bool:
    mask = _argument(node, 3, "attn_mask")
    return mask is not None and mask.dtype == torch.bool or _argument(node, 0, "query").dim() != 4


def _without_bias(node: Any) -> bool:
    return _argument(node, 2, "bias") is None


def _gives_divisor(node: Any) -> bool:
    return _argument(node, 6, "divisor_override") is not None


def _always(_node: Any) -> bool:
    return True


_left, _right = (_shifted(f) for f in (torch.bitwise_left_shift, torch.bitwise_right_shift))
_means = {n: _adaptive(n, _mean) for n in (1, 2, 3)}
_tops = {n: _with_indices(_adaptive(n, _largest)) for n in (1, 2, 3)}

# operator: (what takes its place, which nodes need it)
REPAIRS: dict[Any, tuple[Callable[..., Any], Callable[[Any], bool]]] = {
    aten.index_put.default: (_put, _always),
    aten.softmax.int: (_softmax, _integers),
    aten.log_softmax.int: (_log_softmax, _integers),
    aten.add.Tensor: (_add, _masks),
    aten.__lshift__.Scalar: (_left, _bytes), aten.__rshift__.Scalar: (_right, _bytes),
    aten.bitwise_left_shift.Tensor: (_left, _bytes), aten.bitwise_right_shift.Tensor: (_right, _bytes),
    aten.bitwise_left_shift.Tensor_Scalar: (_left, _bytes), aten.bitwise_right_shift.Tensor_Scalar: (_right, _bytes),
    aten.scaled_dot_product_attention.default: (_attention, _unusual),
    aten.avg_pool2d.default: (_divided(2), _gives_divisor), aten.avg_pool3d.default: (_divided(3), _gives_divisor),
    aten.conv3d.default: (_conv3d, _without_bias), aten.conv3d.padding: (_conv3d, _without_bias),
    aten.atan2.default: (_atan2, _always), aten.angle.default: (_angle, _always),
    aten.cdist.default: (_cdist, _always), aten.searchsorted.Tensor: (_searchsorted, _always),
    aten.kthvalue.default: (_kthvalue, _always), aten.median.dim: (_median, _always),
    aten.median.default: (_median_of_all, _always), aten.aminmax.default: (_aminmax, _always),
    aten.log_sigmoid.default: (_log_sigmoid, _always), aten.logaddexp.default: (_logaddexp, _always),
    aten.logaddexp2.default: (_logaddexp2, _always), aten.logcumsumexp.default: (_logcumsumexp, _always),
    aten.binary_cross_entropy_with_logits.default: (_binary_cross_entropy, _always),
    aten.fmax.default: (_number(torch.maximum), _always), aten.fmin.default: (_number(torch.minimum), _always),
    aten.hypot.default: (_hypot, _always), aten.masked_scatter.default: (_masked_scatter, _always),
    aten.copysign.Tensor: (_copysign, _always), aten.copysign.Scalar: (_copysign, _always),
    aten.cummax.default: (_extreme_so_far(torch.ge), _always),
    aten.cummin.default: (_extreme_so_far(torch.le), _always),
    aten.cumprod.default: (_cumprod, _always), aten.pdist.default: (_pdist, _always),
    aten.rrelu.default: (_rrelu, _always),
    aten.squeeze.dim: (_squeeze, _keeps), aten.squeeze.dims: (_squeeze, _keeps),
    aten.scatter_add.default: (_scatter_add, _unlike),
    aten.scatter.src: (_scatter, _unlike),
    aten.scatter_reduce.two: (_scatter_reduce, _unlike_or_mean),
    aten.sort.stable: (_sort, _always), aten.argsort.stable: (_argsort, _always),
    aten.adaptive_avg_pool1d.default: (_means[1], _uneven(1)),
    aten.adaptive_avg_pool2d.default: (_means[2], _uneven(2)),
    aten.adaptive_avg_pool3d.default: (_means[3], _uneven(3)),
    aten.adaptive_max_pool1d.default: (_tops[1], _uneven(1)),
    aten.adaptive_max_pool2d.default: (_tops[2], _uneven(2)),
    aten.adaptive_max_pool3d.default: (_tops[3], _uneven(3)),
}
