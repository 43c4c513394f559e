"""Nothing that is read can run code: no pickle, no eval, on the way from a cache to a batch and to a head's score."""

import ast
import contextlib
import io
import sys
from pathlib import Path

import fcache
from tests.torture.children import run_child

PACKAGE = Path(fcache.__file__).parent
# Modules that turn bytes into objects of any kind, or into code.
UNSAFE = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "copyreg",
    "runpy",
    "code",
}
CALLS = {"eval", "exec", "compile", "__import__"}
READING = ("cache_spec", "heads")
FORBIDDEN = (
    "pickle.find_class",
    "compile",
    "exec",
    "marshal.loads",
    "marshal.load",
    "code.__new__",
    "function.__new__",
)


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


def look_and_train(folder):
    """Opens, reads, verifies, trains and scores a head, twice: the second time nothing may run code."""
    from fcache.cache_spec import open_cache, verify
    from fcache.cli import main
    from fcache.extractor import Job, extract
    from fcache.extractor.scenes import write_scenes
    from tests.torture.caches import numbers

    root = folder / "c"
    write_scenes(folder / "data", train=4, val=2, size=(48, 64))
    job = Job(
        model="mobilenetv2_050", dataset="ade20k", root=folder / "data", cache=root, weights="random:0", views=1,
        view_recipe="ade20k-small", input_size=(32, 32), batch_size=2, workers=0,
    )  # fmt: skip
    extract(job, report=lambda _: None)

    def use():
        for mode in ("mmap", "pread"):
            numbers(root, mode, ("semantic",))
        reader = open_cache(root)
        for g in reader.manifest.groups:
            reader.read(g.path, g.levels[0].name, 0)
        assert not verify(root, deep=True).faults
        out = folder / f"runs{len(list(folder.iterdir()))}"
        train = ["train-head", "--cache", str(root), "--head", "semantic/linear", "--iters", "2", "--out", str(out)]
        looks = (["info", str(root)], ["verify", str(root)], ["compare", "--cache", str(root)], ["ls", str(folder)])
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as told:
            assert main([*train, "--set", "batch_size=2", "--allow-random-backbone"]) == 0, told.getvalue()
            for arguments in looks:
                found = sorted(map(str, out.iterdir())) if arguments[0] == "compare" else []
                assert main([*arguments, *found]) == 0, told.getvalue()

    use()
    events = []

    def hook(event, args):
        # `ast.literal_eval` of the header of an npy file makes a syntax tree, which nothing runs.
        parsing = event == "compile" and Path(sys._getframe(1).f_code.co_filename).name == "ast.py"
        if event in FORBIDDEN and not parsing:
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


def test_reading_verifying_training_and_scoring_unpickle_nothing_and_compile_nothing(folder):
    ended = run_child(look_and_train, folder)
    assert ended.status == 0, ended.error
    assert ended.value == []
