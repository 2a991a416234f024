"""Calls as another user: a forked child changes its ids, makes the call, and returns the result or error."""

import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

T = TypeVar("T")


@dataclass(frozen=True)
class User:
    """The credentials of a caller: ids, supplementary groups, and the umask."""

    uid: int = 0
    gid: int = 0
    groups: Sequence[int] = ()
    umask: int = 0


ROOT = User()
ALICE = User(1000, 1000)
BOB = User(1001, 1001)


def run_as(user: User, act: Callable[[], T]) -> T:
    """Call `act` in a child with the user's ids, without capabilities unless it is root; raise what it raises."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(writer, user, act)
    os.close(writer)
    with open(reader, "rb") as stream:
        answer = stream.read()
    _, status = os.waitpid(child, 0)
    assert answer, f"the child died with status {status}"
    worked, result = pickle.loads(answer)
    if not worked:
        raise result
    return cast(T, result)


def become(user: User) -> None:
    """Take the ids of a user permanently."""
    os.setgroups(list(user.groups))
    os.setresgid(user.gid, user.gid, user.gid)
    os.setresuid(user.uid, user.uid, user.uid)
    os.umask(user.umask)


def _child(writer: int, user: User, act: Callable[[], object]) -> None:
    def act_as() -> object:
        become(user)
        return act()

    with open(writer, "wb") as stream:
        stream.write(answer_of(act_as))
    os._exit(0)


def answer_of(act: Callable[[], object]) -> bytes:
    """Return, pickled, whether `act` worked, and what it returned or raised: the parent raises it."""
    try:
        return pickle.dumps((True, act()))
    except BaseException as error:
        return _packed(error)


def _packed(error: BaseException) -> bytes:
    try:
        pickle.loads(pickle.dumps(error))
        return pickle.dumps((False, error))
    except Exception:
        return pickle.dumps((False, AssertionError(repr(error))))
