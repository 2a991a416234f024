"""The console examples of the README and of the documentation, run word for word."""

import re
from pathlib import Path

import pytest

from tests.cli import examples
from tests.cli.examples import Page, Session
from tests.oci import registries
from tests.support import requirements

PAGES = examples.pages()
SESSIONS = [
    pytest.param(session, id=f"{page.name}-{number}")
    for page in PAGES
    for number, session in enumerate(page.sessions, 1)
]


@pytest.mark.mounted
@pytest.mark.root
@pytest.mark.parametrize("session", SESSIONS)
def test_a_session(session: Session, place: Path) -> None:
    with examples.network() as inside:
        if "localhost:5000" in session.text:
            with registries.registry(place / "registry", inside, http={"addr": "127.0.0.1:5000"}):
                done = examples.run(session, place, inside)
        else:
            done = examples.run(session, place, inside)
    if not examples.matches(session.text, done.stdout):
        assert examples.without_varying(done.stdout + done.stderr) == examples.without_varying(session.text)
    assert done.returncode == 0


@pytest.mark.parametrize("page", [page for page in PAGES if page.transcripts], ids=lambda page: page.name)
def test_blocks_that_are_not_run_have_a_reason(page: Page, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        for reason in page.transcripts:
            print(f"\n{page.name}: an example is not run: {reason}", end="")
    assert all(len(reason.split()) > 2 for reason in page.transcripts)


def test_the_readme_has_every_step() -> None:
    [readme] = [page for page in PAGES if page.name == "README.md"]
    words = [line.split() for session in readme.sessions for command in session.commands for line in command.split(";")]
    named = {line[1] for line in words if line[:1] == ["overlayfs"]}
    wanted = {"import", "mount", "commit", "log", "diff", "squash", "export", "push", "pull", "rm", "gc", "verify"}
    assert wanted <= named


@pytest.mark.root
def test_the_python_examples_of_an_overlay_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requirements.need_root()
    for name in ("layers/site/etc", "layers/base/etc", "up", "up.work"):
        (place / name).mkdir(parents=True)
    text = (examples.ROOT / "docs/python-api.md").read_text()
    codes = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "Overlay(" in code]
    assert len(codes) == 2
    for code in codes:
        exec(re.sub(r'b"/(layers|up)', rf'b"{place}/\1', code), {})
    assert "[b'file'] Attributes(" in capsys.readouterr().out


PLANTED = """
<!-- setup: echo hello > there -->

```console
# cat there
hello
# cat there \\
>     there | tail -n 1
hello
# seq 3
...
3
```
Words.
```console
# cd /; pwd
/
```
<!-- new session -->
```console
# ls there
```
<!-- transcript: needs another
machine -->
```console
$ rm -rf /
```
"""


def test_examples_are_found(tmp_path: Path) -> None:
    (tmp_path / "p.md").write_text(PLANTED)
    page = examples.read(tmp_path / "p.md")
    assert page.transcripts == ["needs another machine"]
    first, second = page.sessions
    assert first.setup == "echo hello > there"
    assert first.commands == ["cat there", "cat there \\\n    there | tail -n 1", "seq 3", "cd /; pwd"]
    assert second.commands == ["ls there"] and second.setup == ""


@pytest.mark.root
def test_a_wrong_example_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "p.md").write_text(PLANTED)
    good, bad = examples.read(tmp_path / "p.md").sessions
    (tmp_path / "good").mkdir()
    done = examples.run(good, tmp_path / "good")
    assert examples.matches(good.text, done.stdout), done
    assert not examples.matches(good.text.replace("hello", "hallo"), done.stdout)
    (tmp_path / "bad").mkdir()
    done = examples.run(bad, tmp_path / "bad")
    assert done.returncode != 0 and not examples.matches(bad.text, done.stdout)
