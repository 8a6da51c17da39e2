"""A clone with one finished and one failed run, reported: what the report tests and the browser test look at. Made once per session."""
import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import nbformat

TITLE = """# Union Mask, in small

> Does joining the masks of several pruning cycles help? Made-up accuracies.

Of $N$ weights at sparsity $S$, exactly $\\lfloor S N + \\frac{1}{2} \\rfloor$ are removed; `$HOME` is no formula. See [the other](failing.ipynb).

| network | sparsity | vanilla | Union Mask | difference | source of the number in this line of the table |
|---|---|---|---|---|---|
| ResNet32 | 98 % | 67.53 | 70.49 | +2.96 | README table of the repository, mean of three independent runs |

$$S_t = S \\left(1 - \\left(1 - \\frac{t - t_0}{T}\\right)^3\\right), \\qquad t_0 \\le t \\le t_0 + T$$"""
PARAMETERS = 'preset = "smoke"\nseeds = [0, 1, 2, 3]\nrun_dir = ""\nworkers = 1\ndataset = "digits"'
RUN = """import torch
from sparsedarts.reporting.trials import Trials

def trial(method, sparsity, seed):
    level = torch.randn(1, generator=torch.Generator().manual_seed(seed)).item()
    return dict(accuracy=60 + level + 2 * (method == "union") * (sparsity > 0.97) + seed * sparsity * len(method) / 50)

trials = Trials(run_dir)
results = trials.map(trial, [dict(method=m, sparsity=s, seed=k) for m in ("ramp", "union", "random union") for s in (0.9, 0.98) for k in seeds], workers=1)
table = trials.table()
table.pivot_table(index="method", columns=["sparsity", "seed"], values="accuracy", sort=False)"""
PICTURES = """from sparsedarts.plots import curves
from sparsedarts.reporting.widgets import mask_explorer, mask_strip
from sparsedarts.sparse.masks import Masks
cycles = {f"cycle {i}": Masks({"stem.conv.weight": torch.rand(16, 8, 3, 3, generator=torch.Generator().manual_seed(i)) > 0.9}) for i in range(4)}
display(curves(table, "sparsity", "accuracy", title="Test accuracy", ylabel="accuracy, %"), mask_explorer(cycles), mask_strip(cycles, "stem.conv.weight"))"""
JUDGE = """from sparsedarts.files import write_results
from sparsedarts.reporting.claims import Claim, NotTestable, PairedDifference, Published, verdicts
claims = [Claim("union-98", "At 98 % sparsity Union Mask ends more accurate than a linear ramp of equal length",
                Published("70.49", minus="67.53", unit="points", where="original README, table ResNet 32", verified=True), PairedDifference("union", "ramp", dict(sparsity=0.98)), controls=["random union"]),
          Claim("vgg", "The same holds for VGG19", Published("69.34", minus="67.48", unit="points"), NotTestable("VGG19 needs images of 32 x 32"))]
judged = verdicts(claims, table)
write_results(run_dir, paper="toy", parameters=dict(preset=preset, seeds=seeds, dataset=dataset), metrics=dict(best=1), claims=judged, trials=table.to_dict("records"), seconds=trials.seconds)
display(judged, judged.figure())
print("word " * 100, "averyveryverylongword" * 20)"""


def write(path, *cells):
    made = [nbformat.v4.new_markdown_cell(cells[0]), nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
    made += [nbformat.v4.new_markdown_cell(c) if c.startswith("#") else nbformat.v4.new_code_cell(c) for c in cells[1:]]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=made), path)


@functools.cache
def demo_report():
    "The folder of a clone whose report has been written."
    from sparsedarts.reporting.pages import keep_sample, write_report
    from sparsedarts.reporting.runs import reproduce
    root = Path(tempfile.mkdtemp(prefix="sparsedarts-demo-")).resolve()
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    (root / "settings.ini").touch()
    write(root / "nbs/papers/toy.ipynb", TITLE, "## The run", RUN, "## Pictures with $\\alpha$", PICTURES, "## Verdicts", JUDGE)
    write(root / "nbs/papers/failing.ipynb", "# A paper whose notebook fails\n\n> On purpose.", "dict()['a_long_key_that_is_missing_' * 12]")
    failing, toy = reproduce(root=root, jobs=2, echo=lambda line: None)
    assert (failing.status, toy.status) == ("failed", "done"), toy.error
    keep_sample(toy.folder, root)
    write_report(root)
    return root
