"The same commit, data and values give the same bytes anywhere, by `mlkit repro` or plain `dvc repro`; what may differ stands in README.md."
import os
import subprocess
import sys
from fnmatch import fnmatch

import pytest
from conftest import ROOT, differs_by_right, may_differ, quick
from ruamel.yaml import YAML

from mlkit.device import find_gpus

def differing(a, b):
    a, b = a.outputs(), b.outputs()
    return {f for f in a.keys() | b.keys() if a.get(f) != b.get(f)}

def test_plain_dvc_elsewhere(fresh, uninterrupted, tmp_path):
    "From nothing, by `dvc repro` alone: another folder, home, umask, time zone, locale and number of cores, and no warm kernels."
    (home := tmp_path / "a home of its own, with a name that is somewhat longer").mkdir()
    project = quick(fresh.clone(home / "project"))
    (no_folder := home / "file").touch()
    core = min(os.sched_getaffinity(0))
    elsewhere = ["env", f"HOME={home}", f"XDG_RUNTIME_DIR={no_folder}", "TZ=Asia/Kolkata", "LC_ALL=C", "PYTHONHASHSEED=1", "taskset", "-c", core, "sh", "-c", 'umask 077; exec "$@"', "-"]
    assert project.run(*elsewhere, sys.executable, "-c", "from mlkit.flow.warm import start_parent; print(start_parent())").stdout.strip() == "None"
    for name in ("dvc.lock", "reports/metrics"): # a colleague has run the same, and committed it
        subprocess.run(["cp", "-r", uninterrupted / name, (project / name).parent], check=True)
    project.mlkit("render") # as README.md asks for, before plain DVC
    project.commit()
    project.run(*elsewhere, "dvc", "repro")
    assert oct((project / "models/model.safetensors").stat().st_mode)[-2:] == "00" and not (project / "champion.json").exists()
    assert {f for f in differing(project, uninterrupted) if not differs_by_right(f)} == set()
    assert project.apart(uninterrupted) == {} and len(project.same) > 70
    assert len({p.json("reports/metrics/verdict.json")["bundle"] for p in (project, uninterrupted)}) == 1

    assert project.git("status", "--porcelain").stdout == "" or find_gpus()[0]

    assert {p for p in may_differ() if not any(fnmatch(f, p) for f in project.outputs())} == set(), "README.md excepts what no stage writes"

def locked(root):
    "path: MD5 of all that the stages have left; not of `release`, whose criteria the tests change."
    stages = YAML(typ="safe").load(root / "dvc.lock")["stages"]
    return {o["path"]: o["md5"] for name, entry in stages.items() if name != "release" for o in entry.get("outs", [])}

def test_a_fresh_run_gives_what_is_committed(finished):
    "What git holds was made on another machine, perhaps. README.md says what may differ."
    if find_gpus()[0]: pytest.skip("not run: what is committed was trained on a CPU, and here is a GPU")
    committed, now = locked(ROOT), locked(finished.root)
    assert committed.keys() == now.keys() and len(now) > 40
    assert {p for p in now if now[p] != committed[p] and not differs_by_right(p)} == set()

def test_what_is_measured_is_recorded_nowhere(finished):
    "Neither by git nor by DVC."
    measured = sorted(p.relative_to(finished.root).as_posix() for p in (finished / "reports/measurements").iterdir())
    known = finished.git("ls-files").stdout + (finished / "dvc.lock").read_text() + (finished / "dvc.yaml").read_text()
    assert len(measured) == 10 and [p for p in measured if p in known] == []
    p99 = finished.json("reports/measurements/serve.json")["p99_ms"]
    recorded, shown = finished.json("reports/metrics/verdict.json"), (finished / "reports/index.html").read_text()
    assert recorded["criteria"]["serve.p99_ms"].items() >= {"value": None, "met": True, "measured": True, "undecided": ""}.items()
    assert finished.json("reports/measurements/verdict.json") == {"bundle": recorded["bundle"], "values": {"serve.p99_ms": p99}}
    from mlkit.flow.report import figure
    assert f"<td>{figure(p99)}</td>" in shown

def test_metrics_of_a_fresh_clone(finished, tmp_path):
    "`dvc metrics` needs nothing but git."
    subprocess.run(["git", "clone", "-q", finished.root, tmp_path / "clone"], check=True)
    clone = type(finished)(tmp_path / "clone")
    clone.replace("reports/metrics/train.json", '"epochs": 30', '"epochs": 29')
    diff = clone.dvc("metrics", "diff").stdout
    assert "reports/metrics/train.json" in diff and "epochs" in diff and "30" in diff
    assert "accuracy" in clone.dvc("metrics", "show").stdout
