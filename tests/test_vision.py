"""torchvision is imported late, and also where its compiled part does not fit: each case in an interpreter of its own."""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def fresh(program: str) -> str:
    "Run a program in a clean interpreter, return what it printed."
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_digits_and_folders_do_without_torchvision():
    program = """
import sys, pathlib, tempfile
import sparsedarts.data.loading as loading
early = [name for name in ("torchvision", "sklearn", "matplotlib", "pandas", "PIL", "IPython") if name in sys.modules]
assert not early, early
data = loading.load_data("digits")
x, y = next(data.train.batches(32, augment=True))
from PIL import Image
with tempfile.TemporaryDirectory() as folder:
    for part in ("train", "test"):
        for kind in "ab":
            (pathlib.Path(folder) / part / kind).mkdir(parents=True)
            for i in range(2): Image.new("RGB", (8, 8), (90 * i, 30, 60)).save(pathlib.Path(folder) / part / kind / f"{i}.png")
    loading.load_data(f"imagefolder:{folder}")
print(tuple(x.shape), "torchvision" in sys.modules)
"""
    assert fresh(program) == "(32, 1, 8, 8) False"


TRANSFORM = """
from torchvision import transforms
from PIL import Image
picture = Image.new("RGB", (32, 32))
usual = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()])
print(tuple(usual(picture).shape))
"""


def test_a_transform_is_built_after_our_import():
    assert fresh("import sparsedarts.vision as v; v.import_torchvision()" + TRANSFORM) == "(3, 32, 32)"


def test_what_a_failed_import_left_behind_is_no_obstacle():
    before = "for _ in range(2):\n    try: import torchvision\n    except RuntimeError: pass\n"
    assert fresh(before + "import sparsedarts.vision as v; v.import_torchvision(); v.import_torchvision()" + TRANSFORM) == "(3, 32, 32)"


HALF = '''
import pathlib, sys, tempfile
folder = pathlib.Path(tempfile.mkdtemp())
package = folder / "torchvision"
package.mkdir()
(package / "extension.py").write_text("loaded = True")
(package / "__init__.py").write_text("""
import torch
from . import extension
torch.library.register_fake("torchvision::nms")(lambda dets, scores, iou_threshold: dets)
torch.library.register_fake("torchvision::qnms")(lambda dets, scores, iou_threshold: dets)
complete = True
""")
sys.path.insert(0, str(folder))
'''


def test_the_remedy_itself_with_a_package_that_always_fails_first():
    "Runs on every machine: a stand-in that describes the operators without having them."
    program = HALF + """
try: import torchvision
except RuntimeError as error: print("nms does not exist" in str(error), "torchvision.extension" in sys.modules, end=" ")
from sparsedarts import vision
print(vision.import_torchvision().complete, vision.import_torchvision() is sys.modules["torchvision"], vision._signatures is not None)
"""
    assert fresh(program) == "True True True True True"


def test_other_failures_pass_through():
    program = HALF + """
(package / "__init__.py").write_text("raise RuntimeError('no driver')")
from sparsedarts import vision
try: vision.import_torchvision()
except RuntimeError as error: print(error, vision._signatures)
"""
    assert fresh(program) == "no driver None"


def test_a_healthy_package_is_left_alone():
    "Declaring operators that exist would abort the interpreter, so a working import must never lead there."
    program = HALF + """
(package / "__init__.py").write_text("version = 7")
from sparsedarts import vision
print(vision.import_torchvision().version, vision._signatures)
"""
    assert fresh(program) == "7 None"
