"""Models of 16-bit floats as the same models in float32, which holds each of their constants exactly.

No kernel computes in float16 or bfloat16. Every intermediate value is at least as precise as the model asks
for, and none overflows at 65504. The inputs and outputs become float32 as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, ValueInfoProto

from skive.frontend.onnx.load import HALVES, Loaded, half_array, subgraphs

# Attributes that hold an element type.
TYPES = frozenset({"to", "dtype", "output_dtype", "output_datatype", "stash_type", "softmax_precision"})

Place: TypeAlias = "TensorProto | TypeProto.Tensor | AttributeProto"


def widened(model: Loaded) -> Loaded:
    """`model` with float32 in place of float16 and bfloat16; the same object if it has neither."""
    if next(places(model.proto), None) is None:
        return model
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    for place in list(places(proto)):
        if isinstance(place, TensorProto):
            values = half_array(place, model.folder)
            name, dims = place.name, list(place.dims)
            place.Clear()
            place.name, place.data_type, place.raw_data = name, TensorProto.FLOAT, values.astype("<f4").tobytes()
            place.dims.extend(dims)
        elif isinstance(place, AttributeProto):
            place.i = TensorProto.FLOAT
        else:
            place.elem_type = TensorProto.FLOAT
    return Loaded(proto, model.folder, model.file_sha256)


def places(model: ModelProto) -> Iterator[Place]:
    """Everything in `model` that says float16 or bfloat16: tensors, types, attributes with an element type."""
    yield from _in_graph(model.graph)
    for f in model.functions:
        yield from _in_infos(f.value_info)
        yield from _in_nodes(f.node)
        yield from _in_attributes(f.attribute_proto)


def _in_graph(graph: GraphProto) -> Iterator[Place]:
    yield from _in_tensors(graph.initializer)
    yield from _in_tensors(t.values for t in graph.sparse_initializer)
    yield from _in_infos([*graph.input, *graph.output, *graph.value_info])
    yield from _in_nodes(graph.node)


def _in_tensors(tensors: Iterable[TensorProto]) -> Iterator[TensorProto]:
    return (t for t in tensors if t.data_type in HALVES)


def _in_infos(infos: Iterable[ValueInfoProto]) -> Iterator[Place]:
    for info in infos:
        yield from _in_type(info.type)


def _in_type(type_: TypeProto) -> Iterator[Place]:
    kind = type_.WhichOneof("value")
    if kind in ("sequence_type", "optional_type"):
        yield from _in_type(getattr(type_, kind).elem_type)
    elif kind in ("tensor_type", "sparse_tensor_type") and getattr(type_, kind).elem_type in HALVES:
        yield getattr(type_, kind)


def _in_nodes(nodes: Iterable[NodeProto]) -> Iterator[Place]:
    for node in nodes:
        if node.op_type != "BitCast":  # the bits of float32 are others: refused by its row
            yield from _in_attributes(node.attribute)


def _in_attributes(attributes: Iterable[AttributeProto]) -> Iterator[Place]:
    for a in attributes:
        if a.type == AttributeProto.INT and a.name in TYPES and a.i in HALVES:
            yield a
        yield from _in_tensors([*([a.t] if a.HasField("t") else []), *a.tensors])
        for type_ in [*([a.tp] if a.HasField("tp") else []), *a.type_protos]:
            yield from _in_type(type_)
        for graph in subgraphs(a):
            yield from _in_graph(graph)
