"How stages are run: kernels that wait for their turn, the warm parent and its heir, what is recorded when."
import os, signal, sys, tempfile

import nbformat, psutil, pytest
from conftest import ROOT, Project, ran, wait_for
from nbformat.v4 import new_code_cell, new_notebook
from ruamel.yaml import YAML

class Small(Project):
    "A project that has no mlkit in its folder: it takes that of this checkout."
    @property
    def env(self): return super().env | {"PYTHONPATH": os.pathsep.join([str(self.root), str(ROOT)])}

def chain(root, n, alone=()):
    "A project of `n` stages, each of which adds one to what the one before wrote, once the file `go<stage>` is there."
    (root / "nbs/stages").mkdir(parents=True); (root / "data").mkdir()
    names = [f"s{i}" for i in range(n + 1)]
    for before, name in zip(names, names[1:]):
        cells = [new_code_cell("add: int = 1\nlabel: str = ''", metadata={"tags": ["parameters"]}),
            new_code_cell(f'import json, time\nfrom pathlib import Path\nfrom mlkit.flow.stage import Stage\n'
                f'stage = Stage("{name}", reads={{"before": "data/{before}.json"}}, writes={{"after": "data/{name}.json"}}, alone={name in alone})'),
            new_code_cell(f'while not Path("go{name}").exists(): time.sleep(0.02)\n'
                'value = json.loads(stage.input("before").read_text()) + add\nstage.output("after").write_text(json.dumps(value)); value')]
        for i, c in enumerate(cells): c.id = f"cell{i}"
        nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}), root / f"nbs/stages/{name}.ipynb")
        (root / f"go{name}").touch()
    (root / "data/s0.json").write_text("0")
    YAML().dump({s: {"add": 1, "label": ""} for s in names[1:]}, root / "params.yaml")
    project = Small(root)
    project.git("init", "-q"); project.dvc("init", "-q")
    return project

@pytest.fixture
def small(tmp_path):
    "Five stages; the third may not begin before the test says so."
    project = chain(tmp_path / "project", 5)
    (project / "gos3").unlink()
    return project

def kernels(project): # Process ids
    "The kernels of this project, warm or not, those too that wait."
    found = []
    for p in project.processes():
        try: words = set(" ".join(p.cmdline()).replace(";", " ").split())
        except psutil.Error: continue # it has just ended
        if {"mlkit.flow.warm", "ipykernel_launcher"} & words: found.append(p.pid)
    return found

def test_the_next_two_kernels_wait_and_end_with_the_run(small):
    with small.started("mlkit", "repro") as p:
        wait_for(lambda: "▸ s3" in p.out.read_text(), "the third stage")
        wait_for(lambda: len(kernels(small)) == 3, "the kernels of s3, s4 and s5")
        assert not (small / ".mlkit/aside/s4").exists() # they have not begun
        p.send_signal(signal.SIGKILL)
        wait_for(lambda: not kernels(small), "the end of the kernels")
    (small / "gos3").touch()
    done = small.mlkit("repro")
    assert ran(done.stdout) == ["s3", "s4", "s5"] and "healed: the last run ended in s3: " in done.stdout # s1 and s2 were in dvc.lock, or in the cache
    assert small.json("data/s5.json") == 5

def test_a_kernel_whose_stage_need_not_run_ends(small):
    (small / "gos3").touch()
    assert ran(small.mlkit("repro").stdout) == ["s1", "s2", "s3", "s4", "s5"]
    (small / "gos1").unlink()
    small.param(s1__label="another", s4__add=2)
    with small.started("mlkit", "repro") as p:
        wait_for(lambda: len(kernels(small)) == 3, "the kernels of s1, s2 and s3")
        (small / "gos1").touch()
        assert p.wait(300) == 0, p.err.read_text()
        assert ran(p.out.read_text()) == ["s1", "s4", "s5"] and not kernels(small)
    assert small.json("data/s5.json") == 6

def test_nobody_starts_beside_a_stage_that_wants_to_be_alone(tmp_path):
    project = chain(tmp_path / "project", 4, alone=["s2"])
    (project / "gos2").unlink()
    with project.started("mlkit", "repro") as p:
        wait_for(lambda: "▸ s2" in p.out.read_text(), "the second stage")
        wait_for(lambda: (project / ".mlkit/aside/s2").exists(), "its beginning")
        for _ in range(10): # s3 waited already, s4 must not come
            assert len(kernels(project)) <= 2
            with pytest.raises(psutil.TimeoutExpired): p.wait(0.1)
        (project / "gos2").touch()
        assert p.wait(300) == 0, p.err.read_text()
    assert project.json("data/s4.json") == 4

def test_a_failure_ends_those_who_wait(small):
    (small / "data/s0.json").write_text('"no number"')
    done = small.mlkit("repro", rc=1)
    assert "s1: TypeError" in done.stderr and "Traceback" not in done.stderr and not kernels(small)

def test_serial_and_parallel_and_dvc_leave_the_same_lock(tmp_path):
    locks = []
    for i, command in enumerate((["mlkit", "repro"], ["mlkit", "repro", "-j", "3"], ["dvc", "repro"])):
        project = chain(tmp_path / str(i) / "project", 3)
        project.mlkit("render")
        project.run(*command)
        locks.append(YAML(typ="safe").load(project / "dvc.lock"))
    assert locks[0] == locks[1] == locks[2]

def test_the_first_kernel_of_a_day_does_not_wait(tmp_path):
    "It comes from a parent that has imported nothing heavy; the heir of that, which has, takes over."
    code = """
import json, os, subprocess, sys, time
from pathlib import Path
from jupyter_client.manager import start_new_kernel
from mlkit.flow.warm import socket_path
def heavy(): # whether a new kernel has torch
    km, kc = start_new_kernel(kernel_name="mlkit-warm")
    out = []
    kc.execute_interactive("import sys; print('torch' in sys.modules)", output_hook=lambda m: out.append(m["content"].get("text", "")), timeout=60)
    km.shutdown_kernel(now=True)
    return "True" in "".join(out)
try:
    print(heavy())
    end = time.monotonic() + 120
    while not (found := heavy()) and time.monotonic() < end: time.sleep(0.5)
    print(found)
finally: socket_path().unlink(missing_ok=True)
"""
    with tempfile.TemporaryDirectory() as d: # the path of a socket is short
        done = Project(tmp_path).run("env", f"XDG_RUNTIME_DIR={d}", f"PYTHONPATH={ROOT}", sys.executable, "-c", code)
    assert done.stdout.split() == ["False", "True"], done.stderr

def test_two_parents_stay_a_third_replaces_the_one_that_waited_longest():
    code = "from mlkit.flow.warm import ask; import os, sys; os.environ['TZ'] = sys.argv[1]; assert ask({'argv': ['-f', os.environ['XDG_RUNTIME_DIR'] + '/k.json']}, dict(os.environ), '/'); print(__import__('mlkit.flow.warm').flow.warm.socket_path())"
    with tempfile.TemporaryDirectory() as d:
        def asked(zone): return ROOT.__class__(Project(ROOT).run("env", f"XDG_RUNTIME_DIR={d}", f"PYTHONPATH={ROOT}", sys.executable, "-c", code, zone).stdout.strip())
        try:
            first, second = asked("UTC"), asked("Asia/Tokyo")
            assert first != second and first.exists() and second.exists()
            assert asked("UTC") == first and second.exists()
            assert asked("Asia/Kolkata").exists() and first.exists() and not second.exists()
        finally:
            for f in first.parent.glob("*.sock"): f.unlink() # a parent without its socket ends
