"""INT8 on a DeiT-S of random weights, 224 px: time only, ours and the peers' in one interleaved run.

    python tests/benchmarks/deit_int8.py [--repeats N] [--batch N ...]

Every ratio is over the float file of ``torch.onnx.export`` (needs onnxscript) in ONNX Runtime, one thread; OpenVINO's precision
hint is f32. Calibration rows are noise, which says nothing of accuracy, and nothing is said of it.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

VARIANTS: dict[str, dict[str, Any]] = {
    "ours, static": {"activation_symmetric": False, "reduce_range": "pairs"},
    "ours, static, symmetric": {"activation_symmetric": True},
    "ours, dynamic": {"activations": "dynamic"},
}


def files(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
    """Every file by its name, and eight rows of noise."""
    from fusion import subject
    from peers import PEERS, plain_export

    from compress.anatomy import find
    from compress.passes.contract import Context
    from compress.passes.quantize import Quantize
    from compress.surgery import Surgery
    from export.graph import Traceable
    from export.to_onnx import OnnxExporter

    model, signature, rows, _ = subject("deit-s")
    arrays = {name: tensor.numpy() for name, tensor in rows.items()}
    found = {"torch.onnx.export, float": folder / "float.onnx"}
    plain_export(signature.bind(model), {name: value[:2] for name, value in arrays.items()}, folder / "float.onnx")

    def one_by_one() -> Any:
        return ({name: value[n : n + 1] for name, value in arrays.items()} for n in range(len(next(iter(arrays.values())))))

    for name in ("ONNX Runtime quantize_dynamic", "ONNX Runtime quantize_static, matmuls"):
        found[name] = folder / f"{len(found)}.onnx"
        PEERS[name](folder / "float.onnx", found[name], one_by_one)
    for name, options in VARIANTS.items():
        after = copy.deepcopy(model)
        anatomy = find(after, signature, {key: tensor[:2] for key, tensor in rows.items()})
        after = Quantize(**options).run(after, Context(signature, anatomy, lambda: iter([rows]), Surgery()))
        found[name] = folder / str(len(found)) / "model.onnx"
        found[name].parent.mkdir()
        OnnxExporter().write(Traceable(after, signature, {key: tensor[:2] for key, tensor in rows.items()}), found[name])
    return found, arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    given = parser.parse_args()
    torch.set_num_threads(1)
    import onnxruntime
    from sst2_int8 import _openvino, _runner

    from calibrate.latency import interleave, processor_name

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    print(f"DeiT-S, 224 px, random weights, 1 thread, {processor_name()}")
    with tempfile.TemporaryDirectory() as folder:
        found, arrays = files(Path(folder))
        for batch in given.batch:
            feed = {name: np.ascontiguousarray(value[:batch]) for name, value in arrays.items()}
            runs: dict[str, Any] = {}
            for name, path in found.items():
                session = onnxruntime.InferenceSession(str(path), options)
                runs[f"{name}; ONNX Runtime"] = _runner(session, feed)
                if "dynamic" not in name:
                    runs[f"{name}; OpenVINO"] = _openvino(path, feed)
            timings = interleave(runs, repeats=given.repeats, warmup=3)
            base = next(iter(timings.values())).median_ms
            for name, timing in timings.items():
                pace = "" if timing.ratio is None else f"  [{1 / timing.ratio.high:.2f}, {1 / timing.ratio.low:.2f}]"
                print(f"batch {batch}  {name:58s} {timing.median_ms:8.2f} ms  {base / timing.median_ms:5.2f}x{pace}", flush=True)


if __name__ == "__main__":
    main()
