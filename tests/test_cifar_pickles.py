"""CIFAR pickles that are damaged or want to run code: loaded, or refused by name, and nothing is run."""

import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
from helpers.data import Evil, batch, make_cifar10
from test_dataloader_cifar import refused

import dataloader_cifar


@pytest.mark.parametrize("where", ["top", "data", "nested", "key", "meta"])
@pytest.mark.parametrize("function", [os.mkdir, os.system, eval, getattr])
def test_code_is_refused_and_not_run(tmp_path, where, function):
    """Else: whoever offers a data set for download can run programs on the machines of its users."""
    marker = tmp_path / "marker"
    argument = {os.mkdir: str(marker), os.system: f"touch {marker}", eval: f"__import__('os').mkdir({str(marker)!r})"}
    evil = Evil(getattr, "text", "upper") if function is getattr else Evil(function, argument[function])
    folder = make_cifar10(tmp_path, n_train=4, n_test=4, batches=1)
    entry = {
        "top": evil,
        "data": batch(data=evil),
        "nested": batch(filenames=[{"a": (1, [evil])}]),
        "key": batch() | {evil: 1},
        "meta": {"label_names": [evil]},
    }[where]
    path = folder / ("batches.meta" if where == "meta" else "data_batch_1")
    for protocol in range(6):
        path.write_bytes(pickle.dumps(entry, protocol))
        refused("cifar10", tmp_path, path, "asks to run code", "refused")
    assert not marker.exists()
    if where == "top" and function is not getattr:
        pickle.loads(path.read_bytes())
        assert marker.exists()  # the payload would have worked


@pytest.mark.parametrize(
    "content",
    [
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"(S'touch x'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch x'\no.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.",
        b"cnumpy.core.multiarray\nfromstring\n.",
        b"cnumpy.core.multiarray._reconstruct.__globals__\nx\n.",
        b"cbuiltins\nbytes.fromhex\n.",
        b"ccopyreg\n_reconstructor\n.",
    ],
)
def test_any_other_name_is_refused(tmp_path, content):
    """Else: some opcode reaches a function past the guard."""
    folder = make_cifar10(tmp_path, batches=1)
    (folder / "data_batch_1").write_bytes(content)
    refused("cifar10", tmp_path, folder / "data_batch_1", "asks to run code")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b".",
        b"N.",
        b"garbage",
        b"\x80\xff.",
        b"\x80\x02}q\x00",
        b"<html>404 Not Found</html>",
        b"\x1f\x8b\x08\x00",
        b"P1\n.",  # persistent id
        b"\x82\x01.",  # extension registry
        b"(" * 100_000 + b"t" * 100_000 + b".",  # deeply nested
        b"cbuiltins\nbytes\n(I1000000000000\ntR.",
        b"}(U\x04datacbuiltins\nbytes\n(I1000000000000\ntRs.",
        b"}(U\x04datacbuiltins\nbytearray\n(I1000000000000\ntRs.",
        b"}(U\x04datac_codecs\nencode\n(U\x01aU\x05rot13tRs.",
        b"}(U\x04datacnumpy\nndarray\n((I1000000\nI1000000\nttRs.",
        b"}(U\x04datacnumpy\nndarray\ns.",
        b"}(U\x04datacnumpy.core.multiarray\n_reconstruct\n}U\x08__call__NsbS'x'\ns.",
        b"B\xff\xff\xff\xff.",
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"I" + b"9" * 10_000 + b"\n.",
        b"](h\x00h\x00h\x00e.",
    ],
)
def test_garbage_is_damage(tmp_path, content):
    """Else: a web page saved under the name of a batch, or an interrupted copy, ends in a traceback."""
    folder = make_cifar10(tmp_path, batches=1)
    (folder / "data_batch_1").write_bytes(content)
    refused("cifar10", tmp_path, folder / "data_batch_1")


def array_state(shape: tuple, code: str, data: bytes, order: str = "<") -> object:
    """An array whose pickled shape, type and contents do not fit together."""

    class Lie:
        def __reduce_ex__(self, _):
            dtype = type(
                "D", (), {"__reduce__": lambda _: (np.dtype, (code, 0, 1), (3, order) + (None,) * 3 + (-1, -1, 0))}
            )
            reconstruct = np.zeros(1).__reduce__()[0]
            return reconstruct, (np.ndarray, (0,), b"b"), (1, shape, dtype(), False, data)

    return Lie()


@pytest.mark.parametrize(
    "lie",
    [
        array_state((10**9, 10**9), "u1", b"a"),
        array_state((1, 3072), "O8", b"\0" * 8 * 3072, "|"),  # numpy itself would take the bytes for pointers
        array_state((1, 3072), "V1", b"\0" * 3072, "|"),
        array_state((1, 3072), "u1", b"\0" * 3071),
        array_state((-5, 3072), "u1", b"\0" * 3072),
        array_state((1, 3072), "u1", b"\0" * 3072, "x"),
        array_state((2**70,), "u1", b"\0"),
        array_state((1,) * 100, "u1", b"\0"),
        array_state("ab", "u1", b"\0"),
    ],
)
def test_arrays_that_lie(tmp_path, lie):
    """Else: a crafted file crashes the interpreter (numpy trusts the state that it unpickles) or takes all memory."""
    folder = make_cifar10(tmp_path, batches=1)
    (folder / "data_batch_1").write_bytes(pickle.dumps(batch(data=lie), 2))
    refused("cifar10", tmp_path, folder / "data_batch_1")


@pytest.mark.parametrize(
    "content", [b"}r\x00\x00\x00\x04.", b"}p67108864\n.", b"\x96" + struct.pack("<Q", 2**28) + b"."]
)
def test_a_claimed_size_takes_no_memory(tmp_path, content):
    """Else: one damaged byte (a memo index, a length) takes gigabytes, and the machine kills the process."""
    folder = make_cifar10(tmp_path, n_train=4, n_test=4, batches=1)
    (folder / "data_batch_1").write_bytes(content)
    tracemalloc.start()
    try:
        refused("cifar10", tmp_path, folder / "data_batch_1")
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_truncated_anywhere(tmp_path, protocol):
    """Else: an interrupted copy is read as a smaller data set, or ends in a traceback."""
    folder = make_cifar10(tmp_path, n_train=4, n_test=4, batches=1, protocol=protocol)
    path = folder / "data_batch_1"
    whole = path.read_bytes()
    for share in (0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 1 - 1 / len(whole)):
        path.write_bytes(whole[: int(share * len(whole))])
        refused("cifar10", tmp_path, path)


def test_memory_and_recursion_errors_are_damage(tmp_path, monkeypatch):
    """Else: the two errors that a hostile file provokes most easily end in a traceback."""
    folder = make_cifar10(tmp_path)
    for error in (MemoryError(), RecursionError("maximum recursion depth\nexceeded"), KeyError("x"), SystemError()):
        monkeypatch.setattr(dataloader_cifar, "_value", lambda item, error=error: (_ for _ in ()).throw(error))
        refused("cifar10", tmp_path, folder / "data_batch_1", "damaged")
