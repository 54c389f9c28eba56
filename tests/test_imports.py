"""Who may import whom, and what is in the wheel."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"upo": ROOT / "upo", "upo_mlx": ROOT / "upo_mlx", "upo_torch": ROOT / "upo_torch", "upo_cli": ROOT / "cli" / "upo_cli"}
FRAMEWORKS = {"torch", "mlx", "mlx_lm", "peft", "bitsandbytes", "accelerate", "flash_attn", "trl", "tensorflow", "jax"}
# What each package may import beside the standard library, itself and other third-party packages that are no framework.
ALLOWED = {
    "upo": set(),
    "upo_mlx": {"upo", "mlx", "mlx_lm"},
    "upo_torch": {"upo", "torch", "peft", "bitsandbytes", "accelerate", "flash_attn"},
    "upo_cli": {"upo"},
}
# Slow to import, so the core takes them inside functions only.
LAZY = {"transformers", "huggingface_hub", "safetensors", "pyarrow", "datasets", "tokenizers", "gguf", "rich"}


def imports(path: Path) -> list[tuple[str, int, bool]]:
    """(top-level package, line, whether it runs at import) of every import in a file; those under TYPE_CHECKING are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: list[tuple[str, int, bool]] = []

    def visit(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name.split(".")[0], node.lineno, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found.append(((node.module or "").split(".")[0], node.lineno, top))
        for child in ast.iter_child_nodes(node):
            visit(child, top and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    visit(tree, True)
    return found


def faults(package: str, path: Path) -> list[str]:
    told = []
    for name, line, top in imports(path):
        foreign = (name in FRAMEWORKS or name in FOLDERS) and name != package and name not in ALLOWED[package]
        if foreign:
            told.append(f"{path.relative_to(ROOT)}:{line}: {package} must not import {name}")
        if package == "upo" and top and name in LAZY:
            told.append(f"{path.relative_to(ROOT)}:{line}: import {name} inside a function")
    return told


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def modules(package: str) -> list[str]:
    names = [path.relative_to(FOLDERS[package]).with_suffix("") for path in sorted(FOLDERS[package].rglob("*.py"))]
    return [".".join((package, *name.parts)).removesuffix(".__init__") for name in names]


@pytest.mark.parametrize("package", FOLDERS)
def test_import_rule(package):
    files = sorted(FOLDERS[package].rglob("*.py"))
    assert files
    assert [fault for path in files for fault in faults(package, path)] == []


def test_the_rule_sees_a_fault(tmp_path, monkeypatch):
    """The rule itself: a framework in the core, also inside a function; a slow import at the top only; TYPE_CHECKING is exempt."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "x.py"
    path.write_text("import safetensors\nif TYPE_CHECKING:\n    import torch\ndef f():\n    import safetensors\n    from mlx.core import exp\n")
    assert faults("upo", path) == ["x.py:1: import safetensors inside a function", "x.py:6: upo must not import mlx"]
    path.write_text("import upo_torch\nimport upo.losses\nimport mlx.core\n")
    assert faults("upo_mlx", path) == ["x.py:1: upo_mlx must not import upo_torch"]
    assert faults("upo_cli", path) == ["x.py:1: upo_cli must not import upo_torch", "x.py:3: upo_cli must not import mlx"]


@pytest.mark.parametrize(("package", "blocked"), [("upo_mlx", ("torch", "peft")), ("upo_torch", ("mlx", "mlx_lm"))])
def test_a_backend_works_without_the_other_framework(package, blocked):
    framework = "mlx" if package == "upo_mlx" else "torch"
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f'{framework} is not installed: pip install "upo[{framework}]"')
    other = "upo_torch" if package == "upo_mlx" else "upo_mlx"
    code = f"import sys, importlib\nfor name in {(*blocked, other)!r}: sys.modules[name] = None\nfor name in {modules(package)!r}: importlib.import_module(name)"
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_the_core_works_without_any_framework():
    code = (
        f"import sys, importlib\nfor name in {sorted(FRAMEWORKS | {'transformers', 'safetensors', 'huggingface_hub', 'pyarrow', 'datasets'})!r}: sys.modules[name] = None\n"
        f"for name in {modules('upo')!r}: importlib.import_module(name)"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments):
    heavy = ("numpy", "pydantic", "rich", "yaml", "transformers", "huggingface_hub", "torch", "mlx", "mlx_lm", "upo_torch", "upo_mlx")
    code = f"""
import sys
from upo_cli.main import main
try:
    main({arguments!r})
except SystemExit as end:
    assert not end.code, end.code
print([name for name in {heavy!r} if name in sys.modules])
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert "upo" in done.stdout


def test_twin_packages_have_the_same_files():
    """Knowing one backend is knowing the other. A file that one of them needs alone is named here, with its reason."""
    alone = {"upo_torch": {"attention.py", "classify.py", "lora.py"}, "upo_mlx": {"exp.py", "family.py", "quantize.py", "recompute.py", "shared.py"}}
    files = {name: {path.name for path in FOLDERS[name].glob("*.py")} for name in alone}
    shared = {name: found - alone[name] for name, found in files.items()}
    assert shared["upo_mlx"] == shared["upo_torch"]
    assert {"ops.py", "logps.py", "model.py", "step.py", "state.py", "generate.py", "device.py", "selfcheck.py"} <= shared["upo_mlx"]


def test_wheel_packages():
    """Hatch takes the four packages and strips `cli/`; no folder beside them is importable, and each folder of code is a package."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = re.search(r"\[tool\.hatch\.build\.targets\.wheel\]\npackages = \[(.*)\]", text)
    assert packages is not None
    assert {path.strip(' "') for path in packages[1].split(",")} == {"upo", "upo_mlx", "upo_torch", "cli/upo_cli"}
    for name in ("cli", "tests", "examples", "docs", "benchmarks"):
        assert not (ROOT / name / "__init__.py").exists(), f"{name}/ must not be importable"
    for folder in FOLDERS.values():
        for path in folder.rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), f"{path.parent} holds code and no __init__.py: it would be left out"


def test_public_names():
    import upo

    assert upo.__all__ == sorted(upo.__all__)
    for name in upo.__all__:
        assert getattr(upo, name) is not None
        assert find_spec(f"upo.{name}") is None, f"importing the module upo.{name} would put it in the place of upo.{name}"
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        upo.nope  # noqa: B018


def test_version_is_that_of_the_project():
    import upo

    assert f'version = "{upo.__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
