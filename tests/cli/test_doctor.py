"""`fcache doctor`."""

import importlib.metadata
import json
import tomllib
from pathlib import Path

from fcache.cli import doctor, main

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_the_packages_are_those_of_pyproject() -> None:
    project = tomllib.loads(PROJECT.read_text())["project"]
    plain = {r.split(";")[0].replace("[distributed]", "") for r in project["dependencies"]}
    extras = {
        name: {r.split(";")[0] for r in project["optional-dependencies"][name]}
        for name in ("s3", "tensorboard", "dask-cuda")
    }
    listed = {p.requirement for p in doctor.PACKAGES if p.extra in ("", "video")}
    assert listed == plain
    assert {name: {p.requirement for p in doctor.PACKAGES if p.extra == name} for name in extras} == extras


def test_a_sound_machine_passes(capsys) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch          {importlib.metadata.version('torch')}" in out
    assert out.endswith("all is well\n")


def test_json_holds_the_same_checks(capsys, tmp_path: Path) -> None:
    assert main(["doctor", "--json", "--path", str(tmp_path / "not" / "yet")]) == 0
    checks = {c["name"]: c for c in json.loads(capsys.readouterr().out)}
    assert checks["python"]["state"] == "ok"
    assert checks["writable"]["found"].endswith("yes")


def test_a_missing_and_an_old_package_are_named_with_a_remedy(capsys, monkeypatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "timm":
            raise importlib.metadata.PackageNotFoundError(name)
        return "3.0.1" if name == "zarr" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "fail  timm           not installed\n" in out
    assert "-> for backbones: pip install 'timm>=1.0.20'" in out
    assert "fail  zarr           3.0.1, older than 3.1\n" in out
    assert "2 to mend" in out


def test_a_torch_that_does_not_import_is_reported_and_the_rest_still_checked(capsys, monkeypatch) -> None:
    real = doctor.importlib.import_module

    def broken(name: str):
        if name == "torch":
            raise OSError("libcudart.so.13: cannot open shared object file")
        return real(name)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "libcudart.so.13" in out
    assert "free space" in out


def test_a_data_root_that_is_no_folder_fails(capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FCACHE_DATA", str(tmp_path / "gone"))
    assert main(["doctor"]) == 1
    assert "FCACHE_DATA as the folder of your datasets" in capsys.readouterr().out
