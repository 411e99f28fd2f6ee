"""The canonical text form of a graph: one node per line, and parse(print(g)) prints the same.

    graph @kws(%x: f32[1,49,10,1]) {
      %w = const #9f2c01d4e5a6 : f32[64,10,4,1]
      %0 = conv2d %x, %w {stride=[2,2], pad=[4,1,5,1]} : f32[1,25,5,64]  ; conv1/Conv2D
      return %0 as "logits"
    }

Attributes at their default are left out. Constants of more than eight elements print as content
hashes; their values are kept beside the text in an `.npz` file. What follows `;` is the origin.
Names that are no plain words are JSON strings, so no name can break out of its place.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from skive import ops
from skive.errors import InvalidModelError, ShapeError, SkiveError
from skive.ir import Graph, Node, constant, content_hash
from skive.types import DType, Quant, Sparsity, TensorType

INLINE_ELEMENTS = 8  # constants up to this size print in place
MAX_NESTING = 8  # of lists in attributes

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_KEYWORDS = frozenset({"inf", "nan", "true", "false", "as", "const", "return", "state", "graph", "batch"})
_PLAIN_ORIGIN = re.compile(r"[A-Za-z0-9_./:\[\]()+@-][A-Za-z0-9_./:\[\]()+@ -]*[A-Za-z0-9_./:\[\]()+@-]|[A-Za-z0-9_/]")


# ------------------------------------------------------------------------------------ printing


def _word(text: str) -> str:
    return text if _WORD.fullmatch(text) and text not in _KEYWORDS else json.dumps(text)


def _attribute(value: Any) -> str:
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, DType):
        return value.value
    if isinstance(value, (int, np.integer)):
        return str(int(value))
    if isinstance(value, (float, np.floating)):
        return repr(float(value))
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(map(_attribute, value)) + "]"
    raise InvalidModelError(f"an attribute of type {type(value).__name__} has no text form")


def _type(t: TensorType) -> str:
    marks = []
    if t.quant is not None:
        per_tensor = t.quant.axis is None
        s: Any = t.quant.scale[0] if per_tensor else t.quant.scale
        z: Any = t.quant.zero_point[0] if per_tensor else t.quant.zero_point
        marks += [f"s={_attribute(s)}", f"z={_attribute(z)}"] + ([] if per_tensor else [f"axis={t.quant.axis}"])
    if t.sparsity is not None:
        marks += [f"pattern={json.dumps(t.sparsity.pattern)}", f"fraction={_attribute(t.sparsity.fraction)}"]
    return str(t) + ("{" + ", ".join(marks) + "}" if marks else "")


def _element(value: np.generic) -> str:
    return str(value.item()).lower() if value.dtype.kind in "biu" else str(value)


def _constant(value: np.ndarray) -> str:
    """The elements themselves where they are few and survive the round trip bit by bit, else the hash."""
    if value.size <= INLINE_ELEMENTS:
        elements = [_element(v) for v in value.reshape(-1)]
        read = float if value.dtype.kind == "f" else json.loads
        if np.array([read(e) for e in elements], value.dtype).tobytes() == value.tobytes():
            return elements[0] if value.ndim == 0 else "[" + ",".join(elements) + "]"
    return "#" + content_hash(value)


def names_of(graph: Graph) -> dict[Node, str]:
    """Node -> its name in the text: its own where that is unique, else a number."""
    names: dict[Node, str] = {}
    taken: set[str] = set()
    count = 0
    for n in graph.nodes:
        if n.name and n.name not in taken:
            taken.add(n.name)
            names[n] = "%" + _word(n.name)
        else:
            names[n] = f"%{count}"
            count += 1
    return names


def print_graph(graph: Graph) -> str:
    """The canonical text of `graph`, ending in a newline."""
    names = names_of(graph)
    parameters = ", ".join(f"{names[i]}: {_type(i.type)}" for i in graph.inputs)
    batch = "" if graph.batch_max is None else f" batch {graph.batch_max}"
    lines = [f"graph @{_word(graph.name)}({parameters}){batch} {{"]
    for n in graph.nodes:
        if n.op == "input":
            continue
        if n.is_const:
            body = "const " + _constant(n.value)
        else:
            defaults = ops.op_of(n.op).attrs
            shown = [f"{k}={_attribute(v)}" for k, v in n.attrs.items()
                     if k not in defaults or defaults[k] is ops.REQUIRED or _attribute(v) != _attribute(defaults[k])]
            body = " ".join(filter(None, [n.op, ", ".join(names[i] for i in n.inputs),
                                          "{" + ", ".join(shown) + "}" if shown else ""]))
        line = f"  {names[n]} = {body} : {_type(n.type)}"
        if n.origin:
            line += "  ; " + (n.origin if _PLAIN_ORIGIN.fullmatch(n.origin) else json.dumps(n.origin))
        lines.append(line)
    lines += [f"  state {names[a]} -> {names[b]}" for a, b in graph.states]
    lines.append("  return " + ", ".join(f"{names[o]} as {json.dumps(name)}"
                                         for o, name in zip(graph.outputs, graph.output_names, strict=True)))
    return "\n".join([*lines, "}"]) + "\n"


def constants_of(graph: Graph) -> dict[str, np.ndarray]:
    """Content hash -> array, for the constants that the text does not spell out."""
    return {content_hash(n.value): n.value for n in graph.nodes if n.is_const and _constant(n.value)[0] == "#"}


# ------------------------------------------------------------------------------------ parsing

_TOKEN = re.compile(r"""\s*(?:(?P<string>"(?:[^"\\]|\\.)*")
    |(?P<hash>\#[0-9a-f]+)
    |(?P<number>[+-]?(?:inf\b|nan\b|\d+(?:\.\d*)?(?:[eE][+-]?\d+)?))
    |(?P<word>[A-Za-z_][A-Za-z0-9_.]*)
    |(?P<mark>->|[@%=:,;(){}\[\]]))""", re.VERBOSE)


class _Line:
    """The tokens of one line, with the errors that name it."""

    def __init__(self, text: str, number: int) -> None:
        self.text, self.number, self.at = text, number, 0

    def fail(self, what: str) -> InvalidModelError:
        return InvalidModelError(f"line {self.number}: {what}")

    def peek(self) -> tuple[str, str]:
        """(kind, text) of the next token; kind "end" at the end of the line."""
        if not self.text[self.at:].strip():
            return "end", "the end of the line"
        m = _TOKEN.match(self.text, self.at)
        if not m or m.lastgroup is None:
            raise self.fail(f"cannot read {self.text[self.at:].strip()[:24]!r}")
        return m.lastgroup, m[m.lastgroup]

    def take(self) -> tuple[str, str]:
        token = self.peek()
        if token[0] != "end":
            m = _TOKEN.match(self.text, self.at)
            assert m is not None
            self.at = m.end()
        return token

    def expect(self, mark: str) -> None:
        kind, text = self.take()
        if text != mark or kind not in ("mark", "word"):
            raise self.fail(f"expected {mark!r}, found {text!r}")

    def accept(self, mark: str) -> bool:
        kind, text = self.peek()
        if kind in ("mark", "word") and text == mark:
            self.take()
            return True
        return False

    def rest(self) -> str:
        rest, self.at = self.text[self.at:].strip(), len(self.text)
        return rest

    def string(self, quoted: str) -> str:
        try:
            return str(json.loads(quoted))
        except ValueError:
            raise self.fail(f"malformed string {quoted[:24]}") from None

    def name(self) -> str:
        """A word or a string."""
        kind, text = self.take()
        if kind == "string":
            return self.string(text)
        if kind != "word":
            raise self.fail(f"expected a name, found {text!r}")
        return text

    def value_name(self) -> tuple[str, bool]:
        """(name, True) after `%`, or (number, False) for a value without a name of its own."""
        self.expect("%")
        if self.peek()[0] == "number":
            text = self.take()[1]
            if not text.isdigit():
                raise self.fail(f"%{text} is no value")
            return text, False
        return self.name(), True

    def integer(self) -> int:
        value = self.attribute()
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.fail(f"expected an integer, found {value!r}")
        return value

    def attribute(self, depth: int = 0) -> Any:
        kind, text = self.take()
        if kind == "string":
            return self.string(text)
        if kind == "number":
            try:
                return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
            except ValueError:
                raise self.fail(f"malformed number {text[:24]!r}") from None
        if kind == "word" and text in ("true", "false"):
            return text == "true"
        if kind == "word" and text in DType.__members__:
            return DType[text]
        if text == "[" and kind == "mark":
            if depth == MAX_NESTING:
                raise self.fail("lists are nested too deeply")
            return self.sequence("]", lambda: self.attribute(depth + 1))
        raise self.fail(f"expected a value, found {text!r}")

    def sequence(self, close: str, item: Any) -> tuple[Any, ...]:
        """Items separated by commas up to `close`."""
        items: list[Any] = []
        while not self.accept(close):
            if items:
                self.expect(",")
            items.append(item())
        return tuple(items)

    def attributes(self) -> dict[str, Any]:
        """`{key=value, ...}`, or nothing."""
        found: dict[str, Any] = {}

        def one() -> None:
            key = self.name()
            if key in found:
                raise self.fail(f"attribute {key!r} is given twice")
            self.expect("=")
            found[key] = self.attribute()

        if self.accept("{"):
            self.sequence("}", one)
        return found

    def type(self) -> TensorType:
        name = self.name()
        if name not in DType.__members__:
            raise self.fail(f"unknown element type {name!r}")
        self.expect("[")
        shape = self.sequence("]", self.integer)
        quant = sparsity = None
        if self.text[self.at:self.at + 1] == "{":  # directly behind: `{` after a space opens the body
            marks = self.attributes()
            try:
                if "s" in marks:
                    axis = marks.get("axis")
                    s, z = marks["s"], marks["z"]
                    quant = Quant((s,), (z,)) if axis is None else Quant(tuple(s), tuple(z), axis)
                if "pattern" in marks:
                    sparsity = Sparsity(marks["pattern"], marks["fraction"])
            except (KeyError, TypeError):
                raise self.fail("incomplete quantization or sparsity mark") from None
        return TensorType(shape, DType[name], quant, sparsity)


class _Parser:
    def __init__(self, text: str, constants: Mapping[str, np.ndarray]) -> None:
        self.lines = [_Line(t, n) for n, t in enumerate(text.splitlines(), 1) if t.strip()]
        self.constants = constants
        self.values: dict[tuple[str, bool], Node] = {}

    def define(self, line: _Line, key: tuple[str, bool], node: Node) -> None:
        if key in self.values:
            raise line.fail(f"%{key[0]} is defined twice")
        self.values[key] = node

    def value(self, line: _Line) -> Node:
        key = line.value_name()
        if key not in self.values:
            raise line.fail(f"%{key[0]} is not defined before this line")
        return self.values[key]

    def graph(self) -> Graph:
        if len(self.lines) < 2:
            raise InvalidModelError("line 1: expected 'graph @name(...) {'")
        head, *body = self.lines
        name, batch = "", None
        try:
            head.expect("graph")
            head.expect("@")
            name = head.name()
            head.expect("(")
            inputs = head.sequence(")", lambda: self.parameter(head))
            if head.accept("batch"):
                batch = head.integer()
                if batch < 1:
                    raise head.fail("the largest batch is less than 1")
            head.expect("{")
        except ShapeError as e:
            raise head.fail(str(e)) from None
        self.end(head)
        outputs: tuple[tuple[Node, str], ...] | None = None
        states: list[tuple[Node, Node]] = []
        closed = False
        for line in body:
            if closed:
                raise line.fail("text after the end of the graph")
            try:
                if line.accept("}"):
                    closed = True
                elif outputs is not None:
                    raise line.fail("expected '}' after 'return'")
                elif line.accept("return"):
                    outputs = tuple(self.outputs(line))
                elif line.accept("state"):
                    old = self.value(line)
                    line.expect("->")
                    states.append((old, self.value(line)))
                else:
                    self.node(line)
            except ShapeError as e:
                raise line.fail(str(e)) from None
            self.end(line)
        if not closed or outputs is None:
            raise self.lines[-1].fail("the graph ends without 'return' and '}'")
        return Graph(name, inputs, tuple(o for o, _ in outputs), tuple(n for _, n in outputs), batch, tuple(states))

    def end(self, line: _Line) -> None:
        kind, text = line.peek()
        if kind != "end":
            raise line.fail(f"unexpected {text!r}")

    def parameter(self, line: _Line) -> Node:
        key = line.value_name()
        line.expect(":")
        t = line.type()
        node = ops.make("input", label=key[0] if key[1] else "", shape=t.shape, dtype=t.dtype)
        node = Node(node.op, (), node.attrs, t, node.name)
        self.define(line, key, node)
        return node

    def outputs(self, line: _Line) -> list[tuple[Node, str]]:
        found = []
        while True:
            node = self.value(line)
            line.expect("as")
            found.append((node, line.name()))
            if not line.accept(","):
                return found

    def node(self, line: _Line) -> None:
        key = line.value_name()
        line.expect("=")
        op = line.name()
        literal: Any = None
        operands: list[Node] = []
        attrs: dict[str, Any] = {}
        if op == "const":
            literal = line.take()[1] if line.peek()[0] == "hash" else line.attribute()
        else:
            if line.peek() == ("mark", "%"):
                operands.append(self.value(line))
                while line.accept(","):
                    operands.append(self.value(line))
            attrs = line.attributes()
        line.expect(":")
        t = line.type()
        origin = ""
        if line.accept(";"):
            origin = line.rest()
            if origin.startswith('"'):
                origin = line.string(origin)
        label = key[0] if key[1] else ""
        if op == "const":
            node = self.constant(line, literal, t, label, origin)
        elif op == "input":
            raise line.fail("inputs are declared in the first line")
        else:
            try:
                node = ops.make(op, *operands, origin=origin, label=label, **attrs)
            except SkiveError as e:
                raise line.fail(str(e)) from None
            except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as e:
                # A shape rule met an attribute of the wrong kind.
                raise line.fail(f"{op}: attributes do not fit ({e})") from None
        if node.shape != t.shape or node.dtype is not t.dtype:
            raise line.fail(f"{op} has type {node.type}, not {t}")
        if t != node.type:
            node = Node(node.op, node.inputs, node.attrs, t, node.name, node.origin)
        self.define(line, key, node)

    def constant(self, line: _Line, literal: Any, t: TensorType, label: str, origin: str) -> Node:
        if isinstance(literal, str) and literal.startswith("#"):
            if literal[1:] not in self.constants:
                raise line.fail(f"constant {literal} is not in the file of values")
            value = np.asarray(self.constants[literal[1:]])
        else:
            items = literal if isinstance(literal, tuple) else (literal,)
            if len(items) != t.size or not all(isinstance(i, (int, float)) for i in items):
                raise line.fail(f"expected {t.size} numbers for a constant {t}")
            if not t.dtype.is_float and any(isinstance(i, float) for i in items):
                raise line.fail(f"a constant {t} needs integers")
            try:
                value = np.array(items, t.dtype.numpy).reshape(t.shape)
            except (OverflowError, ValueError, TypeError):
                raise line.fail(f"a number does not fit {t.dtype.value}") from None
        if value.dtype.hasobject or value.dtype not in {d.numpy for d in DType}:
            raise line.fail(f"the file of values holds {value.dtype} for a constant {t}")
        return constant(value, name=label, origin=origin)


def parse_graph(text: str, constants: Mapping[str, np.ndarray] | None = None) -> Graph:
    """The graph that `text` spells; `constants` maps content hashes to arrays.

    Raises InvalidModelError with the line number on anything malformed.
    """
    return _Parser(text, constants or {}).graph()


def save_text(graph: Graph, path: str | Path) -> None:
    """Writes the text to `path` and the larger constants beside it, with the suffix `.npz`."""
    path = Path(path)
    values: dict[str, Any] = dict(constants_of(graph))
    np.savez(path.with_suffix(".npz"), **values)
    path.write_text(print_graph(graph), encoding="utf-8")


def load_text(path: str | Path) -> Graph:
    """The graph that `save_text` wrote. InvalidModelError if the files are damaged or do not belong together."""
    path = Path(path)
    values: dict[str, np.ndarray] = {}
    try:
        text = path.read_text(encoding="utf-8")
        if path.with_suffix(".npz").exists():
            with np.load(path.with_suffix(".npz"), allow_pickle=False) as file:
                values = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, UnicodeDecodeError) as e:
        raise InvalidModelError(f"{path.name}: {e}") from None
    for key, value in values.items():
        if content_hash(value) != key:
            raise InvalidModelError(f"{path.name}: the values of constant #{key} are damaged")
    return parse_graph(text, values)
