"""One step of a gradient optimiser (ai.onnx.preview.training): ordinary elementwise arithmetic."""

from __future__ import annotations

from collections.abc import Callable

from skive.errors import InvalidModelError
from skive.frontend.onnx.table import Call, onnx_op
from skive.ir import Node

TRAINING = "ai.onnx.preview.training"


def each_tensor(c: Call, states: int, step: Callable[..., tuple[Node, ...]]) -> list[Node]:
    """`step(x, gradient, *state)` for every optimised tensor; results grouped as ONNX wants them."""
    groups = 2 + states
    count, rest = divmod(len(c.inputs) - 2, groups)
    if rest or count < 1:
        raise InvalidModelError(f"{len(c.inputs)} inputs are not groups of {groups}")
    columns = [step(*(c[2 + g * count + i] for g in range(groups))) for i in range(count)]
    return [v for row in zip(*columns) for v in row]


def regularised(c: Call, x: Node, gradient: Node) -> Node:
    return c.make("add", c.make("mul", x, float(c.attr("norm_coefficient", 0.0))), gradient)


@onnx_op("Adagrad", domain=TRAINING)
def adagrad(c: Call) -> list[Node]:
    rate, count = c[0], c.cast(c[1], c[0].dtype)
    decayed = c.make("div", rate, c.make("add", c.make("mul", count, float(c.attr("decay_factor", 0.0))), 1.0))

    def step(x: Node, gradient: Node, squares: Node) -> tuple[Node, ...]:
        g = regularised(c, x, gradient)
        total = c.make("add", squares, c.make("mul", g, g))
        adaptive = c.make("add", c.make("sqrt", total), float(c.attr("epsilon", 1e-6)))
        return c.make("sub", x, c.make("div", c.make("mul", decayed, g), adaptive)), total

    return each_tensor(c, 1, step)


@onnx_op("Momentum", domain=TRAINING)
def momentum(c: Call) -> list[Node]:
    rate, count = c[0], c[1]
    alpha, beta = float(c.required("alpha")), float(c.required("beta"))
    nesterov = c.choice("mode", "standard", "nesterov") == "nesterov"
    factor = c.make("where", c.make("greater", count, 0), c.lit(beta, rate.dtype), c.lit(1.0, rate.dtype))

    def step(x: Node, gradient: Node, velocity: Node) -> tuple[Node, ...]:
        g = regularised(c, x, gradient)
        v = c.make("add", c.make("mul", velocity, alpha), c.make("mul", g, factor))
        direction = c.make("add", g, c.make("mul", v, alpha)) if nesterov else v
        return c.make("sub", x, c.make("mul", rate, direction)), v

    return each_tensor(c, 1, step)


@onnx_op("Adam", domain=TRAINING)
def adam(c: Call) -> list[Node]:
    rate, count = c[0], c.cast(c[1], c[0].dtype)
    alpha, beta = float(c.attr("alpha", 0.9)), float(c.attr("beta", 0.999))
    late = c.make("greater", count, 0.0)

    def unbiased(base: float) -> Node:
        return c.make("sub", 1.0, c.make("pow", c.lit(base, rate.dtype), count))

    scaled = c.make("div", c.make("mul", rate, c.make("sqrt", unbiased(beta))), unbiased(alpha))
    corrected = c.make("where", late, scaled, rate)

    def step(x: Node, gradient: Node, first: Node, second: Node) -> tuple[Node, ...]:
        g = regularised(c, x, gradient)
        v = c.make("add", c.make("mul", first, alpha), c.make("mul", g, 1 - alpha))
        h = c.make("add", c.make("mul", second, beta), c.make("mul", c.make("mul", g, g), 1 - beta))
        root = c.make("add", c.make("sqrt", h), float(c.attr("epsilon", 1e-6)))
        moved = c.make("sub", x, c.make("div", c.make("mul", corrected, v), root))
        return c.make("mul", moved, 1 - float(c.attr("norm_coefficient_post", 0.0))), v, h

    return each_tensor(c, 2, step)
