"""The README and docs: their examples run in order and print what they say."""

import ast
import contextlib
import inspect
import io
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import optaxclip

README = Path(__file__).parents[1] / "README.md"
PAGES = [README, README.parent / "docs" / "choosing.md"]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PROCESSES = "jax.distributed.initialize"
EXPECTED = re.compile(r"#\s*->\s*(.*)$")


def words(text):
    return text.replace("[", "[ ").replace("]", " ]").split()


def run(source, namespace):
    """Runs statement by statement; returns what printed without a `# ->`, and pairs."""
    lines = source.splitlines()
    free, pairs = "", []
    for node in ast.parse(source).body:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            code = ast.Module([node], type_ignores=[])
            exec(compile(code, str(README), "exec"), namespace)
        found = EXPECTED.search(lines[(node.end_lineno or 1) - 1])
        if found:
            pairs.append((ast.unparse(node), out.getvalue(), found[1]))
        else:
            free += out.getvalue()
    return free, pairs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_print_what_they_say(page):
    namespace = {"__name__": "readme"}
    printed, count = "", 0
    for language, source in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "text":
            assert printed == source
            printed = ""
            continue
        assert language == "python", language
        if PROCESSES in source:
            continue
        assert not printed, "what is printed needs a `# ->` or a text block"
        printed, pairs = run(source, namespace)
        assert source.count("# ->") == len(pairs)
        for statement, got, want in pairs:
            assert words(got) == words(want), statement
        count += len(pairs)
    assert not printed
    assert count


@pytest.mark.timeout(120)
def test_the_script_of_two_processes_prints_what_it_says(tmp_path):
    (source,) = [s for _, s in BLOCK.findall(README.read_text()) if PROCESSES in s]
    (want,) = [m[1] for line in source.splitlines() if (m := EXPECTED.search(line))]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "processes.py"
    script.write_text(source.replace("localhost:9876", f"localhost:{port}"))
    # A proxy would be asked for the loopback address.
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, script, str(rank)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env=environment,
                )
            )
            for rank in (0, 1)
        ]
        for process in started:
            stack.callback(process.kill)
        for rank, process in enumerate(started):
            out, _ = process.communicate(timeout=100)
            assert process.returncode == 0, out
            assert words(out.splitlines()[-1]) == [str(rank), *words(want)]


@pytest.mark.parametrize("name", optaxclip.__all__)
def test_public_names_are_mentioned(name):
    text = README.read_text(encoding="utf-8")
    if inspect.isroutine(getattr(optaxclip, name)):
        assert re.search(rf"`{name}`|\b{name}\(", text)
    else:
        assert re.search(rf"\b{name}\b", text)


def test_public_parts_are_mentioned():
    text = README.read_text(encoding="utf-8")
    for module in (optaxclip.scopes, optaxclip.shapes):
        for name, value in vars(module).items():
            public = inspect.isfunction(value) and value.__module__ == module.__name__
            if public and not name.startswith("_"):
                assert f"`{name}`" in text, f"{module.__name__}.{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link


def test_every_bound_is_on_the_page_about_choosing():
    text = (README.parent / "docs" / "choosing.md").read_text(encoding="utf-8")
    for name, value in vars(optaxclip.bounds).items():
        if inspect.isfunction(value):
            assert re.search(rf"`(bounds\.)?{name}`|bounds\.{name}\(", text), name


def test_files_and_targets_exist():
    text = README.read_text(encoding="utf-8")
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"\bmake (demo|test|lint|bench)\b", text)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for folder in re.findall(r"^\| `(\w+)/` \|", text, re.MULTILINE):
        assert (README.parent / folder).is_dir(), folder


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("updates", "threshold", "want"),
    [
        ([0.0, 0.0], 1.0, [0.0, 0.0]),
        ([INF, 3.0], 1.0, [NAN, NAN]),
        ([NAN, 3.0], 1.0, [NAN, NAN]),
        ([3.0, 4.0], 0.0, [0.0, 0.0]),
        ([0.0, 0.0], 0.0, [0.0, 0.0]),
        ([INF, 4.0], INF, [INF, 4.0]),
        ([NAN, 4.0], INF, [NAN, 4.0]),
        ([1e20, 1.0], 1.0, [1.0, 1e-20]),
    ],
)
def test_table_of_what_comes_out(updates, threshold, want):
    tx = optaxclip.clip_by_global_norm(threshold)
    got, _ = tx.update(np.array(updates, np.float32), None)
    np.testing.assert_allclose(np.asarray(got), want, rtol=1e-6)


@pytest.mark.parametrize("threshold", [-1.0, NAN])
def test_table_of_refused_thresholds(threshold):
    with pytest.raises(ValueError, match="clip_by_global_norm: max_norm must"):
        optaxclip.clip_by_global_norm(threshold)


@pytest.mark.parametrize(("threshold", "want"), [(-1.0, 0.0), (NAN, NAN)])
def test_table_of_traced_thresholds(threshold, want):
    def clip(threshold):
        tx = optaxclip.clip_by_global_norm(threshold)
        return tx.update(np.array([3.0, 4.0], np.float32), None)[0]

    np.testing.assert_array_equal(np.asarray(jax.jit(clip)(threshold)), want)


@pytest.mark.parametrize(
    ("count", "size", "value", "dtype", "want"),
    [(1, 1, 300.0, "float16", 1.0), (1000, 4, 0.5, "bfloat16", 1.004)],
)
def test_table_of_narrow_dtypes(count, size, value, dtype, want):
    updates = [jax.numpy.full(size, value, dtype) for _ in range(count)]
    got, _ = optaxclip.clip_by_global_norm(1.0).update(updates, None)
    norm = np.linalg.norm([np.asarray(leaf, np.float64) for leaf in got])
    assert round(float(norm), 3) == want
