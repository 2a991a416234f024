"""Keyed locks: one holder per key, first come first served, and no deadlock whatever the order of keys."""

import trio
import trio.testing

from overlayfs.fuse.locks import KeyedLocks


def _is_held(locks: KeyedLocks, key: int) -> bool:
    return key in locks._waiting


async def _hold(locks: KeyedLocks, keys: tuple[int, ...], leave: trio.Event, order: list[object], name: object) -> None:
    async with locks.hold(*keys):
        order.append(name)
        await leave.wait()


def test_a_free_lock_costs_no_scheduling_point_and_leaves_nothing_behind() -> None:
    async def main() -> None:
        locks = KeyedLocks()
        with trio.testing.assert_no_checkpoints():
            async with locks.hold(7):
                assert _is_held(locks, 7)
        assert not _is_held(locks, 7)

    trio.run(main)


def test_waiting_tasks_get_the_lock_in_order() -> None:
    order: list[object] = []

    async def main() -> None:
        locks, leave = KeyedLocks(), trio.Event()
        async with trio.open_nursery() as nursery:
            for name in range(4):
                nursery.start_soon(_hold, locks, (1,), leave, order, name)
                await trio.testing.wait_all_tasks_blocked()
            assert order == [0]
            leave.set()
        assert order == [0, 1, 2, 3]
        assert not _is_held(locks, 1)

    trio.run(main)


def test_locks_of_other_keys_are_free() -> None:
    order: list[object] = []

    async def main() -> None:
        locks, leave = KeyedLocks(), trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_hold, locks, (1,), leave, order, "one")
            await trio.testing.wait_all_tasks_blocked()
            async with locks.hold(2):
                assert _is_held(locks, 1)
            leave.set()

    trio.run(main)


def test_holders_of_keys_in_opposite_order_do_not_deadlock() -> None:
    order: list[object] = []

    async def main() -> None:
        locks, leave = KeyedLocks(), trio.Event()
        leave.set()
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                for turn in range(20):
                    keys = (1, 2) if turn % 2 else (2, 1)
                    nursery.start_soon(_hold, locks, keys, leave, order, turn)
        assert sorted(map(str, order)) == sorted(map(str, range(20)))

    trio.run(main)


def test_passing_a_key_twice_takes_it_once() -> None:
    async def main() -> None:
        locks = KeyedLocks()
        with trio.fail_after(5):
            async with locks.hold(3, 3):
                pass
        assert not _is_held(locks, 3)

    trio.run(main)


def test_a_cancelled_wait_releases_the_locks_taken_so_far() -> None:
    order: list[object] = []

    async def main() -> None:
        locks, leave = KeyedLocks(), trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_hold, locks, (2,), leave, order, "first")
            await trio.testing.wait_all_tasks_blocked()
            with trio.move_on_after(0):
                async with locks.hold(1, 2):
                    order.append("never")
            assert not _is_held(locks, 1)
            leave.set()
        assert order == ["first"]
        assert not _is_held(locks, 2)

    trio.run(main)
