"""A step and a phase: golden steps, an independent numpy transcription of the equations with the ablations of Table 5,
modes, statistics, order, and the division of both networks."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.nets import (
    ABLATED,
    ALONE,
    CPU,
    SETTINGS,
    Linear,
    NoSync,
    golden_step,
    half,
    placed,
    same,
    small_net,
    snapshot,
    softmax,
)

from dividemix import Diverged, engine, recipes
from dividemix.codivide import Mixture, codivide
from dividemix.engine import MixMatch, Phase
from dividemix.run import scoring
from dividemix.run.progress import RunPhase
from dividemix.runtime import Runtime
from PreResNet import ResNet18


@pytest.mark.parametrize(
    ("name", "num_class", "recipe"),
    [
        ("cifar", 10, None),
        ("webvision", 50, recipes.WEBVISION),
        pytest.param("clothing1M", 14, recipes.CLOTHING1M, marks=pytest.mark.slow),
    ],
)
def test_golden_step(name, num_class, recipe):
    """One step of ours and one of the authors' from the same weights differ: we train another method."""
    lr, weight_decay = (recipe.method["lr"], recipe.weight_decay) if recipe else (0.02, 5e-4)
    golden, net, terms = golden_step(name, num_class, lr, weight_decay, unlabeled_loss=recipe is None)
    assert terms.loss.item() == pytest.approx(golden["loss"][0], rel=1e-4)
    if recipe is None:
        np.testing.assert_allclose([terms.labeled, terms.unlabeled], golden["terms0"][:2], rtol=1e-4)
        assert golden["terms0"][2] == pytest.approx(25 * 2 / 16)
    state = net.state_dict()
    norms = np.array([state[key].double().norm().item() for key in golden["keys"]])
    sums = np.array([state[key].double().sum().item() for key in golden["keys"]])
    error = np.abs(norms - golden["param_norm"]) / np.maximum(np.abs(golden["param_norm"]), 1e-12)
    assert error.max() < 2e-4
    assert np.median(error) < 1e-6  # a missing weight decay shows as 1e-5
    np.testing.assert_allclose(sums, golden["param_sum"], atol=0.05)


# ---- Against the equations, written again in numpy for a linear network, whose gradient has a closed form ----


def ablated(name: str, peer):
    """What an ablation trains with: (peer, fields of MixMatch)."""
    ablation = recipes.ABLATIONS[name]
    return (peer if ablation.nets == 2 else None), {"refine": ablation.refine, "views": ablation.views}


@pytest.mark.parametrize("unlabeled_rows", [5, 3, 0])
@pytest.mark.parametrize(("name", "unlabeled_loss"), [*((name, True) for name in ABLATED), ("none", False)])
def test_a_step_equals_a_numpy_transcription(monkeypatch, name, unlabeled_loss, unlabeled_rows):
    """Algorithm 1 and Eq. 3-12 by other means; an ablation leaves out what its name says and no more."""
    nets, refine, M = ABLATED[name]
    rng = np.random.default_rng(7)
    B, C, D, T, lam, lambda_u, lr, decay = 5, 4, 12, 0.5, 0.7, 3.0, 0.1, 1e-3
    x = rng.standard_normal((2, B, 3, 2, 2))
    u = rng.standard_normal((2, unlabeled_rows, 3, 2, 2))
    if M == 1:
        x[1], u[1] = np.nan, np.nan  # a step that reads the second view gets nothing else
    labels, w = rng.integers(0, C, B), np.array([0.0, 0.3, 0.7, 0.9, 1.0])
    index = rng.permutation(M * (B + unlabeled_rows))
    net, peer = Linear(D, C).eval(), Linear(D, C)
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=decay)
    weights = [[p.detach().numpy().copy() for p in model.parameters()] for model in (net, peer)]
    weight, bias = weights[0]

    def sharp(p):
        return p ** (1 / T) / (p ** (1 / T)).sum(axis=1, keepdims=True)

    def predict(k, views):  # of net (0) or peer (1), the mean over the views
        weight, bias = weights[k]
        return np.mean([softmax(view.reshape(len(view), D) @ weight.T + bias) for view in views[:M]], axis=0)

    one_hot = np.eye(C)[labels]
    refined = sharp(w[:, None] * one_hot + (1 - w[:, None]) * predict(0, x)) if refine else one_hot
    guess = (predict(0, u) + predict(1, u)) / 2 if nets == 2 else predict(0, u)
    guessed = sharp(guess) if unlabeled_rows else np.empty((0, C))
    X, Y = np.concatenate([*x[:M], *u[:M]]).reshape(-1, D), np.concatenate([refined] * M + [guessed] * M)
    X, Y = lam * X + (1 - lam) * X[index], lam * Y + (1 - lam) * Y[index]
    rows_x = M * B
    n = len(X) if unlabeled_loss else rows_x
    X, Y = X[:n], Y[:n]
    z = X @ weight.T + bias
    p = softmax(z)
    Lx = -(Y[:rows_x] * np.log(p[:rows_x])).sum(axis=1).mean()
    Lu = ((p[rows_x:] - Y[rows_x:]) ** 2).mean() if n > rows_x else 0.0
    pbar = p.mean(axis=0)
    penalty = (1 / C * np.log(1 / C / pbar)).sum()  # on in all ablations

    # d loss / d z, row by row
    g = np.zeros_like(z)
    g[:rows_x] = (p[:rows_x] * Y[:rows_x].sum(axis=1, keepdims=True) - Y[:rows_x]) / rows_x
    d_p = np.zeros_like(p)
    if n > rows_x:
        d_p[rows_x:] = lambda_u * 2 * (p[rows_x:] - Y[rows_x:]) / Y[rows_x:].size
    d_p += -1 / C / pbar / n
    g += p * (d_p - (d_p * p).sum(axis=1, keepdims=True))

    peer_or_none, fields = ablated(name, peer)
    batch = tuple(map(torch.from_numpy, (x[0], x[1], labels, w, u[0], u[1])))
    draws = {"lam": lam, "index": torch.from_numpy(index), "lambda_u": lambda_u}
    if name == "none":  # through the door that takes the settings one by one
        settings = {"T": T, "num_class": C, "unlabeled_loss": unlabeled_loss}
        terms = engine.mixmatch_step(net, peer, optimizer, *batch, **draws, **settings)
    else:
        terms = engine.train_step(net, peer_or_none, optimizer, batch, MixMatch(C, B, T, **fields), **draws)
    expected = [Lx + lambda_u * Lu + penalty, Lx, Lu, penalty]
    np.testing.assert_allclose([float(t) for t in terms], expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(net.layer.weight.detach(), weight - lr * (g.T @ X + decay * weight), rtol=1e-9)
    np.testing.assert_allclose(net.layer.bias.detach(), bias - lr * (g.sum(axis=0) + decay * bias), rtol=1e-9)
    np.testing.assert_array_equal(peer.layer.weight.detach(), weights[1][0])  # frozen

    guessing = [*u[:M], *x[:M]] if unlabeled_rows else [*x[:M]]
    assert [call[:2] for call in net.calls] == [(True, False)] * len(guessing) + [(True, True)]
    for (_, _, images), expected in zip(net.calls, [*guessing, X.reshape(-1, 3, 2, 2)], strict=True):
        np.testing.assert_allclose(images, expected, rtol=1e-12)
    guesses_of_peer = M if nets == 2 and unlabeled_rows else 0
    assert [call[:2] for call in peer.calls] == [(False, False)] * guesses_of_peer


@pytest.mark.parametrize(("name", "precision"), [("none", "fp16"), *((name, "bf16") for name in ABLATED)])
def test_no_host_sync_in_a_step(tiny_images, name, precision):
    """One .item() a step costs a tenth of the speed of a GPU, and makes the step impossible to capture."""
    with pytest.raises(AssertionError, match="synchronises"), NoSync():
        torch.ones(1).item()  # the steps below would be caught
    runtime = Runtime(CPU, precision, merge=True)
    net, peer = (runtime.prepare(ResNet18(3, width=4) if name == "none" else small_net()) for _ in range(2))
    optimizer, rng = runtime.optimizer(net, 0.1, 5e-4), np.random.default_rng(0)
    (batch, *_), (warmup, *_) = tiny_images.mixmatch_batches(half(24), 4, rng), tiny_images.warmup_batches(8, rng)
    peer_or_none, fields = ablated(name, peer)
    draws = torch.tensor(0.7), torch.randperm(8 * fields["views"]), torch.tensor(2.0)
    mixmatch, forward = MixMatch(3, 4, **fields), runtime.forward
    with NoSync():
        images = tiny_images.mixmatch_views(*batch)
        engine.train_step(net, peer_or_none, optimizer, images, mixmatch, *draws, forward=forward)
        x, labels = tiny_images.warmup_views(*warmup)
        engine.warmup_step(net, optimizer, x, labels, conf_penalty=True, forward=forward)


# ---- Phases ----


def train(name: str, net, peer, optimizer, data, labeled: int = 13):
    """An epoch of an ablation on 24 samples. -> its terms"""
    peer, fields = ablated(name, peer)
    mixmatch = dataclasses.replace(SETTINGS, **fields)
    return engine.train_epoch(net, peer or net, optimizer, data, half(24, labeled), mixmatch, Phase(epoch=3))


@pytest.mark.parametrize(("labeled", "steps", "num_iter"), [(12, 3, 4), (13, 4, 4), (24, 6, 7)])
def test_an_epoch_is_one_pass_and_the_ramp_counts_as_the_authors(monkeypatch, tiny_images, labeled, steps, num_iter):
    """Else the ramp is not the authors', who count one batch too many, or ablations see other images."""
    noted: dict[str, list] = {name: [] for name in ABLATED}

    def spy(net, peer, optimizer, batch, mixmatch, lam, index, lambda_u, **_):
        noted[name].append([*batch, lam, lambda_u])
        assert (peer is None) == (name in ALONE)
        assert sorted(index.tolist()) == list(range(ABLATED[name][2] * (len(batch[0]) + len(batch[4]))))
        return engine.Terms(*torch.zeros(4))

    monkeypatch.setattr(engine, "train_step", spy)
    net, peer = small_net(), small_net()
    for name in ABLATED:
        train(name, net, peer, torch.optim.SGD(net.parameters(), 0.1), tiny_images, labeled)
    assert len(noted["none"]) == steps
    assert sum(len(x1) for x1, *_ in noted["none"]) == labeled
    for i, (*_, lam, ramp) in enumerate(noted["none"]):
        assert 0.5 <= lam <= 1
        assert ramp == pytest.approx(8.0 * (3 + i / num_iter - 1) / 16, rel=1e-5)
    for name in ABLATED:
        for tensors, expected in zip(noted[name], noted["none"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


@pytest.mark.parametrize(("labeled", "name"), [(1, "none"), (24, "none"), *((23, name) for name in ABLATED)])
def test_merged_guesses_are_those_of_single_forwards_with_the_smallest_sets_too(tiny_images, labeled, name):
    """On a card guesses go through a network together; an epoch that crashes with one sample loses the run."""
    terms = []
    for merge in (False, True):
        runtime = Runtime(CPU, merge=merge)
        torch.manual_seed(0)
        net, peer = (runtime.prepare(small_net()) for _ in range(2))
        optimizer = runtime.optimizer(net, 0.02, 5e-4)
        terms.append(train(name, net, peer, optimizer, placed(runtime, tiny_images), labeled))
    assert np.isfinite(terms).all()
    np.testing.assert_allclose(terms[0], terms[1], rtol=1e-4)
    assert (terms[0].unlabeled == 0) == (labeled == 24)


@pytest.mark.parametrize(("views", "unlabeled_rows"), [(2, 3), (2, 0), (1, 3)])
def test_strong_views_are_learned_with_the_targets_of_weak_ones(views, unlabeled_rows):
    """Targets found on strong views, or a mixed batch of weak ones, is not what --augment strong says."""
    rng, draws = (
        np.random.default_rng(0),
        {"lam": 1.0, "index": torch.arange(views * (5 + unlabeled_rows)), "lambda_u": 9.0},
    )
    x, s = (
        [torch.from_numpy(rng.standard_normal((n, 3, 2, 2))) for n in (5, 5, unlabeled_rows, unlabeled_rows)]
        for _ in "ab"
    )
    labels, w, settings = torch.arange(5) % 4, torch.full((5,), 0.5, dtype=torch.float64), MixMatch(4, 5, views=views)
    torch.manual_seed(0)
    net, peer = Linear(12, 4), Linear(12, 4)
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    weak = (*x[:2], labels, w, *x[2:])
    plain = engine.train_step(net, peer, optimizer, weak, settings, **draws)
    without = [call[2] for call in net.calls]
    same_views = engine.train_step(net, peer, optimizer, (*weak, *x), settings, **draws)
    assert [value.item() for value in same_views] == [value.item() for value in plain]
    net.calls.clear()
    terms = engine.train_step(net, peer, optimizer, (*weak, *s), settings, **draws)
    *guesses, mixed = [call[2] for call in net.calls]
    assert all(torch.equal(a, b) for a, b in zip(guesses, without[: len(guesses)], strict=True))
    assert torch.equal(mixed, torch.cat([*s[:views], *s[2 : 2 + views]]))
    assert terms.loss != plain.loss
    if views == 2:
        door = {"T": 0.5, "num_class": 4, "strong": s}
        assert engine.mixmatch_step(net, peer, optimizer, *weak, **door, **draws).loss == terms.loss


def test_warmup_is_cross_entropy_plus_the_penalty_if_wanted(tiny_images):
    """The penalty left out (or added everywhere) changes asymmetric noise by points."""
    x, labels = tiny_images.warmup_views(*next(iter(tiny_images.warmup_batches(24, np.random.default_rng(0)))))
    net = small_net().train()
    with torch.no_grad():
        logits = net(x)
    for conf_penalty in (False, True):
        terms = engine.warmup_step(net, torch.optim.SGD(net.parameters(), 0.0), x, labels, conf_penalty=conf_penalty)
        torch.testing.assert_close(terms.labeled, F.cross_entropy(logits, labels))
        assert (terms.penalty < 0) == conf_penalty and terms.unlabeled == 0
        torch.testing.assert_close(terms.loss, terms.labeled + terms.penalty)


def test_per_sample_loss_is_in_eval_mode_and_in_order(tiny_images):
    """A loss that lands on another sample divides the wrong ones; train mode would change the network by looking."""
    net = small_net().train()
    before = snapshot(net)
    scores = engine.per_sample_loss(net, placed(Runtime(CPU, eval_batch_size=7), tiny_images))
    x, labels = next(iter(tiny_images.eval_batches(24)))
    with torch.no_grad():
        logits = net.eval()(x)
    torch.testing.assert_close(scores.loss, F.cross_entropy(logits, labels, reduction="none"))
    torch.testing.assert_close(scores.prediction, logits.argmax(dim=1))
    assert same(net.state_dict(), before)


def test_the_ensemble_sums_logits(tiny_images):
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
    data.labels.fill_(2)
    # The top-2 accuracy is only that of the summed logits.
    record = engine.test(nets, {"val": tiny_images, "test": data}, ks=(1, 2))
    assert record == pytest.approx(
        {"val_acc": 100 / 3, "val_acc_net1": 100 / 3, "val_acc_net2": 100 / 3, "val_acc_top2": 200 / 3}
        | {"test_acc": 100, "test_acc_net1": 0, "test_acc_net2": 0, "test_acc_top2": 100}
    )


# ---- Co-divide ----


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
    monkeypatch.setattr(
        engine, "per_sample_loss", lambda net, *args, **more: scored.append(net) or loss(net, *args, **more)
    )
    for runtime in (Runtime(CPU), Threaded(CPU)):
        divisions = engine.co_divide(nets, [placed(runtime, tiny_images)] * 2, [Mixture(0.5), Mixture(0.6)], run_phase)
        divided.append([dataclasses.asdict(division) for division in divisions])
    assert [id(net) for net in scored] == [id(net) for net in nets[::-1]] * 2, "net 1 waits for net 2's division"
    for at_once, in_thread in zip(*divided, strict=True):
        np.testing.assert_equal(in_thread, at_once)
    for net, division, threshold in zip(nets, divided[1], (0.5, 0.6), strict=True):
        assert division["threshold"] == threshold
        scores = loss(net, tiny_images)
        np.testing.assert_array_equal(division["raw_loss"], scores.loss)
        np.testing.assert_array_equal(division["prediction"], scores.prediction)


def test_net_2s_division_is_read_while_net_1s_is_fitted(tiny_images):
    """Else net 1's training, which needs net 2's division only, waits for both: a card idles for seconds."""
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


def test_a_division_by_class_gets_the_given_labels(tiny_images, monkeypatch):
    """Else each network divides by other labels than those that its losses are of, or by none."""
    monkeypatch.setattr("dividemix.codivide.MIN_CLASS_SIZE", 2)
    nets, labels = linear_nets(), np.arange(24) % 3
    mixtures = [Mixture(0.5, division="per_class"), Mixture(0.5)]
    for division, net, given in zip(
        engine.co_divide(nets, [tiny_images] * 2, mixtures), nets, (labels, None), strict=True
    ):
        losses, state = engine.per_sample_loss(net, tiny_images).loss.numpy(), np.random.default_rng(0)
        expected = codivide(losses, 0.5, random_state=int(state.integers(2**32)), labels=given)
        np.testing.assert_array_equal(division.clean_probability, expected.clean_probability)


@pytest.mark.parametrize("limit", [2**30, 0], ids=["float32", "float16"])
def test_probabilities_are_averaged_over_networks_and_epochs(tiny_images, monkeypatch, limit):
    """Else the label list is made from one network, or from one epoch, or it changes how the samples are divided."""
    monkeypatch.setattr(scoring, "HALF_FROM", limit)
    data, mean, expected = placed(Runtime(CPU, eval_batch_size=7), tiny_images), scoring.MeanProbabilities(), 0
    x, _ = next(iter(tiny_images.eval_batches(24)))
    for _ in range(2):
        nets = linear_nets()
        with_mean = engine.co_divide(nets, [data] * 2, [Mixture(0.5), Mixture(0.5)], run_phase, mean.add)
        without = engine.co_divide(nets, [data] * 2, [Mixture(0.5), Mixture(0.5)], run_phase)
        np.testing.assert_equal(*([dataclasses.asdict(division) for division in both] for both in (with_mean, without)))
        expected = expected + sum(net(x).softmax(dim=1).detach() for net in nets) / 4
    assert mean.count == 4 and mean.mean.dtype is (torch.float32 if limit else torch.float16)
    torch.testing.assert_close(mean.mean.float(), expected, rtol=0, atol=1e-6 if limit else 1e-3)
