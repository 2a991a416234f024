"""Credentials from the files of podman and docker and from helpers, and the challenges of registries."""

import base64
import json
from pathlib import Path

import pytest

from overlayfs.errors import UserError
from overlayfs.oci import credentials
from overlayfs.oci.auth_challenge import Challenge, challenges
from overlayfs.oci.credentials import Credential
from overlayfs.oci.reference import parse

IMAGE = parse("quay.io/team/app/web:1")


def entry(login: str) -> dict[str, str]:
    return {"auth": base64.b64encode(login.encode()).decode()}


def write(path: Path, **document: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def home(place: Path) -> dict[str, str]:
    return {"HOME": str(place), "XDG_RUNTIME_DIR": str(place / "run")}


def user_of(found: Credential | None) -> str:
    assert found is not None
    return found.user


def helper(place: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = place / "bin/docker-credential-vault"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


def test_the_files_are_searched_in_order(place: Path, home: dict[str, str]) -> None:
    assert credentials.find(IMAGE, home) is None
    places = [".docker/config.json", ".config/containers/auth.json", "run/containers/auth.json"]
    for number, path in enumerate(places):
        write(place / path, auths={"quay.io": entry(f"user{number}:x")})
        assert user_of(credentials.find(IMAGE, home)) == f"user{number}"


def test_registry_auth_file_is_the_only_file(place: Path, home: dict[str, str]) -> None:
    write(place / "run/containers/auth.json", auths={"quay.io": entry("other:x")})
    home["REGISTRY_AUTH_FILE"] = str(write(place / "mine.json", auths={}))
    assert credentials.find(IMAGE, home) is None
    home["REGISTRY_AUTH_FILE"] = str(place / "missing.json")
    with pytest.raises(UserError, match=r"missing\.json: no such file"):
        credentials.find(IMAGE, home)


@pytest.mark.parametrize(
    ("variable", "path"), [("XDG_CONFIG_HOME", "containers/auth.json"), ("DOCKER_CONFIG", "config.json")]
)
def test_variables_change_the_directories_of_the_files(
    place: Path, home: dict[str, str], variable: str, path: str
) -> None:
    write(place / "else" / path, auths={"quay.io": entry("me:x")})
    assert user_of(credentials.find(IMAGE, {**home, variable: str(place / "else")})) == "me"


def test_the_longest_prefix_wins(place: Path, home: dict[str, str]) -> None:
    keys = ["quay.io", "quay.io/team", "quay.io/team/app", "quay.io/team/app/web"]
    auths: dict[str, object] = {"quay.io/te": entry("wrong:x"), "quay.io/team/app/web/more": entry("wrong:x")}
    for key in keys:
        auths[key] = entry(f"{key}:p:w")
        write(place / "run/containers/auth.json", auths=auths)
        assert credentials.find(IMAGE, home) == Credential(key, "p:w", f"{place}/run/containers/auth.json, entry {key}")


@pytest.mark.parametrize("key", ["https://quay.io", "https://quay.io/v1/", "http://quay.io/v2"])
def test_keys_of_old_docker_versions(place: Path, home: dict[str, str], key: str) -> None:
    write(place / ".docker/config.json", auths={key: entry("old:x")})
    assert user_of(credentials.find(IMAGE, home)) == "old"


def test_docker_hub_has_several_names(place: Path, home: dict[str, str]) -> None:
    for key in ("https://index.docker.io/v1/", "docker.io", "index.docker.io", "docker.io/library"):
        write(place / ".docker/config.json", auths={key: entry("hub:x")})
        assert user_of(credentials.find(parse("docker.io/alpine"), home)) == "hub"


def test_an_identity_token_has_no_user(place: Path, home: dict[str, str]) -> None:
    write(place / ".docker/config.json", auths={"quay.io": {**entry("me:"), "identitytoken": "long"}})
    found = credentials.find(IMAGE, home)
    assert found is not None and (found.user, found.secret) == ("", "long")


def test_an_empty_entry_is_no_credential(place: Path, home: dict[str, str]) -> None:
    write(place / ".docker/config.json", auths={"quay.io": {}})
    assert credentials.find(IMAGE, home) is None


@pytest.mark.parametrize("text", ["", "   \n", "{}", '{"auths": null}'])
def test_an_empty_file_has_no_credential(place: Path, home: dict[str, str], text: str) -> None:
    write(place / ".docker/config.json").write_text(text)
    assert credentials.find(IMAGE, home) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not a credentials file"),
        ("[]", "is not a credentials file"),
        ("[" * 100_000, "is not a credentials file"),
        ('{"auths": [1]}', "auths must be an object"),
        ('{"auths": {"quay.io": {"auth": "%%%"}}}', "cannot be decoded"),
        ('{"auths": {"quay.io": {"auth": "bm9ib2R5"}}}', "cannot be decoded"),
        ('{"credHelpers": {"quay.io": "../x"}}', "is not the name of a credential helper"),
    ],
)
def test_broken_files_are_named(place: Path, home: dict[str, str], text: str, reason: str) -> None:
    path = write(place / ".docker/config.json")
    path.write_text(text)
    with pytest.raises(UserError, match=reason) as caught:
        credentials.find(IMAGE, home)
    assert str(path) in str(caught.value)


def test_repr_does_not_show_the_secret() -> None:
    assert "hidden" not in repr(Credential("me", "hidden", "file"))


def test_a_helper_receives_the_registry_and_returns_a_credential(
    place: Path, home: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    helper(place, monkeypatch, 'read r; echo "{\\"Username\\": \\"$1 $r\\", \\"Secret\\": \\"s\\"}"')
    write(place / ".docker/config.json", credHelpers={"quay.io": "vault"}, auths={"quay.io/team": entry("other:x")})
    assert credentials.find(IMAGE, home) == Credential("get quay.io", "s", "docker-credential-vault")
    write(place / ".docker/config.json", credsStore="vault", auths={"quay.io": {}})
    assert user_of(credentials.find(IMAGE, home)) == "get quay.io"
    assert user_of(credentials.find(parse("docker.io/alpine"), home)) == "get https://index.docker.io/v1/"


def test_a_helper_may_return_an_identity_token(
    place: Path, home: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    helper(place, monkeypatch, """echo '{"ServerURL": "x", "Username": "<token>", "Secret": "long"}'""")
    write(place / ".docker/config.json", credsStore="vault")
    found = credentials.find(IMAGE, home)
    assert found is not None and (found.user, found.secret) == ("", "long")


def test_a_helper_without_a_credential_is_none(
    place: Path, home: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    helper(place, monkeypatch, "echo credentials not found in native keychain; exit 1")
    write(place / ".docker/config.json", credsStore="vault")
    assert credentials.find(IMAGE, home) is None


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 3", "failed with exit code 3"),
        ("echo '{}'", "does not answer with a credential"),
        ("echo no", "does not answer with a credential"),
    ],
)
def test_a_helper_that_fails(
    place: Path, home: dict[str, str], monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    helper(place, monkeypatch, script)
    write(place / ".docker/config.json", credsStore="vault")
    with pytest.raises(UserError, match=reason):
        credentials.find(IMAGE, home)


def test_a_helper_that_is_missing(place: Path, home: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(place))
    write(place / ".docker/config.json", credsStore="vault")
    with pytest.raises(UserError, match="docker-credential-vault, which is not on the PATH"):
        credentials.find(IMAGE, home)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], []),
        (["Basic"], [Challenge("basic", {})]),
        (['Basic realm="a b, c=\\"d\\""'], [Challenge("basic", {"realm": 'a b, c="d"'})]),
        (
            ['Bearer realm="https://t/x?y=1",service="s",scope="repository:a/b:pull,push"'],
            [Challenge("bearer", {"realm": "https://t/x?y=1", "service": "s", "scope": "repository:a/b:pull,push"})],
        ),
        (
            ['Basic realm="r", Bearer Realm = t , error="invalid_token"', "Negotiate"],
            [
                Challenge("basic", {"realm": "r"}),
                Challenge("bearer", {"realm": "t", "error": "invalid_token"}),
                Challenge("negotiate", {}),
            ],
        ),
        (["Negotiate, Basic realm=x"], [Challenge("negotiate", {}), Challenge("basic", {"realm": "x"})]),
    ],
)
def test_challenges(lines: list[str], expected: list[Challenge]) -> None:
    assert list(challenges(lines)) == expected
