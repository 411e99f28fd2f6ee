"""Model files: reading one without trusting it, checking its structure, and its hash.

Nothing here believes a number in the file: sizes are compared with what is there before anything
is allocated, and external data is read only from regular files inside the model's own folder.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

import numpy as np
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]
from onnx import AttributeProto, GraphProto, ModelProto, SparseTensorProto, TensorProto

from skive.errors import InvalidModelError, ShapeError, first_line
from skive.types import MAX_ELEMENTS, DType

IR_VERSIONS = range(3, 15)  # 14 is that of onnx 1.23
MAX_OPSET = 28
MAX_FILE_BYTES = 2**31 - 1  # protobuf's own limit; larger models keep their weights outside
MAX_NESTING = 24  # subgraphs inside subgraphs; protobuf itself ends at 33

DTYPES: dict[int, DType] = {
    TensorProto.FLOAT: DType.f32, TensorProto.DOUBLE: DType.f64, TensorProto.FLOAT16: DType.f16,
    TensorProto.INT8: DType.i8, TensorProto.INT16: DType.i16, TensorProto.INT32: DType.i32,
    TensorProto.INT64: DType.i64, TensorProto.UINT8: DType.u8, TensorProto.UINT16: DType.u16,
    TensorProto.UINT32: DType.u32, TensorProto.UINT64: DType.u64, TensorProto.BOOL: DType.bool}
ELEM_TYPES = {d: e for e, d in DTYPES.items()}
# Two elements to a byte, the first in the low half; read into the integers of 8 bits that hold their values.
NIBBLES: dict[int, DType] = {TensorProto.INT4: DType.i8, TensorProto.UINT4: DType.u8}
# 16-bit floats, as bit patterns in `int32_data` or raw bytes; `widen` reads them as float32.
HALVES = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})
# The field that holds the elements when they are not raw bytes, by element type.
FIELDS = {DType.f32: "float_data", DType.f64: "double_data", DType.i64: "int64_data", DType.u32: "uint64_data",
          DType.u64: "uint64_data"}


def elem_name(elem: int) -> str:
    """The name of an ONNX element type in a message."""
    try:
        return TensorProto.DataType.Name(elem).lower()
    except ValueError:
        return f"number {elem}"


# ------------------------------------------------------------------------------------------ reading


class Loaded(NamedTuple):
    """A structurally sound model, the folder of its external data (None for a model in memory), and the
    SHA-256 of the file it was read from ("" for a model in memory)."""

    proto: ModelProto
    folder: Path | None
    file_sha256: str


def load_model(model: str | Path | ModelProto | Loaded) -> Loaded:
    """The model, read and checked; what was loaded already is returned as it is.

    InvalidModelError, with one line, for everything that is not such a model.
    """
    if isinstance(model, Loaded):
        return model
    if isinstance(model, ModelProto):
        loaded, what = Loaded(model, None, ""), "the model"
    else:
        path = Path(model)
        data, what = read(path), str(path)
        loaded = Loaded(parse(data, what), path.parent, hashlib.sha256(data).hexdigest())
    try:
        check(loaded.proto)
    except (InvalidModelError, ShapeError) as e:
        raise type(e)(f"{what}: {e}") from None
    except (UnicodeDecodeError, ValueError) as e:  # a string in the file that is not text
        raise InvalidModelError(f"{what}: damaged: {first_line(e)}") from None
    return loaded


def read(path: Path) -> bytes:
    """The bytes of a model file; InvalidModelError if there is no such file or it is of another kind."""
    try:
        if not path.exists():
            raise InvalidModelError(f"{path}: no such file")
        if not path.is_file():
            raise InvalidModelError(f"{path}: not a file")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidModelError(f"{path}: larger than 2 GiB; save the weights as external data")
        data = path.read_bytes()
    except OSError as e:
        raise InvalidModelError(f"{path}: {e.strerror or e}") from None
    except ValueError as e:  # a path with a zero byte
        raise InvalidModelError(f"{str(path)!r}: {e}") from None
    if not data:
        raise InvalidModelError(f"{path}: the file is empty")
    if data[:4] == b"PK\x03\x04":
        raise InvalidModelError(f"{path}: a zip archive, not an ONNX model; skive takes an ONNX file, "
                                "a .pt2 exported program or a module, never a pickled checkpoint")
    if data[0] == 0x80 and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise InvalidModelError(f"{path}: a pickle file, which could run any code; skive takes an ONNX file, "
                                "a .pt2 exported program or a module")
    return data


def parse(data: bytes, what: str) -> ModelProto:
    """The protobuf message in `data`; InvalidModelError if it is damaged."""
    proto = ModelProto()
    try:
        proto.ParseFromString(data)
    except (DecodeError, RecursionError):
        raise InvalidModelError(f"{what}: not an ONNX model, or a damaged one") from None
    return proto


# ----------------------------------------------------------------------------------------- checking


def check(model: ModelProto) -> None:
    """Raises InvalidModelError or ShapeError unless versions, names, order and tensors are sound."""
    if not model.HasField("graph") or not (model.graph.node or model.graph.output):
        raise InvalidModelError("not an ONNX model: it has no graph")
    if model.ir_version not in IR_VERSIONS:
        raise InvalidModelError(f"IR version {model.ir_version} is not one of {IR_VERSIONS[0]} to {IR_VERSIONS[-1]}")
    if not model.opset_import:
        raise InvalidModelError("no opset is imported")
    domains: set[str] = set()
    for opset in model.opset_import:
        domain = "" if opset.domain == "ai.onnx" else opset.domain
        if domain in domains:
            raise InvalidModelError(f"the domain {domain!r} is imported twice")
        domains.add(domain)
        if opset.version < 1 or (domain == "" and opset.version > MAX_OPSET):
            raise InvalidModelError(f"opset {opset.version} of the domain {domain!r} is not one of 1 to {MAX_OPSET}")
    functions = [(f.domain, f.name) for f in model.functions]
    if len(set(functions)) < len(functions):
        raise InvalidModelError("a function is defined twice")
    pending: list[tuple[GraphProto, frozenset[str], int]] = [(model.graph, frozenset(), 0)]
    while pending:
        graph, outer, depth = pending.pop()
        if depth > MAX_NESTING:
            raise InvalidModelError(f"subgraphs are nested more than {MAX_NESTING} deep")
        known = check_names(graph, outer)
        for tensor in graph.initializer:
            check_tensor(tensor)
        for node in graph.node:
            for a in node.attribute:
                pending += [(g, known, depth + 1) for g in subgraphs(a)]
    for tensor in attribute_tensors(model):
        check_tensor(tensor)


def check_names(graph: GraphProto, outer: frozenset[str]) -> frozenset[str]:
    """Every name a node of `graph` may read; InvalidModelError for repeated, missing or late ones."""
    for node in graph.node:
        for text in (node.op_type, node.domain, node.name, *node.input, *node.output):
            if not isinstance(text, str):  # protobuf gives bytes for what is not UTF-8
                raise InvalidModelError(f"a node has a name that is not UTF-8: {text!r}")
    for info in (*graph.input, *graph.output):
        if not isinstance(info.name, str):
            raise InvalidModelError(f"an input or output has a name that is not UTF-8: {info.name!r}")
    inputs = [i.name for i in graph.input]
    weights = [t.name for t in graph.initializer] + [t.values.name for t in graph.sparse_initializer]
    for kind, names in (("input", inputs), ("initialiser", weights)):
        seen: set[str] = set()
        for name in names:
            if not name:
                raise InvalidModelError(f"an {kind} has no name")
            if name in seen:
                raise InvalidModelError(f"the {kind} {name!r} is there twice")
            seen.add(name)
    made = {*inputs, *weights}
    later = {o for n in graph.node for o in n.output if o}
    for node in graph.node:
        label = node.name or f"{node.op_type}:{next(iter(node.output), '')}"
        for name in node.input:
            if name and name not in made and name not in outer:
                why = ("only by a later node or by itself: the nodes are out of order or form a cycle"
                       if name in later else "by nothing: an initialiser or an input is missing")
                raise InvalidModelError(f"{label}: tensor {name!r} is produced {why}")
        for name in node.output:
            if name and name in made:
                raise InvalidModelError(f"{label}: tensor {name!r} is produced twice")
            made.add(name)
    for o in graph.output:
        if o.name not in made and o.name not in outer:
            raise InvalidModelError(f"the output {o.name!r} is produced by nothing")
    return outer | made


def subgraphs(a: AttributeProto) -> list[GraphProto]:
    return [*([a.g] if a.HasField("g") else []), *a.graphs]


def attribute_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor attribute of the model's graphs and functions."""
    pending = [list(model.graph.node), *(list(f.node) for f in model.functions)]
    while pending:
        for node in pending.pop():
            for a in node.attribute:
                if a.HasField("t"):
                    yield a.t
                yield from a.tensors
                pending += [list(g.node) for g in subgraphs(a)]


def element_count(dims: list[int], name: str) -> int:
    """The number of elements; ShapeError for a negative dimension or an impossible product."""
    if any(d < 0 for d in dims):
        raise ShapeError(f"{name}: shape {list(dims)} has a negative dimension")
    if math.prod(max(d, 1) for d in dims) > MAX_ELEMENTS:
        raise ShapeError(f"{name}: shape {list(dims)} has more than 2^40 elements")
    return math.prod(dims)


def check_tensor(tensor: TensorProto) -> None:
    """InvalidModelError if the stored data is not exactly what the shape needs."""
    count = element_count(list(tensor.dims), tensor.name or "a tensor")
    dtype = DTYPES.get(tensor.data_type)
    if tensor.data_type in NIBBLES and tensor.data_location != TensorProto.EXTERNAL:
        bytes_ = len(tensor.raw_data if tensor.HasField("raw_data") else tensor.int32_data)
        if bytes_ != (count + 1) // 2:
            raise InvalidModelError(f"{tensor.name or 'a tensor'}: shape {list(tensor.dims)} of 4-bit integers needs "
                                    f"{(count + 1) // 2} bytes, but {bytes_} are stored")
    if dtype is None or tensor.data_location == TensorProto.EXTERNAL:
        return  # reported where it is used; external data is measured when it is read
    stored = len(tensor.raw_data) // dtype.bytes if tensor.HasField("raw_data") else len(
        getattr(tensor, FIELDS.get(dtype, "int32_data")))
    if stored != count or (tensor.HasField("raw_data") and len(tensor.raw_data) % dtype.bytes):
        raise InvalidModelError(f"{tensor.name or 'a tensor'}: shape {list(tensor.dims)} of {dtype.value} needs "
                                f"{count} elements, but {stored} are stored")


# ------------------------------------------------------------------------------------------ tensors


def tensor_array(tensor: TensorProto, folder: Path | None) -> np.ndarray:
    """The value of a tensor whose element type is in DTYPES; InvalidModelError if its data is not there."""
    dtype = DTYPES[tensor.data_type]
    shape = tuple(tensor.dims)
    if tensor.data_location == TensorProto.EXTERNAL:
        return np.frombuffer(external_bytes(tensor, folder), dtype.numpy.newbyteorder("<")).reshape(shape)
    check_tensor(tensor)
    if tensor.HasField("raw_data"):
        stored = np.frombuffer(tensor.raw_data, dtype.numpy.newbyteorder("<"))
        return stored.astype(dtype.numpy, copy=False).reshape(shape)
    values = getattr(tensor, FIELDS.get(dtype, "int32_data"))
    if dtype is DType.f16:  # stored as bit patterns
        return np.array(values, np.int32).astype(np.uint16).view(np.float16).reshape(shape)
    wide = {DType.u32: np.uint64, DType.u64: np.uint64}.get(dtype, np.int32 if dtype not in FIELDS else dtype.numpy)
    return np.array(values, wide).astype(dtype.numpy).reshape(shape)


def half_array(tensor: TensorProto, folder: Path | None) -> np.ndarray:
    """The float32 value of a tensor of float16 or bfloat16; InvalidModelError if its data is not there."""
    if tensor.data_location == TensorProto.EXTERNAL:
        bits = np.frombuffer(external_bytes(tensor, folder), "<u2")
    elif tensor.HasField("raw_data"):
        bits = np.frombuffer(tensor.raw_data[: len(tensor.raw_data) // 2 * 2], "<u2")
    else:
        bits = np.array(tensor.int32_data, np.int64).astype(np.uint16)
    name = tensor.name or "a tensor"
    count = element_count(list(tensor.dims), name)
    if bits.size != count or len(tensor.raw_data) % 2:
        raise InvalidModelError(f"{name}: shape {list(tensor.dims)} of {elem_name(tensor.data_type)} needs {count} "
                                f"elements, but {bits.size} are stored")
    if tensor.data_type == TensorProto.FLOAT16:
        return bits.astype(np.uint16).view(np.float16).astype(np.float32).reshape(tuple(tensor.dims))
    return (bits.astype(np.uint32) << 16).view(np.float32).reshape(tuple(tensor.dims))


def nibble_array(tensor: TensorProto, folder: Path | None) -> np.ndarray:
    """The value of a tensor of 4-bit integers, in 8 bits; InvalidModelError if its data is not there."""
    if tensor.data_location == TensorProto.EXTERNAL:
        packed = np.frombuffer(external_bytes(tensor, folder), np.uint8)
    else:
        check_tensor(tensor)
        packed = np.frombuffer(tensor.raw_data, np.uint8) if tensor.HasField("raw_data") else np.array(
            tensor.int32_data, np.int64).astype(np.uint8)
    values = np.stack([packed & 15, packed >> 4], -1).reshape(-1)[: math.prod(tensor.dims)].reshape(tuple(tensor.dims))
    if tensor.data_type == TensorProto.INT4:
        return ((values ^ 8).astype(np.int8) - 8).astype(np.int8)
    return values


def external_bytes(tensor: TensorProto, folder: Path | None) -> bytes:
    """The data of a tensor in another file, which must lie in the folder of the model."""
    entries = {e.key: e.value for e in tensor.external_data}
    location = entries.get("location", "")
    name = tensor.name or "a tensor"
    if not isinstance(location, str) or any(len(os.fsencode(part)) > 255 for part in location.split("/")):
        raise InvalidModelError(f"{name}: the location of its external data is not a file name: {location[:80]!r}")
    if folder is None:
        raise InvalidModelError(f"{name}: its data is in the file {location!r}; give the path of the model instead of "
                                "the model in memory")
    posix, windows = PurePosixPath(location), PureWindowsPath(location)
    if not location or "\0" in location or posix.is_absolute() or windows.drive or windows.root or ".." in (
            *posix.parts, *windows.parts):
        raise InvalidModelError(f"{name}: external data {location!r} must be a file in the folder of the model")
    root = Path(os.path.realpath(folder))
    path = Path(os.path.realpath(root / location))
    if not path.is_relative_to(root):
        raise InvalidModelError(f"{name}: external data {location!r} is a link that leaves the folder of the model")
    if not path.is_file():
        raise InvalidModelError(f"{name}: external data {location!r} is missing")
    count = element_count(list(tensor.dims), name)
    each = 2 if tensor.data_type in HALVES else DTYPES[tensor.data_type].bytes
    needed = (count + 1) // 2 if tensor.data_type in NIBBLES else count * each
    try:
        offset, length = int(entries.get("offset", "0")), int(entries.get("length", str(needed)))
    except ValueError:
        raise InvalidModelError(f"{name}: offset or length of its external data is not a number") from None
    if offset < 0 or length != needed or offset + length > path.stat().st_size:
        raise InvalidModelError(f"{name}: {needed} bytes at {offset} (declared {length}) do not fit {location!r} of "
                                f"{path.stat().st_size} bytes")
    try:
        with path.open("rb") as f:
            f.seek(offset)
            return f.read(length)
    except OSError as e:
        raise InvalidModelError(f"{name}: {location}: {e.strerror or e}") from None


def sparse_array(tensor: SparseTensorProto, folder: Path | None) -> np.ndarray:
    """A sparse initialiser as a dense array; InvalidModelError if its indices are outside."""
    name = tensor.values.name
    values, indices = tensor_array(tensor.values, folder), tensor_array(tensor.indices, folder)
    count = element_count(list(tensor.dims), name)
    if count > 1 << 28:
        raise ShapeError(f"{name}: a sparse tensor of {count} elements is too large to be made dense")
    shape = tuple(tensor.dims)
    if indices.ndim == 2 and indices.shape == (values.size, len(shape)):
        if (indices < 0).any() or (indices >= np.array(shape)).any():
            raise InvalidModelError(f"{name}: an index is outside {list(shape)}")
        indices = np.ravel_multi_index(tuple(indices.T), shape)
    if indices.shape != (values.size,) or (indices < 0).any() or (indices >= count).any():
        raise InvalidModelError(f"{name}: the indices do not fit {list(shape)}")
    dense = np.zeros(count, values.dtype)
    dense[indices] = values.reshape(-1)
    return dense.reshape(shape)


def model_sha256(model: str | Path | ModelProto | Loaded) -> str:
    """SHA-256 (hexadecimal) over the model file, or the model in memory, and its external data."""
    proto, folder, file_sha256 = load_model(model)
    if file_sha256:
        digest = hashlib.sha256(file_sha256.encode())
    else:
        try:
            digest = hashlib.sha256(proto.SerializeToString(deterministic=True))
        except (EncodeError, ValueError) as e:
            raise InvalidModelError(f"the model: {first_line(e)}") from None
    external = False
    for tensor in (*proto.graph.initializer, *attribute_tensors(proto)):
        known = tensor.data_type in DTYPES or tensor.data_type in NIBBLES or tensor.data_type in HALVES
        if tensor.data_location == TensorProto.EXTERNAL and known:
            digest.update(external_bytes(tensor, folder))
            external = True
    return file_sha256 if file_sha256 and not external else digest.hexdigest()
