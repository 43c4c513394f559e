"""The project's frame: what is declared agrees with what is there."""

import re
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import fcache
from fcache.cli.app import COMMANDS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_are_exact_versions_and_name_no_host() -> None:
    assert [line for line in PINS if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)] == []
    assert sorted(PINS) == PINS


def test_constraints_leave_the_cuda_packages_to_torch() -> None:
    assert [line for line in PINS if line.startswith(("nvidia-", "cuda-", "triton"))] == []


def test_every_direct_requirement_of_a_checkout_is_pinned() -> None:
    extras = PROJECT["optional-dependencies"]
    wanted = PROJECT["dependencies"] + extras["s3"] + extras["test"] + extras["dev"]
    names = {canonical(re.match(r"[A-Za-z0-9._-]+", r).group()) for r in wanted} - {"fcache"}  # type: ignore[union-attr]
    assert names - {canonical(line.split("==")[0]) for line in PINS} == set()


def test_the_version_is_the_newest_of_the_changelog() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest.group(1) == fcache.__version__ == version("fcache")


def test_the_readme_uses_commands_and_options_that_exist() -> None:
    import importlib

    text = "".join(re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)).replace("\\\n", " ")
    lines = [line.split("#")[0].split() for line in re.findall(r"^fcache .*", text, re.MULTILINE)]
    assert lines
    for words in lines:
        assert words[1] in COMMANDS, words
        command = importlib.import_module(f"fcache.cli.{words[1].replace('-', '_')}").command
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert {w for w in words if w.startswith("--")} - known == set(), words


def test_the_makefile_targets_of_readme_and_contributing_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(
        re.findall(r"make ([a-z-]+)", (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text())
    )
    assert named - targets == set()


def test_nothing_committed_is_larger_than_a_megabyte() -> None:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("this is no git checkout")
    large = [f for f in listing.stdout.split("\0") if f and (ROOT / f).is_file() and (ROOT / f).stat().st_size > 1e6]
    assert large == []
