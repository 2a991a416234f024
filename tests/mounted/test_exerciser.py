"""T7: many random operations on a file of a layer, and on files that fio verifies."""

import subprocess
from pathlib import Path
from random import Random

import pytest

from tests.mounted.conftest import Mount
from tests.mounted.exerciser import Exerciser
from tests.support import engines
from tests.support.campaign import Campaign
from tests.support.mutants.together import CUTS_IGNORED
from tests.support.requirements import need_program

SEEDS = (1, 2, 3, 4)
CONTENT = Random(7).randbytes(100_000)
WAYS = ("cached", "passthrough")

pytestmark = [pytest.mark.campaign("T7"), pytest.mark.timeout(600)]


def _lower_file(mount: Mount, seed: int) -> Path:
    """A file of a layer, half of it a hole."""
    name = f"file{seed}"
    with open(Path(mount.stack.lower[-1]) / name, "wb") as stream:
        stream.write(CONTENT)
        stream.truncate(2 * len(CONTENT))
    return mount.point / name


def _exercise(mount: Mount, seed: int, count: int) -> list[str]:
    return Exerciser(mount.point / f"file{seed}", CONTENT + bytes(len(CONTENT)), seed).run(count)


@pytest.mark.parametrize("way", WAYS)
def test_random_operations_give_the_expected_content(campaign: Campaign, mount: Mount, way: str) -> None:
    if engines.current() == engines.PYFUSE3 and way == "passthrough":
        return  # libfuse has no passthrough
    count, wrong = campaign.size(500, 25_000), []
    for seed in SEEDS:
        _lower_file(mount, seed)
    mount.start(options=f"io={way}")
    for seed in SEEDS:
        wrong += [f"seed {seed}: {each}" for each in _exercise(mount, seed, count)]
    mount.unmount()
    campaign.held(f"operations on a file, {way}, engine {engines.current()}", count * len(SEEDS), wrong)


def test_a_tail_that_is_not_cut_is_noticed(campaign: Campaign, mount: Mount) -> None:
    _lower_file(mount, 1)
    mount.mutant(CUTS_IGNORED)
    campaign.caught(f"{CUTS_IGNORED}, engine {engines.current()}", 500, _exercise(mount, 1, 500))


@pytest.mark.parametrize("how", ["psync", "mmap", "libaio --direct=1"])
def test_fio_reads_what_it_wrote(campaign: Campaign, mount: Mount, how: str) -> None:
    """Four jobs, each with its own file of a layer; each block carries a checksum and is read back."""
    need_program("fio")
    size = campaign.size(1, 32)
    (Path(mount.stack.lower[-1]) / "fio").mkdir()
    for job in range(4):
        (Path(mount.stack.lower[-1]) / "fio" / f"verified.{job}.0").write_bytes(bytes(size << 20))
    mount.start()
    words = f"fio --name=verified --directory={mount.point}/fio --size={size}m --rw=randwrite --bs=4k --numjobs=4"
    checks = "--verify=crc32c --do_verify=1 --verify_state_save=0 --verify_fatal=1 --minimal"
    command = f"{words} --ioengine={how} {checks}".split()
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    wrong = [f"fio {how}: {done.stderr[-300:]}{done.stdout[-300:]}"] if done.returncode else []
    mount.unmount()
    campaign.held(f"blocks that fio wrote and verified, engine {engines.current()}", 4 * size * 256, wrong)
