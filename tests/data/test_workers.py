"""The processes that read images: in order, the same ones all along, and what the user is told when one fails."""

import os
import signal

import numpy as np
import pytest
import torch
from helpers.trees import make_clothing1M

import dataloader_clothing1M
from dividemix import DivideMixError
from dividemix.data.images import Views
from dividemix.data.workers import PART, Reader, Task, Workers, explained

VIEWS = Views(16, 12)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return dataloader_clothing1M.load(make_clothing1M(tmp_path_factory.mktemp("data"))).train


@pytest.fixture
def workers(images):
    """Two of them."""
    made = Workers(Reader({"train": images}, VIEWS), 2, pin=False)
    yield made
    made.close()


def tasks(n, start=0):
    """n tasks of one image each, again and again the same 56."""
    return (Task("train", None, np.array([i % 56])) for i in range(start, start + n))


def processes(workers):
    return [process.pid for process in workers._loader._iterator._workers]


def test_parts_come_in_the_order_of_the_tasks(images, workers):
    """Images would get each other's labels."""
    reader = Reader({"train": images}, VIEWS)
    for task, part in zip(tasks(100), workers.run(tasks(100)), strict=True):
        assert torch.equal(part.pixels, reader[task].pixels)


def test_the_processes_stay(workers):
    """Each phase would start with seconds of starting processes, and of handing them the lists."""
    seen = []
    for _ in range(3):
        list(workers.run(tasks(10)))
        seen.append(processes(workers))
    assert seen[0] == seen[1] == seen[2]
    assert len(set(seen[0])) == 2


def test_an_abandoned_pass_leaves_nothing_behind(images, workers):
    """After an error that was mended, or an early stop, the next pass would begin with images of the one before."""
    reader = Reader({"train": images}, VIEWS)
    abandoned = workers.run(tasks(100))
    next(abandoned)
    found = [part.pixels for part in workers.run(tasks(5, start=30))]
    assert all(torch.equal(a, reader[task].pixels) for a, task in zip(found, tasks(5, start=30), strict=True))
    with pytest.raises(RuntimeError, match="another one had begun"):
        next(abandoned)


def test_a_pass_after_a_bad_image(images, workers):
    """The message of a bad image would come again in a pass that has none."""
    with pytest.raises(DivideMixError, match="/no/cache"):
        list(workers.run([*tasks(3), Task("train", "/no/cache", np.array([0])), *tasks(30)]))
    assert len(list(workers.run(tasks(20)))) == 20


def test_ctrl_c_is_left_to_the_main_process(workers):
    """Ctrl-C would end the run with the tracebacks of all workers instead of one line."""
    passing = workers.run(tasks(200))
    for _ in range(2):  # one of each: both have begun
        next(passing)
    for pid in processes(workers):
        os.kill(pid, signal.SIGINT)
    assert len(list(passing)) == 198


def test_a_worker_that_is_killed_is_explained(workers):
    """Out of memory, the kernel kills a worker: the run would hang, or end with an error that does not say so."""
    expected = r"worker .*(killed|exited).*--workers.*continues after the last finished epoch"
    # torch reports it wherever the main process is, also between two parts
    with pytest.raises(DivideMixError, match=expected) as error, explained():
        for k, _ in enumerate(workers.run(tasks(100_000))):
            if k == 3:
                os.kill(processes(workers)[0], signal.SIGKILL)
    assert "\n" not in str(error.value)
    workers.close()
    assert len(list(workers.run(tasks(5)))) == 5


def test_a_death_that_is_reported_late_does_not_spoil_the_end(workers, monkeypatch):
    """The report of a killed worker can reach the main process while it ends the workers: instead of the one line that
    explains the death, the run would end with torch's own error, and leave the other workers behind."""
    next(workers.run(tasks(10)))
    pids = processes(workers)
    event = workers._loader._iterator._workers_done_event

    def report():
        type(event).set(event)
        raise RuntimeError(f"DataLoader worker (pid {pids[0]}) is killed by signal: Killed. ")

    monkeypatch.setattr(event, "set", report)
    workers.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert len(list(workers.run(tasks(5)))) == 5


def test_an_error_at_the_end_that_is_no_death_is_not_hidden(workers, monkeypatch):
    """A mistake in the code would pass for a worker that was killed."""
    next(workers.run(tasks(10)))
    iterator = workers._loader._iterator

    def fail():
        type(iterator)._shutdown_workers(iterator)
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(iterator, "_shutdown_workers", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        workers.close()


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "Connection reset by peer")])
def test_a_result_that_breaks_off_is_explained(workers, monkeypatch, error):
    """The main process is taking a result over when the worker is killed, and hears of that only after: once in some
    hundred kills the run would end with an error of Python's own pipes."""

    class Broken:
        def __iter__(self):
            raise error

    monkeypatch.setattr(workers, "_start", Broken)
    with pytest.raises(DivideMixError, match=r"worker .*died.*--workers.*continues after the last finished epoch"):
        list(workers.run(tasks(3)))


def test_too_little_shared_memory_is_explained(images, monkeypatch, start_method):
    """In a container with 64 MB of it: the run would wait forever for a result that was lost on its way."""

    def full(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_7>: No space left on device (28)")

    start_method("fork")
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    workers = Workers(Reader({"train": images}, VIEWS), 1, False)
    with pytest.raises(DivideMixError, match=r"/dev/shm.*--workers 0.*--shm-size"):
        list(workers.run(tasks(3)))
    workers.close()


@pytest.mark.parametrize(
    "text",
    [
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit.",
        "unable to write to file </torch_7>: shared memory",
    ],
)
def test_signs_of_too_little_shared_memory(text):
    """The advice would be to use less memory, and would not help."""
    with pytest.raises(DivideMixError, match="--shm-size"), explained():
        raise RuntimeError(text)


def test_other_errors_stay_as_they_are():
    """A mistake in the code would be blamed on the memory."""
    with pytest.raises(RuntimeError, match="shapes"), explained():
        raise RuntimeError("shapes do not fit")


def test_nothing_is_drawn_from_the_global_stream(workers):
    """A run with another number of workers, or started anew, would differ in all that torch draws."""
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(workers.run(tasks(3)))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_ways_to_start_processes(images, method, start_method):
    """Python 3.14 starts workers without a copy of the main process: all they are given must be picklable."""
    start_method(method)
    workers = Workers(Reader({"train": images}, VIEWS), 1, False)
    [part] = workers.run([Task("train", None, np.arange(PART), np.ones((PART, 2), np.int64))])
    assert part.pixels.shape == (2, PART, 12, 12, 3)
    workers.close()
