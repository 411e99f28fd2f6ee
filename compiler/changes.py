"""What becomes of a network on its way to an artefact besides exact passes: channels and blocks of weights removed,
integers, exits. `Changes` holds what was asked for and, after the passes, what was done."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from skive import check, explanation, integer_criteria, pruning, quantization, sparsity, speed
from skive import exits as early
from skive.ir import Graph
from skive.lower.sparse import sparse_layers
from skive.pipeline import NoOptions, Pass, Step
from skive.plan import Plan
from skive.targets.base import Target

if TYPE_CHECKING:
    from skive.exits import Exit
    from skive.program import ExitTest
    from skive.pruning import Prune
    from skive.quantization import Quantize
    from skive.sparsity import Sparsify

Progress = Callable[[str, float], None]  # (step, fraction of the whole)


@dataclass
class Changes:
    """The arguments of `skive.compile` that change what the network computes, checked.

    Then, by its `steps`: `found` is what the report says of them, `smaller` the float network without what was
    removed, `canonical` the network before fusion, `tests` how a call with exits ends.
    """

    prune: Prune | None
    sparsify: Sparsify | None
    quantize: Quantize | None
    exits: tuple[Exit, ...]
    found: dict[str, Any] = field(default_factory=dict)
    smaller: Graph | None = None
    canonical: Graph | None = None
    tests: tuple[ExitTest, ...] = ()

    @staticmethod
    def requested(prune: Any, sparsify: Any, quantize: Any, exits: Any) -> Changes:
        """The arguments in all their forms; PruningError, QuantizationError or ExitError where one cannot be."""
        changes = Changes(
            pruning.requested(prune) if prune is not None else None,
            sparsity.requested(sparsify) if sparsify is not None else None,
            quantization.requested(quantize) if quantize is not None else None,
            early.requested(exits) if exits is not None else (),
        )
        if changes.exits and changes.integer_only:
            integer_criteria.require_forms(changes.exits)
        return changes

    @property
    def integer_only(self) -> bool:
        return self.quantize is not None and self.quantize.integer_only

    def _asked(self) -> list[Any]:
        return [c for c in (self.prune, self.sparsify, self.quantize, *self.exits) if c]

    def options(self) -> str:
        """What was asked for, without the data."""
        return "".join(json.dumps(c.options(), sort_keys=True) for c in self._asked())

    def fingerprint(self) -> str | None:
        """Equal for equal requests and data; None where the data can be read only once or a function decides."""
        texts = [c.fingerprint() for c in self._asked()]
        if None in texts:
            return None
        measured = (self.quantize and self.quantize.dtype == "auto") or (self.prune and self.prune.measure == "latency")
        return "".join([*texts, speed.cpu() if measured else ""])

    # ---------------------------------------------------------------------------------- what is done

    def steps(self, target: Target, threads: int, progress: Progress) -> list[Step]:
        """The pipeline's elements behind the canonical passes."""

        def prune(graph: Graph, options: Any) -> Graph:
            assert self.prune is not None
            kind = self.quantize.dtype if self.quantize else "float32"
            measured = {"auto": "int8", "int8": "int8", "int16": "int16"}.get(kind, "float32")  # auto decides later
            result, self.found["sparsity"] = pruning.apply(graph, self.prune, progress, target, threads, measured)
            self.smaller = result if result is not graph else None
            return result

        def sparsify(graph: Graph, options: Any) -> Graph:
            assert self.sparsify is not None
            result, details = sparsity.apply(graph, self.sparsify, progress)
            self.smaller = result if result is not graph else self.smaller
            if before := self.found.get("sparsity"):  # channels went first
                both = 1 - (1 - before["macs_removed"]) * (1 - details["macs_removed"])
                details = {**details, "groups": before["groups"], "channels": before, "macs_removed": both}
            self.found["sparsity"] = details
            return result

        def quantize(graph: Graph, options: Any) -> Graph:
            assert self.quantize is not None
            result, self.found["quantization"] = quantization.apply(
                graph, self.quantize, progress, target=target, threads=threads
            )
            return result

        def keep(graph: Graph, options: Any) -> Graph:
            self.canonical = graph
            return graph

        def exits(graph: Graph, options: Any) -> Graph:
            ports = self.found.get("quantization", {}).get("ports")
            program = early.attach(graph, self.exits, ports and ports["outputs"])
            self.tests = program.exits
            return program.graph

        elements = [("prune", prune, self.prune), ("sparsify", sparsify, self.sparsify),
                    ("quantize", quantize, self.quantize), ("export", keep, True), ("exits", exits, self.exits)]
        return [Step(Pass(name, run, exact=run is keep), NoOptions()) for name, run, asked in elements if asked]

    def meant(self, imported: Graph) -> Graph:
        """What the artefact is to compute, but for rounding: the float network that was left, with its scores."""
        graph = self.smaller or imported
        return early.attach(graph, self.exits).graph if self.exits else graph

    def with_scales(self, plan: Plan) -> Plan:
        """`plan` whose inputs and outputs say which real numbers their integers stand for."""
        known: Mapping[str, Any] | None = self.found.get("quantization", {}).get("ports")
        if not known:
            return plan
        if plan.exits:  # the scores stand between the outputs that were quantized
            scores = {e.score: {"scale": e.scale, "zero": 0} for e in plan.exits}
            values = iter(known["outputs"])
            outputs_ = [scores[i] if i in scores else next(values) for i in range(len(plan.outputs))]
            known = {**known, "outputs": outputs_}
        inputs, outputs = (
            tuple(dataclasses.replace(p, **(q or {})) for p, q in zip(ports, known[side], strict=True))
            for side, ports in (("inputs", plan.inputs), ("outputs", plan.outputs))
        )
        return dataclasses.replace(plan, inputs=inputs, outputs=outputs)

    def described(self, plan: Plan) -> dict[str, Any]:
        """The `exits` of manifest and report, where there are any."""
        return {"exits": early.described(plan, self.exits)} if self.exits else {}

    def report(self, optimised: Graph, target: Target) -> dict[str, Any]:
        """The entries `quantization` and `sparsity` of report.json."""
        result: dict[str, Any] = {}
        if self.quantize or check.has_roundings(optimised):
            kept = self.quantize.keep if self.quantize else ()
            result["quantization"] = _explained(self.found.get("quantization"), optimised, kept)
        if "sparsity" in self.found:
            result["sparsity"] = self.found["sparsity"]
        if zeros := sparse_layers(optimised, target):
            given = {"macs_removed": 0.0, "groups": [], "pattern": "as given"}
            result["sparsity"] = {**result.get("sparsity", given), "layers": zeros}
        return result


def _explained(details: dict[str, Any] | None, optimised: Graph, kept: Sequence[str]) -> dict[str, Any]:
    """The `quantization` of report.json: what quantization found (None: the model came quantized), where the
    final graph leaves the integers, and what to try."""
    result = details or explanation.of_quantized_model(optimised)
    if result["dtype"] in quantization.WEIGHT_ONLY:
        return result  # nothing is stored as integers between kernels
    result |= explanation.conversions(optimised, kept)
    return result | {"advice": explanation.advice(result)}
