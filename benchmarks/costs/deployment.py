"""What PatchToll and PatchCore cost where they inspect: time per image, in torch and OpenVINO, size, memory."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.quiet import apart
from benchmarks.run.measure import in_new_process, median_seconds, peak_memory
from benchmarks.run.store import RESULTS, finish, provenance
from benchmarks.run.tables import markdown

#: As PatchToll is by default; PatchCore's default layers are the last two.
LAYERS = {"PatchToll": ("layer1", "layer2", "layer3"), "PatchCore": ("layer2", "layer3")}


def deployment(
    images: int = 256,
    coresets: Sequence[float] = (0.01, 0.1),
    image_size: int = 256,
    backbone: str = "resnet18",
    repeats: int = 40,
    memory: bool = True,
    output: Path = RESULTS / "deployment.json",
) -> None:
    """Milliseconds per image, one image at a time, on one thread; bytes of the model; memory of scoring.

    All of them depend on sizes alone, so weights are random and PatchCore's memory bank is filled
    with as many random patches as ``coresets`` leave of the training images. In brackets stands what a model
    takes more than its backbone alone up to the same layer.

    Args:
        images: Training images.
        coresets: Shares of their patches that PatchCore keeps; anomalib's default is 0.1.
        image_size: In pixels, square.
        backbone: Of all models.
        repeats: Interleaved measurements of each; medians are shown.
        memory: Whether the memory of scoring is measured, for which each model gets a process of its own.
        output: Where the record goes.
    """
    torch.set_num_threads(1)
    record = {"command": "deployment", **provenance(), "images": images, "image_size": image_size, "repeats": repeats}
    patches = images * (image_size // 8) ** 2
    cases = [("PatchToll", "PatchToll", 0)]
    cases += [(f"PatchCore, {share:g} of the patches", "PatchCore", round(share * patches)) for share in coresets]
    image = torch.rand(1, 3, image_size, image_size)
    with apart(), tempfile.TemporaryDirectory() as folder:
        models = [_features(backbone, layers) for layers in LAYERS.values()]
        models += [_model(kind, backbone, image_size, bank) for _, kind, bank in cases]
        files = [_openvino(model, image, Path(folder) / str(i)) for i, model in enumerate(models)]
        calls: list[Callable[[], Any]] = [partial(model, image) for model in models]
        calls += [_compiled(path, image) for path, _ in files]
        with torch.inference_mode():
            seconds = median_seconds({str(i): call for i, call in enumerate(calls)}, repeats)
        taken = [1000 * one for one in seconds.values()]
        banks = [(kind, None) for kind in LAYERS] + [(kind, bank) for _, kind, bank in cases]
        peaks = [_peak(kind, backbone, image_size, bank) for kind, bank in banks] if memory else None
    measured = {
        "torch, ms": taken[: len(models)],
        "OpenVINO, ms": taken[len(models) :],
        "model, MB": [sum(value.nbytes for value in model.state_dict().values()) / 1e6 for model in models],
        "OpenVINO file, MB": [size / 1e6 for _, size in files],
        **({} if peaks is None else {"memory, MB": peaks}),
    }
    rows = []
    for i, (name, kind, _) in enumerate(cases):
        alone, whole = list(LAYERS).index(kind), len(LAYERS) + i
        rows.append({"model": name} | {key: (v[whole], v[whole] - v[alone]) for key, v in measured.items()})
    table = markdown(
        [{"model": row["model"]} | {key: "{:.1f} ({:.1f})".format(*row[key]) for key in measured} for row in rows]
    )
    finish(output, {**record, "rows": rows, "table": table})


def _features(backbone: str, layers: Sequence[str]) -> torch.nn.Module:
    from anomalib.models.components import TimmFeatureExtractor

    return TimmFeatureExtractor(backbone, layers, pre_trained=False).eval()


def _model(name: str, backbone: str, image_size: int, bank: int) -> torch.nn.Module:
    """PatchToll, or PatchCore with a bank of so many patches; torch models, of images that are scaled already."""
    torch.manual_seed(0)
    if name == "PatchToll":
        from toll_plugin.anomalib import PatchToll

        model: torch.nn.Module = PatchToll(
            backbone, LAYERS["PatchToll"], pre_trained=False, image_size=image_size
        ).model
        model.is_fitted.fill_(True)
    else:
        from anomalib.models.image.patchcore.torch_model import PatchcoreModel

        model = PatchcoreModel(layers=LAYERS["PatchCore"], backbone=backbone, pre_trained=False)
        width = sum(model.feature_extractor.out_dims)
        model.memory_bank = torch.rand(bank, width)
    return model.eval()


def _openvino(model: torch.nn.Module, image: torch.Tensor, stem: Path) -> tuple[Path, int]:
    """A file of OpenVINO's, in single precision as the model is, and its bytes."""
    import openvino

    path = stem.with_suffix(".xml")
    torch.onnx.export(model, (image,), str(stem.with_suffix(".onnx")), opset_version=18, dynamo=True, verbose=False)
    openvino.save_model(openvino.convert_model(str(stem.with_suffix(".onnx"))), str(path), compress_to_fp16=False)
    return path, path.stat().st_size + path.with_suffix(".bin").stat().st_size


def _compiled(path: Path, image: torch.Tensor) -> Callable[[], Any]:
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    compiled, pixels = openvino.Core().compile_model(str(path), "CPU", options), image.numpy()
    return lambda: compiled(pixels)


def _peak(name: str, backbone: str, image_size: int, bank: int | None) -> float:
    """MB that a new process takes, beyond its imports, to build a model and to score ten images one by one."""
    given = (name, backbone, image_size) if bank is None else (name, backbone, image_size, bank)
    return float(in_new_process("benchmarks.costs.deployment", *given))


def _scoring(name: str, backbone: str, image_size: int, bank: int | None) -> None:
    """What :func:`_peak` runs; without a bank, the backbone alone."""
    torch.set_num_threads(1)
    _model(name, backbone, 32, 1)  # imports, and what they leave behind
    image = torch.rand(1, 3, image_size, image_size)
    with contextlib.suppress(OSError, AttributeError):  # memory that was freed would hide what is taken
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with peak_memory() as memory:
        model = _features(backbone, LAYERS[name]) if bank is None else _model(name, backbone, image_size, bank)
        with torch.inference_mode():
            for _ in range(10):
                model(image)
    print(memory[0])


if __name__ == "__main__":
    _scoring(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else None)
