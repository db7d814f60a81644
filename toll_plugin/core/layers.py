"""Watch one layer of a network for the length of a block: how often it is called, and what it returns."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from toll_plugin.core.threads import Overlapping, is_this_thread, this_thread

__all__ = ["LayerPass", "find_layer", "only_pass", "watch_layer"]


class LayerPass(NamedTuple):
    """One call of the watched layer.

    Attributes:
        layer: The module that was called.
        inputs: Its positional arguments.
        output: What it returned.
    """

    layer: nn.Module
    inputs: tuple[Any, ...]
    output: Any


def find_layer(owner: object, path: str) -> nn.Module:
    """The module at a dotted path below ``owner``, such as ``"model.encoder"`` or ``"encoder.2"``.

    Args:
        owner: A module, or any object with modules as attributes.
        path: Names of attributes, and positions in containers, joined by dots.

    Raises:
        ValueError: If there is no module at the path; names the ones that are there.

    Example:
        >>> from torch import nn
        >>> find_layer(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), "1")
        ReLU()
    """
    layer: Any = owner
    walked: list[str] = []
    for name in path.split("."):
        below = getattr(layer, name, None)
        if isinstance(below, nn.Module):
            layer = below
            walked.append(name)
            continue
        place, there = ".".join(walked) or type(owner).__name__, ", ".join(_modules_below(layer)) or "no modules"
        msg = f"there is no module {path!r}: {place} has no {name!r}, it has {there}"
        raise ValueError(msg)
    is_list = isinstance(layer, nn.ModuleList | nn.ModuleDict)
    if is_list:
        members = ", ".join(f"{path}.{name}" for name in _modules_below(layer))
        msg = f"{path!r} is a {type(layer).__name__}, which is never called itself; name one of its members: {members}"
        raise ValueError(msg)
    found: nn.Module = layer
    return found


@contextmanager
def watch_layer(owner: object, path: str) -> Iterator[list[LayerPass]]:
    """Collect the calls of the layer at ``path`` below ``owner`` that this thread makes until the block ends.

    A network that was compiled runs uncompiled within the block.

    Raises:
        ValueError: If there is no such layer, see :func:`find_layer`.
    """
    passes: list[LayerPass] = []
    thread = this_thread()

    def note(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if is_this_thread(thread):
            # A copy of the output, because a layer that follows may overwrite it.
            passes.append(LayerPass(layer, inputs, output.clone() if isinstance(output, Tensor) else output))

    handle = find_layer(owner, path).register_forward_hook(note)
    try:
        with _eager():
            yield passes
    finally:
        handle.remove()


def _uncompiled() -> AbstractContextManager[object]:
    """The setting in which compiled code runs uncompiled: it would not call a hook that came after compilation."""
    # Nothing was compiled if dynamo was never imported, and what is being compiled just now has the hook.
    if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


_eager = Overlapping(_uncompiled)


def _modules_below(owner: object) -> list[str]:
    if isinstance(owner, nn.Module):
        return [name for name, _ in owner.named_children()]
    return [name for name, value in vars(owner).items() if isinstance(value, nn.Module)]


def only_pass(passes: Sequence[LayerPass]) -> Tensor:
    """The output of a layer that was called once; of several calls nobody could know which one gave the latent.

    Raises:
        RuntimeError: If the layer was not called, or more than once.
        TypeError: If it did not return a tensor of one row per sample.
    """
    if len(passes) != 1:
        msg = (
            f"the latent's layer was called {len(passes)} times in one step, and must be called once: "
            "name another layer, or say what the latent is (latent_of of watch, collapse_latent of a mixin)"
        )
        raise RuntimeError(msg)
    latent = passes[0].output
    if not isinstance(latent, Tensor) or latent.ndim < 2 or not latent.is_floating_point():
        what = f"a tensor of shape {tuple(latent.shape)}" if isinstance(latent, Tensor) else type(latent).__name__
        layer = type(passes[0].layer).__name__
        msg = f"the latent must be a floating point tensor of shape (N, ...), {layer} gave {what}"
        raise TypeError(msg)
    return latent
