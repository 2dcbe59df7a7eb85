"""Quotations of the sources: whole, balanced, and an error where a name has vanished."""

import re
from pathlib import Path

import pytest

from flash_attn_ext.series import quote

SOURCE = r"""
#include "x.h"
#define BODY(x) { x

int helper(int x);

/* Twice } what
 * it is. */
static int T(twice)(const char *s,
                    int x) { // {
    if (s == "}" || s[0] == '{')
        return helper(x);
    while (--x > 0) {
        for (int j = 0; j < 3; j++)
            x += helper(j);
        other(x);
    }
    return x;
}

struct __align__(16) plan {
    int x; /* } */
};

template <int N>
__global__ void __launch_bounds__(N, 1)
    kernel(int p) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        T(twice)("", i);
    }
}
"""


@pytest.fixture
def csrc(tmp_path, monkeypatch):
    (tmp_path / "a.inl").write_text(SOURCE)
    monkeypatch.setattr(quote, "CSRC", tmp_path)


def test_function(csrc):
    twice = quote.function("a.inl", "twice")
    assert twice.startswith("/* Twice } what\n") and twice.endswith("    return x;\n}")
    kernel = quote.function("a.inl", "kernel")
    assert kernel.startswith("template <int N>\n") and kernel.endswith("    }\n}")


def test_loop(csrc):
    """The innermost one, whatever its head, and of several the shortest."""
    assert quote.loop("a.inl", around="helper") == (
        "for (int j = 0; j < 3; j++)\n    x += helper(j);"
    )
    outer = quote.loop("a.inl", around="other")
    assert outer.startswith("while (--x > 0) {\n    for") and outer.endswith("    other(x);\n}")
    assert quote.loop("a.inl", around="twice").startswith("for (int i")


def test_exists(csrc):
    assert quote.exists("a.inl") and not quote.exists("b.inl")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quote.function("a.inl", "gone"), "no function gone in csrc/a.inl"),
        (lambda: quote.function("a.inl", "helper"), "no function helper"),  # only declared
        (lambda: quote.loop("a.inl", around="gone"), "no loop around a call of gone"),
        (lambda: quote.function("gone.inl", "twice"), "no file csrc/gone.inl"),
    ],
)
def test_what_vanished_is_named(csrc, call, message):
    with pytest.raises(LookupError, match=message):
        call()


@pytest.mark.parametrize("name", ["online_softmax", "forward_tile", "rescale_rows"])
def test_the_c_kernels_can_be_quoted(name):
    quoted = quote.function("cpu/forward.inl", name)
    assert f"T({name})" in quoted and quoted.endswith("\n}")
    assert quoted.count("{") == quoted.count("}")


def quotations():
    """(function or loop, arguments) wherever a notebook quotes."""
    for source in sorted((Path(__file__).parent.parent / "notebooks").glob("[0-9]_*.py")):
        yield from re.findall(
            r'quote\.(function|loop)\(\s*"([^"]+)",\s*(?:around=)?"([^"]+)"', source.read_text()
        )


@pytest.mark.parametrize(("what", "path", "name"), list(quotations()))
def test_what_the_notebooks_quote_is_there(what, path, name):
    if not quote.exists(path):
        pytest.skip(f"this version has no {path}")
    assert name in getattr(quote, what)(path, name)


def test_the_notebooks_quote_c_and_cuda():
    paths = {path for _, path, _ in quotations()}
    assert {"cpu/forward.inl", "cuda/kernels/forward_sm80.cu"} <= paths
