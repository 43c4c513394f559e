"""Nothing that is read can run code: no pickle, no eval, on the way from a cache to a batch and to a head's score."""

import ast
import contextlib
import io
import sys
from pathlib import Path

import fcache
from tests.torture.children import run_child
from tests.torture.test_hostile_metadata import make_sound

PACKAGE = Path(fcache.__file__).parent
# Modules that turn bytes into objects of any kind, or into code.
UNSAFE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "copyreg", "runpy", "code"}
CALLS = {"eval", "exec", "compile", "__import__"}
READING = ("cache_spec", "heads")
FORBIDDEN = ("pickle.find_class", "compile", "exec", "marshal.loads", "marshal.load", "code.__new__", "function.__new__")


def modules(*rooms):
    return [p for room in rooms for p in sorted((PACKAGE / room).rglob("*.py"))]


def test_no_module_on_the_read_path_imports_or_calls_what_runs_data():
    found = []
    for path in modules(*READING):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{path.name}: import {n}" for n in names if n.split(".")[0] in UNSAFE]
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
                found.append(f"{path.name}:{node.lineno}: {node.func.id}")
    assert found == []


def test_torch_and_numpy_files_are_loaded_without_pickle_everywhere():
    found, loads = [], 0
    for path in modules("cache_spec", "heads", "extractor", "cli"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner, name = ast.unparse(node.func.value), node.func.attr
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if (owner, name) == ("torch", "load"):
                loads += 1
                found += [] if options.get("weights_only") == "True" else [f"{path.name}:{node.lineno}"]
            if name in ("load", "fromfile", "memmap") and owner in ("np", "numpy"):
                loads += 1
                found += [f"{path.name}:{node.lineno}"] if options.get("allow_pickle", "False") != "False" else []
    assert found == []
    assert loads


def look_and_train(root, out):
    """Opens, reads, verifies, trains and evaluates a head, twice: the second time nothing may run code."""
    from fcache.cache_spec import open_cache, verify
    from fcache.cli import main
    from tests.torture.caches import numbers

    kinds = ("class", "semantic", "instances")

    def use():
        for mode in ("mmap", "pread"):
            numbers(root, mode, kinds)
        reader = open_cache(root)
        for g in reader.manifest.groups:
            reader.read(g.path, "level-4", 0)
        assert not verify(root, deep=True).faults
        train = ["train-head", "--cache", str(root), "--head", "semantic/linear", "--iters", "2", "--out", str(out)]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as told:
            for arguments in ([*train, "--set", "batch_size=2", "--set", "evaluate_every=0"], ["info", str(root)]):
                status = main(arguments)
                assert status in (0, 2), told.getvalue()
        return status

    use()
    events = []

    def hook(event, args):
        if event in FORBIDDEN:
            stack, frame = [], sys._getframe(1)
            while frame is not None and len(stack) < 6:
                stack.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
                frame = frame.f_back
            events.append((event, stack))

    sys.addaudithook(hook)
    use()
    counted = list(events)
    import pickle

    # The watch itself works.
    pickle.loads(pickle.dumps(Path("x")))
    assert len(events) > len(counted)
    return counted


def test_reading_verifying_and_training_unpickle_nothing_and_compile_nothing(folder):
    make_sound(folder / "c")
    ended = run_child(look_and_train, folder / "c", folder / "runs")
    assert ended.status == 0, ended.error
    assert ended.value == []
