"""The latent term for networks that are not ours, against loops and hand-worked values."""

from __future__ import annotations

import copy
import math
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from collapse_checks import hooks_of, norms_by_loops
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from toll_plugin.core import TargetedCollapse, TollLoss, latent_norm
from toll_plugin.core.layers import LayerPass, find_layer, only_pass, watch_layer


class Plain(nn.Module):
    """Somebody's autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
        self.decoder = nn.ModuleList([nn.Linear(2, 4), nn.Linear(4, 6)])

    def forward(self, x):
        z = self.encoder(x)
        return self.decoder[1](self.decoder[0](z))


# --- the norm


@pytest.mark.parametrize("pool", ["flatten", "mean", "max"])
@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 5), (3, 5, 2, 4), (2, 3, 2, 2, 2), (1, 1, 1, 1)])
def test_norm_equals_loops(shape, pool):
    latent = torch.randn(shape, dtype=torch.float64)
    expected = norms_by_loops(latent, pool)
    torch.testing.assert_close(latent_norm(latent, pool=pool), torch.tensor(expected, dtype=torch.float64))
    squared = latent_norm(latent, pool="flatten", exponent=2)
    torch.testing.assert_close(squared, latent.flatten(1).square().sum(1))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100), st.sampled_from(["flatten", "mean", "max"]))
def test_norm_scales_with_the_latent_and_ignores_the_order_of_positions(seed, factor, pool):
    latent = torch.randn(3, 4, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    norm = latent_norm(latent, pool=pool)
    torch.testing.assert_close(latent_norm(factor * latent, pool=pool), factor * norm)
    torch.testing.assert_close(latent_norm(latent.flip(2, 3), pool=pool), norm)
    assert (latent_norm(latent, pool="mean") <= latent_norm(latent, pool="max")).all()
    assert (latent_norm(latent, pool="max") <= latent_norm(latent, pool="flatten")).all()


def test_norm_in_half_precision_does_not_overflow():
    assert latent_norm(torch.full((1, 4, 8, 8), 3e4, dtype=torch.float16)).item() == pytest.approx(4.8e5)


# --- loss and score


def test_loss_and_score_by_hand():
    latent = torch.tensor([[3.0, 4.0], [6.0, 8.0], [0.0, 0.0]])
    collapse = TargetedCollapse("z", 0.5, score_weight=2.0)
    assert collapse.loss(latent).item() == pytest.approx(0.5 * 15 / 3)
    assert collapse.score(latent).tolist() == [10.0, 20.0, 0.0]
    assert TargetedCollapse("z", 0.5).score(latent).tolist() == [2.5, 5.0, 0.0]


def test_loss_counts_normal_samples_only():
    latent = torch.tensor([[3.0, 4.0], [math.inf, 1.0], [0.0, 1.0]], requires_grad=True)
    loss = TargetedCollapse("z", 0.5).loss(latent, torch.tensor([True, False, True]))
    assert loss.item() == pytest.approx(0.5 * (5 + 1) / 2)
    loss.backward()
    torch.testing.assert_close(latent.grad, torch.tensor([[0.15, 0.2], [0.0, 0.0], [0.0, 0.25]]))


def test_loss_does_not_wait_for_the_device():
    """Which it would to count or select samples: a meta tensor has no values to wait for."""
    latent, normal = torch.ones(3, 2, 4, 4, device="meta"), torch.ones(3, dtype=torch.bool, device="meta")
    assert TargetedCollapse("z", pool="mean").loss(latent, normal).shape == ()


@pytest.mark.parametrize("pool", ["flatten", "mean", "max"])
def test_loss_without_a_normal_sample_is_zero_and_pulls_nothing(pool):
    latent = torch.randn(2, 3, 2, 2, requires_grad=True)
    loss = TargetedCollapse("z", 0.5, pool=pool).loss(latent, torch.zeros(2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert not latent.grad.any()


@pytest.mark.parametrize("pool", ["flatten", "mean", "max"])
def test_loss_of_an_empty_batch_is_zero(pool):
    assert TargetedCollapse("z", 0.5, pool=pool).loss(torch.rand(0, 3, 2, 2)).item() == 0


def test_loss_refuses_a_mask_of_another_length():
    with pytest.raises(ValueError, match=r"normal must have shape \(2,\)"):
        TargetedCollapse("z").loss(torch.ones(2, 3), torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"layer": None}, TypeError, "layer must be the dotted path"),
        ({"weight": -1.0}, ValueError, "weight must be finite and >= 0, got -1"),
        ({"weight": math.nan}, ValueError, "weight must be finite"),
        ({"weight": "1"}, TypeError, "weight must be a number of at least 0 or 'auto', got '1'"),
        ({"strength": -1}, ValueError, "strength must be finite and >= 0, got -1"),
        ({"score_weight": math.inf}, ValueError, "score_weight must be finite"),
        ({"pool": "sum"}, ValueError, "pool must be one of 'flatten', 'mean', 'max', got 'sum'"),
        ({"exponent": 3}, ValueError, "exponent must be one of 1, 2"),
    ],
)
def test_arguments_are_checked(arguments, kind, message):
    with pytest.raises(kind, match=message):
        TargetedCollapse(**({"layer": "encoder"} | arguments))


# --- the method on somebody's autoencoder


def test_a_plain_autoencoder_with_the_term_is_toll():
    x = torch.rand(32, 6)
    theirs = Plain()
    ours = copy.deepcopy(theirs)
    toll, collapse = TollLoss(beta=0.3), TargetedCollapse("encoder", 0.3)
    optimizers = [torch.optim.Adam(network.parameters(), lr=1e-2) for network in (theirs, ours)]
    for _ in range(25):
        for optimizer in optimizers:
            optimizer.zero_grad()
        toll(x, ours(x), ours.encoder(x)).backward()
        with collapse.watch(theirs) as latent:
            loss = torch.linalg.vector_norm(theirs(x) - x, dim=1).mean()
        (loss + latent.loss()).backward()
        for optimizer in optimizers:
            optimizer.step()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], value, msg=name)
    with collapse.watch(theirs) as latent, torch.no_grad():
        score = torch.linalg.vector_norm(theirs(x) - x, dim=1)
    expected = toll.score(toll.terms(x, ours(x), ours.encoder(x)))
    torch.testing.assert_close(score + latent.score(), expected)


def test_the_gradient_flows_through_the_latents_producers_only():
    network, x = Plain(), torch.rand(8, 6)
    with TargetedCollapse("encoder").watch(network) as latent:
        network(x)
    latent.loss().backward()
    assert all(p.grad.abs().sum() > 0 for p in network.encoder.parameters())
    assert all(p.grad is None for p in network.decoder.parameters())


def test_pulling_equals_adding_to_the_loss():
    x = torch.rand(8, 6)
    added = Plain()
    pulled = copy.deepcopy(added)
    collapse = TargetedCollapse("encoder", 0.7)
    with collapse.watch(added) as latent:
        loss = (added(x) - x).square().mean()
    (loss + latent.loss()).backward()
    with watch_layer(pulled, "encoder") as passes:
        handle = pulled.encoder.register_forward_hook(lambda *call: collapse.pull(call[-1]))
        (pulled(x) - x).square().mean().backward()
        handle.remove()
    assert len(passes) == 1
    for (name, p), q in zip(added.named_parameters(), pulled.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)


# --- watching


def test_a_latent_nobody_trains_is_refused():
    network = Plain().requires_grad_(False)
    with TargetedCollapse("encoder").watch(network) as latent:
        network(torch.rand(2, 6))
    with pytest.raises(RuntimeError, match="nothing that is trained makes the latent"):
        latent.loss()
    with torch.no_grad():
        assert latent.loss() > 0  # a validation loss is fine


def test_several_passes_are_not_guessed_at():
    network, x = Plain(), torch.rand(2, 6)
    with TargetedCollapse("encoder").watch(network) as latent:
        network(x)
        network(2 * x)
    with pytest.raises(RuntimeError, match="called 2 times"):
        _ = latent.latent
    with TargetedCollapse("encoder").watch(network, lambda passes: passes[0].output) as latent:
        network(x)
        network(2 * x)
    torch.testing.assert_close(latent.latent, network.encoder(x))
    with TargetedCollapse("decoder.1").watch(network) as latent:
        network.encoder(x)
    with pytest.raises(RuntimeError, match="called 0 times"):
        latent.score()


@pytest.mark.parametrize("output", [[torch.ones(2, 3)], torch.ones(2), torch.ones(2, 3, dtype=torch.int64)])
def test_only_a_tensor_of_one_row_per_sample_is_a_latent(output):
    with pytest.raises(TypeError, match="the latent must be a floating point tensor of shape"):
        only_pass([LayerPass(nn.Identity(), (), output)])


def test_no_hook_stays():
    network = Plain()
    with TargetedCollapse("encoder").watch(network):
        assert hooks_of(network) == 1
    assert hooks_of(network) == 0
    with pytest.raises(ZeroDivisionError), TargetedCollapse("encoder").watch(network):
        raise ZeroDivisionError
    assert hooks_of(network) == 0


def test_the_network_can_be_copied_and_pickled_after_a_step():
    network, x = Plain(), torch.rand(2, 6)
    collapse = TargetedCollapse("encoder", 0.2, pool="max", exponent=2)
    with collapse.watch(network) as latent:
        network(x)
    latent.loss()
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        torch.testing.assert_close(other(x), network(x))
    assert repr(pickle.loads(pickle.dumps(collapse))) == repr(collapse)
    assert eval(repr(collapse)).pool == "max"


@pytest.mark.parametrize("where", ["whole", "layer", "in place"])
def test_a_network_compiled_before_is_watched_too(where):
    network, x = Plain(), torch.rand(2, 6)
    compiled: nn.Module = network
    if where == "whole":
        compiled = torch.compile(network, backend="eager")
    elif where == "layer":
        network.encoder = torch.compile(network.encoder, backend="eager")
    else:
        network.compile(backend="eager")
    compiled(x)
    for _ in range(2):
        with TargetedCollapse("encoder").watch(compiled) as latent:
            compiled(x)
        torch.testing.assert_close(latent.latent, network.encoder(x))


def test_a_wrong_path_names_what_is_there():
    network = Plain()
    with pytest.raises(ValueError, match=r"no module 'coder': Plain has no 'coder', it has encoder, decoder"):
        find_layer(network, "coder")
    with pytest.raises(ValueError, match=r"no module 'encoder.9': encoder has no '9', it has 0, 1, 2"):
        find_layer(network, "encoder.9")
    with pytest.raises(ValueError, match=r"'decoder' is a ModuleList.*decoder.0, decoder.1"):
        find_layer(network, "decoder")
    with pytest.raises(ValueError, match="no module '': Plain has no ''"):
        find_layer(network, "")

    class Detector:
        model = None

    detector = Detector()
    with pytest.raises(ValueError, match="Detector has no 'model', it has no modules"):
        find_layer(detector, "model.encoder")
    detector.model = network
    assert find_layer(detector, "model.encoder.2") is network.encoder[2]


def test_a_layer_that_works_in_place_does_not_change_the_latent():
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 4))
    x = torch.randn(5, 4)
    with TargetedCollapse("0").watch(network) as latent:
        network(x)
    torch.testing.assert_close(latent.latent, network[0](x))
    latent.loss().backward()
    gradient = network[0].weight.grad.clone()
    network.zero_grad()
    (0.1 * network[0](x).norm(dim=1).mean()).backward()
    torch.testing.assert_close(gradient, network[0].weight.grad)


def test_pulling_acts_on_one_backward_pass():
    weight = torch.ones(2, 3, requires_grad=True)
    z = weight * 1.0
    TargetedCollapse("z", 1.0).pull(z)
    z.sum().backward(retain_graph=True)
    first = weight.grad.clone()
    weight.grad = None
    z.sum().backward()
    torch.testing.assert_close(weight.grad, torch.ones(2, 3))
    torch.testing.assert_close(first, 1 + 0.5 * torch.ones(2, 3) / 3**0.5)
    with pytest.raises(RuntimeError, match="nothing that is trained"):
        TargetedCollapse("z").pull(torch.ones(2, 3))


def test_threads_watch_the_same_network_apart():
    network, collapse = Plain(), TargetedCollapse("encoder")

    def watch(seed: int) -> bool:
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        with collapse.watch(network) as latent, torch.no_grad():
            network(x)
        return torch.equal(latent.latent, network.encoder(x).detach())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(watch, range(200)))
    assert hooks_of(network) == 0


def test_blocks_that_overlap_leave_compiled_code_compiled():
    from torch._dynamo import eval_frame

    before = eval_frame._stance.stance
    one, two = (TargetedCollapse("encoder").watch(Plain()) for _ in range(2))
    one.__enter__()
    two.__enter__()
    assert eval_frame._stance.stance == "force_eager"
    one.__exit__(None, None, None)
    assert eval_frame._stance.stance == "force_eager"
    two.__exit__(None, None, None)
    assert eval_frame._stance.stance == before == "default"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_forgets_the_blocks_of_other_threads():
    from torch._dynamo import eval_frame

    inside, done = threading.Event(), threading.Event()

    def hold() -> None:
        with TargetedCollapse("encoder").watch(Plain()):
            inside.set()
            done.wait()

    other = threading.Thread(target=hold)
    other.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        with TargetedCollapse("encoder").watch(Plain()):
            held = eval_frame._stance.stance == "force_eager"
        os._exit(0 if held and eval_frame._stance.stance == "default" else 1)
    _, status = os.waitpid(child, 0)
    assert eval_frame._stance.stance == "force_eager"
    done.set()
    other.join()
    assert status == 0
    assert eval_frame._stance.stance == "default"


def test_auto_is_as_large_as_the_loss_it_joins():
    latent = torch.tensor([[3.0, 4.0], [0.0, 1.0]], requires_grad=True)  # norms 5 and 1
    collapse = TargetedCollapse("0", "auto", strength=0.5)
    loss = torch.tensor(-6.0, requires_grad=True)  # of some hosts it has a sign
    term = collapse.loss(latent, reference=loss)
    torch.testing.assert_close(term, torch.tensor(3.0))
    term.backward()
    assert loss.grad is None  # the weight is a number
    torch.testing.assert_close(latent.grad, torch.tensor([[0.6, 0.8], [0.0, 1.0]]) / 2)
    assert collapse.score_weight == 0.5
    with pytest.raises(ValueError, match="weight='auto' needs the loss that the term joins, as reference, got None"):
        collapse.loss(latent)
    assert repr(collapse).startswith("TargetedCollapse('0', 'auto', strength=0.5, score_weight=0.5")


@pytest.mark.parametrize("factor", [1.0, 1e-6, 1e6, 0.0])
def test_auto_pulls_as_hard_as_the_host_does(factor):
    latent = torch.tensor([[3.0, 4.0], [0.0, 1.0]], requires_grad=True)
    z = latent * 1
    TargetedCollapse("0", "auto", strength=2.0).pull(z)
    theirs = factor * torch.tensor([[1.0, 2.0], [2.0, 0.0]])  # of length 3 factor
    (z * theirs).sum().backward()
    ours = torch.tensor([[0.6, 0.8], [0.0, 1.0]])  # of length sqrt(2)
    torch.testing.assert_close(latent.grad, theirs + 2 * 3 * factor / 2**0.5 * ours)


def test_a_numeric_weight_is_applied_before_the_mean_is_divided():
    # Multiplied after it, the last bits of losses and gradients would be others, and so would seeded fits.
    draw = torch.Generator().manual_seed(0)
    for weight in torch.rand(50, generator=draw).tolist():
        z, normal = torch.randn(7, 5, generator=draw), torch.rand(7, generator=draw) < 0.6
        collapse = TargetedCollapse("0", weight)
        norms = torch.where(normal, z.norm(dim=1), 0)
        assert torch.equal(collapse.loss(z, normal), weight * norms.sum() / normal.sum().clamp_min(1))
        summed, pulled = (z.clone().requires_grad_() for _ in range(2))
        (weight * summed.norm(dim=1).mean()).backward()
        latent = pulled * 1
        collapse.pull(latent)
        (latent * 0).sum().backward()
        assert torch.equal(pulled.grad, summed.grad)
