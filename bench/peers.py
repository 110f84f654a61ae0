"""The pipeline engine against its peers: the same notebooks under mlkit, DVC with papermill, Calkit, Metaflow, Kedro, and as a bare script.

Usage: python bench/peers.py [--repeats 7] [--only trivial|default] [--resume]. Workloads: five and ten trivial notebooks in a chain,
and the default pipeline. Every run starts in a folder of its own with no outputs and no cache; all contenders take their turn within a
repeat, so that a slow minute of the machine is shared. What a run leaves is checked before its time counts. Progress goes to stderr, the
tables in Markdown to stdout; times are kept in a JSON, from which `--resume` goes on. The peers are installed by pip into environments
of their own, which see the packages of this one.
"""
import argparse, compileall, os, platform, shutil, statistics, subprocess, sys, sysconfig, tempfile, time
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Callable

import nbformat, psutil
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from ruamel.yaml import YAML

HERE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE), str(HERE / "tests")]
from conftest import checkout
from mlkit.flow.notebook import code_cells
from mlkit.core import read_json, sha256, write_json
from mlkit.flow.runner import load_project
from mlkit.flow.warm import socket_path
from cells import script

BIN = Path(sys.executable).parent
PEERS = {"calkit": "calkit-python==0.49.5", "metaflow": "metaflow==2.19.39", "kedro": "kedro==1.7.0"}


def machine(*packages: str) -> str:
    "What figures are worth nothing without."
    return ", ".join([platform.machine(), f"{len(os.sched_getaffinity(0))} cores", f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages)])


# The workloads

@dataclass
class Workload:
    key: str # In the JSON
    title: str
    n: int # Notebooks
    make: Callable[[Path], None] # Writes the project into an empty folder
    result: Callable[[Path], list[str]] # What must be the same whoever ran it; raises where it is wrong


def trivial(n: int) -> Workload:
    "A chain of `n` notebooks that each add one to what the one before wrote."
    def make(root):
        names = [f"s{i:02d}" for i in range(n + 1)]
        for before, name in zip(names, names[1:]):
            cells = [new_markdown_cell(f"# {name}"), new_code_cell("add: int = 2", metadata={"tags": ["parameters"]}),
                     new_code_cell(f"""import numpy as np
from mlkit.core import read_json, write_json
from mlkit.flow.stage import Stage

stage = Stage("{name}", reads={{"before": "data/{before}.json"}}, writes={{"after": "data/{name}.json"}})"""),
                     new_code_cell('value = read_json(stage.input("before"))["value"] + int(np.ones(add).sum())\nwrite_json(stage.output("after"), {"value": value});'),
                     new_code_cell("display(value)")]
            for i, c in enumerate(cells): c["id"] = f"cell{i}"
            kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
            (path := root / f"nbs/stages/{name}.ipynb").parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(new_notebook(cells=cells, metadata=kernel), path)
        write_json(root / "data/s00.json", {"value": 0})
        YAML().dump({s: {"add": 1} for s in names[1:]}, root / "params.yaml")
    def result(root):
        value = read_json(root / f"data/s{n:02d}.json")["value"]
        if value != n: raise ValueError(f"the last value is {value}, not {n}")
        return [str(value)]
    return Workload(f"trivial {n}", f"{n} trivial notebooks in a chain", n, make, result)


def default_project(root: Path):
    "This checkout, as if it had never run."
    checkout(root)
    (root / "dvc.lock").unlink(missing_ok=True)
    for f in (root / "mlkit").rglob("*.py"): f.touch() # newer than their notebooks: nothing to export


def default_result(root: Path) -> list[str]:
    verdict = read_json(root / "reports/metrics/verdict.json")
    if not verdict["released"]: raise ValueError(f"not released: {[k for k, c in verdict['criteria'].items() if not c['met']]}")
    return [sha256(root / "models/model.safetensors"), verdict["bundle"]]


WORKLOADS = [trivial(5), trivial(10), Workload("default", "the default pipeline", len([*(HERE / "nbs/stages").glob("[!._]*.ipynb")]), default_project, default_result)]


# What each contender adds to a project

def dump(path: Path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    yaml = YAML()
    yaml.width = 10_000
    yaml.dump(value, path)


def steps(root, nodes, params):
    "The cells as plain Python."
    (root / "steps").mkdir()
    for name, node in nodes.items(): (root / f"steps/{name}.py").write_text(script(code_cells(root / node.notebook), params[name]))
    (root / "script.py").write_text(f"from cells import run\n\nfor name in {list(nodes)}: run(name)\n")


def inputs(root, node): return [p for p in node.stage.reads.values() if not p.startswith("${")]


def rendered(root, nodes, params): execute([BIN / "mlkit", "render"], root, environment(root))


def papermill(root, nodes, params):
    for name, node in nodes.items(): dump(root / f"values/{name}.yaml", params[name])
    dump(root / "dvc.yaml", {"stages": {name: {
        "cmd": f"papermill {node.notebook} reports/{name}.ipynb -k python3 -f values/{name}.yaml --no-progress-bar",
        "deps": [str(node.notebook), f"values/{name}.yaml", *inputs(root, node)],
        "outs": [*node.stage.outputs.values(), f"reports/{name}.ipynb"]} for name, node in nodes.items()}})
    (root / "reports").mkdir(exist_ok=True) # papermill makes no folder


def calkit(root, nodes, params):
    (root / "dvc.yaml").unlink(missing_ok=True)
    dump(root / "calkit.yaml", {"name": "bench", "environments": {"main": {"kind": "system"}}, "pipeline": {"stages": {name: {
        "kind": "jupyter-notebook", "notebook_path": str(node.notebook), "environment": "main", "parameters": params[name],
        "inputs": inputs(root, node), "outputs": list(node.stage.outputs.values())} for name, node in nodes.items()}}})


def metaflow(root, nodes, params):
    steps(root, nodes, params)
    names = ["start", *list(nodes)[1:-1], "end"]
    body = "".join(f"\n    @step\n    def {s}(self):\n        run({n!r})\n" + (f"        self.next(self.{after})\n" if after else "")
                   for s, n, after in zip(names, nodes, [*names[1:], None]))
    (root / "flow.py").write_text(f"from cells import run\nfrom metaflow import FlowSpec, step\n\n\nclass Bench(FlowSpec):{body}\n\nif __name__ == '__main__': Bench()\n")


def kedro(root, nodes, params):
    steps(root, nodes, params)
    names = list(nodes)
    body = ", ".join(f"node(partial(call, {n!r}), {before!r}, {n!r}, name={n!r})" for before, n in zip([None, *names], names))
    (package := root / "src/bench").mkdir(parents=True)
    for file, text in {"__init__.py": "", "settings.py": "", "pipeline_registry.py":
            "from functools import partial\nfrom cells import run\nfrom kedro.pipeline import node, pipeline\n\n"
            f"def call(name, *before):\n    run(name)\n    return name\n\ndef register_pipelines(): return {{'__default__': pipeline([{body}])}}\n"}.items():
        (package / file).write_text(text)
    for d in ("base", "local"): dump(root / f"conf/{d}/catalog.yml", {})
    with open(root / "pyproject.toml", "a") as f: f.write(f'\n[tool.kedro]\npackage_name = "bench"\nproject_name = "bench"\nkedro_init_version = "{PEERS["kedro"].partition("==")[2]}"\n')


@dataclass
class Contender:
    name: str
    command: str
    prepare: Callable # Of the project, its nodes, their values
    env: dict[str, str] = field(default_factory=dict) # '{root}': the project
    leaves: tuple[str, ...] = () # Patterns of its reports; '{}': the stage
    parent: str | None = None # 'cold': no warm parent is there; 'warm': one is, and has imported all
    venv: str | None = None # Of PEERS
    cached: bool = False # Whether a second run has nothing to do
    only: str = "" # Workload


IN_PLACE = {"MLKIT_OUTPUTS": "{root}"} # without mlkit's runner, `stage.output` writes where it belongs
PLAIN = IN_PLACE | {"MPLBACKEND": "agg"}
ours = partial(Contender, prepare=rendered, leaves=("reports/{}.ipynb", "reports/{}.html"), cached=True)
CONTENDERS = [
    Contender("bare script, one process", "python script.py", steps, PLAIN),
    ours("mlkit repro, parent cold", "mlkit repro", parent="cold"),
    ours("mlkit repro, parent warm", "mlkit repro", parent="warm"),
    ours("mlkit repro -j 2, parent warm", "mlkit repro -j 2", parent="warm", only="default"),
    ours("dvc repro of the mlkit project, parent warm", "dvc repro -q", parent="warm"),
    Contender("DVC + papermill", "dvc repro -q", papermill, IN_PLACE, ("reports/{}.ipynb",), cached=True),
    Contender("Calkit", "calkit run", calkit, IN_PLACE, (".calkit/notebooks/executed/nbs/stages/{}*.ipynb", ".calkit/notebooks/html/nbs/stages/{}*.html"), venv="calkit", cached=True),
    Contender("Metaflow", "python flow.py --quiet run", metaflow, PLAIN, venv="metaflow"),
    Contender("Kedro", "kedro run", kedro, PLAIN, venv="kedro"),
]


# Running

def environment(root: Path, venv: Path | None = None) -> dict[str, str]:
    "The variables of a run: the same for all but the path to their programs."
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "DVC_", "JPY_", "JUPYTER", "MLKIT_", "METAFLOW_", "KEDRO_", "CALKIT_", "PYTHON"))}
    here, own = root if (root / "mlkit").is_dir() else HERE, root.parent / "own" # what programs keep outside of projects
    return kept | {"PATH": os.pathsep.join([*([f"{venv}/bin"] if venv else []), str(BIN), os.environ["PATH"]]), "PYTHONPATH": f"{here}:{HERE}/bench",
        "PYTHONHASHSEED": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "1", "DVC_SITE_CACHE_DIR": f"{own}/site",
        "MLKIT_SERVING": os.environ.get("MLKIT_SERVING", f"{sys.prefix}/serving"), "JUPYTER_DATA_DIR": f"{own}/jupyter", "JUPYTER_PATH": f"{sys.prefix}/share/jupyter",
        "CALKIT_AUTO_UPGRADE": "no-check", "CALKIT_USER_HOME": f"{own}/home", "METAFLOW_USER": "bench", "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(root), "METAFLOW_HOME": f"{own}/metaflowconfig"}


def execute(command: list, cwd: Path, env: dict) -> float:
    "Wall-clock seconds of a command. Raises `RuntimeError` with the end of what it said where it fails."
    with open(cwd.with_suffix(".log"), "w+") as log:
        start = time.perf_counter()
        done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        log.seek(0)
        if done.returncode: raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{log.read()[-3000:]}")
    return seconds


def parents() -> list[psutil.Process]:
    "The warm parents of this benchmark, and kernels that they have forked: their sockets lie in a folder of ours."
    return [p for p in psutil.process_iter(["cmdline"]) if str(socket_path().parent) in " ".join(p.info["cmdline"] or []) and "mlkit.flow.warm" in " ".join(p.info["cmdline"])]


START_PARENT = """
from pathlib import Path
from mlkit.flow.config import instruction_set
from mlkit.flow.kernels import instruction_env, kernel_env
from mlkit.flow.warm import start_parent
print(start_parent(kernel_env(instruction_env(instruction_set(Path())))))
"""


def set_parent(state: str | None, root: Path, env: dict[str, str]):
    "Bring the warm parent for the kernels of a project into this state: gone, or alone with all that it imports."
    if state == "cold":
        for socket in socket_path().parent.glob("*.sock"): socket.unlink()
        for p in psutil.wait_procs(parents(), timeout=60)[1]: p.kill()
    if state == "warm":
        there = subprocess.run([sys.executable, "-c", START_PARENT], cwd=root, env=env, capture_output=True, text=True, check=True).stdout
        if not there.strip().endswith(".sock"): raise RuntimeError(f"no warm parent: {there}")
    busy = lambda: sum(sum(p.cpu_times()[:2]) for p in parents())
    before, after = -1, 0
    while after - before > 0.02 or state == "warm" and len(parents()) != 1: before = busy(); time.sleep(0.5 if parents() else 0); after = busy()


def once(contender: Contender, workload: Workload, template: Path, root: Path, envs: Path) -> dict: # 'seconds', of a run from nothing; 'again', of one with nothing to do; 'result'
    "Raises where the work was not done."
    shutil.copytree(template, root, symlinks=True)
    nodes = load_project(root)[0]
    env = environment(root, envs / f"peers-{contender.venv}" if contender.venv else None) | {k: v.format(root=root) for k, v in contender.env.items()}
    program, *args = contender.command.split()
    command = [shutil.which(program, path=env["PATH"]), *args]
    patterns = [p for n in nodes.values() for p in n.stage.outputs.values()] + [p.format(n) for n in nodes for p in contender.leaves]
    set_parent(contender.parent, root, env)
    found = {"seconds": execute(command, root, env)}
    made = {p: [f.stat().st_mtime_ns for f in root.glob(p)] for p in patterns}
    if missing := [p for p, files in made.items() if not files]: raise ValueError(f"{missing[0]} is missing")
    found["result"] = workload.result(root)
    if contender.cached:
        found["again"] = execute(command, root, env)
        if changed := [p for p in made if made[p] != [f.stat().st_mtime_ns for f in root.glob(p)]]: raise ValueError(f"the second run did something: {changed[0]}")
    return found


def install(envs: Path):
    "An environment a peer; each sees the packages of this one."
    for name, spec in PEERS.items():
        if (ready := envs / f"peers-{name}/ready").is_file() and ready.read_text() == spec: continue
        print(f"installing {spec}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", ready.parent], check=True)
        (site,) = ready.parent.glob("lib/python3*/site-packages")
        (site / "main.pth").write_text(sysconfig.get_path("purelib") + "\n")
        execute([sys.executable, "-m", "pip", "--python", ready.parent / "bin/python", "install", spec], ready.parent, dict(os.environ))
        ready.write_text(spec)


def template(workload: Workload, contender: Contender, root: Path) -> Path:
    "The project as a contender finds it: in git, its modules compiled, nothing run."
    root.mkdir(parents=True)
    workload.make(root)
    env = environment(root)
    execute(["git", "init", "-q"], root, env)
    if not (root / ".dvc").is_dir(): execute([BIN / "dvc", "init", "-q"], root, env)
    contender.prepare(root, *load_project(root))
    compileall.compile_dir(root, quiet=1)
    execute(["git", "add", "-A"], root, env)
    execute(["git", "-c", "user.name=bench", "-c", "user.email=bench@localhost", "commit", "-qm", "the project"], root, env)
    return root


def table(workload: Workload, contenders: list[Contender], repeats: list[dict]) -> str:
    "Figures of all repeats; ratios and differences are to the bare script of the same repeat."
    n, base = workload.n, contenders[0].name
    lines = [f"### {workload.title}\n", "| | runs notebooks, leaves | median s | min | max | against the bare script | s a notebook above it | nothing to do, s |", "|---|---|---|---|---|---|---|---|"]
    for c in contenders:
        runs = [r for r in repeats if c.name in r and base in r]
        if not runs: continue
        t, middle = [r[c.name]["seconds"] for r in runs], statistics.median
        ratio, above = (middle(f(r[c.name]["seconds"], r[base]["seconds"]) for r in runs) for f in (lambda x, y: x / y, lambda x, y: (x - y) / n))
        again = f"{middle(r[c.name]['again'] for r in runs):.1f}" if c.cached else "no cache"
        short = "" if len(runs) == len(repeats) else f" ({len(runs)} runs)"
        lines.append(f"| {c.name}{short} | {', '.join(Path(p).suffix[1:] for p in c.leaves) or 'no'} | {middle(t):.1f} | {min(t):.1f} | {max(t):.1f} | {ratio:.2f} | {above:.2f} | {again} |")
    return "\n".join(lines)


def further(fewer: Workload, more: Workload, state: dict) -> str:
    "What one more notebook costs: the start of Python and of its packages is in it no more."
    lines = ["### A further trivial notebook\n", f"| | s a notebook, from {fewer.n} to {more.n} | {fewer.n} take, median s | {more.n} take, median s |", "|---|---|---|---|"]
    for c in taking_part(more):
        few, many = (statistics.median(t) if (t := [r[c.name]["seconds"] for r in state.get(w.key, []) if c.name in r]) else None for w in (fewer, more))
        if few and many: lines.append(f"| {c.name} | {(many - few) / (more.n - fewer.n):.2f} | {few:.2f} | {many:.2f} |")
    return "\n".join(lines)


def taking_part(workload): return [c for c in CONTENDERS if workload.key.startswith(c.only)]


def measure(workload: Workload, args, state: dict, folder: Path, envs: Path):
    "Every contender in turn, `args.repeats` times; what is in `state` already is not done again."
    runs = state.setdefault(workload.key, [])
    for i in range(args.repeats):
        if i == len(runs): runs.append({})
        for c in taking_part(workload):
            if c.name in runs[i]: continue
            if not (made := folder / "templates" / workload.key / c.name).is_dir(): template(workload, c, made)
            print(f"{workload.key}, repeat {i + 1} of {args.repeats}: {c.name}", end=" ", file=sys.stderr, flush=True)
            try:
                found = once(c, workload, made, root := folder / "run/project", envs)
                if found["result"] != (first := state.setdefault("results", {}).setdefault(workload.key, found["result"])): raise ValueError(f"its result {found['result']} is not {first}")
                runs[i][c.name] = found
                write_json(args.state, state)
                print(f"{found['seconds']:.1f} s{f', again {again:.1f} s' if (again := found.get('again')) else ''}", file=sys.stderr)
            except (RuntimeError, ValueError) as e: print(f"does not count: {e}", file=sys.stderr)
            finally: shutil.rmtree(root.parent, ignore_errors=True)


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--repeats", type=int, default=7)
    args.add_argument("--only", choices=["trivial", "default"], default="")
    args.add_argument("--own", action="store_true", help="mlkit and the bare script only: no peer is installed.")
    args.add_argument("--envs", type=Path, default=Path(sys.prefix), help="Where the environments of the peers are, or are made (default: %(default)s).")
    args.add_argument("--state", type=Path, default=HERE / ".mlkit/peers.json", help="Where times are kept (default: %(default)s).")
    args.add_argument("--resume", action="store_true", help="Go on from what is kept, rather than anew.")
    args = args.parse_args()
    envs = args.envs.absolute()
    if args.own: CONTENDERS[1:] = [c for c in CONTENDERS if c.parent]
    else: install(envs)
    here = f"{machine('dvc', 'papermill', 'ipykernel', 'torch', 'mlflow')}, {', '.join(PEERS.values()).replace('==', ' ')}"
    state = read_json(args.state) if args.resume else {"machine": here}
    if state["machine"] != here: sys.exit(f"{args.state}: made with {state['machine']}; start anew, without --resume")
    workloads = [w for w in WORKLOADS if w.key.startswith(args.only)]
    with tempfile.TemporaryDirectory(prefix="mlkit-peers-") as d:
        os.environ["XDG_RUNTIME_DIR"] = d # a warm parent of our own
        folder = Path(d)
        try:
            for w in workloads: measure(w, args, state, folder, envs)
        finally: set_parent("cold", HERE, {})
    print(f"{here}; {args.repeats} repeats, in turn")
    for w in workloads: print("", table(w, taking_part(w), state[w.key]), sep="\n")
    if args.only != "default": print("", further(*WORKLOADS[:2], state), sep="\n")


if __name__ == "__main__": main()
