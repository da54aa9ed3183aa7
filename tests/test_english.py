"""The rules of CONTRIBUTING.md about English that a machine can check, over all texts of the repository.

Texts are docstrings, comments, other strings outside of the tests, and Markdown text outside of code.
"""

import ast
import io
import re
import subprocess
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
LISTED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
FILES = [ROOT / name for name in LISTED if name.endswith((".py", ".md")) and (ROOT / name).is_file()]
FILES = [path for path in FILES if path != Path(__file__)]
QUESTIONS = ("What", "How", "Which", "Where", "Whether", "Who", "When")
NOT_HERE = (  # words that a reader has to translate
    "whose", "mended", "mends?", "anew", "for ever", "nobody", "somebody", "be it", "begun", "wants?", "of before",
    "of now", "go(?:es)? on", "went on", "said", "rungs?", "siblings?", "wings?",
)  # fmt: skip


def docstrings(tree):
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                yield first.lineno, first.value.value


def texts(path):
    """Yield line and text of each docstring, comment and string of a module, or of each line of a page."""
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        plain = re.sub(r"```.*?```", lambda code: "\n" * code[0].count("\n"), content, flags=re.S)
        yield from ((number, re.sub(r"`[^`]*`", "", line)) for number, line in enumerate(plain.splitlines(), 1))
        return
    tree = ast.parse(content)
    yield from docstrings(tree)
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    if "tests" not in path.parts:
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                yield node.lineno, node.value


def name_of(path):
    return str(path.relative_to(ROOT))


def modules():
    return ((path, path.read_text(encoding="utf-8")) for path in FILES if path.suffix == ".py")


def test_a_docstring_begins_with_a_verb_or_names_what_is_returned():
    found = [
        f"{name_of(path)}:{line}: {text.strip().splitlines()[0]}"
        for path, content in modules()
        for line, text in docstrings(ast.parse(content))
        if re.match(rf"\s*(?:{'|'.join(QUESTIONS)})\b", text)
    ]
    assert not found, "\n".join(found)


def test_arguments_and_help_texts_are_noun_phrases():
    found = []
    for path, content in modules():
        for line, text in docstrings(ast.parse(content)):
            entries = re.findall(r"^ +\w[\w, ]*: (?:of|by|from) .*", text, re.M)
            found += [f"{name_of(path)}:{line}: {entry.strip()}" for entry in entries]
        helps = re.findall(r'help="((?:of|how|what|whether|which|where)\b[^"]*)"', content)
        found += [f"{name_of(path)}: help={text}" for text in helps]
    assert not found, "\n".join(found)


def test_no_word_has_to_be_translated():
    pattern, found = re.compile(rf"\b(?:{'|'.join(NOT_HERE)})\b", re.I), []
    for path in FILES:
        for line, text in texts(path):
            for hit in pattern.finditer(text):
                found.append(f"{name_of(path)}:{line}: {text[max(0, hit.start() - 40) : hit.end() + 20]!r}")
    assert not found, "\n".join(found)
