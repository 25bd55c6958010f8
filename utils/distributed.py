"""Several processes that train one network, as torchrun starts them: who this one is, and what they do together.

Tensors go through torch.distributed: gloo between CPUs, NCCL between GPUs. Everything else goes through torchrun's
key-value store (:func:`all_gather_object`), as JSON (:mod:`utils.messages`). A single process needs neither, and for it
every function here is trivial. torch's own error files and barriers do not do: the first holds one process's traceback
while SIGTERM ends the others, where a mistake of the user's is to be two lines and status 2 under any launcher, and a
barrier waits for a process that has failed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from datetime import timedelta
from typing import Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils import signals
from utils.errors import Diverged, Unsaved, UsageError
from utils.messages import pack, unpack
from utils.signals import Interrupted

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)

#: How long processes wait for each other, through a download or the slowest evaluation.
TIMEOUT = timedelta(minutes=30)
#: How long a process that must end waits to hear whether the others end for the same reason.
PATIENCE = timedelta(seconds=5)
#: Seconds that the others wait at the end for the first one's message: torchrun ends all as soon as one has ended.
GRACE = 0.5
#: Seconds between looks whether the first process has ended its work.
PAUSE = 0.2
#: What ends a command with a message; other exceptions are defects, told by their traceback.
EXPECTED = (UsageError, Diverged, Unsaved, OSError)


def launched() -> int:
    """How many processes were started: not joined yet, joined, or waiting for the first."""
    return int(os.environ.get("WORLD_SIZE", 1))


def world_size() -> int:
    """How many processes have joined."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them; 0 is the first, which alone writes and prints."""
    return dist.get_rank() if world_size() > 1 else 0


def local_rank_and_size() -> tuple[int, int]:
    """The number of this process on its machine, and how many there are."""
    return (int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])) if world_size() > 1 else (0, 1)


def launcher() -> list[str]:
    """The words before the script that start as many processes."""
    if launched() == 1:
        return ["python"]
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = [f"--nnodes={launched() // here}"] if launched() > here else []
    return ["torchrun", *nodes, f"--nproc-per-node={here}", "--"]  # else it takes --start for its own --start-method


class Store(Protocol):
    """torchrun's key-value store, as torch.distributed has it."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def wait(self, keys: list[str], timeout: timedelta) -> None: ...
    def check(self, keys: list[str]) -> bool: ...


class _Board:
    """Where processes leave each other messages: also while tensors are stuck, and for those who read them later.

    Attributes:
        is_over: a process has told the others of an error.
    """

    def __init__(self, store: Store, rank: int, number: int) -> None:
        self.store, self.rank, self.number = store, rank, number
        self.meetings = 0
        self.is_over = False

    def exchange(self, value: T, error: Exception | None, patience: timedelta) -> list[tuple[T, Exception | None]]:
        """What every process brings to this meeting, in their order; DistError where one does not come in time."""
        self.post(value, error)
        keys = [f"{self.meetings}/{process}" for process in range(self.number)]
        self.store.wait(keys, patience)
        found = [self._read(key) for key in keys]
        self.is_over = any(each is not None for _, each in found)
        return cast(list[tuple[T, Exception | None]], found)

    def post(self, value: object, error: Exception | None) -> None:
        """Brings something to the next meeting, and waits for nobody."""
        self.meetings += 1
        self.store.set(f"{self.meetings}/{self.rank}", pack((value, error)))

    def meet(self, value: T) -> list[T]:
        """What every process brings, in their order; where one has an error, all raise it."""
        found = self.exchange(value, None, TIMEOUT)
        for _, error in found:
            if error is not None:
                raise error
        return [each for each, _ in found]

    def wait_for_first(self) -> None:
        """Waits, however long it takes, until the first process comes to the next meeting; ends where it cannot."""
        try:
            while not self.store.check([f"{self.meetings + 1}/0"]):
                time.sleep(PAUSE)
        except dist.DistError:  # it kept the store, and has ended
            raise SystemExit(1) from None

    def _read(self, key: str) -> tuple[object, Exception | None]:
        found = unpack(self.store.get(key))
        if isinstance(found, tuple) and len(found) == 2 and (found[1] is None or isinstance(found[1], Exception)):
            return found
        unpack(b"")  # raises
        raise AssertionError

    def tell(self, error: Exception) -> bool:
        """Tells the others why this process ends; whether they have heard it, or something of the kind."""
        if not self.is_over:
            with suppress(dist.DistError):
                self.exchange(None, error, PATIENCE)
        return self.is_over

    def has_ended(self) -> bool:
        """Whether another process has told an error that this one has not met yet."""
        keys = [f"{self.meetings + 1}/{process}" for process in range(self.number)]
        return any(self._read(key)[1] is not None for key in keys if self.store.check([key]))


_board: _Board | None = None  # of this process, while it has joined the others


@contextmanager
def process_group() -> Iterator[None]:
    """Makes one group of the processes that torchrun started, until the block ends; only the first one prints.

    A user's mistake, a divergence or a full disk ends all of them, whichever process meets it: the first with the
    message, the others quietly with its exit status. One that the others cannot hear, since they wait for its tensors,
    tells its error itself.

    Raises:
        UsageError: WORLD_SIZE is set, but not what belongs to it.
    """
    if launched() == 1:
        yield
        return
    board = _join()
    with ExitStack() as opened:
        if board.rank > 0:
            opened.enter_context(redirect_stdout(opened.enter_context(open(os.devnull, "w"))))
        try:
            yield
            board.meet(None)
        except EXPECTED as error:
            if not board.tell(error):
                raise
            _leave()
            if board.rank > 0:
                time.sleep(GRACE)
                raise SystemExit(2 if isinstance(error, UsageError) else 1) from None
            raise
        except KeyboardInterrupt as error:
            if board.rank == 0 and not dist.is_initialized():  # the others wait for it
                board.post(None, Unsaved(str(error)))
            if isinstance(error, Interrupted) and error.between_steps:  # in all of them
                _leave()
            if board.rank > 0:
                raise SystemExit(getattr(error, "status", 130)) from None
            raise
        except Exception:
            if board.has_ended():  # and this process broke because of that
                raise SystemExit(1) from None
            raise  # without leaving in order, which might wait for the others' tensors
    _leave()


def _join() -> _Board:
    global _board
    missing = {"RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - set(os.environ)
    if missing:
        words = ", ".join(sorted(missing))
        raise UsageError(f"WORLD_SIZE {launched()} without {words}", "torchrun, which sets them, or no WORLD_SIZE")
    store, me, number = next(dist.rendezvous("env://", timeout=TIMEOUT))  # type: ignore[attr-defined]
    tensors, messages = (dist.PrefixStore(name, store) for name in ("tensors", "messages"))  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=tensors, rank=me, world_size=number, timeout=TIMEOUT)
    _board = _Board(messages, me, number)
    return _board


def _leave() -> None:
    global _board
    _board = None
    if dist.is_initialized():
        dist.destroy_process_group()


def go_on_alone() -> None:
    """Ends what processes do together: the first goes on as if it were the only one, the others wait for its end.

    They do not come back from here, and end as the first one does. Until then they keep the rendezvous, which may be
    on their machine.
    """
    if _board is None or world_size() == 1:
        return
    barrier()
    dist.destroy_process_group()
    if _board.rank > 0:
        _board.wait_for_first()
        _board.meet(None)
        _leave()
        raise SystemExit(0)


def require_single(command: str) -> None:
    """Refuses a start by torchrun with several processes; the first one says so.

    Raises:
        UsageError: in the first process.
    """
    if launched() > 1 and int(os.environ.get("RANK", 0)) > 0:
        raise SystemExit(2)
    if launched() > 1:
        raise UsageError(f"{command} with {launched()} processes", f"one: python {command}, without torchrun")


def all_gather_object(value: T) -> list[T]:
    """What each process brings, in their order, in all of them; where one has an error, all raise it."""
    return [value] if _board is None or world_size() == 1 else _board.meet(value)


def barrier() -> None:
    """Waits for all processes; where one has an error, all raise it.

    Call it after what only one process does, and before they compute together.
    """
    all_gather_object(None)


def on_main_process(work: Callable[[], T]) -> T:
    """What ``work`` returns in the first process, which alone does it, in all of them."""
    return cast(T, all_gather_object(work() if rank() == 0 else None)[0])


@contextmanager
def main_process_first() -> Iterator[None]:
    """The block in the first process, then in the first one of every other machine, then in all others.

    What one puts on a disk the next find there, whether the machines share it or not.
    """
    turn = 0 if rank() == 0 else 1 if local_rank_and_size()[0] == 0 else 2
    for number in range(3):
        if number == turn:
            yield
        barrier()


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum over processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def all_reduce_max(values: list[int]) -> list[int]:
    """Of each number the largest that any process has. It does not wait for a GPU."""
    if world_size() == 1:
        return values
    numbers = torch.tensor(values)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return [int(number) for number in numbers]


def interruptible(steps: Iterable[T]) -> Iterator[T]:
    """Passes steps through; of a single process a signal ends them, where several must first agree."""
    for step in steps:
        if world_size() == 1:
            signals.check()
        yield step


def gather_bytes(mine: bytes) -> list[bytes]:
    """The bytes of every process, in their order, in the first one; nothing in the others."""
    if world_size() == 1:
        return [mine]
    size = all_reduce_max([len(mine)])[0]
    padded = torch.zeros(size + 8, dtype=torch.uint8)
    padded[:8] = torch.tensor([len(mine)]).view(torch.uint8)
    if mine:
        padded[8 : 8 + len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
    found = [torch.empty_like(padded) for _ in range(world_size())] if rank() == 0 else None
    dist.gather(padded, found)
    return [row[8 : 8 + int(row[:8].view(torch.int64))].numpy().tobytes() for row in found or []]


def in_turn(mine: Iterator[Tensor], number: int, width: int) -> Iterator[Tensor]:
    """``number`` pieces (n, width) float32 that processes make in turn, in order, in the first one; in others nothing.

    ``mine`` are this process's: of the first round, the second ... A round is passed on before the next one is made.
    """
    if world_size() == 1:
        yield from mine
        return
    for _ in range(0, number, world_size()):
        piece = next(mine, None)
        content = b"" if piece is None else piece.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        for each in filter(None, gather_bytes(content)):
            yield torch.frombuffer(bytearray(each), dtype=torch.float32).view(-1, width)
    next(mine, None)  # ends it


def broadcast_bytes(content: bytes) -> bytes:
    """The first process's bytes, in all of them."""
    if world_size() == 1:
        return content
    size = all_reduce_max([len(content) if rank() == 0 else 0])[0]
    shared = torch.zeros(size, dtype=torch.uint8)
    if rank() == 0 and size:
        shared.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    dist.broadcast(shared, 0)
    return shared.numpy().tobytes()


def gather_in_order(mine: list[Tensor]) -> list[Tensor]:
    """Tensors on the CPU that were dealt to the processes in turn, in order again: the first of each, the second ...

    They are of one type and differ in their first dimension alone.
    """
    if world_size() == 1:
        return mine
    shapes = all_gather_object([list(each.shape) for each in mine])
    _, *others = next(shape for hand in shapes for shape in hand)
    kind = next(each for each in all_gather_object(str(mine[0].dtype) if mine else "") if each)
    dtype = {str(each): each for each in (torch.float32, torch.float64, torch.int64)}[kind]
    shared = torch.zeros(max(sum(shape[0] for shape in hand) for hand in shapes), *others, dtype=dtype)
    if mine:
        whole = torch.cat(mine)
        shared[: len(whole)] = whole
    found = [torch.empty_like(shared) for _ in shapes]
    dist.all_gather(found, shared)
    lengths = [[shape[0] for shape in hand] for hand in shapes]
    hands = [iter(rows[: sum(each)].split(each)) for rows, each in zip(found, lengths)]
    return [next(hands[number % len(hands)]) for number in range(sum(map(len, shapes)))]


def broadcast_model(model: M) -> M:
    """The model, with the first process's weights and BatchNorm statistics in all of them."""
    if world_size() > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
    return model
