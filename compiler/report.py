"""The compile report as one HTML page that needs nothing beside it.

The page is text, tables and SVG without a script; what it draws is also in it as data, so that a
profile can be added later (`with_profile`). The same report and graphs give the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from skive import explanation, ops
from skive.errors import InvalidModelError
from skive.ir import Graph, Node

# A drawing of more nodes than this is no longer read: the page lists them instead.
DRAWN_NODES = 400
DRAWN_WIDTH = 2200  # pixels; the same for one with many ways side by side

# Pixels for a drawing on the page: beside the other one, and alone.
_COLUMN, _ROW = 520, 1088

# Pixels of a drawing.
_BOX_WIDTH, _BOX_HEIGHT = 184, 36
_GAP_X, _GAP_Y = 18, 26
_WIRE_WIDTH = 10  # of a layer that an edge only passes through

_DATA = re.compile(r'<script type="application/json" id="skive-graphs">(.*?)</script>', re.DOTALL)


@dataclass(frozen=True)
class Drawn:
    """A node as the page shows it: `inputs` are indices of earlier nodes."""

    label: str
    op: str
    type: str
    detail: str
    inputs: tuple[int, ...]
    output: bool = False

    @property
    def dims(self) -> str:
        """The shape alone, if it fits beside the operation: letters of 7 and digits of 6 pixels."""
        text = self.type.partition("[")[2].removesuffix("]").replace(",", "×")
        return text if 7 * len(self.op) + 6 * len(text) <= _BOX_WIDTH - 36 else ""

    @property
    def kind(self) -> str:
        """The group of operations that decides the colour."""
        row = ops.OPS.get(self.op)
        return row.kind if row else "source"


def outline(graph: Graph) -> tuple[Drawn, ...]:
    """The nodes of `graph` without its constants, in execution order."""
    index: dict[Node, int] = {}
    drawn: list[Drawn] = []
    for n in graph.nodes:
        if n.is_const:
            continue
        index[n] = len(drawn)
        fused = str(n.attrs.get("epilogue") or n.attrs.get("fn") or "")
        drawn.append(Drawn(n.label(), n.op, str(n.type), fused,
                           tuple(index[i] for i in n.inputs if not i.is_const),
                           any(n is o for o in graph.outputs)))
    return tuple(drawn)


# ---------------------------------------------------------------------------------------- drawing


def _layers(nodes: Sequence[Drawn]) -> list[int]:
    """The layer of each node: one below the lowest of its operands (longest path).

    An input sits right above its first user, not at the top of the page.
    """
    layer = [0] * len(nodes)
    for i, n in enumerate(nodes):
        layer[i] = max((layer[j] + 1 for j in n.inputs), default=0)
    first_use: dict[int, int] = {}
    for i, n in enumerate(nodes):
        for j in n.inputs:
            first_use[j] = min(first_use.get(j, layer[i]), layer[i])
    return [first_use[i] - 1 if not n.inputs and i in first_use else layer[i] for i, n in enumerate(nodes)]


def _spread(wanted: Sequence[float], widths: Sequence[float]) -> list[float]:
    """Centres closest to `wanted` (least squares) that keep the order and do not overlap.

    With the space that the boxes before it take subtracted, each centre must not be smaller than
    the one before: isotonic regression, solved by pooling adjacent violators.
    """
    offsets, at = [], 0.0
    for k, w in enumerate(widths):
        at += (widths[k - 1] + w) / 2 + _GAP_X if k else 0.0
        offsets.append(at)
    pools: list[list[float]] = []  # [sum, count]
    for want, offset in zip(wanted, offsets, strict=True):
        pools.append([want - offset, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1][0] += total
            pools[-1][1] += count
    means = [total / count for total, count in pools for _ in range(int(count))]
    return [m + o for m, o in zip(means, offsets, strict=True)]


@dataclass(frozen=True)
class Box:
    """A placed node: the upper left corner in pixels."""

    node: Drawn
    x: int
    y: int
    text: str
    small: str
    dims: str


@dataclass(frozen=True)
class Picture:
    """A placed graph: boxes, and edges as SVG paths."""

    width: int
    height: int
    boxes: tuple[Box, ...]
    paths: tuple[str, ...]
    box_width: int = _BOX_WIDTH
    box_height: int = _BOX_HEIGHT


def draw(nodes: Sequence[Drawn]) -> Picture:
    """A layered drawing: longest-path layers, crossings reduced by barycentres, straightened.

    Sugiyama, Tagawa, Toda: Methods for visual understanding of hierarchical system structures, 1981.
    """
    if not nodes:
        return Picture(0, 0, (), ())
    layer = _layers(nodes)
    rows: list[list[int]] = [[] for _ in range(max(layer) + 1)]
    for i, at in enumerate(layer):
        rows[at].append(i)
    # An edge over several layers passes each through a wire: an invisible node, numbered from
    # len(nodes) on.
    above: dict[int, list[int]] = {i: [] for i in range(len(nodes))}
    below: dict[int, list[int]] = {i: [] for i in range(len(nodes))}
    chains: list[list[int]] = []
    count = len(nodes)
    for i, n in enumerate(nodes):
        for j in dict.fromkeys(n.inputs):
            chain = [j]
            for at in range(layer[j] + 1, layer[i]):
                rows[at].append(count)
                above[count], below[count] = [], []
                chain.append(count)
                count += 1
            chain.append(i)
            chains.append(chain)
            for a, b in zip(chain, chain[1:], strict=False):
                below[a].append(b)
                above[b].append(a)

    width = [_BOX_WIDTH if i < len(nodes) else _WIRE_WIDTH for i in range(count)]
    x = [0.0] * count

    def settle(row: list[int], neighbours: Mapping[int, list[int]], *, sort: bool) -> None:
        wanted = {i: sum(x[j] for j in neighbours[i]) / len(neighbours[i]) if neighbours[i] else x[i] for i in row}
        if sort:
            row.sort(key=lambda i: wanted[i])  # stable: ties keep their order
        for i, centre in zip(row, _spread([wanted[i] for i in row], [width[i] for i in row]), strict=True):
            x[i] = centre

    for sweep in range(6):
        for row in rows:
            settle(row, above, sort=sweep < 4)
        for row in reversed(rows):
            settle(row, below, sort=sweep < 4)
    left = min(x[i] - width[i] / 2 for i in range(count)) - _GAP_X
    right = max(x[i] + width[i] / 2 for i in range(count)) + _GAP_X
    step = _BOX_HEIGHT + _GAP_Y

    def centre(i: int) -> int:
        return round(x[i] - left)

    row_of = {i: r for r, row in enumerate(rows) for i in row}
    boxes = tuple(Box(n, centre(i) - _BOX_WIDTH // 2, row_of[i] * step + _GAP_Y, _cut(n.op, 18),
                      _cut(n.label, 30), n.dims) for i, n in enumerate(nodes))
    paths = []
    for chain in chains:
        points = [(centre(chain[0]), row_of[chain[0]] * step + _GAP_Y + _BOX_HEIGHT)]
        path = f"M{points[0][0]} {points[0][1]}"
        x0, y0 = points[0]
        for i in chain[1:]:
            x1, y1 = centre(i), row_of[i] * step + _GAP_Y
            half = (y1 - y0) // 2
            path += f"V{y1}" if x1 == x0 else f"C{x0} {y0 + half} {x1} {y1 - half} {x1} {y1}"
            if i >= len(nodes):  # straight through the layer
                y1 += _BOX_HEIGHT
                path += f"V{y1}"
            x0, y0 = x1, y1
        paths.append(path)
    return Picture(round(right - left), len(rows) * step + _GAP_Y, boxes, tuple(paths))


def _cut(text: str, length: int) -> str:
    """`text` in at most `length` characters; of a path-like name the end says most."""
    text = clean(text)
    return text if len(text) <= length else "…" + text[1 - length:]


def clean(text: Any) -> str:
    """`text` without characters that are invisible or reorder their neighbours."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


# ------------------------------------------------------------------------------------------ plot


@dataclass(frozen=True)
class Bar:
    """A layer's row of the plot; fractions are of the largest value in that column."""

    label: str
    title: str
    fractions: tuple[float, ...]
    texts: tuple[str, ...]
    starts: tuple[float, ...] = ()  # where each bar begins, as a fraction; at 0 if not given


@dataclass(frozen=True)
class Plot:
    """Horizontal bars: one row per layer, one column per quantity."""

    columns: tuple[str, ...]
    bars: tuple[Bar, ...]


def plot(layers: Sequence[Mapping[str, Any]], profile: Mapping[str, Any] | None) -> Plot:
    """MACs and bytes of every layer, and its time where it was measured."""
    quantities: list[tuple[str, list[float], Any]] = []
    if profile:
        times = [float(layer["us"]) for layer in profile["layers"]]
        quantities.append(("time", times, microseconds))
    quantities += [("MACs", [float(layer["macs"]) for layer in layers], decimal),
                   ("bytes moved", [float(layer["bytes"]) for layer in layers], size)]
    bars = []
    for i, layer in enumerate(layers):
        values = [v[i] for _, v, _ in quantities]
        tops = [max(v) or 1.0 for _, v, _ in quantities]
        bars.append(Bar(_cut(layer["name"] or layer["op"], 34), f"{i}: {clean(layer['name'])} ({clean(layer['op'])})",
                        tuple(round(v / t, 4) for v, t in zip(values, tops, strict=True)),
                        tuple(f(v) if v else "" for v, (_, _, f) in zip(values, quantities, strict=True))))
    return Plot(tuple(name for name, _, _ in quantities), tuple(bars))


_PLOTTED_DB = 60.0  # a bar of the full width


def quantization_plot(layers: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Signal-to-noise ratio, share of the output's noise, and range of each layer; None if nothing was measured."""
    shown = [layer for layer in layers if layer.get("sqnr_db") is not None or layer.get("range")]
    if not shown:
        return None
    shares = [layer.get("noise_share") or 0.0 for layer in shown]
    most = max(shares) or 1.0
    low = min([layer["range"][0] for layer in shown if layer.get("range")], default=0.0)
    high = max([layer["range"][1] for layer in shown if layer.get("range")], default=0.0)
    low, width = min(0.0, low), (max(0.0, high) - min(0.0, low)) or 1.0
    bars = []
    for layer, share in zip(shown, shares, strict=True):
        db, seen = layer.get("sqnr_db"), layer.get("range")
        values = [("", 0.0, 0.0) if db is None else (f"{db:.1f} dB", 0.0, min(1.0, max(0.0, db / _PLOTTED_DB))),
                  (f"{100 * share:.0f} %", 0.0, share / most) if share else ("", 0.0, 0.0),
                  (f"{seen[0]:.3g} … {seen[1]:.3g}", (seen[0] - low) / width, (seen[1] - seen[0]) / width)
                  if seen else ("", 0.0, 0.0)]
        texts, starts, fractions = zip(*values, strict=True)
        bars.append(Bar(f"{_cut(layer['name'] or layer['op'], 26)} {layer['dtype']}",
                        f"{clean(layer['name'])} ({clean(layer['op'])}), {layer['dtype']}",
                        tuple(round(f, 4) for f in fractions), texts, tuple(round(f, 4) for f in starts)))
    return Plot(("signal to noise", "share of the output's noise", "range"), tuple(bars))


# ------------------------------------------------------------------------------------------- text


def decimal(n: float) -> str:
    """`n` to three digits with a decimal suffix."""
    for suffix in ("", "K", "M"):
        if n < 999.5:
            return f"{n:.3g}{suffix}" if suffix else f"{n:.0f}"
        n /= 1000
    return f"{n:.3g}G"


def size(n: float) -> str:
    """`n` bytes to three digits with a binary unit."""
    if n < 1024:
        return f"{n:.0f} B"
    for unit in ("KB", "MB"):
        n /= 1024
        if n < 999.5:
            return f"{n:.3g} {unit}"
    return f"{n / 1024:.3g} GB"


def span(limits: Sequence[float] | None) -> str:
    """An interval to three digits; nothing if there is none."""
    return f"{limits[0]:.3g} … {limits[1]:.3g}" if limits else ""


def types(layer: Mapping[str, Any]) -> str:
    """What a kernel reads and writes: `u8 → f32`, or one type for both."""
    if "dtype" not in layer:
        return ""
    reads, writes = ", ".join(layer["reads"]) or "constants", layer["writes"]
    return writes if reads == writes else f"{reads} → {writes}"


def ratio(db: float | None) -> str:
    """Decibels to one digit behind the point; nothing if not measured."""
    return "" if db is None else f"{db:.1f}"


def microseconds(us: float) -> str:
    """A duration to three digits in the unit that suits it."""
    return f"{us:.3g} µs" if us < 999.5 else f"{us / 1e3:.3g} ms" if us < 999.5e3 else f"{us / 1e6:.3g} s"


# ------------------------------------------------------------------------------------------- page


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    environment.filters |= {"clean": clean, "decimal": decimal, "size": size, "microseconds": microseconds,
                            "span": span, "ratio": ratio, "types": types}
    return environment.from_string((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))


def _as_data(graphs: Mapping[str, Sequence[Drawn]]) -> str:
    """The outlines as JSON that can stand in a `<script>` element whatever the names are."""
    rows = {k: [[n.label, n.op, n.type, n.detail, n.inputs, n.output] for n in nodes] for k, nodes in graphs.items()}
    text = json.dumps(rows, separators=(",", ":"))  # ASCII; only these three could end the element
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _from_data(text: str) -> dict[str, tuple[Drawn, ...]]:
    return {k: tuple(Drawn(str(label), str(op), str(type_), str(detail), tuple(int(i) for i in inputs), bool(output))
                     for label, op, type_, detail, inputs, output in json.loads(text)[k])
            for k in ("before", "after")}


def _page(report: Mapping[str, Any], graphs: Mapping[str, Sequence[Drawn]],
          profile: Mapping[str, Any] | None) -> str:
    layers = report.get("layers") or []
    fixed = report.get("quantization")
    views: list[dict[str, Any]] = []
    for key, title in (("before", "As imported"), ("after", "As compiled")):
        picture = draw(graphs[key]) if len(graphs[key]) <= DRAWN_NODES else None
        views.append({"title": title, "nodes": graphs[key],
                      "operations": sum(n.op != "input" for n in graphs[key]),
                      "picture": picture if picture and 0 < picture.width <= DRAWN_WIDTH else None})
    wide = any(v["picture"] and v["picture"].width > _COLUMN for v in views)
    path = (report.get("model") or {}).get("path") or ""
    return _template().render(
        report=report, model=report.get("model") or {}, target=report.get("target"),
        compiled=report.get("compiled"), passes=report.get("passes") or [], layers=layers,
        verification=report.get("verification"), verified="verification" in report, profile=profile,
        title=clean(Path(str(path)).name or "model"), views=views, wide=wide, room=_ROW if wide else _COLUMN,
        plot=plot(layers, profile) if layers else None, quantization=fixed,
        quantization_plot=quantization_plot(fixed["layers"]) if fixed else None, good_db=explanation.GOOD_DB,
        data=Markup(_as_data(graphs)))


def render(report: Mapping[str, Any], before: Graph, after: Graph, profile: Mapping[str, Any] | None = None) -> str:
    """The page of `report`, with the graph as imported and as compiled, and the times of `profile`.

    Parts that `report` lacks (a model that was only inspected has no artefact) are left out.
    """
    return _page(report, {"before": outline(before), "after": outline(after)}, profile)


def with_profile(folder: Path, profile: Mapping[str, Any]) -> str:
    """The page of the artefact in `folder`, with measured times. InvalidModelError if it is damaged."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        data = _DATA.search((folder / "report.html").read_text(encoding="utf-8"))
        if data is None:
            raise InvalidModelError(f"{folder / 'report.html'} holds no graphs; compile the model again")
        if len(report["layers"]) != len(profile["layers"]):
            raise InvalidModelError(f"{folder}: the report and the library have different layers")
        return _page(report, _from_data(data[1]), profile)
    except FileNotFoundError as e:
        raise InvalidModelError(f"{folder} is not an artefact: it has no {Path(e.filename).name}") from None
    except (ValueError, KeyError, TypeError, IndexError) as e:
        raise InvalidModelError(f"{folder}: the report is damaged: {e}") from None
