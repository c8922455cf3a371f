"""The baseline of the speed ratio does the work that the engine does: the same step, the same losses, every sample."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers.nets import golden_weights

from benchmarks import baseline_plain
from dividemix import engine
from dividemix.codivide import Division
from dividemix.data.device import DeviceImages
from dividemix.runtime.device import Runtime

CPU = Runtime(torch.device("cpu"), memory_format=torch.contiguous_format)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def plain_epoch() -> baseline_plain.PlainEpoch:
    """24 images in batches of 4."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (34, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, 34)
    options = {"device": "cpu", "width": 4, "batch_size": 4, "workers": 0, "eval_batch_size": 10}
    return baseline_plain.PlainEpoch(images[:24], labels[:24], images[24:], labels[24:], **options)


def division_of(labeled: int) -> Division:
    """Of 24 images, with probabilities that are all different."""
    rng = np.random.default_rng(labeled)
    division = baseline_plain.division_of(rng.permutation(24) < labeled)
    return dataclasses.replace(division, clean_probability=division.clean_probability + rng.uniform(0, 0.1, 24))


def test_step_is_the_engines():
    """The speed ratio compares two different methods: what is faster may just be what does less."""
    plain = plain_epoch()
    nets = [golden_weights(net, seed) for seed, net in enumerate(plain.nets, start=2)]
    ours = [CPU.prepare(golden_weights(baseline_plain.ResNet18(10, width=4), seed)) for seed in (2, 3)]
    optimizer = CPU.optimizer(ours[0], 0.02, 5e-4)
    nets[0].train()
    nets[1].eval()
    for unlabeled_rows in (6, 3):  # the second step has momentum, and a partial unlabeled batch
        x1, x2 = torch.randn(2, 6, 3, 32, 32)
        u1, u2 = torch.randn(2, unlabeled_rows, 3, 32, 32)
        batch = [x1, x2, torch.randint(0, 10, (6,)), torch.rand(6), u1, u2]
        draws = {"lam": 0.7, "index": torch.randperm(2 * (6 + unlabeled_rows)), "T": 0.5, "lambda_u": 25.0}
        terms = baseline_plain.step(*nets, plain.optimizers[0], *batch, **draws, num_class=10)
        expected = engine.mixmatch_step(*ours, optimizer, *batch, **draws, num_class=10)
        assert terms == pytest.approx([float(term) for term in expected], rel=1e-5)
    for net, our_net in zip(nets, ours, strict=True):
        state = our_net.state_dict()
        for key, value in net.state_dict().items():
            torch.testing.assert_close(value, state[key], rtol=3e-6, atol=5e-7, msg=key)
    assert nets[0].bn1.num_batches_tracked == 10  # five forwards in train mode a step


def test_losses_and_accuracy_are_the_engines():
    """The loss pass of the baseline sees other pixels, or puts losses in other places, than the method."""
    plain = plain_epoch()
    data = DeviceImages(plain.images, plain.labels, MEAN, STD, flip=True)
    for k, net in enumerate(plain.nets):
        golden_weights(net, k)
        torch.testing.assert_close(plain.losses(k), engine.per_sample_loss(net, data).loss, rtol=0, atol=1e-4)
    test_data = DeviceImages(plain.test_images, plain.test_labels, MEAN, STD, flip=True)
    assert plain.test() == engine.test(plain.nets, {"test": test_data})["test_acc"]


def test_an_epoch_passes_once_over_the_labeled_set(monkeypatch):
    """An epoch of the baseline is shorter or longer than the method's, and the ratio of two epochs' times is void."""
    calls = []
    step = baseline_plain.step

    def spy(net, peer, optimizer, x1, x2, labels, w, u1, u2, *, lam, index, **settings):
        calls.append((net, w, len(u1)))
        assert net.training and not peer.training
        assert 0.5 <= lam <= 1
        assert not torch.equal(x1, x2)  # two views
        assert settings == {"T": 0.5, "lambda_u": 25.0, "num_class": 10}
        return step(net, peer, optimizer, x1, x2, labels, w, u1, u2, lam=lam, index=index, **settings)

    monkeypatch.setattr(baseline_plain, "step", spy)
    plain = plain_epoch()
    divisions = [division_of(14), division_of(13)]  # both sets end in a partial batch, the unlabeled set restarts
    seconds = plain.run(divisions)
    assert list(seconds) == ["loss", "gmm", "train1", "train2", "test"] and min(seconds.values()) > 0
    for net, division, last, restart in zip(plain.nets, divisions, (2, 1), (2, 3), strict=True):
        expected = torch.from_numpy(division.clean_probability[division.labeled]).float()  # they tell samples apart
        batches = [(w, rows) for trained, w, rows in calls if trained is net]
        assert [len(w) for w, _ in batches] == [4, 4, 4, last]
        assert [rows for _, rows in batches] == [4, 4, restart, 4]  # 10 or 11 unlabeled, restarted
        torch.testing.assert_close(torch.cat([w for w, _ in batches]).sort().values, expected.sort().values)
        assert net.bn1.num_batches_tracked == 5 * 4


def test_a_warmup_epoch_passes_once_over_all_in_torchs_own_precision():
    """Else warm-up epochs of other steps are compared, or a baseline without the TF32 that its scripts have."""
    plain, test, flags = plain_epoch(), baseline_plain.PlainEpoch.test, []
    before = [net.linear.weight.detach().clone() for net in plain.nets]

    def noted() -> float:
        flags.append((torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark))
        return test(plain)

    plain.test = noted
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, benchmark=False):
        assert list(plain.run(None)) == ["warmup1", "warmup2", "test"]
        assert not torch.backends.cudnn.allow_tf32  # the engine's own setting is back
    assert flags == [(True, True)]
    for net, weight in zip(plain.nets, before, strict=True):
        assert net.bn1.num_batches_tracked == 3  # 24 images, twice the batch of 4
        assert not torch.equal(net.linear.weight, weight)
