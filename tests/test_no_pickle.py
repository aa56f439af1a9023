"""Nothing that a file may hold is ever run: no pickle is opened, and no text is taken for code."""

import ast
from pathlib import Path

PACKAGES = Path(__file__).parents[1] / "packages"
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "pickletools"}
CALLS = {
    "torch.load",
    "numpy.load",
    "np.load",
    "pandas.read_pickle",
    "pd.read_pickle",
    "yaml.unsafe_load",
    "yaml.full_load",
}
BUILT_IN = {"eval", "exec", "__import__"}
KEYWORDS = {"allow_pickle", "trust_remote_code", "weights_only"}

ALLOWED = {
    # A model goes from a run to its own worker processes as one message of multiprocessing's, which pickles every
    # message. It is made and read by processes of one program, through pipes that no other program has an end of, and
    # no file or network has a part in it. (Ray's engine likewise leaves messages between its processes to Ray.)
    "fl/src/lowrank_fl/flower/workers.py": {"import pickle", "pickle.dumps", "pickle.loads"},
    # CIFAR is published as pickles. An archive with another checksum than the published one is refused before anything
    # of it is read, and the unpickler makes plain data and numpy arrays alone.
    "fl/src/lowrank_fl/data/cifar.py": {"import pickle", "pickle.Unpickler"},
}


def uses(code: str) -> set[str]:
    """What of the above a module's code names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {f"import {alias.name}" for alias in node.names if alias.name.partition(".")[0] in MODULES}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            if (node.module or "").partition(".")[0] in MODULES or names & CALLS:
                found |= {f"import {name}" for name in names}
            found |= {f"import {name}" for name in names if name.rpartition(".")[2] in MODULES}
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name in CALLS or name.partition(".")[0] in MODULES:
                found.add(name)
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in BUILT_IN:
                found.add(node.func.id)
            found |= {f"{keyword.arg}=" for keyword in node.keywords if keyword.arg in KEYWORDS}
    return found


def test_no_code_of_ours_unpickles_but_where_it_is_said_why():
    files = sorted(PACKAGES.rglob("*.py"))
    assert len(files) > 100
    found = {file.relative_to(PACKAGES).as_posix(): uses(file.read_text(encoding="utf-8")) for file in files}
    assert {file: names for file, names in found.items() if names} == ALLOWED


def test_the_search_finds_what_it_looks_for():
    assert uses("import pickle") == {"import pickle"}
    assert uses("from pickle import loads") == {"import pickle.loads"}
    assert uses("from ray import cloudpickle") == {"import ray.cloudpickle"}
    assert uses("import torch\ntorch.load(path)") == {"torch.load"}
    assert uses("from torch import load") == {"import torch.load"}
    assert uses("model = AutoModel.from_pretrained(name, trust_remote_code=True)") == {"trust_remote_code="}
    assert uses("x = eval(text)") == {"eval"}
    assert uses("model.eval()\nre.compile(text)\nlowrank_core.load(model, path)") == set()
