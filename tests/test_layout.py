"""The rules of CONTRIBUTING.md that a machine can check."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

import train_ddpm

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
UTILS = sorted((ROOT / "utils").glob("*.py"))


def imports(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
            names |= {"." * node.level + alias.name for alias in node.names} if not node.module else set()
    return names


def test_no_script_imports_a_script_and_nothing_needs_torchvision():
    assert len(SCRIPTS) >= 1 and len(UTILS) >= 10
    stems = {path.stem for path in SCRIPTS}
    for path in SCRIPTS + UTILS:
        names = imports(path)
        assert not names & stems, path
        assert not any("torchvision" in name for name in names), path


def test_utils_import_no_script_and_never_in_a_circle():
    stems = {path.stem for path in UTILS}
    siblings = {path.stem: {name[1:] for name in imports(path) if name[1:] in stems} for path in UTILS}
    visited = []

    def visit(name, above):
        assert name not in above, f"circle: {[*above, name]}"
        for sibling in siblings[name]:
            visit(sibling, [*above, name])
        visited.append(name)

    for name in siblings:
        visit(name, [])
    assert set(visited) == stems


@pytest.mark.parametrize("path", SCRIPTS + UTILS, ids=lambda path: path.name)
def test_a_file_can_be_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 350
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", UTILS, ids=lambda path: path.name)
def test_public_functions_say_what_they_do(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.col_offset == 0 and not node.name.startswith("_"):
            assert ast.get_docstring(node) or len(node.body) < 6, f"{path.name}: {node.name}"


def test_every_flag_is_tested_or_documented(capsys):
    with pytest.raises(SystemExit):
        train_ddpm.parse_args(["--help"])
    flags = set(re.findall(r"--([a-z][a-z_0-9]+)", capsys.readouterr().out)) - {"help"}
    flags = {flag for flag in flags if not flag.startswith("no-")}
    known = "\n".join(path.read_text() for path in [*(ROOT / "tests").glob("*.py"), ROOT / "README.md"])
    missing = sorted(flag for flag in flags if f"--{flag}" not in known)
    assert len(flags) > 55 and not missing


def test_readme_names_every_file_that_exists_and_no_other():
    text = (ROOT / "README.md").read_text()
    for path in SCRIPTS + [path for path in UTILS if path.stem != "__init__"]:
        assert path.name in text, path
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link


def test_the_mistake_of_a_flag_is_found_without_torch(tmp_path):
    """Parsing must not import what takes seconds."""
    program = "import sys, train_ddpm; train_ddpm.parse_args([]); assert not {'torch', 'diffusers'} & set(sys.modules)"
    import sys

    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
