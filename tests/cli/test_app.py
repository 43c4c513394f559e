"""The group of commands: help, names, exit statuses."""

import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from fcache import __version__
from fcache.cache_spec import CorruptError, IncompatibleError, IncompleteError, NoSpaceError, SpecError
from fcache.cli import app as module
from fcache.cli import main
from fcache.cli.job import parse_job

HEAVY = ("torch", "torchvision", "timm", "zarr", "numpy", "dask", "distributed", "rich", "PIL", "scipy", "transformers")
GOLDEN = Path(__file__).parent / "golden"
LINES = [[], *([name] for name in module.COMMANDS)]


def fcache(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fcache.cli", *args], capture_output=True, text=True, timeout=60)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """Make `fcache ls` raise an error; gives a function that takes it and returns the exit status."""

    def run(error: BaseException) -> int:
        def command() -> None:
            raise error

        monkeypatch.setattr(module._Group, "get_command", lambda *_: click.Command("ls", callback=command))
        return main(["ls"])

    return run


@pytest.mark.parametrize("line", LINES, ids=lambda line: " ".join(line) or "fcache")
def test_help_imports_nothing_heavy(line: list[str]) -> None:
    program = f"import sys; from fcache.cli import main; main({[*line, '--help']!r}); "
    program += f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "HEAVY []", result.stdout + result.stderr


@pytest.mark.parametrize("line", LINES, ids=lambda line: " ".join(line) or "fcache")
def test_help_is_as_recorded(line: list[str], capsys, monkeypatch) -> None:
    """After a wanted change run once with FCACHE_UPDATE_GOLDEN=1."""
    monkeypatch.setenv("COLUMNS", "100")
    assert main([*line, "--help"]) == 0
    text = capsys.readouterr().out
    path = GOLDEN / f"{'-'.join(line) or 'fcache'}.txt"
    if os.environ.get("FCACHE_UPDATE_GOLDEN") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("line", LINES, ids=lambda line: " ".join(line) or "fcache")
def test_help_shows_examples_and_both_spellings_work(line: list[str], capsys) -> None:
    assert main([*line, "-h"]) == 0
    short = capsys.readouterr().out
    assert main([*line, "--help"]) == 0
    assert short == capsys.readouterr().out
    assert f"Examples:\n    fcache {' '.join(line)}" in short.replace("Examples:\n  fcache", "Examples:\n    fcache")


def test_every_command_is_a_module_with_an_option_text() -> None:
    for name in module.COMMANDS:
        command = importlib.import_module(f"fcache.cli.{name.replace('-', '_')}").command
        assert isinstance(command, click.Command)
        assert command.help
        missing = [p.name for p in command.params if isinstance(p, click.Option) and not p.help]
        assert missing == [], name


def test_help_names_all_that_can_be_chosen() -> None:
    """The lists are static, so that help stays fast; this keeps them true."""
    from fcache.cache_spec import encoding_names
    from fcache.cli import extract, train_head
    from fcache.extractor import dataset_names
    from fcache.extractor.views import view_recipe_names
    from fcache.heads import head_names, recipe_names

    def words(text: str | None) -> set[str]:
        return set(re.split(r"[\s,;.:\[\]]+", text or ""))

    def option(name: str) -> set[str]:
        return next(words(p.help) for p in extract.command.params if isinstance(p, click.Option) and p.name == name)

    epilog = words(train_head.command.epilog)
    assert set(head_names()) == {word for word in epilog if "/" in word and not word.startswith("runs/")}
    assert set(recipe_names()) - epilog == set()
    assert set(view_recipe_names()) - option("view_recipe") == set()
    assert {name.partition(":")[0] for name in encoding_names()} - option("encoding") == set()
    assert set(dataset_names()) - option("dataset") == set()


def test_version_is_the_package_s(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fcache {__version__}\n"


def test_unknown_command_suggests_the_nearest(capsys) -> None:
    assert main(["extrakt"]) == 2
    assert (
        capsys.readouterr().err
        == "fcache: error: unknown command 'extrakt'; did you mean extract?; see 'fcache --help'\n"
    )


def test_unknown_option_suggests_the_nearest_on_one_line(capsys) -> None:
    assert main(["doctor", "--jsno"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "'--json'" in err
    assert "see 'fcache doctor --help'" in err


def test_no_command_prints_the_help_and_fails_as_usage(capsys) -> None:
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (SpecError("x"), 2),
        (IncompleteError("x"), 1),
        (CorruptError("x"), 4),
        (IncompatibleError("x"), 5),
        (NoSpaceError("x"), 6),
        (OSError(28, "No space left on device"), 6),
        (OSError(122, "Disk quota exceeded"), 6),
        (PermissionError(13, "Permission denied", "/x"), 1),
        (ModuleNotFoundError("No module named 'timm'", name="timm"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_error_of_the_user_s_world_is_one_line_with_its_status(failing, capsys, error, status) -> None:
    assert failing(error) == status
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1
    assert err[0].startswith("fcache: error: ")


def test_fcache_debug_shows_the_traceback(failing, capsys, monkeypatch) -> None:
    monkeypatch.setenv("FCACHE_DEBUG", "1")
    assert failing(CorruptError("shard 3")) == 4
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("fcache: error: shard 3\n")


def test_an_unexpected_error_says_that_it_is_a_bug_and_shows_where(failing, capsys) -> None:
    assert failing(RuntimeError("no such thing")) == 1
    err = capsys.readouterr().err
    assert "RuntimeError: no such thing" in err
    assert "bug in fcache" in err.splitlines()[-1]


def test_a_missing_module_of_fcache_itself_is_a_bug(failing, capsys) -> None:
    assert failing(ModuleNotFoundError("No module named 'fcache.x'", name="fcache.x")) == 1
    assert "bug in fcache" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_any_command_with_130(number: signal.Signals) -> None:
    program = (
        "import signal, sys, time, click\nfrom fcache.cli import app\n"
        # As in a terminal: a background job of a shell inherits a SIGINT that is ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def wait(): print('ready', flush=True); time.sleep(60)\n"
        "app._Group.get_command = lambda *_: click.Command('ls', callback=wait)\n"
        "sys.exit(app.main(['ls']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert err.strip() == "fcache: error: interrupted"


def test_a_closed_pipe_ends_quietly() -> None:
    line = f"{sys.executable} -m fcache.cli doctor | head -n 1"
    result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert result.stderr == ""
    assert result.stdout.startswith("ok")


def test_precision_is_what_the_device_computes_fast_unless_it_is_given():
    options = dict.fromkeys(("recipe", "data_root", "cache", "weights", "precision")) | {
        "model": "test_resnet", "dataset": "ade20k", "data_root": "data",
    }  # fmt: skip
    assert parse_job(options | {"devices": "cpu"}).precision == "fp32"
    assert parse_job(options | {"devices": "cuda:1"}).precision == "bf16"
    assert parse_job(options | {"devices": "cpu", "precision": "bf16"}).precision == "bf16"
    assert parse_job(options, cluster=True).precision == "bf16"
    assert parse_job(options | {"devices": "cuda", "recipe": "camvid-small"}).precision == "fp32"
