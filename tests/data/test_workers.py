"""The processes that read images: in order, the same ones all along, and what the user is told when one fails."""

import os
import signal
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.trees import make_clothing1M

import dataloader_clothing1M
from dividemix import DivideMixError
from dividemix.data import workers as workers_module
from dividemix.data.images import Views
from dividemix.data.workers import TASK_SIZE, Reader, Task, Workers, explain_worker_death

DIED = r"worker .*died.*--workers"


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    images = dataloader_clothing1M.load(make_clothing1M(tmp_path_factory.mktemp("data"), 56, 14, 14)).train
    return Reader({"train": images}, Views(16, 12))


@pytest.fixture
def workers(reader):
    """Two of them."""
    made = Workers(reader, 2, pin=False)
    yield made
    made.close()


def tasks(n, start=0):
    """n tasks of one image each, again and again the same 56."""
    return (Task("train", None, np.array([i % 56])) for i in range(start, start + n))


def processes(workers):
    return [process.pid for process in workers._loader._iterator._workers]


def test_results_come_in_the_order_of_the_tasks_from_the_same_processes(reader, workers):
    """Images would get each other's labels; Ctrl-C would end the run with the tracebacks of all workers."""
    random_state, pids = torch.get_rng_state(), []
    for start in (0, 20):
        results = []
        for result in workers.run(tasks(30, start)):
            results.append(result)
            if len(results) == 2:  # one of each: both have begun
                pids.append(processes(workers))
                for pid in pids[-1]:
                    os.kill(pid, signal.SIGINT)
        for task, result in zip(tasks(30, start), results, strict=True):
            assert torch.equal(result.pixels, reader[task].pixels)
    assert pids[0] == pids[1] == processes(workers) and len(set(pids[0])) == 2
    assert torch.equal(torch.get_rng_state(), random_state)


def test_an_abandoned_pass_leaves_nothing_behind(reader, workers):
    """After an error or an early stop the next pass would begin with the images of the one before."""
    abandoned = workers.run(tasks(100))
    next(abandoned)
    results = list(workers.run(tasks(5, start=30)))
    for task, result in zip(tasks(5, start=30), results, strict=True):
        assert torch.equal(result.pixels, reader[task].pixels)
    with pytest.raises(RuntimeError, match="another one had begun"):
        next(abandoned)
    with pytest.raises(DivideMixError, match="/no/cache"):
        list(workers.run([*tasks(3), Task("train", "/no/cache", np.array([0])), *tasks(30)]))
    assert len(list(workers.run(tasks(20)))) == 20


def test_a_worker_that_is_killed_is_explained(workers):
    """Out of memory, the kernel kills a worker: the run would hang, or end with an error that does not say so."""
    # torch reports it wherever the main process is, also between two results
    with pytest.raises(DivideMixError, match=DIED) as error, explain_worker_death():
        for k, _ in enumerate(workers.run(tasks(100_000))):
            if k == 3:
                os.kill(processes(workers)[0], signal.SIGKILL)
    assert "\n" not in str(error.value)
    workers.close()
    assert len(list(workers.run(tasks(5)))) == 5


@pytest.mark.skipif(workers_module.START_METHOD != "fork", reason="a patched function is there in forked workers alone")
def test_too_little_shared_memory_is_explained(reader, monkeypatch):
    """In a container with 64 MB of it: the run would wait forever for a result that was lost on its way."""
    error = RuntimeError("unable to allocate shared memory(shm) for file </torch_7>: No space left on device (28)")
    monkeypatch.setattr(torch.Tensor, "share_memory_", mock.Mock(side_effect=error))
    workers = Workers(reader, 1, False)
    with pytest.raises(DivideMixError, match="--shm-size"):
        list(workers.run(tasks(3)))
    workers.close()


@pytest.mark.parametrize(
    ("error", "kind", "expected"),
    [
        (EOFError(), DivideMixError, DIED),
        (ConnectionResetError(), DivideMixError, DIED),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It"), DivideMixError, "--shm-size"),
        (RuntimeError("shapes do not fit"), RuntimeError, "shapes"),
    ],
    ids=["end of file", "connection", "bus error", "shapes"],
)
def test_what_an_error_means(error, kind, expected, monkeypatch):
    """Too little memory would be answered by the wrong advice, or a mistake in the code blamed on it."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(kind, match=expected), explain_worker_death():
        raise error


@pytest.mark.slow
def test_other_ways_to_start_processes(reader, monkeypatch):
    """Windows and macOS start workers without a copy of the main process: all they are given must be picklable."""
    monkeypatch.setattr(workers_module, "START_METHOD", "spawn")
    reader._caches["a cache of gigabytes"] = mock.Mock()  # cannot be pickled, and need not
    workers = Workers(reader, 1, False)
    [result] = workers.run([Task("train", None, np.arange(TASK_SIZE), np.ones((TASK_SIZE, 2), np.int64))])
    assert result.pixels.shape == (2, TASK_SIZE, 12, 12, 3)
    workers.close()
