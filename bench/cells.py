"""The code cells of stage notebooks as plain Python: for peers that do not run notebooks, and the bare script that all are compared with.

What a cell shows is kept, and its figures are drawn, as in a notebook, but nothing of IPython runs.
"""
import ast, io, runpy, sys

KEPT = [] # what was shown


def show(*values, raw=False):
    "What `display` does, without a page to show it on."
    for v in values: KEPT.append(v._repr_html_() if hasattr(v, "_repr_html_") else repr(v))


def draw():
    "Draw the figures that a cell has left open."
    if plt := sys.modules.get("matplotlib.pyplot"):
        for i in plt.get_fignums():
            plt.figure(i).savefig(png := io.BytesIO(), format="png", bbox_inches="tight")
            KEPT.append(png.getvalue())
        plt.close("all")


def script(
    cells: list[dict], # Code cells, from `mlkit.flow.config.code_cells`
    values: dict, # Parameters: replace those of the cell tagged so
) -> str:
    "The cells as one module."
    parts = ["from cells import draw, show, show as display"]
    for cell in cells:
        tree = ast.parse(cell["source"])
        if tree.body and isinstance(last := tree.body[-1], ast.Expr) and not cell["source"].rstrip().endswith(";"):
            last.value = ast.Call(ast.Name("show"), [last.value], [])
        parts.append(ast.unparse(ast.fix_missing_locations(tree)))
        if "parameters" in cell["metadata"].get("tags", []): parts += [f"{k} = {v!r}" for k, v in values.items()]
        parts.append("draw()")
    return "\n".join(parts) + "\n"


def run(name: str):
    "Run what `script` has made of a stage, from the project's folder."
    runpy.run_path(f"steps/{name}.py", run_name=name)
