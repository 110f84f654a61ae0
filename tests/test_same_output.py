"The notebook that a warm kernel gives is the one that papermill gives with an ordinary kernel: outputs, displays, errors, metadata, and what code sees of its process."
import difflib, json, os, re, shutil, subprocess, sys
from concurrent.futures import ThreadPoolExecutor

import nbformat, psutil, pytest

from conftest import ROOT, wait_for
from mlkit.flow.warm import LAUNCHED

KERNELS = ("python3", "mlkit-warm")

DISPLAYS = """
from IPython.display import HTML, JSON, SVG, Image, Latex, Markdown, Pretty, clear_output, display, update_display
display(HTML("<b>bold</b>"), Markdown("*a*"), Latex("$x^2$"), JSON({"a": [1, {"b": 2}]}), Pretty("p"), SVG("<svg xmlns='http://www.w3.org/2000/svg'/>"))
---
handle = display("first", display_id="one"); update_display("second", display_id="one"); handle.update(HTML("<i>third</i>"))
---
print("gone"); clear_output(); print("stays"); clear_output(wait=True); print("stays instead")
---
display({"application/x-own+json": {"a": 1}, "text/plain": "own"}, raw=True, metadata={"application/x-own+json": {"k": 1}})
class Own:
    def __repr__(self): return "Own()"
    def _repr_mimebundle_(self, include=None, exclude=None): return {"text/html": "<u>own</u>", "text/plain": "own"}, {"text/html": {"isolated": True}}
Own()
---
import matplotlib.pyplot as plt
plt.plot([1, 2, 3], [3, 1, 2]); plt.title("shown by the cell's end")
---
fig, ax = plt.subplots(figsize=(2, 2)); ax.bar(["a", "b"], [1, 2]); plt.show(); print("after", plt.get_backend(), plt.get_fignums())
---
fig
---
%config InlineBackend.figure_formats = ["svg", "png"]
%config InlineBackend.print_figure_kwargs = {"metadata": {"Date": None}}
plt.rcParams["svg.hashsalt"] = "0"
plt.figure(figsize=(1, 1)); plt.scatter([1], [1]); plt.show()
---
print(plt.rcParams["backend"], plt.rcParams["figure.figsize"], plt.rcParams["figure.dpi"], plt.rcParams["lines.linewidth"], plt.isinteractive())
---
import pandas as pd
pd.DataFrame({"a": [1, 2], "b": ["x", None], "t": pd.to_datetime(["2026-01-01", None])}).style.format(na_rep="-").to_html(table_uuid="t")[:200]
---
pd.DataFrame({"a": range(100), "b": [0.1] * 100})
---
import polars as pl
display(pl.DataFrame({"a": range(100), "s": ["long" * 20] * 100}).group_by("s").agg(pl.col("a").sum())); pl.Series("x", [1.5, None])
---
import numpy as np, torch, sympy
display(np.arange(2000), torch.linspace(0, 1, 3), sympy.Symbol("x") ** 2); 1 + 1
---
%%html
<p>magic</p>
---
%%latex
\\alpha
---
import sklearn.linear_model
sklearn.linear_model.LinearRegression().fit([[1.0], [2.0]], [1, 2]).coef_
---
_; __; Out.keys(), get_ipython().execution_count
"""

STREAMS = """
import logging, os, subprocess, sys, time, warnings
print("out", flush=True); print("err", file=sys.stderr)
---
os.write(1, b"fd 1\\n"); subprocess.run(["sh", "-c", "echo from sh"]); os.system("echo system")
import ctypes
libc = ctypes.CDLL(None); libc.puts(b"from C"); libc.fflush(None); time.sleep(1) # a thread of the kernel reads that
---
os.write(2, b"fd 2\\n"); subprocess.run(["sh", "-c", "echo from sh >&2"])
import cv2
str(cv2.imread("no/such/file.png")), time.sleep(1)
---
!echo by the shell; exit 3
---
_exit_code, subprocess.run(["cat"], capture_output=True, text=True).stdout, os.fstat(0).st_rdev, type(sys.stdin).__name__
---
%%bash
echo a script; echo its error >&2
---
logging.getLogger("own").warning("of a library"); logging.getLogger("own").info("not seen")
---
logging.basicConfig(level="INFO", format="%(levelname)s %(message)s"); logging.info("root"); logging.getLogger("own").info("seen")
---
import optuna, mlflow.tracking, torch
optuna.logging.get_logger("optuna").warning("of optuna"); print("between", file=sys.stderr)
logging.getLogger("mlflow").warning("of mlflow"); logging.getLogger("torch.distributed").error("of torch")
---
[type(h.stream).__name__ for n in ("optuna", "torch") for h in logging.getLogger(n).handlers], logging.root.handlers
---
warnings.warn("mine"); warnings.warn("future", FutureWarning); warnings.warn("old", DeprecationWarning); warnings.warn("late", PendingDeprecationWarning)
---
import numpy as np
np.array([1.0]) / 0, np.log(-np.ones(1)), int(np.int8(127) + np.int8(1))
---
import torch
torch.nn.functional.softmax(torch.ones(2)), torch.arange(4, dtype=torch.int8).numpy()
---
import pandas as pd
d = pd.DataFrame({"a": [1, 2]}); d["a"][0] = 5; d
---
from tqdm import tqdm
for i in tqdm(range(3), bar_format="{desc}{n_fmt}/{total_fmt}", desc="bar ", mininterval=0, miniters=1): pass
---
from tqdm.auto import tqdm as auto
for i in auto(range(2), bar_format="{n_fmt}/{total_fmt}"): pass
---
from rich.console import Console
Console().print("[bold]rich[/]", {"a": 1}); sys.stdout.isatty(), sys.stdout.encoding, type(sys.stdout).__name__, sys.__stdout__.encoding, sys.__stdout__.fileno(), sys.__stderr__.fileno()
---
import threading
t = threading.Thread(target=lambda: print("in a thread")); t.start(); t.join()
---
print("no newline", end=""); sys.stdout.write("é☃"); None
"""

STATE = """
import asyncio, atexit, decimal, gc, importlib, locale, logging, multiprocessing, os, random, resource, signal, sys, tempfile, threading, time, weakref
(mask := os.umask(0), os.umask(mask))[0], os.getcwd(), [resource.getrlimit(getattr(resource, n)) for n in sorted(dir(resource)) if n.startswith("RLIMIT_")], os.nice(0), os.sched_getaffinity(0)
---
sorted(os.environ.items())
---
sys.argv[0], len(sys.argv), sys.path, __name__, sys.flags, sys.warnoptions, sys.dont_write_bytecode, sys.executable, sys.prefix, sys.modules["__main__"].__dict__.get("__file__"), sys.orig_argv[:3]
---
[(s.name, str(signal.getsignal(s))) for s in signal.Signals], signal.pthread_sigmask(signal.SIG_BLOCK, [])
---
[t.name for t in threading.enumerate()], os.getsid(0) == os.getpid() == os.getpgid(0)
---
locale.setlocale(locale.LC_ALL), locale.getpreferredencoding(), time.tzname, time.strftime("%c %Z", time.localtime(0)), sys.getfilesystemencoding()
---
tempfile.gettempdir(), multiprocessing.get_start_method(), multiprocessing.process.ORIGINAL_DIR, multiprocessing.current_process().name, sys.getrecursionlimit(), gc.get_threshold(), gc.isenabled(), sys.getswitchinterval()
---
logging.root.handlers, logging.root.level, decimal.getcontext(), sys.excepthook.__qualname__, sys.displayhook.__class__.__name__, asyncio.get_event_loop_policy().__class__.__name__
---
import numpy as np, torch
torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_default_dtype(), np.geterr(), np.get_printoptions()
---
import threadpoolctl, polars, sklearn.metrics
polars.thread_pool_size(), sorted({(p["user_api"], p["num_threads"]) for p in threadpoolctl.threadpool_info()}) # the warm one has more libraries
---
# Each kernel has random states of its own: what it draws goes to a file.
drawn = [random.random(), np.random.rand(), torch.rand(1).item(), np.random.default_rng().random(), tempfile.mktemp(), multiprocessing.current_process().authkey.hex()]
open(f"drawn-{os.getpid()}", "w").write("\\n".join(map(str, drawn))); None
---
import mlkit; mlkit.__file__, importlib.util.find_spec("only_where_the_parent_was_started")
---
import captum.attr, matplotlib, pandas
captum.__name__, dict(matplotlib.rcParams), matplotlib.get_configdir(), matplotlib.matplotlib_fname(), pandas.get_option("display.max_rows"), pandas.get_option("plotting.backend")
---
with multiprocessing.get_context("spawn").Pool(1) as pool: print(pool.map(abs, [-1]), pool.apply(os.getcwd), pool.apply(os.getenv, ["OMP_NUM_THREADS"]))
---
with multiprocessing.get_context("fork").Pool(1) as pool: print(pool.map(abs, [-1]))
---
open(f"kernel-{os.getpid()}", "w").write(open("/proc/self/cmdline").read()); None
"""

ERRORS = {"exception": """
print("before")
---
def f(x): return 1 / x
try: f(0)
except ZeroDivisionError as e: raise ValueError("chained") from e
---
print("never")
""", "signal": "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT); time.sleep(60)", "exit": "import sys\nsys.exit(3)\n---\nprint('never')",
"exit 0": "raise SystemExit\n---\nprint('after')", "quit": "exit()", "killed": "import os, time\ntime.sleep(1); os.kill(os.getpid(), 9)",
"expected": "\n---\n".join(f"#raises-exception\n{e}" for e in (
    "print('a')\nif True\n    pass", "import numpy as np\nassert np.arange(3).sum() == 4, 'sums differ'", "import pandas as pd\npd.DataFrame({'a': [1]})['b']",
    "import torch\ntorch.ones(2) @ torch.ones(3)", "import no_such_module_at_all", "input('?')", "raise ExceptionGroup('g', [ValueError(1), TypeError(2)])",
    "class Own(Exception): 'mine'\nraise Own({'a': 1})", "%no_such_magic", "%%bash\nexit 4", "raise KeyboardInterrupt", "sys"))}

PARAMETERS = """
#parameters
n = 1
name = "default"
flags = []
rate: float = 0.5
nothing = 0
nested = {}
on = True
untouched = "kept"
---
n, name, flags, rate, nothing, nested, on, untouched, {k: type(v).__name__ for k, v in dict(n=n, name=name, rate=rate, nested=nested).items()}
---
#keep
print("tagged")
---
import atexit, weakref
class Thing: pass
thing, ended = Thing(), "ended-warm" if b"mlkit.flow.warm" in open("/proc/self/cmdline", "rb").read() else "ended"
weakref.finalize(thing, lambda: open(ended, "a").write("finalize ")); atexit.register(lambda: open(ended, "a").write("atexit ")); None
---
#hide-input
await __import__("asyncio").sleep(0.01, "top-level await")
"""
GIVEN = {"n": 3, "name": "it's \"quoted\"\n", "flags": [True, None, 1.5, "x"], "rate": 1e-300, "nothing": None, "nested": {"a": {"b": [1, 2]}}, "on": False}

def notebook(text):
    "Cells between lines of dashes; a first line `#tag` tags its cell."
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}, "own": {"kept": True}})
    nb.cells = [nbformat.v4.new_markdown_cell("# Text", id="text")]
    for i, source in enumerate(text.strip("\n").split("\n---\n")):
        tag = re.match("#([a-z-]+)\n", source)
        nb.cells.append(nbformat.v4.new_code_cell(source, id=f"c{i}", metadata={"tags": [tag[1]]} if tag else {}))
    return nb

def run_both(text, folder, parameters={}):
    "The notebook run by papermill with either kernel, both at once: [(what papermill raised, its output without what cannot be equal)]."
    import papermill
    os.environ.pop("PYTEST_CURRENT_TEST", None) # where it is set a kernel does not catch what is written to a file descriptor
    from papermill.exceptions import PapermillExecutionError
    def one(kernel):
        path = folder / f"{kernel}.ipynb"
        # papermill's own `cwd` changes the folder of the whole process, and another thread is at work: a kernel may start, and write, in the wrong one
        try: raised = papermill.execute_notebook(notebook(text), str(path), parameters, kernel_name=kernel, resources={"metadata": {"path": str(folder)}}, progress_bar=False, execution_timeout=600, start_timeout=300) and None
        except Exception as e: raised = [type(e).__name__, plain(str(e)), *(map(repr, (e.cell_index, e.exec_count, e.ename, e.evalue)) if isinstance(e, PapermillExecutionError) else [])]
        return raised, comparable(nbformat.read(path, 4))
    with ThreadPoolExecutor(2) as pool: return list(pool.map(one, KERNELS))

def plain(text): # without a process's id in the name of a cell's file, addresses, and the times (and the id after them) that loggers print
    return re.sub(r"(?<=ipykernel_)\d+|(?<=0x)[0-9a-f]{6,}|\d\d:\d\d:\d\d([.,]\d+)?( \d+)?|(?<=WARN:0@)[\d.]+", "", text)

def comparable(nb):
    "What papermill wrote, without times, drawn ids and the output's own path; pieces of one stream joined."
    def walk(x):
        if isinstance(x, dict): return {k: walk(v) for k, v in x.items() if k not in {"start_time", "end_time", "duration", "output_path"}}
        if isinstance(x, list): return [walk(v) for v in x]
        return plain(x) if isinstance(x, str) else x
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
        if {"injected-parameters", "papermill-error-cell-tag"} & {*cell.metadata.get("tags", [])}: cell.id = "drawn"
        joined = []
        for o in cell.get("outputs", []):
            if joined and o.output_type == joined[-1].output_type == "stream" and o.name == joined[-1].name: joined[-1].text += o.text
            else: joined.append(o)
        if "outputs" in cell: cell.outputs = joined
    return walk(json.loads(json.dumps(nb)))

def same(both):
    "What papermill raised and the one output, after a comparison of both."
    (cold_raised, cold), (warm_raised, warm) = both
    lines = [json.dumps(x, indent=1, ensure_ascii=False).replace("\\n", "\n").splitlines() for x in ([cold_raised, cold], [warm_raised, warm])]
    if diff := [l[:300] for l in difflib.unified_diff(*lines, *KERNELS, lineterm="", n=0)]: pytest.fail("\n".join(diff))
    assert both[0] == both[1]
    return cold_raised, cold

@pytest.fixture(autouse=True)
def as_mlkit_asks(monkeypatch):
    "No warning of tqdm when it is imported: in a warm kernel that has happened already."
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    before = set(os.listdir(ROOT)), os.getcwd()
    yield len(LAUNCHED)
    assert (set(os.listdir(ROOT)) - {".pytest_cache"}, os.getcwd()) == (before[0] - {".pytest_cache"}, before[1]), "a test has left something, or moved"

@pytest.mark.parametrize("name", ["displays", "streams", "parameters"])
def test_outputs(name, tmp_path, as_mlkit_asks):
    raised, nb = same(run_both(globals()[name.upper()], tmp_path, GIVEN if name == "parameters" else {}))
    outputs = [o for c in nb["cells"] for o in c.get("outputs", [])]
    assert raised is None and len(LAUNCHED) == as_mlkit_asks + 1 and len(outputs) >= {"displays": 20, "streams": 20, "parameters": 3}[name]
    if name == "displays": assert sum("image/png" in o.get("data", {}) for o in outputs) == 4
    if name == "parameters": assert sorted((tmp_path / "ended-warm").read_text().split()) == ["atexit", "finalize"] # an ordinary one may hang before, and be killed

def test_errors(tmp_path, as_mlkit_asks):
    "What papermill raises, and the notebook with its marks."
    folders = {n: tmp_path / str(i) for i, n in enumerate(ERRORS)}
    for f in folders.values(): f.mkdir()
    with ThreadPoolExecutor(4) as pool: raised = dict(zip(ERRORS, pool.map(lambda n: same(run_both(ERRORS[n], folders[n]))[0], ERRORS)))
    assert {n for n, r in raised.items() if r is None} == {"exit 0", "quit"} and len(LAUNCHED) == as_mlkit_asks + len(ERRORS), raised

IN_STATE = """
import json, os, sys; from pathlib import Path
env = dict(os.environ); sys.path[:0] = [{tests!r}]; from test_same_output import DRAW, OWN, STATE, run_both; from mlkit.flow.warm import socket_path
os.environ.clear(); os.environ.update(env) # cv2 has changed it
print(json.dumps([run_both(globals()[sys.argv[1]], Path.cwd()), str(socket_path())]))
"""
DRAW = """
import multiprocessing, os, random, tempfile
---
import numpy as np, torch
---
""" + next(c for c in STATE.split("\n---\n") if "drawn-" in c)
OWN = """
import safetensors, matplotlib; matplotlib.rcParams["lines.linewidth"], getattr(safetensors, "MINE", None)
"""

def elsewhere(folder, *code, umask="027", **env):
    "A process that has its own parent of kernels, and other umask, limits, niceness, ignored signals, locale, time zone and variables than this one."
    own = {"XDG_RUNTIME_DIR": folder / "run", "TMPDIR": folder / "tmp", "TZ": "Asia/Kolkata", "LC_ALL": "C", "OMP_NUM_THREADS": 1, "OPENBLAS_NUM_THREADS": 3, "POLARS_MAX_THREADS": 3, "PYTHONHASHSEED": 0, "ANY_OTHER": "x"}
    for d in ("run", "tmp"): (folder / d).mkdir(exist_ok=True)
    shell = ["sh", "-c", f'umask {umask}; ulimit -S -n 5{umask};  ulimit -c 0; trap "" HUP; exec "$@"', "-", "nice", "-n", "3", "taskset", "-c", min(os.sched_getaffinity(0))]
    done = subprocess.run(list(map(str, [*shell, sys.executable, "-P", "-c", *code])), cwd=folder / "project", env=os.environ | {k: str(v) for k, v in (own | env).items()}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout

@pytest.fixture(scope="module")
def state(tmp_path_factory):
    "Two checkouts with one environment: the parent is started in one, the kernels are asked for in the other."
    folder = tmp_path_factory.mktemp("state")
    for name in ("only", "own"): shutil.copytree(ROOT / "mlkit", folder / name / "mlkit")
    (folder / "project").mkdir()
    (folder / "only/only_where_the_parent_was_started.py").touch()
    (folder / "project/random.py").touch() # the folder comes after the standard library
    yield folder
    for p in (folder / "run").rglob("*.sock"): p.unlink() # a parent without its socket ends

def both_in(state, notebook, *path):
    (*both, ), socket = json.loads(elsewhere(state, IN_STATE.format(tests=str(ROOT / "tests")), notebook, PYTHONPATH=os.pathsep.join(map(str, path))))
    assert [str(p) for p in (state / "run").rglob("*.sock")] == [socket]
    return both

def test_state(state):
    "What code sees of its process; in a kernel that is warm."
    socket = elsewhere(state, "from mlkit.flow.warm import start_parent; print(start_parent())", umask="000", PYTHONPATH=state / "only").strip()
    def serving(): return [p.memory_info().rss for p in psutil.process_iter(["cmdline"]) if socket in (p.info["cmdline"] or [])]
    wait_for(lambda: len(rss := serving()) == 1 and rss[0] > 3e8, "the heir, which has imported all, has taken over")
    assert same(both_in(state, "STATE", state / "own"))[0] is None
    assert [str(p) for p in (state / "run").rglob("*.sock")] == [socket], "another parent took its place"
    project = state / "project"
    assert [("mlkit.flow.warm" in f.read_text()) for f in project.glob("kernel-*")].count(True) == 1
    drawn = [f.read_text().splitlines() for f in project.glob("drawn-*")]
    assert len(drawn) == 2 and all(a != b for a, b in zip(*drawn))
    same(both_in(state, "DRAW", state / "own")) # with another kernel of the same parent
    drawn = [f.read_text().splitlines() for f in project.glob("drawn-*")]
    assert all(len(set(values)) == 4 for values in zip(*drawn)), "kernels of one parent share a random state"

def test_own_module(state, tmp_path):
    "A module of one's own with the name of a package that the parent has imported, or settings of matplotlib: an ordinary kernel takes the place of the warm one."
    def output(*path): return same(both_in(state, "OWN", state / "own", *path))[1]["cells"][1]["outputs"][0]["data"]["text/plain"]
    (tmp_path / "safetensors.py").write_text("MINE = 1")
    (state / "project/matplotlibrc").write_text("lines.linewidth: 7")
    assert "(7.0, None)" in output()
    (state / "project/matplotlibrc").unlink()
    assert "(1.5, 1)" in output(tmp_path)

def test_end(tmp_path):
    "A kernel ends with the process that has asked for it, also one that became an ordinary kernel."
    for own in (False, True):
        (folder := tmp_path / str(own)).mkdir()
        if own: (folder / "safetensors.py").touch()
        nbformat.write(notebook("import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"), folder / "nb.ipynb")
        asker = subprocess.Popen([sys.executable, "-c", "import papermill; papermill.execute_notebook('nb.ipynb', 'out.ipynb', kernel_name='mlkit-warm', progress_bar=False)"], cwd=folder, stdin=subprocess.DEVNULL)
        pid = wait_for(lambda: (folder / "pid").is_file() and (folder / "pid").read_text(), "a kernel")
        kernel = psutil.Process(int(pid))
        assert ("mlkit.flow.warm" in " ".join(kernel.cmdline())) is not own
        asker.kill(); asker.wait(300)
        kernel.wait(300)
