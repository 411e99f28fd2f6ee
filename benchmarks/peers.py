"""What other engines make of a float32 ONNX model and calibration samples: their INT8 files.

    python benchmarks/peers.py     serves one job of `skive.bench`, ExecuTorch's included

Every function takes the same samples, an array [N, ...] of inputs of batch 1 or of the model's batch,
and writes the file that the engine runs. `missing` says what is not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from skive import bench

# Which package holds each engine, and the quantizer of its best INT8 file.
PACKAGES = {"onnxruntime": ("onnxruntime",), "openvino": ("openvino",), "nncf": ("nncf", "openvino"),
            "executorch": ("executorch", "torch", "torchao")}


def missing(engine: str) -> str | None:
    """The package that `engine` lacks, None if it is all there."""
    return next((p for p in PACKAGES[engine] if importlib.util.find_spec(p) is None), None)


def version(package: str) -> str:
    """Its version, or "missing"."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def quantize_onnxruntime(model: Path, samples: np.ndarray, destination: Path, *, operators: bool = False,
                         signed: bool = False, batch: int = 1) -> None:
    """INT8 by onnxruntime's static quantizer: weights int8 per channel, activations uint8 (`signed`: int8,
    symmetric); QDQ, or with `operators` QOperator."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, name: str):
            self._items = ({name: x} for x in _batches(samples, batch))

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._items, None)

    logging.getLogger().setLevel(logging.ERROR)  # the quantizer warns of what is done here
    with tempfile.TemporaryDirectory(prefix="skive-bench-") as folder:
        prepared = Path(folder) / "prepared.onnx"
        source = _modern(model, Path(folder))
        # The conversion leaves constants of the old shape, which the optimiser of the preparation rejects.
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True, skip_optimization=source != model)
        quantize_static(
            str(prepared), str(destination), Reader(_input_name(onnx.load(source))),
            quant_format=QuantFormat.QOperator if operators else QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QInt8 if signed else QuantType.QUInt8, weight_type=QuantType.QInt8,
            extra_options={"ActivationSymmetric": signed, "WeightSymmetric": True})


def quantize_onnxruntime_dynamic(model: Path, destination: Path) -> None:
    """INT8 weights per channel of matrix products; activations are quantized while the network runs."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(model), str(destination), per_channel=True, weight_type=QuantType.QInt8,
                     op_types_to_quantize=["MatMul", "Gemm", "Gather"])


def is_transformer(model: Path) -> bool:
    """True if it has layers that convolutional networks do not have."""
    import onnx

    return any(n.op_type in ("LayerNormalization", "Erf", "Gelu") for n in onnx.load(model).graph.node)


def quantize_nncf(model: Path, samples: np.ndarray, destination: Path, *, batch: int = 1) -> None:
    """INT8 by NNCF's post-training quantization with its defaults, all samples used: an `.xml` for OpenVINO, or
    an ONNX model with QDQ if `destination` ends so."""
    with tempfile.TemporaryDirectory(prefix="skive-bench-") as folder:
        _quantize_nncf(_folded(_modern(model, Path(folder)), Path(folder)), samples, destination, batch)


def _quantize_nncf(model: Path, samples: np.ndarray, destination: Path, batch: int) -> None:
    import onnx

    nncf = _silent_nncf()
    loaded = onnx.load(model)
    kind: dict[str, Any] = {}
    if is_transformer(model):
        kind["model_type"] = nncf.ModelType.TRANSFORMER
    inputs = list(_batches(samples, batch))
    if destination.suffix == ".onnx":
        name = _input_name(loaded)
        data = nncf.Dataset([{name: x} for x in inputs])
        onnx.save(nncf.quantize(loaded, data, subset_size=len(inputs), **kind), destination)
        return
    import openvino as ov

    network = ov.Core().read_model(model)
    if network.is_dynamic():
        network.reshape(list(inputs[0].shape))
    quantized = nncf.quantize(network, nncf.Dataset(inputs), subset_size=len(inputs), **kind)
    ov.save_model(quantized, destination, compress_to_fp16=False)


def quantize_executorch(module: Any, samples: np.ndarray, destination: Path, *, batch: int = 1) -> None:
    """INT8 by the XNNPACK quantizer, per channel and static, lowered to the XNNPACK delegate: a `.pte` of a
    torch `module`."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    warnings.simplefilter("ignore", FutureWarning)  # of torch about itself, for each parameter
    inputs = [torch.from_numpy(x) for x in _batches(samples, batch)]
    quantizer = xnnpack_quantizer.XNNPACKQuantizer()
    quantizer.set_global(xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True))
    prepared = prepare_pt2e(torch.export.export(module, (inputs[0],)).module(), quantizer)
    for x in inputs:
        prepared(x)
    exported = torch.export.export(convert_pt2e(prepared), (inputs[0],))
    program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
    destination.write_bytes(program.buffer)


def _modern(model: Path, folder: Path) -> Path:
    """`model`, or if it is older than opset 13, which knows no scale per channel, the same in opset 17."""
    import onnx
    import onnx.version_converter

    loaded = onnx.load(model)
    if next(o.version for o in loaded.opset_import if o.domain in ("", "ai.onnx")) >= 13:
        return model
    onnx.save(onnx.version_converter.convert_version(loaded, 17), folder / "modern.onnx")
    return folder / "modern.onnx"


def _folded(model: Path, folder: Path) -> Path:
    """`model` with its constants folded if weights stand behind a Reshape, where NNCF does not find their axes."""
    import onnx
    import onnxruntime as ort

    graph = onnx.load(model).graph
    constants = {t.name for t in graph.initializer}
    if not any(n.op_type == "Reshape" and n.input[0] in constants for n in graph.node):
        return model
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / "folded.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return folder / "folded.onnx"


def _silent_nncf() -> Any:
    """The module nncf without its hints."""
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    return nncf


def _batches(samples: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    """The samples in runs of `batch`, each with its batch dimension; what does not fill one is left out."""
    return (np.ascontiguousarray(samples[i:i + batch]) for i in range(0, len(samples) - batch + 1, batch))


def _input_name(model: Any) -> str:
    """The name of its only input."""
    constants = {t.name for t in model.graph.initializer}
    (name,) = (i.name for i in model.graph.input if i.name not in constants)
    return str(name)


# ---------------------------------------------------------------------------------------- running

Run = Callable[[np.ndarray], np.ndarray]  # one sample with its batch dimension -> the first output


def run_onnxruntime(model: Path) -> Run:
    """One thread, every optimisation."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: np.asarray(session.run(None, {name: x})[0])


def run_openvino(model: Path, shape: Sequence[int]) -> Run:
    """One thread; what is not quantized is computed in float32."""
    import openvino as ov

    core = ov.Core()
    network = core.read_model(model)
    if network.is_dynamic():
        network.reshape(list(shape))
    compiled = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    request = compiled.create_infer_request()

    def run(x: np.ndarray) -> np.ndarray:
        request.infer([np.ascontiguousarray(x)])
        return np.array(request.get_output_tensor(0).data)

    return run


def _executorch(job: bench.Job) -> bench.Loaded:
    import torch
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    portable_lib._unsafe_reset_threadpool(job.threads)
    method = Runtime.get().load_program(job.source).load_method("forward")
    inputs = tuple(torch.from_numpy(a) for a in job.inputs())
    last: list[Any] = [None]

    def run() -> None:
        last[0] = method.execute(inputs)

    return version("executorch"), run, lambda: [o.numpy() for o in last[0]]


def _openvino(job: bench.Job) -> bench.Loaded:
    """As skive.bench runs it; without its fused subgraphs where it has not registers enough for one."""
    try:
        return bench._openvino(job)
    except RuntimeError as e:
        if "ubgraph" not in str(e) and "snippets" not in str(e):
            raise
        return bench._openvino(job, SNIPPETS_MODE="DISABLE")


if __name__ == "__main__":
    bench.ENGINES["openvino"] = _openvino
    bench.ENGINES["executorch"] = _executorch
    bench.worker()
