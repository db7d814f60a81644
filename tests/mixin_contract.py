"""What targeted collapse keeps in every host it is added to, written once."""

from __future__ import annotations

import copy
import io
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from anomalib import models as anomalib_models
from anomalib.data import ImageBatch, MVTecAD
from anomalib.models import AnomalibModule
from collapse_checks import hooks_of, norms_by_loops
from lightning.pytorch import Trainer
from torch import nn

WEIGHT = 0.5
STRENGTH = 0.7


class Host(NamedTuple):
    """A model that the mixin is added to.

    Attributes:
        name: Of anomalib's class; the package has ``Collapsed`` before it.
        arguments: Plain constructor arguments that make it small.
        size: Of the images.
        latent: The latent ``(N, ...)`` from a call (layer, inputs, output) in evaluation and N.
        copies: Whether anomalib's own class survives ``deepcopy``.
        batch_size: Of training.
        loss: The name by which it logs the loss that the term joins.
    """

    name: str
    arguments: dict[str, Any]
    size: int
    latent: Callable[[Any, int], torch.Tensor] = lambda call, _: call[-1]
    copies: bool = True
    batch_size: int = 4
    loss: str = "train_loss"

    def pre_processor(self, kind: type[AnomalibModule]) -> nn.Module:
        crops = {"crop_size": self.size} if self.name in {"Dinomaly", "InpFormer"} else {}
        return kind.configure_pre_processor((self.size, self.size), **crops)


def seed() -> None:
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002  the hosts draw from the global generators
    torch.manual_seed(1)


def quiet_trainer(**arguments: Any) -> Trainer:
    """Lightning's, on the CPU, that shows and keeps nothing."""
    quiet = {
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    return Trainer(**(quiet | arguments))


class MixinContract:
    """Subclasses give ``host`` as a class-scoped fixture."""

    @pytest.fixture(scope="class")
    def arguments(self, host, mvtec_root) -> dict[str, Any]:
        """Constructor arguments, with a folder of images where the host wants one."""
        images = mvtec_root / "part/train"
        return {name: images if value == "IMAGES" else value for name, value in host.arguments.items()}

    @pytest.fixture(scope="class")
    def build(self, host, arguments):
        def build(bare: bool = False, **changes: Any) -> AnomalibModule:
            kind = getattr(anomalib_models, host.name if bare else f"Collapsed{host.name}")
            seed()
            return kind(
                pre_processor=host.pre_processor(kind),
                visualizer=False,
                evaluator=False,
                **(arguments | changes),
            )

        return build

    @pytest.fixture(scope="class")
    def data(self, host, mvtec_root):
        def data() -> MVTecAD:
            return MVTecAD(
                root=mvtec_root,
                category="part",
                train_batch_size=host.batch_size,
                eval_batch_size=4,
                num_workers=0,
                seed=0,
            )

        return data

    @pytest.fixture(scope="class")
    def images(self, data) -> torch.Tensor:
        module = data()
        module.setup()
        return torch.stack([module.test_data[i].image for i in (0, 7)]).as_subclass(torch.Tensor)

    @pytest.fixture(scope="class")
    def fit(self, build, data):
        def fit(validated: bool = False, **changes: Any) -> tuple[AnomalibModule, Trainer]:
            model = build(**changes)
            seed()
            # Two epochs, because some hosts warm up their learning rate from zero, by epoch.
            limits = {"limit_train_batches": 1, "limit_val_batches": 1.0 if validated else 0}
            trainer = quiet_trainer(max_epochs=2, num_sanity_val_steps=0, **limits)
            trainer.fit(model, datamodule=data())
            return model.eval(), trainer

        return fit

    @pytest.fixture(scope="class")
    def trained(self, fit):
        return fit(validated=True, collapse_weight="auto", collapse_strength=STRENGTH)

    @pytest.fixture(scope="class")
    def without(self, fit):
        """The class of the mixin with a term that is off, after epochs each of which measured the units."""
        return fit(collapse_weight="auto", collapse_strength=0.0)

    @staticmethod
    def scores(model: AnomalibModule, images: torch.Tensor) -> torch.Tensor:
        """Raw, before the post-processor."""
        with torch.no_grad():
            batch = ImageBatch(image=model.pre_processor(images))
            return model.predict_step(batch, 0).pred_score.reshape(-1)

    # --- training

    def test_a_term_that_is_off_leaves_the_bare_host_bit_for_bit(self, fit, without, images, monkeypatch):
        (bare, _), (none, trainer) = fit(bare=True), without
        for name, value in bare.state_dict().items():
            torch.testing.assert_close(none.state_dict()[name], value, rtol=0, atol=0, equal_nan=True, msg=name)
        assert "train_collapse" not in trainer.callback_metrics
        raw = self.scores(bare, images)
        for off in ({"collapse_score_weight": 0.0}, {"collapse_weight": 0.0}):
            with monkeypatch.context() as patch:
                for name, value in off.items():
                    patch.setattr(none, name, value)
                with torch.no_grad():
                    assert torch.equal(none(images).pred_score, bare(images).pred_score)
                assert torch.equal(self.scores(none, images), raw)

    def test_the_term_is_logged_in_proportion_and_moves_the_weights_of_the_layer(self, host, trained, without):
        model, trainer = trained
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        assert logged["train_collapse"] == pytest.approx(STRENGTH * abs(logged[host.loss]), rel=1e-4)
        assert 0 < logged["train_collapse"] < float("inf")
        layer, twin = model.collapse.find(model), without[0].collapse.find(without[0])
        assert any(not p.equal(q) for p, q in zip(layer.parameters(), twin.parameters(), strict=True))

    def test_no_hook_stays_and_nothing_of_the_instance_is_replaced(self, trained, images):
        model, _ = trained
        before = hooks_of(model)
        self.scores(model, images)
        with torch.no_grad():
            model(images)
        assert hooks_of(model) == before
        assert "manual_backward" not in vars(model)
        layer = model.collapse.find(model)
        # A training pass moves what BatchNorm remembers, also where it fails later on.
        state = copy.deepcopy(model.state_dict())
        layer.forward = _fails
        try:
            with pytest.raises(ZeroDivisionError):
                model(images)
            with pytest.raises(ZeroDivisionError):
                model.train().training_step(ImageBatch(image=model.pre_processor(images)), 0)
        finally:
            del layer.forward
            model.eval().load_state_dict(state)
        assert hooks_of(model) == before
        assert "manual_backward" not in vars(model)

    # --- scores

    @staticmethod
    def terms(host, model: AnomalibModule, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The host's scores of pre-processed images and, by loops, the norms of its latents."""
        outputs = []
        handle = model.collapse.find(model).register_forward_hook(
            lambda *call: outputs.append((*call[:-1], call[-1].clone()))
        )
        with torch.no_grad():
            scores = model.model(images).pred_score.reshape(-1)
        handle.remove()
        return scores, torch.tensor(norms_by_loops(host.latent(outputs[-1], len(images)))).float()

    def test_the_score_is_the_hosts_plus_the_weighted_norm(self, host, trained, images, monkeypatch):
        model, _ = trained
        monkeypatch.setattr(model, "collapse_weight", WEIGHT)
        assert model.collapse.score_weight == WEIGHT * model.collapse_score_factor()
        theirs, norms = self.terms(host, model, model.pre_processor(images))
        expected, ours = model.collapse.score_weight * norms, self.scores(model, images)
        torch.testing.assert_close(ours - theirs, expected, rtol=1e-3, atol=1e-5)
        for step in (model.validation_step, model.test_step):
            with torch.no_grad():
                batch = step(ImageBatch(image=model.pre_processor(images)), 0)
            assert torch.equal(batch.pred_score.reshape(-1), ours)
        assert expected.min() > 0

    def test_the_score_of_auto_adds_both_in_units_of_the_normal_validation_images(self, host, trained, data, images):
        model, _ = trained
        module = data()
        module.setup("fit")
        sizes, norms = [], []
        for batch in module.val_dataloader():  # UniNet's scores depend on the batch
            # A data module's images are resized with antialiasing, those given to pre_processor itself are not.
            terms = self.terms(host, model, model.pre_processor.transform(batch.image))
            for label, score, norm in zip(batch.gt_label.tolist(), *(term.tolist() for term in terms), strict=True):
                sizes += [] if label else [abs(score)]
                norms += [] if label else [norm]
        assert 0 < len(sizes) < len(module.val_data)
        units = statistics.median(sizes), statistics.median(norms)
        found = [float(unit) for unit in model.collapse_units.units]
        assert found == pytest.approx(units, rel=1e-3)
        theirs, norms = self.terms(host, model, model.pre_processor(images))
        expected = theirs / units[0] + 0.5 * norms / units[1]
        torch.testing.assert_close(self.scores(model, images), expected, rtol=1e-3, atol=1e-5)

    def test_the_weight_of_the_score_is_its_own(self, build, images):
        model = build(collapse_weight=WEIGHT, collapse_score_weight=0.0)
        with torch.no_grad():
            plain = model.eval().model(model.pre_processor(images)).pred_score.reshape(-1)
        assert torch.equal(self.scores(model, images), plain)

    # --- what users do with models

    def test_copies_score_the_same(self, host, trained, images):
        model, _ = trained
        written = io.BytesIO()
        torch.save({"model": model}, written)  # as anomalib's torch export does
        written.seek(0)
        others = [torch.load(written, weights_only=False)["model"]]
        if host.copies:
            others.append(copy.deepcopy(model))
        with torch.no_grad():
            expected = model(images).pred_score
            for other in others:
                assert torch.equal(other(images).pred_score, expected)

    def test_a_checkpoint_brings_the_term_back(self, host, trained, images, tmp_path: Path):
        model, trainer = trained
        path = tmp_path / "model.ckpt"
        trainer.save_checkpoint(path, weights_only=True)
        again = type(model).load_from_checkpoint(path, pre_processor=host.pre_processor(type(model))).eval()
        assert repr(again.collapse) == repr(model.collapse)
        assert again.collapse_units.units == model.collapse_units.units != (1.0, 1.0)
        assert torch.equal(self.scores(again, images), self.scores(model, images))


def _fails(*_: Any, **__: Any) -> None:
    raise ZeroDivisionError
