"""One training of an authors' experiment, from which every protocol chooses its step."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.studies.parts import Parts
from benchmarks.studies.protocol import METRICS, PROTOCOLS, Settings, batches, initial_network
from toll_plugin.core import TollLoss, TollTerms, terms_of
from toll_plugin.core.devices import to_device
from toll_plugin.core.training.divergence import snapshot

#: Samples that are scored at a time. On the CPU as many as its cache holds; numbers depend on it in the last bits.
_CHUNK = {"cpu": 500, "cuda": 5000}


def pick_device(device: str) -> torch.device:
    """``auto`` is a GPU where there is one.

    Raises:
        ValueError: If torch knows no such device, or cannot use it here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
    except (AssertionError, RuntimeError) as error:
        msg = f"device must be auto or one that torch can use here, got {device!r}: {error}"
        raise ValueError(msg) from error
    return picked


def train(
    parts: Parts,
    settings: Settings,
    seed: int,
    normal_class: int,
    *,
    device: str = "auto",
    threads: int | None = None,
    network: nn.Module | None = None,
    on_iteration: Callable[[], object] = lambda: None,
) -> tuple[dict[str, Any], dict[int, dict[str, Tensor]]]:
    """Train once; return what each protocol chose and scored, and the weights of the chosen steps.

    Args:
        parts: The data.
        settings: The experiment.
        seed: Of the initial weights.
        normal_class: The class, which decides what the authors' generators drew before it.
        device: ``auto``, ``cpu``, ``cuda``, ...
        threads: Of torch, for the length of the run. Default: as it is.
        network: Another than the authors', with its initial weights.
        on_iteration: Called after each.

    Raises:
        FloatingPointError: If a score is not finite.
        ValueError: If a class has fewer training samples than a batch, or validation or test lack a kind.
    """
    if settings.batch_size > parts.sizes[-1]:
        msg = f"batch_size must be at most the {parts.sizes[-1]} training samples, got {settings.batch_size}"
        raise ValueError(msg)
    for name, anomalous in (("validation", parts.validation_anomalous), ("test", parts.test_anomalous)):
        if not anomalous.any() or (~anomalous).sum() < 2:
            counts = f"{anomalous.sum()} and {(~anomalous).sum()}"
            msg = f"the {name} part must hold an anomaly and two normal samples, got {counts}"
            raise ValueError(msg)
    before = torch.get_num_threads(), torch.backends.cudnn.benchmark
    torch.set_num_threads(threads or before[0])
    torch.backends.cudnn.benchmark = True  # all batches have one size, so trying out the convolutions pays
    try:
        run = _Run(parts, settings, network or initial_network(settings, seed, normal_class), pick_device(device))
        return run.train(on_iteration)
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.benchmark = before[1]


def score(
    parts: Parts, settings: Settings, weights: dict[int, dict[str, Tensor]], device: str = "auto"
) -> dict[int, dict[str, float]]:
    """Test metrics of kept weights, by step."""
    run = _Run(parts, settings, settings.build(), pick_device(device))
    return {step: run.test(state) for step, state in weights.items()}


class _Run:
    """A network, its data on one device, and what is measured on the way."""

    def __init__(self, parts: Parts, settings: Settings, network: nn.Module, device: torch.device) -> None:
        self._settings, self._scale, self._device = settings, parts.scale, device
        self._network, self._loss = network.to(device), TollLoss(settings.beta)
        if device.type == "cuda":  # in half precision its convolutions bring images to this order themselves
            self._network.to(memory_format=torch.channels_last)
        self._metric = METRICS[settings.metric]
        self._parts = replace(
            parts,
            train=parts.train.to(device),
            validation=parts.validation.to(device),
            test=parts.test.to(device),
            synthetic=parts.synthetic.to(device),
        )

    def train(self, on_iteration: Callable[[], object]) -> tuple[dict[str, Any], dict[int, dict[str, Tensor]]]:
        settings, parts, network = self._settings, self._parts, self._network
        optimizer = torch.optim.Adam(network.parameters(), lr=settings.lr, fused=self._device.type == "cuda" or None)
        trace: list[dict[str, float]] = []
        chosen: dict[str, tuple[float, int]] = {}
        weights: dict[int, dict[str, Tensor]] = {}
        seconds = dict.fromkeys(("training", "validation", "test"), 0.0)
        clock = _Clock(seconds, self._device)
        for iteration, index in enumerate(batches(parts.sizes, settings), start=1):
            network.train()
            x = self._scale(parts.train[to_device(torch.from_numpy(index), self._device)])
            with self._autocast():
                terms = self._loss.terms(x, *network(x))
            # The score of the means is the mean of the scores; in this order the authors' loop is met to the last bit.
            loss = self._loss.score(TollTerms(terms.reconstruction.mean(), terms.latent.mean()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            on_iteration()
            if iteration % settings.validate_every and iteration < settings.iterations:
                continue
            clock.stop("training")
            trace.append({"step": iteration, "batch_loss": loss.item(), **self._validate()})
            for protocol, value in ((name, rule(trace[-1])) for name, rule in PROTOCOLS.items()):
                if protocol not in chosen or value < chosen[protocol][0]:
                    chosen[protocol] = (value, iteration)
            kept = {step for _, step in chosen.values()}
            if iteration in kept:
                weights[iteration] = snapshot(network)
            weights = {step: weights[step] for step in sorted(kept)}
            clock.stop("validation")
        tested = {step: self.test(state) for step, state in weights.items()}
        clock.stop("test")
        result = {
            "protocols": {name: {"step": step, **tested[step]} for name, (_, step) in chosen.items()},
            "trace": [{k: round(v, 6) for k, v in step.items()} for step in trace],
            "seconds": {k: round(v, 1) for k, v in seconds.items()},
            "device": torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else self._device.type,
            "threads": torch.get_num_threads(),
            "train_samples": len(parts.train),
        }
        return result, {step: {k: v.cpu().contiguous() for k, v in state.items()} for step, state in weights.items()}

    def test(self, state: dict[str, Tensor]) -> dict[str, float]:
        """The metric on the test part, by the score and by each term alone."""
        self._network.load_state_dict(state)
        terms = self._terms(self._parts.test)
        return {
            name: self._metric(self._parts.test_anomalous, self._loss.score(terms, name).numpy())
            for name in ("total", "reconstruction", "latent")
        }

    def _validate(self) -> dict[str, float]:
        """The labelled metric, and what is known of the held-out normal samples without labels."""
        terms = self._terms(self._parts.validation)
        anomalous = self._parts.validation_anomalous
        scores = self._loss.score(terms)
        found = {"validation": self._metric(anomalous, scores.numpy())}
        normal = torch.from_numpy(~anomalous)
        held_out = TollTerms(*(term[normal].double() for term in terms))
        found |= statistics(held_out, self._loss)
        made = self._loss.score(self._terms(self._parts.synthetic))
        both = torch.cat([scores[normal], made]).numpy()
        found["synthetic"] = 1 - METRICS["AUROC"](np.arange(len(both)) >= int(normal.sum()), both)
        if self._parts.trace_test:
            tested = self._loss.score(self._terms(self._parts.test))
            found["test"] = self._metric(self._parts.test_anomalous, tested.numpy())
        return found

    def _terms(self, samples: Tensor) -> TollTerms:
        with self._autocast():
            found = [
                terms_of(self._network, self._scale(part), self._loss, batch_size=len(part))
                for part in torch.split(samples, _CHUNK.get(self._device.type, 500))
            ]
        terms = TollTerms(*(torch.cat(term).float().cpu() for term in zip(*found, strict=True)))
        if not all(bool(term.isfinite().all()) for term in terms):
            msg = "a score is not finite: training has diverged, a lower lr may help"
            raise FloatingPointError(msg)
        return terms

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._settings.bf16)


def statistics(held_out: TollTerms, loss: TollLoss) -> dict[str, float]:
    """What held-out normal samples alone say about a step: means of the score and its terms, and its spread."""
    scores = loss.score(held_out)
    return {
        "total": float(scores.mean()),
        "reconstruction": float(held_out.reconstruction.mean()),
        "latent": float(held_out.latent.mean()),
        "spread": float(scores.std() / scores.mean()),
        "tail": float(scores.quantile(0.95) / scores.median()),
    }


class _Clock:
    """Seconds by what they were spent on."""

    def __init__(self, seconds: dict[str, float], device: torch.device) -> None:
        self._seconds, self._device, self._last = seconds, device, time.perf_counter()

    def stop(self, what: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._seconds[what] += now - self._last
        self._last = now


def threads_each(jobs: int) -> int:
    """Threads of each of several runs at a time, at most those that torch would take (``OMP_NUM_THREADS``)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // jobs, torch.get_num_threads()))
