"""What every model of this project must do inside anomalib, written once.

anomalib tests its own models by fit, test, train, validate, predict and export on dummy data,
by its CLI and by its benchmark pipeline; these are the same behaviours, with results checked.
Subclass :class:`AnomalibModelContract`, say how to build the model, get the tests; what the command line does with
the model's name and arguments is :class:`AnomalibCommandContract`, once for each name.
"""

from __future__ import annotations

import gc
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from anomalib.cli import AnomalibCLI
from anomalib.data import ImageBatch, MVTecAD
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from anomalib.models import get_model, list_models


def engine(root: Path, **arguments: Any) -> Engine:
    """An engine that writes below ``root`` and shows nothing."""
    quiet = {
        "default_root_dir": root,
        "accelerator": "cpu",
        "devices": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Engine(**(quiet | arguments))


def pixels(batch: Any) -> torch.Tensor:
    return batch.image.as_subclass(torch.Tensor)


def checkpoint_of(root: Path, model: str, dataset: str, category: str) -> Path:
    return root / model / dataset / category / "latest/weights/lightning/model.ckpt"


def run_cli(*arguments: str, run: bool = True) -> AnomalibCLI:
    """anomalib's command line, in this process."""
    # torch.export leaves a subclass of the model under the model's name until it is collected,
    # and the command line refuses names that are not unique.
    gc.collect()
    return AnomalibCLI(args=list(arguments), run=run)


def keep_onnx(monkeypatch: pytest.MonkeyPatch, kind: type, folder: Path) -> list[Path]:
    """Copies of the ONNX files that models of a class write from now on.

    An export to OpenVINO is one to ONNX, converted and thrown away: with its copy, one export serves to check both.
    """
    kept: list[Path] = []
    to_onnx = kind.to_onnx

    def keeping(*arguments: Any, **options: Any) -> Path:
        path = to_onnx(*arguments, **options)
        kept.append(shutil.copytree(path.parent, folder / f"onnx_{len(kept)}") / path.name)
        return path

    monkeypatch.setattr(kind, "to_onnx", keeping)
    return kept


class _Contract:
    """Subclasses set ``name`` and ``arguments`` (constructor arguments as plain data)."""

    name: str
    arguments: dict[str, Any]
    #: Validation of normal images only (label-free), and the test as anomalib has it.
    data_arguments: dict[str, Any] = {"val_split_mode": "from_train", "val_split_ratio": 0.25, "seed": 0}  # noqa: RUF012

    def build(self, **changes: Any) -> Any:
        return get_model(self.name, **(self.arguments | changes))


class AnomalibModelContract(_Contract):
    """What a model does in anomalib's engine."""

    #: What a validation logs.
    validation_logs: frozenset[str] = frozenset()

    def data(self, root: Path, **changes: Any) -> MVTecAD:
        arguments = self.data_arguments | {"train_batch_size": 4, "eval_batch_size": 3, "num_workers": 0} | changes
        return MVTecAD(root=root, category="part", **arguments)

    @pytest.fixture(scope="class")
    def trained(self, mvtec_root, tmp_path_factory):
        """A model after two epochs, its engine and where it wrote."""
        root = tmp_path_factory.mktemp("trained")
        model, data = self.build(), self.data(mvtec_root)
        runner = engine(root, max_epochs=2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = runner.train(model, datamodule=data)
        return model, data, runner, results, checkpoint_of(root, self.name, "MVTecAD", "part")

    # --- the names anomalib knows it by

    def test_is_known_by_name(self):
        snake = next(name for name in list_models() if name.replace("_", "") == self.name.lower())
        assert type(get_model(snake, **self.arguments)).__name__ == self.name
        assert type(get_model({"class_path": self.name, "init_args": self.arguments})).__name__ == self.name
        assert self.name in list_models(case="pascal")

    # --- the verbs, by the engine

    def test_train_gives_the_default_metrics(self, trained):
        *_, results, checkpoint = trained
        assert set(results[0]) == {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"}
        assert all(0 <= value <= 1 for value in results[0].values())
        assert checkpoint.is_file()

    def test_test_of_the_checkpoint_gives_what_training_showed(self, trained, mvtec_root, tmp_path):
        *_, results, checkpoint = trained
        again = engine(tmp_path).test(self.build(), datamodule=self.data(mvtec_root), ckpt_path=checkpoint)
        assert again[0] == pytest.approx(results[0], abs=1e-6)

    def test_validate(self, trained, mvtec_root, tmp_path):
        checkpoint = trained[-1]
        logged = engine(tmp_path).validate(self.build(), datamodule=self.data(mvtec_root), ckpt_path=checkpoint)
        assert set(logged[0]) == self.validation_logs
        assert all(math.isfinite(value) for value in logged[0].values())

    def test_predict(self, trained, mvtec_root, tmp_path):
        checkpoint = trained[-1]
        batches = engine(tmp_path).predict(self.build(), datamodule=self.data(mvtec_root), ckpt_path=checkpoint)
        scores = torch.cat([batch.pred_score for batch in batches])
        assert scores.shape == (8,)
        assert ((scores > 0) & (scores < 1)).all()
        for batch in batches:
            assert batch.anomaly_map.shape[-2:] == batch.image.shape[-2:]
            assert batch.pred_mask.dtype == torch.bool
        assert len(list(tmp_path.glob(f"{self.name}/MVTecAD/part/**/images/**/*.png"))) == 8

    def test_predict_a_folder_of_images(self, trained, mvtec_root, tmp_path):
        folder = mvtec_root / "part/test/spot"
        batches = engine(tmp_path).predict(self.build(), data_path=folder, ckpt_path=trained[-1])
        assert len(batches) == 4

    def interrupted(self):
        """Arguments of an engine whose fit ends after two epochs of four."""
        return {"max_epochs": 2}

    def test_resume_equals_an_uninterrupted_fit(self, mvtec_root, tmp_path):
        def data():
            # The host shuffles without a seed; one sorted batch per epoch is always the same.
            module = self.data(mvtec_root, train_batch_size=9)
            module.external_collate_fn = lambda items: ImageBatch.collate(sorted(items, key=lambda i: i.image_path))
            return module

        straight, half, resumed = self.build(seed=0), self.build(seed=0), self.build(seed=1)
        engine(tmp_path / "straight", max_epochs=4).fit(straight, datamodule=data())
        engine(tmp_path / "half", **self.interrupted()).fit(half, datamodule=data())
        engine(tmp_path / "rest", max_epochs=4).fit(
            resumed,
            datamodule=data(),
            ckpt_path=checkpoint_of(tmp_path / "half", self.name, "MVTecAD", "part"),
        )
        for name, value in straight.model.state_dict().items():
            torch.testing.assert_close(resumed.model.state_dict()[name], value, msg=name)

    def test_checkpoint_is_plain_data(self, trained):
        content = torch.load(trained[-1], weights_only=True)
        assert content["hyper_parameters"].items() >= self.arguments.items()
        loaded = type(trained[0]).load_from_checkpoint(trained[-1])
        for name, value in trained[0].state_dict().items():
            torch.testing.assert_close(loaded.state_dict()[name], value, equal_nan=True, msg=name)
        assert loaded.post_processor.promise == trained[0].post_processor.promise != {}

    # --- exports

    def test_exports_score_as_lightning_does(self, trained, mvtec_root, tmp_path, monkeypatch):
        import onnxruntime
        import openvino

        _, data, *_, checkpoint = trained
        batches = engine(tmp_path).predict(self.build(), datamodule=data, ckpt_path=checkpoint)
        expected = {
            "pred_score": torch.cat([b.pred_score for b in batches]).numpy(),
            "anomaly_map": torch.cat([b.anomaly_map.squeeze(1) for b in batches]).numpy(),
        }
        raw = self.data(mvtec_root)
        raw.setup()
        images = torch.stack([raw.test_data[i].image for i in range(len(raw.test_data))]).as_subclass(torch.Tensor)

        onnx_files = keep_onnx(monkeypatch, type(self.build()), tmp_path)
        torch_file, openvino_file = (
            engine(tmp_path).export(self.build(), kind, export_root=tmp_path, ckpt_path=checkpoint)
            for kind in (ExportType.TORCH, ExportType.OPENVINO)
        )
        with torch.no_grad():
            exported = torch.load(torch_file, weights_only=False)["model"].eval()
            results = {"torch": exported(images)._asdict()}
        session = onnxruntime.InferenceSession(str(onnx_files[0]))
        names = [output.name for output in session.get_outputs()]
        results["onnx"] = dict(zip(names, session.run(None, {"input": images.numpy()}), strict=True))
        # OpenVINO computes in bfloat16 by default where the processor can.
        compiled = openvino.compile_model(str(openvino_file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        results["openvino"] = compiled(images.numpy())
        outputs = {
            kind: {name: np.asarray(result[name]).reshape(expected[name].shape) for name in expected}
            for kind, result in results.items()
        }
        for kind, output in outputs.items():
            for name, value in output.items():
                np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-6, err_msg=f"{kind} {name}")
        promise = {f"toll_{name}": f"{value:.6g}" for name, value in exported.post_processor.promise.items()}
        assert {"toll_held_out", "toll_confidence", "toll_false_alarms"} <= set(promise)
        assert session.get_modelmeta().custom_metadata_map.items() >= promise.items()
        kept = openvino.Core().read_model(openvino_file)
        assert {name: str(kept.get_rt_info(["framework", name]).astype(str)) for name in promise} == promise


class AnomalibCommandContract(_Contract):
    """What anomalib's command line and its benchmark do with a model."""

    #: What keeps the benchmark, which has no trainer section, short.
    brief: dict[str, Any] = {"max_epochs": 1}  # noqa: RUF012

    @pytest.fixture
    def config(self, mvtec_root, tmp_path):
        path = tmp_path / "config.yaml"
        content = {
            "model": {"class_path": self.name, "init_args": self.arguments},
            "data": {
                "class_path": "MVTecAD",
                "init_args": {"root": str(mvtec_root), "category": "part", "num_workers": 0} | self.data_arguments,
            },
            "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
        }
        path.write_text(yaml.safe_dump(content))
        return path

    def test_cli_verbs(self, config, mvtec_root, tmp_path):
        run_cli("train", "--model", self.name, "--config", str(config))
        checkpoint = str(checkpoint_of(tmp_path / "results", self.name, "MVTecAD", "part"))
        assert Path(checkpoint).is_file()
        for verb in ("test", "validate"):
            run_cli(verb, "--model", self.name, "--config", str(config), "--ckpt_path", checkpoint)
        plain = ["--model", self.name]
        for name, value in self.arguments.items():
            plain += [f"--model.{name}", "null" if value is None else str(value).replace("(", "[").replace(")", "]")]
        image = str(mvtec_root / "part/test/spot/000.png")
        run_cli("predict", *plain, "--data", image, "--ckpt_path", checkpoint)
        run_cli("export", *plain, "--export_type", "onnx", "--ckpt_path", checkpoint)
        assert list(tmp_path.rglob("model.onnx"))

    def test_cli_in_both_argument_orders_and_by_both_paths(self, config):
        dotted = f"{type(self.build()).__module__}.{self.name}"
        for arguments in (
            ["--model", self.name, "--config", str(config)],
            ["--config", str(config), "--model", self.name],
            ["--config", str(config)],
        ):
            cli = run_cli("train", *arguments, "--model.lr", "0.5", run=False)
            assert type(cli.model).__name__ == self.name
            assert cli.model.lr == 0.5
        config.write_text(config.read_text().replace(f"class_path: {self.name}\n", f"class_path: {dotted}\n"))
        assert type(run_cli("train", "--config", str(config), run=False).model).__name__ == self.name

    def test_cli_names_an_unknown_key(self, config, capsys):
        with pytest.raises(SystemExit):
            run_cli("train", "--config", str(config), "--model.betta", "1", run=False)
        assert "betta" in capsys.readouterr().err

    def test_benchmark_pipeline(self, mvtec_root, tmp_path):
        from anomalib.pipelines import Benchmark

        path = tmp_path / "benchmark.yaml"
        content = {
            "accelerator": "cpu",
            "benchmark": {
                "seed": 0,
                "model": {"class_path": self.name, "init_args": self.arguments | self.brief},
                "data": {
                    "class_path": "MVTecAD",
                    "init_args": {"root": str(mvtec_root), "category": "part", "num_workers": 0},
                },
            },
        }
        path.write_text(yaml.safe_dump(content))
        benchmark = Benchmark()
        benchmark.run(benchmark.get_parser().parse_args(["--config", str(path)]))
        (results,) = tmp_path.glob("runs/benchmark/*/results.csv")
        assert "image_AUROC" in results.read_text()
