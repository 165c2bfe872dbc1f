"""The peers of the INT8 benchmark: each makes a file from the same float model and the same calibration rows; Olive where it is
installed (olive-ai)."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

Arrays = dict[str, np.ndarray[Any, Any]]

__all__ = ["PEERS", "plain_export"]


def plain_export(model: torch.nn.Module, example: Arrays, path: Path) -> None:
    """The file that ``torch.onnx.export`` writes by itself: the baseline of every ratio."""
    batch = torch.export.Dim("batch")
    tensors = {name: torch.from_numpy(value) for name, value in example.items()}
    program = torch.onnx.export(
        model, (), kwargs=tensors, dynamo=True, dynamic_shapes={name: {0: batch} for name in tensors}, verbose=False
    )
    assert program is not None
    program.save(str(path), external_data=False)


def ort_dynamic(source: Path, path: Path, rows: Callable[[], Iterator[Arrays]]) -> None:
    """ONNX Runtime's quantize_dynamic; needs the exporter's value_info removed first."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(str(source))
    del model.graph.value_info[:]
    bare = path.with_suffix(".bare.onnx")
    onnx.save(model, str(bare))
    quantize_dynamic(str(bare), str(path), weight_type=QuantType.QInt8, per_channel=True)
    bare.unlink()


def _static(source: Path, path: Path, rows: Callable[[], Iterator[Arrays]], operators: list[str] | None) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows = rows()

        def get_next(self) -> Arrays | None:
            return next(self.rows, None)

    import onnx

    model = onnx.load(str(source))
    del model.graph.value_info[:]
    bare = path.with_suffix(".bare.onnx")
    onnx.save(model, str(bare))
    quantize_static(
        str(bare), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=operators,
    )  # fmt: skip
    bare.unlink()


def ort_static(source: Path, path: Path, rows: Callable[[], Iterator[Arrays]]) -> None:
    """ONNX Runtime's quantize_static, matmuls only, min-max."""
    _static(source, path, rows, ["MatMul", "Gemm"])


def nncf_onnx(source: Path, path: Path, rows: Callable[[], Iterator[Arrays]]) -> None:
    """NNCF's quantize on the ONNX model (SmoothQuant, fast bias correction, its transformer preset)."""
    import nncf
    import onnx

    quantized = nncf.quantize(
        onnx.load(str(source)), nncf.Dataset(list(rows())), model_type=nncf.ModelType.TRANSFORMER, subset_size=128
    )
    onnx.save(quantized, str(path))


def ort_nbits(source: Path, path: Path, rows: Callable[[], Iterator[Arrays]]) -> None:
    """ONNX Runtime's MatMulNBits: weights of 4 bits in groups of 32, products in 8 bits (accuracy_level 4), no rows."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(str(source)), block_size=32, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    onnx.save(quantizer.model.model, str(path))


def olive_dynamic(source: Path, path: Path, rows: Callable[[], Iterator[Arrays]]) -> None:
    """Olive's OnnxDynamicQuantization as it is by default; no rows."""
    operators = torch.library.Library("torchvision", "DEF")  # a torchvision without a GPU's torch imports with these only
    operators.define("nms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    operators.define("qnms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    from olive.workflows import run

    processor = {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
    with tempfile.TemporaryDirectory() as folder:
        run(
            {
                "input_model": {"type": "ONNXModel", "model_path": str(source)},
                "systems": {"here": {"type": "LocalSystem", "accelerators": [processor]}},
                "host": "here",
                "target": "here",
                "passes": {"quantize": {"type": "OnnxDynamicQuantization"}},
                "output_dir": f"{folder}/out",
                "cache_dir": f"{folder}/cache",
                "evaluate_input_model": False,
            }
        )
        shutil.copy(Path(folder) / "out" / "model.onnx", path)


PEERS: dict[str, Callable[[Path, Path, Callable[[], Iterator[Arrays]]], None]] = {
    "ONNX Runtime quantize_dynamic": ort_dynamic,
    "ONNX Runtime quantize_static, matmuls": ort_static,
    "ONNX Runtime MatMulNBits, 4 bits": ort_nbits,
    "NNCF quantize (ONNX)": nncf_onnx,
}
if importlib.util.find_spec("olive"):
    PEERS["Olive OnnxDynamicQuantization"] = olive_dynamic


def _main() -> None:
    """``python peers.py NAME SOURCE OUT ROWS.npz``: makes one peer's file, in a process of its own."""
    name, source, out, stored = sys.argv[1:]
    arrays = dict(np.load(stored))
    count = next(iter(arrays.values())).shape[0]

    def rows() -> Iterator[Arrays]:
        for start in range(count):
            yield {key: value[start : start + 1] for key, value in arrays.items()}

    PEERS[name](Path(source), Path(out), rows)


if __name__ == "__main__":
    _main()
