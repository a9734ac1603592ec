"""`scripts/kernel_schedule.py`: what is compiled, printed and kept."""

import importlib

import pytest
from script_processes import error_of, run


@pytest.fixture(scope="module")
def script(pytestconfig):
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(pytestconfig.rootpath / "scripts")
        yield importlib.import_module("kernel_schedule")


def test_lines(script):
    tpu = {
        "name": "f.1",
        "bundles": 100,
        "hot_bundles": 80,
        "shares": {"MXU": 0.8, "VALU": 0.9, "XLU": 0.1, "SALU": 0.0},
    }
    tpu |= {"spill_stores": 3, "spill_loads": 4, "vmem_bytes": 3 * 2**19}
    gpu = {"name": "g", "registers": 168, "spill_stores": 8, "smem_bytes": 2**17, "wgmma": 12, "tma_loads": 4}
    gpu |= {"warnings": ["wgmma is serialized"]}
    assert script.lines("case", {"kernels": [tpu, gpu]}) == [
        "case: f.1: 100 bundles, 80 hot (VALU 0.90, MXU 0.80, XLU 0.10), 3 spills, 1.5 MiB of VMEM",
        "case: g: 168 registers, 8 bytes spilled, 128 KiB of shared memory, 12 wgmma, 4 TMA loads; wgmma is serialized",
    ]
    assert script.lines("case", {"kernels": []}) == ["case: no Pallas kernel in it"]
    assert script.lines("case", {"error": "ValueError: no"}) == ["case: ValueError: no"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--chips=v5",), "error: --chips=v5: no such chip; did you mean 'v5"),
        (("--chips=v5e", "--cases=nothing_like_it"), "error: --cases=nothing_like_it: no case has this in its name"),
    ],
)
def test_mistakes(tmp_path, arguments, message):
    assert error_of(run("kernel_schedule.py", *arguments, f"--output={tmp_path}")).startswith(message)
    assert not any(tmp_path.iterdir())
