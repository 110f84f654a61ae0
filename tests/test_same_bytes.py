"The same commit, data and values give the same bytes anywhere, by `mlkit repro` or plain `dvc repro`; what may differ stands in README.md."
import os, sys
from fnmatch import fnmatch

from conftest import differs_by_right, may_differ, quick

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
    project.mlkit("render") # as README.md asks for, before plain DVC
    project.run(*elsewhere, "dvc", "repro")
    assert oct((project / "models/model.safetensors").stat().st_mode)[-2:] == "00" and not (project / "champion.json").exists()
    assert {f for f in differing(project, uninterrupted) if not differs_by_right(f)} == set()
    assert project.same == uninterrupted.same and len(project.same) > 70
    assert len({p.json("reports/metrics/verdict.json")["bundle"] for p in (project, uninterrupted)}) == 1

    assert {p for p in may_differ() if not any(fnmatch(f, p) for f in project.outputs())} == set(), "README.md excepts what no stage writes"
    always = {p for p, when in may_differ().items() if when == "always"}
    def equal(of): return of(project) == of(uninterrupted)
    lucky = equal(lambda p: p.json("reports/measurements/serve.json")["p99_ms"]) or equal(lambda p: p.json("reports/measurements/train.json"))
    assert lucky or {p for p in always if not any(fnmatch(f, p) for f in differing(project, uninterrupted))} == set(), "README.md excepts what is the same"
