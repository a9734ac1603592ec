"""Compiling for this CPU: once, whole or not at all, and with a reason where it cannot be."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import fallback, native
from pallas_kernels.paged_attention import PagedCache, paged_attention
from pallas_kernels.paged_attention.core import resolve

SOURCE = """
#include "xla/ffi/api/ffi.h"
namespace ffi = xla::ffi;
static ffi::Error Add(ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::F32> y) {
  for (size_t i = 0; i < x.element_count(); ++i) y->typed_data()[i] = x.typed_data()[i] + NUMBER;
  return ffi::Error::Success();
}
XLA_FFI_DEFINE_HANDLER_SYMBOL(add, Add, ffi::Ffi::Bind().Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>());
"""


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MEGABATCH_CACHE_DIR", str(tmp_path / "cache"))
    native.register.cache_clear()
    yield
    native.register.cache_clear()


def source(tmp_path, number):
    path = tmp_path / "add.cc"
    path.write_text(SOURCE.replace("NUMBER", number))
    return path


def call(target):
    x = jnp.arange(4.0)
    return np.asarray(jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(x.shape, x.dtype))(x)).tolist()


def test_compiles_once_for_each_source(monkeypatch, tmp_path):
    first = native.register(source(tmp_path, "1"), "add")
    assert call(first.target) == [1, 2, 3, 4]
    native.register.cache_clear()
    second = native.register(source(tmp_path, "2"), "add")
    assert second.target != first.target
    assert call(second.target) == [2, 3, 4, 5]
    assert call(first.target) == [1, 2, 3, 4]
    # What is there is taken as it is, and nothing else lies beside it.
    native.register.cache_clear()
    monkeypatch.setattr(native, "_compile", None)
    assert native.register(tmp_path / "add.cc", "add") == second
    assert len(os.listdir(tmp_path / "cache" / "native")) == 2


def test_the_same_from_another_folder(monkeypatch, tmp_path):
    first = native.register(source(tmp_path, "3"), "add")
    native.register.cache_clear()
    monkeypatch.setenv("MEGABATCH_CACHE_DIR", str(tmp_path / "another"))
    assert native.register(tmp_path / "add.cc", "add") == first
    assert call(first.target) == [3, 4, 5, 6]


@pytest.mark.parametrize(
    "number,symbol,reason", [("nothing", "add", "was not declared|undeclared"), ("1", "other", "undefined symbol")]
)
def test_says_what_fails(tmp_path, number, symbol, reason):
    found = native.register(source(tmp_path, number), symbol)
    assert not found.target
    assert re.search(reason, found.missing)


def test_a_compiler_with_arguments(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "c++ -DFOUR=4")
    assert call(native.register(source(tmp_path, "FOUR"), "add").target) == [4, 5, 6, 7]


def test_without_a_compiler_it_is_xla(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    said = []
    monkeypatch.setattr(fallback.logging, "warning", lambda text, *values: said.append(text % values))
    fallback._say.cache_clear()
    operands = jnp.ones((1, 2, 16)), PagedCache.zeros(1, 2, 16, 1, 16, "float32")
    table, lengths = jnp.zeros((1, 2), jnp.int32), jnp.full(1, 3, jnp.int32)
    for _ in range(2):
        assert not paged_attention(*operands, 0, table, lengths).any()
    reason = "there is no C++ compiler here ($CXX, c++, g++, clang++)"
    assert said == [f"paged_attention: implementation='xla' instead of 'cpu': {reason}"]
    with pytest.raises(ValueError, match="implementation='cpu' does not support this case: there is no C"):
        resolve(*operands, True, "cpu")
