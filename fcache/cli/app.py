"""The group of commands, found by name without importing them, and the exit status of each kind of failure."""

import contextlib
import errno
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from fcache import __version__

# The order of a day's work. Each name is a module of this package that holds `command`; the texts stand here so that
# `fcache --help` imports no command.
COMMANDS = {
    "demo": "Run the whole path on synthetic scenes: extract, train, compare.",
    "plan": "Say what an extraction costs: bytes, files, time, free space.",
    "extract": "Run a frozen backbone over a dataset and cache its features.",
    "train-head": "Train one or many heads from a cache, in one pass over it.",
    "evaluate": "Score trained heads on the evaluation split.",
    "compare": "Compare the runs of one cache in a table or as JSON.",
    "predict": "Run a backbone and a trained head on photos, write overlays.",
    "info": "Show what a cache or a run holds.",
    "ls": "List the caches and runs below a folder.",
    "verify": "Check that a cache is complete and unharmed.",
    "repair": "Extract damaged shards anew, and only those.",
    "copy": "Copy a cache to another folder or object store.",
    "convert": "Make a weights file of a checkpoint.",
    "gc": "List and remove what nothing needs.",
    "doctor": "Check this machine and say what to do about each problem.",
}

INTERRUPTED = 130
NO_SPACE = 6


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMANDS:
            return importlib.import_module(f"fcache.cli.{cmd_name.replace('-', '_')}").command
        if cmd_name.startswith("-"):
            return None
        # Looked up here, as `difflib` is needed for a wrong name only.
        import difflib

        near = difflib.get_close_matches(cmd_name, COMMANDS, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"commands: {', '.join(COMMANDS)}"
        raise click.UsageError(f"unknown command {cmd_name!r}; {hint}", ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


_EPILOG = """\b
Examples:
  fcache demo
  fcache extract --model mobilenetv2_100 --dataset ade20k --cache ade.fcache
  fcache train-head --cache ade.fcache --head linear --head upernet --out runs
  fcache compare --cache ade.fcache runs/*

\b
Exit status: 0 done, 1 failure, 2 usage, 3 finished with quarantined or partial
data, 4 corrupt, 5 incompatible cache, 6 no space, 130 interrupted.
Progress goes to stderr, results to stdout.
"""


@click.group(cls=_Group, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", message="fcache %(version)s")
def app() -> None:
    """Run a frozen vision backbone over a dataset once, cache its feature pyramids, train heads from the cache."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line with `args` (the process's own by default); returns the exit status.

    Commands return their status, None for 0. Errors that a user can act on print one line on stderr; anything else is
    a bug and prints its traceback. FCACHE_DEBUG=1 prints the traceback of every error.
    """
    # Threads of OpenMP that spin while they wait make a busy machine seven times slower (measured on two cores), and
    # gain little on an idle one. Read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with contextlib.suppress(ValueError):  # not in the main thread, where signals cannot be taken
        signal.signal(signal.SIGTERM, _terminate)
    with contextlib.suppress(AttributeError):  # not a text stream of a file
        # File names need not be UTF-8: a result that names one goes out as the bytes that it is.
        sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    try:
        status = app.main(args=None if args is None else list(args), prog_name="fcache", standalone_mode=False)
        sys.stdout.flush()
        return int(status or 0)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", INTERRUPTED)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "fcache"
        return _fail(f"{error.format_message().rstrip('.')}; see '{path} --help'", error.exit_code)
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except BrokenPipeError:
        # The reader of a pipe has left (`fcache ls | head`): nothing to say, and nothing to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _report(error)


def _terminate(signum: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _fail(message: str, status: int) -> int:
    if os.environ.get("FCACHE_DEBUG") == "1" and sys.exc_info()[0] is not None:
        traceback.print_exc()
    click.echo(f"fcache: error: {message}", err=True)
    return status


def _report(error: Exception) -> int:
    """Print an error that is not click's; returns the exit status."""
    # If the module was never imported, the error is none of its classes.
    errors = sys.modules.get("fcache.cache_spec.errors")
    if errors is not None and isinstance(error, errors.FcacheError):
        return _fail(" ".join(str(error).split()), error.exit_code)  # type: ignore[attr-defined]
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _fail(f"no space left: {error}; free some and run the same command again", NO_SPACE)
    if isinstance(error, OSError) and error.errno is not None:
        return _fail(str(error), 1)
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("fcache"):
        return _fail(f"the package {error.name} is missing; run `fcache doctor` for what to install", 1)
    scarce = ("can't start new thread", "can't allocate memory", "out of memory")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(s in str(error) for s in scarce)):
        return _fail(f"not enough memory ({error}); nothing is lost: free some, or lower --batch-size and --workers", 1)
    traceback.print_exc()
    click.echo("fcache: error: this is a bug in fcache; please report it with the lines above", err=True)
    return 1
