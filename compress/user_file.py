"""Models from a function in the user's own Python file, which is run only with leave (``--trust``)."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calibrate.errors import UserError
from calibrate.signature import Batch, Output, Signature, TensorSpec
from compress.sources import Source, check_finite, digest_tensors, nearest

__all__ = ["load_file", "rebuild_file"]


def load_file(source: str, base: Path, trust: bool, task: str, seed: int) -> Source:
    """The model that ``path/file.py:function`` returns; see ``compress.sources.load_model``.

    The function takes no arguments and returns ``(module, example_inputs)``: a dict of tensors by input name, a tuple
    in the order of ``forward``'s parameters, or one tensor. The first dimension of each is the batch.
    """
    path, function = _split(source, base)
    if not trust:
        what = f"would run {function}() in {path}, which needs leave"
        raise UserError("model", what, "Read the file, then run again with --trust (from Python: trust=True).")
    torch.manual_seed(seed)
    model, example = _call(path, function, source)
    check_finite(model, source)
    batch = _named(model, example, source)
    signature, output = _signature(model, batch, source)
    found = _task(signature, output, task)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Source(
        model=model,
        signature=signature,
        name=path.stem if function in ("model", "make", "build", "load", "main") else function,
        task=found,  # type: ignore[arg-type]
        fingerprint=digest_tensors(model.state_dict(), digest.encode()),
        rebuild={
            "kind": "file",
            "file": path.name,
            "function": function,
            "path": source.rpartition(":")[0],
            "sha256": digest,
        },
        make_example=lambda: _few(batch),
        classes=output.shape[-1] if found in ("image-classification", "text-classification") else None,
        files={path: path.name},
    )


def rebuild_file(rebuild: dict[str, Any], folder: Path, trust: bool) -> nn.Module:
    """The model that the function returns: from the file it came from if that is unchanged, else from the run's
    copy."""
    copy = folder / "source" / rebuild["file"]
    original = _base(folder) / rebuild["path"]
    unchanged = original.is_file() and hashlib.sha256(original.read_bytes()).hexdigest() == rebuild["sha256"]
    path = original if unchanged else copy
    if not path.is_file():
        raise UserError(str(path), "there is no such file", "The run folder is not complete; run the recipe again.")
    if not trust:
        what = f"would run {rebuild['function']}() in {path}, which needs leave"
        raise UserError(str(folder), what, "Read the file, then run again with --trust (from Python: trust=True).")
    return _call(path, rebuild["function"], f"{path}:{rebuild['function']}")[0]


def _base(folder: Path) -> Path:
    """The folder of the recipe, as the run's manifest has it."""
    try:
        return folder / str(json.loads((folder / "manifest.json").read_text())["base"])
    except (OSError, ValueError, KeyError, TypeError):
        return folder


def _split(source: str, base: Path) -> tuple[Path, str]:
    file, _, function = source.rpartition(":")
    if not file:
        raise UserError("model", f"{source!r} names no function", f"Write {source}:function.")
    path = base / Path(file).expanduser()
    if not os.path.isfile(path):  # unlike Path.is_file, takes names of any length
        names = [entry.name for entry in path.parent.iterdir()] if os.path.isdir(path.parent) else []
        hint = nearest(path.name, names) if names else f"Files are looked for from {base}."
        raise UserError("model", f"there is no file {file}", hint)
    try:
        tree = ast.parse(path.read_text(), filename=file)
    except (SyntaxError, UnicodeDecodeError) as error:
        place = f"{file}:{error.lineno}:{error.offset}" if isinstance(error, SyntaxError) else file
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UserError(place, f"is not valid Python: {reason}", f"See it with: python -m py_compile {file}.") from None
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)]
    imported = [alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assigned = [
        target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets if isinstance(target, ast.Name)
    ]
    if function not in (*defined, *imported, *assigned):
        raise UserError(
            "model",
            f"{file} defines no function {function!r}",
            nearest(function, defined) if defined else "It defines none.",
        )
    return path, function


def _call(path: Path, function: str, source: str) -> tuple[nn.Module, Any]:
    """Runs the file and the function; what they raise is the user's own, and is shown with its place in their file."""
    _check_modules(path)
    name = f"_compress_user_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # classes defined there must be found by their module's name
    try:
        with _importable(path.parent):
            spec.loader.exec_module(module)
            returned = getattr(module, function)()
    except Exception as error:
        raise UserError(_place(error, path) or source, _line(error), "The file raised this.") from error
    if not isinstance(returned, tuple) or len(returned) != 2 or not isinstance(returned[0], nn.Module):
        hint = "Return (module, example_inputs): a torch module, and a dict of tensors by input name."
        raise UserError(source, f"returned {_told(returned)}", hint)
    model, example = returned
    wrong = next(
        (key for key, value in model.state_dict().items() if value.is_floating_point() and value.dtype != torch.float32),
        None,
    )
    if wrong is not None:
        model = model.float()
    return model.eval().requires_grad_(False), example


def _check_modules(path: Path) -> None:
    """Refuses a file beside which lies a module that it imports and whose name another module has already in this process: it
    would get that one.

    Raises:
        UserError: names the module and both files.
    """
    folder = path.parent.resolve()
    seen: set[str] = set()
    left = [path]
    while left:
        for name in _imports(left.pop()) - seen - sys.stdlib_module_names:
            seen.add(name)
            place = next((one for one in (folder / name / "__init__.py", folder / f"{name}.py") if one.is_file()), None)
            if place is None:
                continue
            left += sorted(place.parent.rglob("*.py")) if place.name == "__init__.py" else [place]
            known = getattr(sys.modules.get(name), "__file__", None)
            if known and not _same(Path(known), place):
                what = f"imports {name} from {place}, but {known} was imported under that name before"
                raise UserError(str(path), what, f"Give one of the two modules {name} another name.")


def _same(known: Path, place: Path) -> bool:
    """Whether two modules are one, or hold the same text (packages do not count)."""
    if known.resolve() == place.resolve():
        return True
    return known.is_file() and "__init__.py" not in (known.name, place.name) and known.read_bytes() == place.read_bytes()


def _imports(file: Path) -> set[str]:
    """Names of the modules that a file imports, functions included, without what is inside of packages."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_text())))
    except (OSError, SyntaxError, ValueError):
        return set()  # Python says so, if it is ever imported
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.partition(".")[0] for name in found}


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """The file's own folder is where its imports are looked for first, as when Python runs a script."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _named(model: nn.Module, example: Any, source: str) -> Batch:
    parameters = list(inspect.signature(model.forward).parameters)
    if isinstance(example, Tensor):
        example = (example,)
    if isinstance(example, tuple | list):
        example = dict(zip(parameters, example, strict=False)) if len(example) <= len(parameters) else None
    if not isinstance(example, Mapping) or not example or not all(isinstance(value, Tensor) for value in example.values()):
        hint = "Give a dict of tensors by input name, a tuple in the order of forward's parameters, or one tensor."
        raise UserError(source, "the example inputs are not tensors that fit forward", hint)
    batch = {str(name): value for name, value in example.items()}
    for name, value in batch.items():
        if value.dim() < 1 or value.shape[0] != next(iter(batch.values())).shape[0] or not value.shape[0]:
            raise UserError(source, f"input {name} is {list(value.shape)}", "The first dimension of every input is the batch.")
    return batch


def _signature(model: nn.Module, batch: Batch, source: str) -> tuple[Signature, Tensor]:
    try:
        with torch.inference_mode():
            returned = model(**batch)
    except Exception as error:
        raise UserError(source, f"the model fails on its example inputs: {_line(error)}", "") from error
    text = [name for name, value in batch.items() if value.dim() == 2 and not value.is_floating_point()]
    lengths = {batch[name].shape[1] for name in text}
    specs = []
    for name, value in batch.items():
        tail: tuple[int | str, ...] = tuple(value.shape[1:])
        if name in text and len(lengths) == 1 and value.dtype != torch.bool:
            tail = ("tokens",)
        specs.append(TensorSpec(name, value.dtype, ("batch", *tail)))
    output: Output = "tensor"
    for field in ("logits", "last_hidden_state"):
        if isinstance(getattr(returned, field, None), Tensor):
            output = field
            break
    signature = Signature(tuple(specs), output, "logits" if output == "logits" else "output")
    try:
        with torch.inference_mode():
            picked = signature.call(model, batch)
    except (IndexError, TypeError, AttributeError, StopIteration, KeyError):
        raise UserError(
            source, f"the model returns {_told(returned)}", "Return a tensor, a tuple or dict of tensors, or .logits."
        ) from None
    rows = next(iter(batch.values())).shape[0]
    if not picked.dim() or picked.shape[0] != rows:
        what = f"the output is {list(picked.shape)} for {rows} rows"
        raise UserError(source, what, "The first dimension of the output is the batch.")
    return signature, picked


def _task(signature: Signature, output: Tensor, task: str) -> str:
    if task != "auto":
        return task
    if output.dim() != 2 or output.shape[1] < 2:
        return "features"
    if any(len(spec.shape) == 4 and spec.dtype.is_floating_point for spec in signature.inputs):
        return "image-classification"
    if all(not spec.dtype.is_floating_point for spec in signature.inputs):
        return "text-classification"
    return "features"


def _few(batch: Batch) -> Batch:
    """Four rows, the user's own repeated if there are fewer."""
    order = torch.arange(4) % next(iter(batch.values())).shape[0]
    return {name: value[order] for name, value in batch.items()}


def _place(error: BaseException, path: Path) -> str:
    """The deepest line of the user's file in a traceback."""
    found, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            found = f"{path}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _told(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {', '.join(type(entry).__name__ for entry in value) or 'nothing'}"
    return f"{type(value).__name__}"
