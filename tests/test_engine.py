"""A step and a phase: golden steps, an independent numpy transcription of the equations, modes, statistics, order."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers.nets import SETTINGS, Linear, NoSync, golden_step, half, placed, softmax

from dividemix import Diverged, DivideMixError, DivideMixWarning, engine, recipes
from dividemix.codivide import Mixture
from dividemix.engine import MixMatch, Phase
from dividemix.run.run import RunPhase
from dividemix.runtime.device import Runtime
from PreResNet import ResNet18

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "num_class", "lr", "weight_decay", "unlabeled_loss"),
    [
        ("cifar", 10, 0.02, 5e-4, True),
        ("webvision", 50, recipes.WEBVISION.method["lr"], recipes.WEBVISION.weight_decay, False),
        ("clothing1M", 14, recipes.CLOTHING1M.method["lr"], recipes.CLOTHING1M.weight_decay, False),
    ],
)
def test_golden_step(monkeypatch, name, num_class, lr, weight_decay, unlabeled_loss):
    """One step of ours and one of the authors' from the same weights differ: we train another method."""
    seen = {}
    mixup, semi_loss = engine.mixup, engine.semi_loss

    def spy_mixup(*args):
        seen["mixed"], seen["targets"] = mixup(*args)
        return seen["mixed"], seen["targets"]

    def spy_loss(logits_x, targets_x, logits_u, targets_u):
        seen["logits"] = torch.cat([logits_x, logits_u]).detach()
        return semi_loss(logits_x, targets_x, logits_u, targets_u)

    monkeypatch.setattr(engine, "mixup", spy_mixup)
    monkeypatch.setattr(engine, "semi_loss", spy_loss)
    golden, net, terms = golden_step(name, num_class, lr, weight_decay, unlabeled_loss=unlabeled_loss)

    assert terms.loss.item() == pytest.approx(golden["loss"][0], rel=1e-4)
    logits = golden["logits0"]
    np.testing.assert_allclose(seen["logits"], logits, atol=1e-3 * np.abs(logits).max())
    rows = len(golden["mixed_sum0"])
    assert rows == (32 if unlabeled_loss else 16)
    np.testing.assert_allclose(seen["mixed"][:rows].sum(dim=(1, 2, 3)), golden["mixed_sum0"], atol=1e-2)
    if unlabeled_loss:
        np.testing.assert_allclose([terms.labeled, terms.unlabeled], golden["terms0"][:2], rtol=1e-4)
        assert golden["terms0"][2] == pytest.approx(25 * 2 / 16)
        np.testing.assert_allclose(seen["targets"][:16], golden["mixed_target_x0"], atol=1e-4)
        np.testing.assert_allclose(seen["targets"][16:], golden["mixed_target_u0"], atol=1e-4)
    state = net.state_dict()
    norms = np.array([state[key].double().norm().item() for key in golden["keys"]])
    sums = np.array([state[key].double().sum().item() for key in golden["keys"]])
    error = np.abs(norms - golden["param_norm"]) / np.maximum(np.abs(golden["param_norm"]), 1e-12)
    assert error.max() < 2e-4
    assert np.median(error) < 1e-6  # a missing weight decay shows as 1e-5
    np.testing.assert_allclose(sums, golden["param_sum"], atol=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# Against the equations, written again in numpy for a linear network (whose gradient is known in closed form)


@pytest.mark.parametrize("unlabeled_loss", [True, False])
@pytest.mark.parametrize("unlabeled_rows", [5, 3, 0])
def test_step_equals_a_numpy_transcription(unlabeled_loss, unlabeled_rows):
    """Paper, Algorithm 1 and Eq. 3-12, by other means: an error common to ours and to a golden file would show."""
    rng = np.random.default_rng(7)
    B, C, D, T, lam, lambda_u, lr, momentum_free_decay = 5, 4, 12, 0.5, 0.7, 3.0, 0.1, 1e-3
    x1, x2 = rng.standard_normal((2, B, 3, 2, 2))
    u1, u2 = rng.standard_normal((2, unlabeled_rows, 3, 2, 2))
    labels, w = rng.integers(0, C, B), rng.uniform(0, 1, B)
    index = rng.permutation(2 * (B + unlabeled_rows))
    torch.manual_seed(1)
    net, peer = Linear(D, C), Linear(D, C)
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=momentum_free_decay)
    weight, bias = (p.detach().numpy().copy() for p in net.layer.parameters())
    other, other_bias = (p.detach().numpy().copy() for p in peer.layer.parameters())

    def mine(x):
        return softmax(x.reshape(len(x), D) @ weight.T + bias)

    def theirs(x):
        return softmax(x.reshape(len(x), D) @ other.T + other_bias)

    def sharp(p):
        return p ** (1 / T) / (p ** (1 / T)).sum(axis=1, keepdims=True)

    refined = sharp(w[:, None] * np.eye(C)[labels] + (1 - w[:, None]) * (mine(x1) + mine(x2)) / 2)
    guessed = sharp((mine(u1) + mine(u2) + theirs(u1) + theirs(u2)) / 4) if unlabeled_rows else np.empty((0, C))
    X = np.concatenate([x1, x2, u1, u2]).reshape(-1, D)
    Y = np.concatenate([refined, refined, guessed, guessed])
    X, Y = lam * X + (1 - lam) * X[index], lam * Y + (1 - lam) * Y[index]
    n = 2 * B if not unlabeled_loss else len(X)
    X, Y = X[:n], Y[:n]
    z = X @ weight.T + bias
    p = softmax(z)
    Lx = -(Y[: 2 * B] * np.log(p[: 2 * B])).sum(axis=1).mean()
    Lu = ((p[2 * B :] - Y[2 * B :]) ** 2).mean() if n > 2 * B else 0.0
    pbar = p.mean(axis=0)
    penalty = (1 / C * np.log(1 / C / pbar)).sum()

    # d loss / d z, row by row
    g = np.zeros_like(z)
    g[: 2 * B] = (p[: 2 * B] * Y[: 2 * B].sum(axis=1, keepdims=True) - Y[: 2 * B]) / (2 * B)
    d_p = np.zeros_like(p)
    if n > 2 * B:
        d_p[2 * B :] = lambda_u * 2 * (p[2 * B :] - Y[2 * B :]) / Y[2 * B :].size
    d_p += -1 / C / pbar / n
    g += p * (d_p - (d_p * p).sum(axis=1, keepdims=True))
    new_weight = weight - lr * (g.T @ X + momentum_free_decay * weight)
    new_bias = bias - lr * (g.sum(axis=0) + momentum_free_decay * bias)

    terms = engine.mixmatch_step(
        net, peer, optimizer, *map(torch.from_numpy, (x1, x2, labels, w, u1, u2)),
        lam=lam, index=torch.from_numpy(index), T=T, lambda_u=lambda_u, num_class=C, unlabeled_loss=unlabeled_loss,
    )  # fmt: skip
    np.testing.assert_allclose(
        [float(t) for t in terms], [Lx + lambda_u * Lu + penalty, Lx, Lu, penalty], rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(net.layer.weight.detach(), new_weight, rtol=1e-9)
    np.testing.assert_allclose(net.layer.bias.detach(), new_bias, rtol=1e-9)
    np.testing.assert_array_equal(peer.layer.weight.detach(), other)  # frozen


def test_order_and_mode_of_the_forwards():
    """Guessing with net in eval mode, or in another order, leaves other running statistics behind every step."""
    torch.manual_seed(0)
    net, peer = Linear(12, 3), Linear(12, 3)
    x1, x2, u1, u2 = torch.randn(4, 2, 3, 2, 2, dtype=torch.double)
    net.eval()
    engine.mixmatch_step(
        net, peer, torch.optim.SGD(net.parameters(), 0.1), x1, x2, torch.tensor([0, 1]), torch.ones(2).double(), u1, u2,
        lam=0.8, index=torch.arange(8), T=0.5, lambda_u=1.0, num_class=3,
    )  # fmt: skip
    assert [(training, grad) for training, grad, _ in net.calls] == [(True, False)] * 4 + [(True, True)]
    for (_, _, seen), expected in zip(net.calls, (u1, u2, x1, x2), strict=False):
        torch.testing.assert_close(seen, expected)
    assert [(training, grad) for training, grad, _ in peer.calls] == [(False, False)] * 2


def test_running_statistics_after_a_step():
    """Five updates a step (u1, u2, x1, x2, mixed), each from its own sub-batch: merged or in eval mode they differ."""
    torch.manual_seed(0)
    net, peer, reference = (ResNet18(4, width=4) for _ in range(3))
    reference.load_state_dict(net.state_dict())
    before = {k: v.clone() for k, v in peer.state_dict().items()}
    x1, x2, u1, u2 = torch.randn(4, 6, 3, 16, 16)
    w, labels, index = torch.rand(6), torch.arange(6) % 4, torch.randperm(24)
    engine.mixmatch_step(
        net, peer, torch.optim.SGD(net.parameters(), 0.1), x1, x2, labels, w, u1, u2,
        lam=0.6, index=index, T=0.5, lambda_u=1.0, num_class=4,
    )  # fmt: skip
    reference.train()
    inputs = torch.cat([x1, x2, u1, u2])
    with torch.no_grad():
        for batch in (u1, u2, x1, x2, 0.6 * inputs + 0.4 * inputs[index]):
            reference(batch)
    for name, value in net.named_buffers():
        torch.testing.assert_close(value, dict(reference.named_buffers())[name])
    assert net.bn1.num_batches_tracked == 5
    for name, value in peer.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_weight_decay_reaches_bn_and_biases():
    """The usual exemption of BN and biases is not in the authors' optimiser, and moves every number a little."""
    net = ResNet18(3, width=4)
    optimizer = Runtime(CPU).optimizer(net, lr=0.5, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    engine.update(optimizer, sum((p * 0).sum() for p in net.parameters()))
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.5 * 0.1), msg=name)


def test_no_host_sync_in_a_step(tiny_images):
    """One .item() a step costs a tenth of the speed of a GPU, and makes the step impossible to capture."""
    with pytest.raises(AssertionError, match="synchronises"), NoSync():
        torch.ones(1).item()  # the net that the steps below are caught with has no hole
    net, peer = ResNet18(3, width=4), ResNet18(3, width=4)
    machine = Runtime(CPU, "bf16", merge=True)
    net, peer = machine.prepare(net), machine.prepare(peer)
    optimizer = machine.optimizer(net, 0.1, 5e-4)
    rng = np.random.default_rng(0)
    (mixmatch, *_), (warmup, *_) = tiny_images.mixmatch_batches(half(24), 4, rng), tiny_images.warmup_batches(8, rng)
    lam, index, ramp = torch.tensor(0.7), torch.randperm(16), torch.tensor(2.0)
    with NoSync():
        engine.warmup_step(
            net, optimizer, *tiny_images.warmup_views(*warmup), conf_penalty=True, forward=machine.forward
        )
        engine.mixmatch_step(
            net, peer, optimizer, *tiny_images.mixmatch_views(*mixmatch),
            lam=lam, index=index, T=0.5, lambda_u=ramp, num_class=3, forward=machine.forward,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Phases


@pytest.mark.parametrize(("labeled", "steps", "num_iter"), [(12, 3, 4), (13, 4, 4), (1, 1, 1), (24, 6, 7), (23, 6, 6)])
def test_an_epoch_is_one_pass_and_the_ramp_counts_as_the_authors(monkeypatch, tiny_images, labeled, steps, num_iter):
    """The authors count one batch too many when B divides the labeled set: the ramp must follow them."""
    seen = []

    def spy(net, peer, optimizer, batch, mixmatch, lam, index, lambda_u, **_):
        x1, _, _, _, u1, _ = batch
        seen.append((len(x1), len(u1), float(lam), float(lambda_u), sorted(index.tolist())))
        return engine.StepTerms(*torch.zeros(4))

    monkeypatch.setattr(engine, "train_step", spy)
    net = ResNet18(3, width=4)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    engine.train_epoch(net, net, optimizer, tiny_images, half(24, labeled), SETTINGS, Phase(epoch=3))
    assert len(seen) == steps
    assert sum(rows for rows, *_ in seen) == labeled
    for i, (x, u, lam, ramp, index) in enumerate(seen):
        assert 0.5 <= lam <= 1
        assert ramp == pytest.approx(8.0 * (3 + i / num_iter - 1) / 16, rel=1e-5)
        assert index == list(range(2 * (x + u)))


@pytest.mark.parametrize("labeled", [1, 23, 24])
def test_phases_survive_the_smallest_sets(tiny_images, labeled):
    """One labeled sample, one unlabeled, none: an epoch that crashes there loses the run."""
    net, peer = ResNet18(3, width=4), ResNet18(3, width=4)
    optimizer = Runtime(CPU).optimizer(net, 0.02, 5e-4)
    terms = engine.train_epoch(net, peer, optimizer, tiny_images, half(24, labeled), SETTINGS, Phase(epoch=3))
    assert np.isfinite(terms).all()
    assert (terms.unlabeled == 0) == (labeled == 24)


def test_warmup_is_cross_entropy_plus_the_penalty_where_asked(tiny_images):
    """The penalty left out (or added everywhere) changes asymmetric noise by points."""
    x, labels = tiny_images.warmup_views(*next(iter(tiny_images.warmup_batches(24, np.random.default_rng(0)))))
    x = x.contiguous()  # see `runtime.start` on channels_last and few channels
    losses = {}
    for penalty in (False, True):
        torch.manual_seed(0)
        net = ResNet18(3, width=4)
        losses[penalty] = engine.warmup_step(
            net, torch.optim.SGD(net.parameters(), 0.1), x, labels, conf_penalty=penalty
        )
    plain, penalised = losses[False], losses[True]
    assert plain.loss == plain.labeled == penalised.labeled
    assert plain.penalty == 0
    assert penalised.penalty < 0
    torch.testing.assert_close(penalised.loss, penalised.labeled + penalised.penalty)


def test_per_sample_loss_is_in_eval_mode_and_in_order(tiny_images):
    """A loss that lands on another sample divides the wrong ones; train mode would change the network by looking."""
    torch.manual_seed(0)
    net = ResNet18(3, width=4).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    scores = engine.per_sample_loss(net, placed(Runtime(CPU, eval_batch_size=7), tiny_images))
    x, labels = next(iter(tiny_images.eval_batches(24)))
    with torch.no_grad():
        logits = net.eval()(x.contiguous())
    torch.testing.assert_close(scores.loss, torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
    torch.testing.assert_close(scores.prediction, logits.argmax(dim=1))
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


class SmallMemory(torch.nn.Module):
    """Runs out of memory over `room` images."""

    def __init__(self, net, room: int):
        super().__init__()
        self.net, self.room, self.tried = net, room, []

    def forward(self, x):
        self.tried.append(len(x))
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
        return self.net(x)


def test_evaluation_adapts_to_the_memory(tiny_images):
    """A card that is too small for the evaluation batch loses the run at its first test; every epoch anew, it would
    lose the time of the failed attempts."""
    torch.manual_seed(0)
    net = ResNet18(3, width=4)
    small, data = SmallMemory(net, room=6), placed(Runtime(CPU, eval_batch_size=100), tiny_images)
    with pytest.warns(DivideMixWarning, match="24 images at once.*--eval_batch_size"):
        scores = engine.per_sample_loss(small, data)
    assert small.tried == [24, 12, 6, 6, 6, 6]
    expected = engine.per_sample_loss(net, tiny_images)
    torch.testing.assert_close(scores.loss, expected.loss)
    small.tried.clear()
    expected = engine.test([net], {"test": tiny_images})["test_acc"]
    accuracy = engine.test([small, net], {"test": data})
    assert accuracy["test_acc_net1"] == accuracy["test_acc_net2"] == expected
    assert small.tried == [6, 6, 6, 6]
    small.room = 0
    with pytest.warns(DivideMixWarning), pytest.raises(DivideMixError, match="no memory to evaluate 1 images"):
        engine.per_sample_loss(small, data)


def test_ensemble_sums_logits(tiny_images):
    """A vote of argmaxes, or a sum of probabilities, is another classifier than the paper's."""

    class Fixed(torch.nn.Module):
        def __init__(self, *logits):
            super().__init__()
            self.logits = torch.tensor(logits)

        def forward(self, x):
            return self.logits.expand(len(x), 3)

    # Summed logits say class 2; both argmaxes and summed probabilities say otherwise.
    nets = [Fixed(9.0, 1.0, 8.0), Fixed(0.0, 9.0, 8.0)]
    data = placed(Runtime(CPU, eval_batch_size=5), tiny_images)
    names = ["test_acc", "test_acc_net1", "test_acc_net2"]
    assert engine.test(nets, {"test": data}) == pytest.approx(dict.fromkeys(names, 100 / 3))
    data.labels.fill_(2)
    assert engine.test(nets, {"test": data}) == dict(zip(names, (100, 0, 0), strict=True))
    # Of two sets each has its own names, and more than the first answer is asked of the summed logits alone.
    record = engine.test(nets, {"val": tiny_images, "test": data}, ks=(1, 2))
    assert record == pytest.approx(
        {"val_acc": 100 / 3, "val_acc_net1": 100 / 3, "val_acc_net2": 100 / 3, "val_acc_top2": 200 / 3}
        | {"test_acc": 100, "test_acc_net1": 0, "test_acc_net2": 0, "test_acc_top2": 100}
    )


def test_first_non_finite_step_stops_all_updates(tiny_images):
    """Weights that turned NaN an hour ago: the phase must end with the batch's number and sound weights."""
    torch.manual_seed(0)
    net = ResNet18(3, width=4)
    optimizer = Runtime(CPU).optimizer(net, 0.02, 5e-4)
    calls, kept = 0, {}

    def spoil(module, inputs, logits):
        nonlocal calls
        calls += 1
        if calls == 3:
            kept.update({name: p.detach().clone() for name, p in net.named_parameters()})
            return logits * float("inf")

    net.register_forward_hook(spoil)
    with pytest.raises(DivideMixError, match="batch 3 of 6"):
        engine.warmup_epoch(net, optimizer, tiny_images, MixMatch(3, batch_size=2), Phase())
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), kept[name], rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Co-divide


class Threaded(Runtime):
    """A CPU that fits mixtures in a thread, as a card does."""

    def background(self, function, *args):
        return ThreadPoolExecutor(1).submit(function, *args).result


def linear_nets() -> list[torch.nn.Module]:
    return [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 3)) for _ in range(2)]


def run_phase(name: str, k: int = 0) -> RunPhase:
    """As of a run's epoch 7."""
    return RunPhase(7, np.random.default_rng(k) if name == "divide" else None, iter, name, {})


def test_a_mixture_that_is_fitted_in_a_thread_gives_the_same_division(tiny_images, monkeypatch):
    """Else a card divides other samples than a CPU, or each network's samples by the other's losses."""
    nets, scored, divided = linear_nets(), [], []
    loss = engine.per_sample_loss
    monkeypatch.setattr(engine, "per_sample_loss", lambda net, *args: scored.append(net) or loss(net, *args))
    for machine in (Runtime(CPU), Threaded(CPU)):
        divisions = engine.co_divide(nets, [placed(machine, tiny_images)] * 2, [Mixture(0.5), Mixture(0.6)], run_phase)
        divided.append([dataclasses.asdict(division) for division in divisions])
    assert [id(net) for net in scored] == [id(net) for net in nets[::-1]] * 2, "net 1 waits for net 2's division"
    for here, there in zip(*divided, strict=True):
        for name, value in here.items():
            np.testing.assert_array_equal(there[name], value)
    for net, division, threshold in zip(nets, divided[1], (0.5, 0.6), strict=True):
        assert division["threshold"] == threshold
        scores = loss(net, tiny_images)
        np.testing.assert_array_equal(division["raw_loss"], scores.loss)
        np.testing.assert_array_equal(division["prediction"], scores.prediction)


def test_net_2s_division_is_read_while_net_1s_is_fitted(tiny_images):
    """Else net 1's training, which is the first and needs net 2's division alone, waits for both: a card idles for
    seconds in each epoch."""
    may_go_on, ended = threading.Event(), threading.Event()

    class Held(Mixture):
        def divide(self, *args):
            may_go_on.wait(60)
            ended.set()
            return super().divide(*args)

    data = placed(Threaded(CPU), tiny_images)
    divisions = engine.co_divide(linear_nets(), [data] * 2, [Held(0.5), Mixture(0.5)], run_phase)
    assert divisions[1] is not None and divisions[-1] is divisions[1] and not ended.is_set()
    may_go_on.set()
    assert divisions[0] is not None and ended.is_set()


def test_losses_that_cannot_be_divided_end_the_run_where_the_division_is_read(tiny_images):
    """Else a training that diverged goes on: an error in a thread is seen by nobody until its result is asked for."""
    nets = linear_nets()
    with torch.no_grad():
        nets[0][1].weight.fill_(torch.nan)
    mixtures = [Mixture(0.5), Mixture(0.5)]
    divisions = engine.co_divide(nets, [placed(Threaded(CPU), tiny_images)] * 2, mixtures, run_phase)
    assert divisions[1] is not None
    with pytest.raises(Diverged, match=r"epoch 7.*not finite"):
        divisions[0]
    with pytest.raises(Diverged, match=r"epoch 7.*not finite"):  # where nothing runs in a thread
        engine.co_divide(nets, [tiny_images] * 2, mixtures, run_phase)
