"""NVIDIA's management library, as far as it is asked, played by a small library of the same interface."""

import ctypes
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

from cllm.runtime import nvml

# Two GPUs, the second one a part of a GPU, whose load is not known. 3 is NVML_ERROR_NOT_SUPPORTED, 6 NVML_ERROR_NOT_FOUND.
PLAYED = r"""
#include <string.h>
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned int gpu, memory; } Utilization;
static int first, second, fails;
void let_fail(int code) { fails = code; }
int nvmlInit_v2(void) { return fails; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 2; return fails; }
int nvmlDeviceGetHandleByUUID(const char *name, void **handle) {
  if (strcmp(name, "GPU-1111") == 0) *handle = &first;
  else if (strcmp(name, "MIG-2222") == 0) *handle = &second;
  else return 6;
  return 0;
}
int nvmlDeviceGetMemoryInfo(void *handle, Memory *memory) {
  if (fails) return fails;
  memory->total = 80ull << 30; memory->used = 10ull << 30; memory->free = (handle == &first ? 70ull : 5ull) << 30;
  return 0;
}
int nvmlDeviceGetUtilizationRates(void *handle, Utilization *share) {
  if (fails || handle == &second) return 3;
  share->gpu = 42; share->memory = 7;
  return 0;
}
"""


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler, which builds the library that plays NVML")
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(PLAYED)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "nvml.so", folder / "nvml.c"], check=True)
    return folder / "nvml.so"


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    nvml._library.cache_clear()
    nvml._handle.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=["1111", "2222", "3333"][index]))
    yield
    nvml._library.cache_clear()
    nvml._handle.cache_clear()


def test_free_memory_and_load_are_those_of_the_gpu_that_torch_counts(played, monkeypatch):
    monkeypatch.setattr(nvml, "_LIBRARY", str(played))
    assert [nvml.free_memory(index) for index in range(3)] == [70 << 30, 5 << 30, None]
    assert [nvml.utilization(index) for index in range(3)] == [0.42, None, None]


@pytest.mark.parametrize(
    ("variable", "names"),
    [
        (None, ["0", "1"]),
        ("1", ["1"]),
        ("1, 0", ["1", "0"]),
        ("GPU-1111,MIG-2222", ["GPU-1111", "MIG-2222"]),
        ("0,-1,1", ["0"]),
        ("", []),
        ("-1", []),
    ],
)
def test_gpus_are_named_as_the_variable_names_them(played, monkeypatch, variable, names):
    monkeypatch.setattr(nvml, "_LIBRARY", str(played))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert nvml.visible_gpus() == names and nvml.has_gpu() is bool(names)


@pytest.mark.parametrize("code", [1, 3, 9, 15, 999])
def test_every_error_of_the_library_is_an_unknown_figure(code, played, monkeypatch):
    monkeypatch.setattr(nvml, "_LIBRARY", str(played))
    assert nvml.utilization(0) == 0.42
    ctypes.CDLL(str(played)).let_fail(code)  # the GPU has fallen off the bus meanwhile
    try:
        assert nvml.utilization(0) is None and nvml.free_memory(0) is None
        nvml._library.cache_clear()
        nvml._handle.cache_clear()
        assert nvml.utilization(0) is None and nvml.free_memory(0) is None  # and it cannot even begin
    finally:
        ctypes.CDLL(str(played)).let_fail(0)


@pytest.mark.parametrize("library", ["libnvidia-ml-that-is-not-here.so", "libm.so.6"])
def test_without_the_library_nothing_is_known(library, monkeypatch):
    monkeypatch.setattr(nvml, "_LIBRARY", library)
    assert nvml.utilization(0) is None and nvml.free_memory(0) is None and nvml.visible_gpus() == []
