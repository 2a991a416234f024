"""The gate: `close` waits for changes in progress, later changes wait for `open`."""

import pytest
import trio
import trio.testing

from overlayfs.fuse.gate import Gate


async def _change(gate: Gate, entered: trio.Event, leave: trio.Event) -> None:
    async with gate.change():
        entered.set()
        await leave.wait()


def test_an_open_gate_costs_no_scheduling_point() -> None:
    async def main() -> None:
        gate = Gate()
        with trio.testing.assert_no_checkpoints():
            async with gate.change():
                assert not gate.closed

    trio.run(main)


def test_closing_waits_for_changes_in_progress_and_holds_new_ones() -> None:
    order: list[str] = []

    async def main() -> None:
        gate, entered, leave = Gate(), trio.Event(), trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_change, gate, entered, leave)
            await entered.wait()
            nursery.start_soon(_close, gate, order)
            await trio.testing.wait_all_tasks_blocked()
            assert gate.closed
            assert order == []
            nursery.start_soon(_late, gate, order)
            await trio.testing.wait_all_tasks_blocked()
            leave.set()
            await trio.testing.wait_all_tasks_blocked()
            assert order == ["closed"]
            gate.open()
        assert order == ["closed", "late change"]

    trio.run(main)


async def _close(gate: Gate, order: list[str]) -> None:
    await gate.close()
    order.append("closed")


async def _late(gate: Gate, order: list[str]) -> None:
    async with gate.change():
        order.append("late change")


def test_a_second_close_waits_for_the_first() -> None:
    order: list[str] = []

    async def main() -> None:
        gate = Gate()
        await gate.close()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_close, gate, order)
            await trio.testing.wait_all_tasks_blocked()
            assert order == []
            gate.open()
        assert order == ["closed"]
        assert gate.closed

    trio.run(main)


def test_a_cancelled_close_leaves_the_gate_open() -> None:
    async def main() -> None:
        gate, entered, leave = Gate(), trio.Event(), trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_change, gate, entered, leave)
            await entered.wait()
            with trio.move_on_after(0):
                await gate.close()
            assert not gate.closed
            leave.set()

    trio.run(main)


def test_a_failed_change_leaves_the_gate() -> None:
    async def main() -> None:
        gate = Gate()
        with pytest.raises(OSError, match="disk"):
            async with gate.change():
                raise OSError("disk")
        await gate.close()

    trio.run(main)


async def _copy(gate: Gate, order: list[str], finish: trio.Event) -> None:
    async with gate.change(), gate.heavy() as stepped_out:
        order.append("copying again" if stepped_out else "copying")
        await finish.wait()
    order.append("copied")


def test_closing_lets_copies_end_before_it_holds_changes() -> None:
    order: list[str] = []

    async def main() -> None:
        gate, finish = Gate(), trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_copy, gate, order, finish)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(_close, gate, order)
            await trio.testing.wait_all_tasks_blocked()
            assert not gate.closed
            await _late(gate, order)
            finish.set()
            await trio.testing.wait_all_tasks_blocked()
            assert order == ["copying", "late change", "copied", "closed"]
            gate.open()

    trio.run(main)


def test_a_copy_that_would_begin_while_closing_waits_outside() -> None:
    """A change inside the gate that waited for it to open, while `close` waits for the change, would be a deadlock."""
    order: list[str] = []

    async def main() -> None:
        gate, first, second = Gate(), trio.Event(), trio.Event()
        second.set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_copy, gate, order, first)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(_close, gate, order)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(_copy, gate, order, second)
            await trio.testing.wait_all_tasks_blocked()
            first.set()
            await trio.testing.wait_all_tasks_blocked()
            assert order == ["copying", "copied", "closed"]
            gate.open()
        assert order[3:] == ["copying again", "copied"]
        await gate.close()

    trio.run(main)


def test_a_change_cancelled_outside_is_not_counted() -> None:
    async def main() -> None:
        gate, first = Gate(), trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_copy, gate, [], first)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(gate.close)
            await trio.testing.wait_all_tasks_blocked()
            with trio.move_on_after(0):
                await _copy(gate, [], first)
            first.set()
        assert gate.closed

    trio.run(main)
