# SPDX-License-Identifier: LGPL-2.1-or-later OR MIT
"""KV-cache scratchpads for transformer inference.

A pad is a growing table of at most max_seq_len rows over one or more planes. A row holds
one token; a plane is an array [max_seq_len, dim] of one element type, K of a layer, say. All
of it is allocated once. Every process that has a handle on the pad maps the same memory
read-only and sees each plane as one plain, growing array.

    planes = [kvscratch.Plane(label, 64, "f32") for label in ("k0", "v0")]
    with kvscratch.Scratchpad(512, planes=planes) as pad:
        row = numpy.ones(64, numpy.float32)
        pad.append({"k0": row, "v0": row})      # a token; of arrays [n, 64] a batch, or none
        with pad.writer() as writer:
            writer.stage("k0", row)             # as the layers come
            writer.stage("v0", row)
            writer.commit()                     # all planes at once
        keys = pad["k0"]                        # [2, 64], no copy
        print(pad)      # Scratchpad(len=2, capacity=512, planes=2)

A pad of one plane needs no label: Scratchpad(512, 64, "f32"), append(row), as_tensor().

Pads live in /dev/kvscratch or, where that does not exist, in a memfd, which keeps
fewer promises: see promises(). The environment variable KVSCRATCH_BACKEND=kernel|memfd
decides for new pads.

Reading beside a writer. Committed rows do not change until somebody truncates
the pad. A View counts the rows of one moment and can tell afterwards what they
were worth:

    view = pad.view()
    scores = numpy.asarray(view) @ query
    scores = scores[:view.valid_rows()]     # all of them, unless there was a truncate

Until valid_rows() was asked compute only what is harmless on any numbers. Of several planes
the rows that are in the first array are in all that are made after it: take as many of each.

Writing. Whoever has a handle that may write appends, in turn. writer() is for one that wants
to be the only one, and to store rows as the layers of a model give them: they are in the
arrays of all readers at once, beyond the len, and count with the commit. What a writer that
dies has staged is nothing; another one goes on at the len, and from one that hangs takeover()
takes the role.

Element types. f64 f32 f16 i64 i32 i16 i8 u8 are NumPy's. bf16, which NumPy lacks, is
uint16 here: the upper half of a float32. An mxint8 pad shows int8, with its scales in
scales(); see dequantize().

PyTorch. What as_tensor() returns is read-only in hardware. torch.from_numpy() takes
it with a warning, and the first in-place operation on the tensor kills the process with
SIGSEGV. Where that cannot be excluded take a copy, which is a consistent and
writable array of its own: torch.from_numpy(pad.as_tensor().copy()). For bf16:
torch.from_numpy(rows.view(numpy.int16)).view(torch.bfloat16).

Lifetime. Arrays and views keep the memory mapped, also when the Scratchpad that they came
from is closed or collected.

Threads. A Scratchpad may be used by any number of threads; appends are ordered one after
the other, each whole. wait() is for one thread at a time on an object. The GIL is
released while a call may wait or copy much.

Fork. A child may read what its parent had open. To append or truncate it attaches a
handle of its own: Scratchpad.attach(pad, "rw"). Other ways to a pad are
send_handles() over a Unix socket and Scratchpad.attach("NAME/PAD") of a holder.

Branches. fork() makes a pad that begins with the rows of another and shares their memory: two
continuations of one prompt, say. snapshot() keeps the rows of this moment, rewind() goes on from
an earlier one.

    branch = pad.fork()                         # or fork(rows, max_seq_len)
    branch.append({"k0": row, "v0": row})       # pad does not see it

Files. save() and load() keep pads in .safetensors files, with a tensor for each plane, or
the rows of one plane in .npy.

Exceptions. ValueError: a wrong shape, value or range, a malformed file, or a closed pad.
TypeError: an argument or elements of another type. KeyError: a file or a holder has no pad
of this name, a pad no plane of this label. IndexError: a pad has no such row, or not that many
planes. Full, an OSError: the rows do not fit a pad. MemoryError: no memory for a pad.
RuntimeError: a handle of the process that forked this one, or one that another thread waits
with. OSError with its errno, and its subclasses, FileNotFoundError for a file or a socket that
is not there: whatever else the system refuses. errno is EBUSY while another handle is the
writer, ESTALE for a writer that was taken over, EROFS for a sealed pad, ETXTBSY for a truncate
of rows that others share, and EOPNOTSUPP for what only pads of one plane have: dim, dtype and
the like, rows without the name of a plane. The text is the library's, "Scratchpad full: 2 / 2
tokens"; of an OSError it is in strerror.
"""

from __future__ import annotations

import errno
import functools
import importlib
import math
import operator
import os
import selectors
import socket
import struct
import time
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from . import _kvscratch
from ._kvscratch import Full, View, Writer, default_backend, holder_drop

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Protocol, Union

    import numpy
    from numpy.typing import ArrayLike, NDArray

    class HasFileno(Protocol):
        def fileno(self) -> int: ...

    FileDescriptor = Union[int, HasFileno]

__all__ = ["Full", "Plane", "Promise", "Scratchpad", "View", "Writer", "default_backend",
           "dequantize", "holder_drop", "holder_get", "holder_put", "load", "promises",
           "receive_handles", "save", "send_handles"]
__version__ = _kvscratch.version()

_S = TypeVar("_S", bound="Scratchpad")
_LEN_MASK = 0xffffffff
_MAX_TIMEOUT_MS = 0x7fffffff
# elements that share a scale
_MX_BLOCK = 32
_MAX_FRAC_BITS = 62


@functools.cache
def _numpy() -> Any:
    """NumPy, or None: the package works without."""
    try:
        return importlib.import_module("numpy")
    except ImportError:
        return None


def _array(view: View) -> NDArray[Any]:
    numpy = _numpy()
    array = memoryview(cast(Any, view)) if numpy is None else numpy.asarray(view)
    return cast("NDArray[Any]", array)


class Promise(NamedTuple):
    """A promise, and whether a backend keeps it.

    name is one word, text a sentence; reason says what may happen where it does not hold.
    """

    name: str
    text: str
    holds: bool
    reason: str | None


def promises(backend: str) -> tuple[Promise, ...]:
    """What "kernel" or "memfd" promises: the same list for each, held or not."""
    return tuple(Promise(*promise) for promise in _kvscratch.promises(backend))


class Plane(NamedTuple):
    """What a plane of a pad is made of; a tuple of these will do as well.

    label is its name, at most 15 bytes: of a pad of several each has one of its own, or goes
    by its index. The rest is as of Scratchpad(); input_dtype is None where it is dtype.
    """

    label: str
    dim: int
    dtype: str = "f32"
    input_dtype: str | None = None
    frac_bits: int = 0


class Scratchpad(_kvscratch.Pad):
    """Scratchpad(max_seq_len, dim, dtype="f32", *, input_dtype=None, frac_bits=0, tag=b"")
    Scratchpad(max_seq_len, *, planes, tag=b"")

    A new, zero-filled pad of [max_seq_len, dim] elements of dtype: f64, f32, f16, bf16,
    i64, i32, i16, i8, u8 or mxint8; or of planes, a sequence of Plane. All its memory is taken
    here; no append allocates.

    With input_dtype f64, f32, f16 or bf16 the rows that are appended are converted to
    mxint8, or to integers with frac_bits fraction bits. tag is up to 64 bytes that the pad is
    to be known by, a fingerprint of a model, say.
    """

    @property
    def planes(self) -> tuple[Plane, ...]:
        """What the pad is made of: planes that make another one like it."""
        return tuple(Plane(*plane) for plane in self._planes())

    def __getitem__(self, label: str) -> NDArray[Any]:
        """The committed rows of the plane with this label: as_tensor() of it."""
        # the rows of a pad, which iterate, are no items of it
        if not isinstance(label, str):
            raise TypeError(f"expected the label of a plane, got {type(label).__name__}: rows are "
                            "in as_tensor() and get_token()")
        return self.as_tensor(label)

    def as_tensor(self, plane: str | int | None = None) -> NDArray[Any]:
        """The committed rows of this moment: a read-only array [len, dim], without a copy.

        It does not grow, and stays mapped as long as it is used. After a truncate its
        rows may change: where that can happen use view(). Without NumPy it is a memoryview.
        plane is a label or an index; a pad of one plane needs none.
        """
        return _array(self.view(plane))

    def scales(self, plane: str | int | None = None) -> NDArray[numpy.uint8]:
        """The [len, dim / 32] scale bytes of a plane of mxint8; otherwise as as_tensor().

        For elements and scales of the same moment use view() and its scales().
        """
        return _array(self.view(plane).scales())

    def get_token(self, i: int, plane: str | int | None = None) -> NDArray[Any]:
        """A copy of row i, [dim], as it was at one moment; IndexError when there is none."""
        i = operator.index(i)
        rows = len(self)
        if not -rows <= i < rows:
            raise IndexError(f"expected a row of {rows}, got {i}")
        # of mxint8 the scales of the row come behind its elements
        row, element, dim = self._copy_row(i % rows, plane)
        numpy = _numpy()
        if numpy is None:
            elements = memoryview(row)[:dim * struct.calcsize(element)]
            return cast("NDArray[Any]", elements.cast(element))
        return cast("NDArray[Any]", numpy.frombuffer(row, element, dim))

    def __iter__(self) -> Iterator[NDArray[Any]]:
        """Copies of the rows that are committed now; ends where a truncate took one."""
        for i in range(len(self)):
            try:
                yield self.get_token(i)
            except IndexError:
                return

    def __copy__(self: _S) -> _S:
        return self.fork()

    def rewind(self: _S, n: int) -> _S:
        """The pad to go on with behind the first n rows: pad = pad.rewind(n).

        That is this one, truncated, or where others share rows that would be dropped a fork
        of the first n rows, and then this one stays as it is.
        """
        try:
            self.truncate(n)
        except OSError as error:
            if error.errno != errno.ETXTBSY:
                raise
            return self.fork(n)
        return self

    def wait(self, state: int | None = None, *, rows: int | None = None,
             timeout: float | None = None) -> bool:
        """Sleep until the pad's state is another than state, or until it has rows rows.

        state is that of the pad or of a View. Returns False when timeout seconds passed
        without, or when the pad is sealed and that never comes. ValueError for more rows than
        fit. A handle of its own for each thread: RuntimeError when two share one.
        """
        if (state is None) == (rows is None):
            raise TypeError("wait: expected either state or rows")
        if state is not None:
            state = operator.index(state)
        if rows is not None and not 0 <= operator.index(rows) <= self.capacity:
            raise ValueError(f"rows: expected 0 to {self.capacity}, the rows that fit, got {rows}")
        # a float32 of NumPy would make the clock one too, in which it stands still
        deadline = None if timeout is None else time.monotonic() + float(timeout + 0)
        while True:
            now = self.state
            if now != state if rows is None else now & _LEN_MASK >= rows:
                return True
            left_ms = -1
            if deadline is not None:
                left_ms = math.ceil(min((deadline - time.monotonic()) * 1000, _MAX_TIMEOUT_MS))
                if left_ms <= 0:
                    return False
            # returns after a signal as well, hence the loop
            if not self._wait(now, left_ms):
                return False

    def save(self, path: str | os.PathLike[str], name: str = "pad", *,
             plane: str | int | None = None) -> None:
        """Save the committed rows as .npy or, under a name, as .safetensors; see save().

        With plane, a label or an index, only those of one plane, as .npy.
        """
        if plane is None:
            save(path, {name: self})
        else:
            self._save_plane(path, plane)

    @property
    def promises(self) -> tuple[Promise, ...]:
        """The promises of the pad's backend."""
        return promises(self.backend)

    def __repr__(self) -> str:
        name = f"{type(self).__module__}.{type(self).__qualname__}"
        if self.closed:
            return f"<{name} closed>"
        planes = self.planes
        made_of = f"planes={len(planes)}"
        if len(planes) == 1:
            made_of = f"dim={planes[0].dim} dtype={planes[0].dtype}"
        return (f"<{name} len={len(self)} capacity={self.capacity} {made_of} "
                f"backend={self.backend}>")


def _entries(named: Mapping[str, Any]) -> list[tuple[str, Any]]:
    if not hasattr(named, "items"):
        raise TypeError(f"expected a mapping of names, got {type(named).__name__}")
    return list(named.items())


def _pads(handles: list[tuple[str, int]]) -> dict[str, Scratchpad]:
    """The pads of descriptors, which it takes over; all or none."""
    pads: dict[str, Scratchpad] = {}
    try:
        while handles:
            name, fd = handles[0]
            if name in pads:
                raise ValueError(f"expected each name once, got {name} again")
            pads[name] = Scratchpad.from_fd(fd)
            del handles[0]
    except BaseException:
        for _, fd in handles:
            os.close(fd)
        raise
    return pads


def send_handles(sock: socket.socket, handles: Mapping[str, FileDescriptor]) -> None:
    """Pass handles, each with a name, over a connected and blocking Unix stream socket.

    The receiver gets them with the rights that they have: pass open_reader() of a pad to
    who shall only read. A name has no white space; at most 253 handles fit.
    """
    _kvscratch.send_handles(sock, _entries(handles))


def receive_handles(sock: socket.socket) -> dict[str, Scratchpad]:
    """What send_handles() of the other side passed: the pads by their names, in its order."""
    if not hasattr(sock, "fileno"):
        raise TypeError(f"expected a socket, got {type(sock).__name__}")
    fd = sock.fileno()
    # waits here, where a signal is heard, but not for what the library refuses
    if getattr(sock, "type", socket.SOCK_STREAM) == socket.SOCK_STREAM:
        with selectors.PollSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            selector.select()
    return _pads(_kvscratch.receive_handles(fd))


def holder_get(name: str, mode: str = "r") -> dict[str, Scratchpad]:
    """A handle of its own on each pad that the holder keeps, by name; mode as of attach().

    A holder is a process, kvscratchctl hold NAME, that keeps pads of its user so that they
    outlive who made them. One pad of it is Scratchpad.attach("NAME/PAD").
    """
    return _pads(_kvscratch.holder_get(name, mode))


def holder_put(name: str, handles: Mapping[str, FileDescriptor], *,
               replace: bool = False) -> None:
    """Give pads to a holder that was started with --write, all of them or none.

    What the handles are open for is what it can hand out. They stay the caller's. With replace
    they take the place of what it has under these names, if anything: whoever asks it gets all of
    the old pads or all of the new ones, and who has the old ones keeps them.
    """
    _kvscratch.holder_put(name, _entries(handles), replace)


def save(path: str | os.PathLike[str], pads: Mapping[str, Scratchpad]) -> None:
    """Save the committed rows of pads, as they were at one moment, to a .safetensors file.

    It has a tensor for each plane, "NAME", or "NAME.LABEL" in a pad of several, and all that
    load() makes the same pads of, labels and tags included. Or of one pad of one plane to .npy,
    which has no names and neither bf16 nor mxint8. The file is replaced as a whole or left as it
    was. A writer that puts a token into one pad after the other may be between two of them, but
    not between planes of one: who loads pads that belong together truncates all to the shortest.
    """
    _kvscratch.save(path, _entries(pads))


def load(path: str | os.PathLike[str]) -> dict[str, Scratchpad]:
    """New pads of all rows in a file, by name; Scratchpad.load() is for one."""
    return dict(Scratchpad._load_all(path))


def dequantize(elements: ArrayLike, scales: ArrayLike | None = None,
               frac_bits: int = 0) -> NDArray[numpy.float32]:
    """The values of scaled integers, as float32.

    elements [..., dim] of an mxint8 pad have scales [..., dim / 32]; those of i8, i16, i32
    and i64 have frac_bits fraction bits. Each value is the float32 next to the exact one.
    """
    import numpy
    elements = numpy.asarray(elements)
    if scales is not None:
        return _dequantize_blocks(numpy, elements, numpy.asarray(scales), frac_bits)
    if elements.dtype.kind != "i" and elements.dtype != numpy.uint8:
        raise TypeError(f"expected elements of i8, i16, i32 or i64, got {elements.dtype}")
    exponent = -operator.index(frac_bits)
    if not -_MAX_FRAC_BITS <= exponent <= 0:
        raise ValueError(f"frac_bits: expected 0 to {_MAX_FRAC_BITS}, got {frac_bits}")
    # in floats from the start: ldexp() of i8 is a float16, and a double would round twice
    return cast("NDArray[numpy.float32]", numpy.ldexp(elements.astype(numpy.float32), exponent))


def _dequantize_blocks(numpy: Any, elements: NDArray[Any], scales: NDArray[Any],
                       frac_bits: int) -> NDArray[numpy.float32]:
    if frac_bits:
        raise ValueError("expected either scales or frac_bits, got both")
    if elements.dtype != numpy.int8 or scales.dtype != numpy.uint8:
        raise TypeError("expected elements of int8 and scales of uint8, got "
                        f"{elements.dtype} and {scales.dtype}")
    if not elements.ndim or elements.shape[-1] % _MX_BLOCK:
        raise ValueError(f"expected rows of a multiple of {_MX_BLOCK} elements, got a shape of "
                         f"{elements.shape}")
    shape = (*elements.shape[:-1], elements.shape[-1] // _MX_BLOCK)
    if scales.shape != shape:
        raise ValueError(f"scales: expected a shape of {shape}, got {scales.shape}")
    # a block shares the scale 2^(s - 127), and its elements count in 2^-6
    exponents = numpy.repeat(scales.astype(numpy.int32) - 127 - 6, _MX_BLOCK, axis=-1)
    values = numpy.ldexp(elements.astype(numpy.float32), exponents)
    values[numpy.repeat(scales == 255, _MX_BLOCK, axis=-1)] = numpy.nan
    return cast("NDArray[numpy.float32]", values)
