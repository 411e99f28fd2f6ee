"""The report page: complete, self-contained, the same bytes each time, and safe whatever the names are."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skive import ops, report
from skive.errors import InvalidModelError
from skive.ir import Graph, Node, constant
from skive.types import DType

HOSTILE = ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "'; DROP", "</script><b>", "a\u202eb\nc\x00d",
           "&lt;b&gt;", "{{ 7 * 7 }}", "{% raw %}", "\ud800", "</title><svg onload=alert(1)>", "]]>", "<!--"]
# Elements without an end tag.
VOID = {"meta", "link", "br", "img", "input", "hr"}


def chain(length: int, *, name: str = "layer") -> Graph:
    """x -> length times relu, each an operation called `name` and its number."""
    x = y = ops.make("input", shape=(1, 4), dtype=DType.f32, label="x")
    for i in range(length):
        y = ops.make("relu", y, origin=f"{name}{i}", label=f"t{i}")
    return Graph("chain", (x,), (y,), ("y",))


def block() -> Graph:
    """A residual block: two ways of unequal length from x to an addition."""
    x = ops.make("input", shape=(1, 8, 8, 4), dtype=DType.f32, label="x")
    w = constant(np.ones((4, 3, 3, 4), np.float32))
    a = ops.make("conv2d", x, w, pad=(1, 1, 1, 1), origin="a")
    b = ops.make("conv2d", ops.make("relu", a, origin="r"), w, pad=(1, 1, 1, 1), origin="b")
    y = ops.make("add", b, x, origin="sum")
    return Graph("block", (x,), (y,), ("y",))


def facts(name: str = "conv1") -> dict[str, Any]:
    """A complete report of two layers; `name` stands wherever a model's own words can."""
    return {
        "skive": "1.2.3",
        "model": {"path": f"/models/{name}.onnx", "sha256": "ab" * 32, "macs": 5000, "weight_bytes": 2048, "nodes": 4},
        "target": {"name": "avx2", "isa": ["avx2", "fma"], "threads": 2},
        "passes": [{"name": "fold-constants", "ms": 1.25, "nodes": 3, "macs": 5000, "weight_bytes": 2000,
                    "exact": True}],
        "compiled": {"macs": 4000, "weight_bytes": 4096, "arena_bytes": 3000, "arena_lower_bound": 2000,
                     "code_bytes": 10240, "seconds": 1.0},
        "layers": [{"name": name, "op": "conv2d", "kernel": "conv2d", "macs": 4000, "bytes": 3000},
                   {"name": f"{name}/relu", "op": "map", "kernel": "map_1d", "macs": 0, "bytes": 1500}],
        "verification": {"reference": "numpy", "samples": 1, "max_abs_error": 1e-6, "relative_error": 2e-6,
                         "sqnr_db": 120.0, "passed": True, "worst_node": None}}


def fixed(name: str = "conv1") -> dict[str, Any]:
    """`facts` of a quantized network: one integer layer, one float32 one."""
    report = facts(name)
    for layer in report["layers"]:
        layer |= {"dtype": "int8", "reads": ["u8"], "writes": "f32"}
    report["quantization"] = {
        "dtype": "int8", "method": "minmax", "samples": 77, "sqnr_db": 31.25,
        "layers": [
            {"name": name, "op": "conv2d", "dtype": "int8", "sqnr_db": 28.5, "input_sqnr_db": 36.5,
             "noise_share": 0.77, "bytes": 1024,
             "weight_bytes": 2048, "stored": "u8", "range": [-1.5, 2.5], "kept": [-1.25, 2.25],
             "bits": {"activations": 8, "weights": 7}, "weight_sqnr_db": 44.5},
            {"name": f"{name}/softmax", "op": "softmax", "dtype": "float32", "sqnr_db": None,
             "reason": f"because {name}"}],
        "islands": [{"names": [f"{name}/softmax"], "ops": ["softmax"], "macs": 0, "bytes": 48,
                     "reason": f"island {name}"}],
        "boundaries": [{"name": name, "op": "map", "to": "u8", "bytes": 4, "reason": f"boundary {name}"}],
        "advice": [{"layer": name, "share": 1.0, "finding": "adds 100 % of the noise", "action": f"--keep {name}"}]}
    return report


def times(*us: float) -> dict[str, Any]:
    return {"rounds": 9, "run_us": sum(us), "layers_us": sum(us), "layers": [
        {"us": u, "share": u / sum(us), "gmac_per_s": 1.0, "gb_per_s": 2.0} for u in us]}


class Page(HTMLParser):
    """Parses a page strictly: every element is closed in order. Collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_holds_the_figures() -> None:
    text = report.render(facts(), block(), chain(2))
    words = " ".join(" ".join(Page(text).text).split())
    for figure in ("conv1.onnx", "verified", "4K", "5K", "10 KB", "1.50 × the lower bound", "120 dB", "fold-constants",
                   "map_1d", "1e-06", "avx2, 2 threads", "As imported: 4 operations", "As compiled: 2 operations"):
        assert figure in words, figure


def test_the_page_explains_quantization() -> None:
    words = " ".join(" ".join(Page(report.render(fixed(), block(), chain(2))).text).split())
    for figure in ("int8, ranges by minmax from 77 samples", "31.2 dB", "36.5 → 28.5", "44.5", "-1.5 … 2.5",
                   "-1.25 … 2.25", "8 × 7", "1 KB + 2 KB", "because conv1", "island conv1", "boundary conv1",
                   "--keep conv1", "u8 → f32", "77 %"):
        assert figure in words, figure
    assert "Quantization" not in " ".join(Page(report.render(facts(), block(), chain(2))).text)
    imported = fixed()
    imported["quantization"] = {"dtype": "int8", "sqnr_db": None, "imported": True, "advice": [], "islands": [],
                                "boundaries": [], "layers": [{"name": "a", "op": "conv2d", "dtype": "int8",
                                                              "sqnr_db": None, "bytes": 4, "weight_bytes": 4}]}
    words = " ".join(" ".join(Page(report.render(imported, block(), chain(2))).text).split())
    assert "came quantized" in words and "No kernel computes in float32" in words


def test_the_page_needs_nothing_else_and_runs_nothing() -> None:
    text = report.render(facts(), block(), block())
    for tag, attributes in Page(text).tags:
        assert tag not in {"img", "link", "iframe", "object", "base", "form"}
        assert not {a for a in attributes if a.startswith("on") or a in {"src", "href", "style"}}, tag
        if tag == "script":
            assert attributes["type"] == "application/json"
    assert "http://" not in text and "https://" not in text and "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text


def test_the_same_report_gives_the_same_bytes() -> None:
    assert report.render(facts(), block(), chain(3)) == report.render(facts(), block(), chain(3))


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_only_ever_text(name: str) -> None:
    plain = Page(report.render(fixed(), chain(3), chain(2)))
    text = report.render(fixed(name), chain(3, name=name), chain(2, name=name))
    page = Page(text)
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert "\u202e" not in text and "\x00" not in text
    text.encode("utf-8")  # a lone surrogate cannot be written
    assert "49" not in "".join(page.text) or "7 * 7" in "".join(page.text)


def test_parts_that_are_not_there_are_left_out() -> None:
    bare = {"skive": "1", "model": {"path": "m.onnx", "sha256": "", "macs": 1, "weight_bytes": 2, "nodes": 3}}
    words = " ".join(Page(report.render(bare, block(), block())).text)
    assert "Verification" not in words and "Arena" not in words and "Graph" in words
    unverified = facts() | {"verification": None}
    assert "Not compared" in " ".join(Page(report.render(unverified, block(), block())).text)
    failed = facts()
    failed["verification"]["passed"] = False
    assert "verification failed" in " ".join(Page(report.render(failed, block(), block())).text)


def test_a_graph_without_operations() -> None:
    """Nothing is drawn of a network whose outputs are constants."""
    nothing = Graph("nothing", (), (constant(np.ones(2, np.float32)),), ("y",))
    text = report.render(facts(), chain(3), nothing)
    assert "As compiled: 0 operations" in text and "Too large" not in text


def test_a_large_graph_is_listed() -> None:
    text = report.render(facts(), chain(report.DRAWN_NODES + 1), chain(3))
    assert text.count("<details>") == 1
    assert f"layer{report.DRAWN_NODES}" in text


def test_a_wide_graph_has_the_page_to_itself_and_a_very_wide_one_is_listed() -> None:
    def fan(ways: int) -> Graph:
        x = ops.make("input", shape=(1, 4), dtype=DType.f32, label="x")
        ends = tuple(ops.make("relu", x, origin=f"way{i}") for i in range(ways))
        return Graph("fan", (x,), ends, tuple(f"y{i}" for i in range(ways)))

    assert 'class="pair"' in report.render(facts(), fan(2), fan(2))
    wide = report.render(facts(), fan(2), fan(8))
    assert 'class="pair wide"' in wide and "<details>" not in wide
    assert max(int(w) for w in re.findall(r'<svg width="(\d+)"', wide)) <= report._ROW
    assert report.render(facts(), fan(2), fan(30)).count("<details>") == 1


def test_a_profile_is_added_to_the_page_of_an_artefact(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(facts("</script>")))
    (tmp_path / "report.html").write_text(report.render(facts("</script>"), block(), chain(2, name="</script>")))
    page = Page(report.with_profile(tmp_path, times(30.0, 10.0)))
    words = " ".join(" ".join(page.text).split())
    assert "40 µs" in words and "75.0 %" in words and "As imported: 4 operations" in words
    # Without the times the page is what it was: the graphs survive the way through the page.
    data = report._DATA.search((tmp_path / "report.html").read_text())
    assert data is not None
    assert report._from_data(data[1]) == {"before": report.outline(block()),
                                          "after": report.outline(chain(2, name="</script>"))}


@pytest.mark.parametrize("damage", ["no json", "no html", "bad json", "no graphs", "bad graphs", "other layers"])
def test_a_damaged_artefact_has_no_page(tmp_path: Path, damage: str) -> None:
    if damage != "no json":
        (tmp_path / "report.json").write_text("{" if damage == "bad json" else json.dumps(facts()))
    page = report.render(facts(), block(), block())
    if damage == "no graphs":
        page = page.replace("skive-graphs", "other")
    if damage == "bad graphs":
        page = re.sub(r'"before":\[', '"before":[7,', page)
    if damage != "no html":
        (tmp_path / "report.html").write_text(page)
    with pytest.raises(InvalidModelError):
        report.with_profile(tmp_path, times(*([1.0] if damage == "other layers" else [1.0, 2.0])))


# ---------------------------------------------------------------------------------------- drawing


def random_nodes(seed: int, count: int) -> list[report.Drawn]:
    rng = np.random.default_rng(seed)
    return [report.Drawn(f"n{i}", "relu", "f32[1]", "", tuple(sorted(
        {int(j) for j in rng.integers(max(0, i - 9), i, int(rng.integers(0, 4)))})) if i else ()) for i in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_boxes_do_not_overlap_and_edges_point_down(seed: int) -> None:
    nodes = random_nodes(seed, 5 + 4 * seed)
    picture = report.draw(nodes)
    assert [b.node for b in picture.boxes] == nodes
    place = {id(b.node): b for b in picture.boxes}
    rows: dict[int, list[int]] = {}
    for b in picture.boxes:
        assert b.x >= 0 and b.x + picture.box_width <= picture.width
        assert b.y >= 0 and b.y + picture.box_height <= picture.height
        rows.setdefault(b.y, []).append(b.x)
        for j in b.node.inputs:
            assert place[id(nodes[j])].y + picture.box_height < b.y
    for row in rows.values():
        row.sort()
        assert all(b - a >= picture.box_width for a, b in zip(row, row[1:], strict=False))
    assert len(picture.paths) == sum(len(n.inputs) for n in nodes)


def test_edges_start_and_end_at_their_boxes() -> None:
    nodes = report.outline(block())
    picture = report.draw(nodes)
    box = {b.node.label: b for b in picture.boxes}
    ends = set()
    for path in picture.paths:
        numbers = [int(n) for n in re.findall(r"-?\d+", path)]
        ends.add((numbers[0], numbers[1], numbers[-1]))
    half = picture.box_width // 2
    for source, target in [("x", "a"), ("a", "r"), ("r", "b"), ("b", "sum"), ("x", "sum")]:
        s, t = box[source], box[target]
        assert any(abs(x - (s.x + half)) <= 1 and y == s.y + picture.box_height and end == t.y
                   for x, y, end in ends), (source, target)


def test_a_chain_is_drawn_straight() -> None:
    picture = report.draw(report.outline(chain(12)))
    assert len({b.x for b in picture.boxes}) == 1
    assert picture.boxes[0].node.op == "input"


def test_an_operand_used_twice_is_one_edge() -> None:
    x = ops.make("input", shape=(2,), dtype=DType.f32, label="x")
    y: Node = ops.make("mul", x, x)
    assert len(report.draw(report.outline(Graph("square", (x,), (y,), ("y",)))).paths) == 1


def test_spread_is_the_nearest_arrangement_without_overlap() -> None:
    gap = report._GAP_X
    assert report._spread([0.0, 1000.0], [10, 10]) == [0.0, 1000.0]
    # Two boxes that want the same place share the distance.
    assert report._spread([50.0, 50.0], [10, 10]) == pytest.approx([50 - (10 + gap) / 2, 50 + (10 + gap) / 2])


@pytest.mark.parametrize(("function", "value", "text"), [
    (report.decimal, 0, "0"), (report.decimal, 999, "999"), (report.decimal, 1234, "1.23K"),
    (report.decimal, 4.09e9, "4.09G"), (report.size, 100, "100 B"), (report.size, 1536, "1.5 KB"),
    (report.size, 3 << 20, "3 MB"),
    (report.microseconds, 0.5, "0.5 µs"), (report.microseconds, 1500, "1.5 ms"), (report.microseconds, 2e6, "2 s")])
def test_quantities(function: Any, value: float, text: str) -> None:
    assert function(value) == text
