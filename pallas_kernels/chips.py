"""What a chip gives: data-sheet figures by JAX's name of the device."""

import dataclasses
from typing import Any

import jax.numpy as jnp

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Chip:
    """Data-sheet figures of one JAX device.

    Attributes:
      bf16_flops: dense matrix FLOP/s in bfloat16.
      float32_flops: dense matrix FLOP/s on float32 operands at JAX's default precision, which is TF32 on NVIDIA and one
        bfloat16 pass on TPU.
      memory_bytes: capacity of device memory.
      memory_bandwidth: bytes/s.
      link_bandwidth: bytes/s, one way, of one link to a neighbour (TPU: ICI) or of all links to the switch (NVLink);
        ``None``: not known to us.
      network_bandwidth: bytes/s, one way, of the device's share of its host's network (DCN, InfiniBand).
      cores: TensorCores (TPU) or streaming multiprocessors (GPU).
      vmem_bytes: TPU: vector memory of one core. A kernel is given a part of it unless it asks for more
        (``vmem_limit_bytes``). 0 on GPUs.
      smem_bytes: GPU: shared memory that one thread block may have. 0 on TPUs.
      l2_bytes: GPU: second-level cache, shared by all cores. 0 on TPUs.
    """

    bf16_flops: float
    float32_flops: float
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float | None = None
    network_bandwidth: float | None = None
    cores: int = 1
    vmem_bytes: int = 0
    smem_bytes: int = 0
    l2_bytes: int = 0


def _tpu(
    bf16: float,
    gibibytes: float,
    bandwidth: float,
    link: float | None = None,
    dcn: float | None = None,
    *,
    cores: int = 1,
    vmem: int,
) -> Chip:
    memory = gibibytes * 2**30
    return Chip(bf16, bf16, memory, bandwidth, link, dcn, cores=cores, vmem_bytes=vmem * _MIB)


def _gpu(
    bf16: float,
    float32: float,
    memory: float,
    bandwidth: float,
    link: float | None = None,
    network: float | None = None,
    *,
    cores: int,
    smem: int,
    l2: int,
) -> Chip:
    return Chip(bf16, float32, memory, bandwidth, link, network, cores=cores, smem_bytes=smem, l2_bytes=l2 * _MIB)


# Shared memory of a thread block, by compute capability (CUDA C++ programming guide, technical specifications).
_AMPERE, _ADA, _HOPPER = 163 * 1024, 99 * 1024, 227 * 1024

# Keys are `jax.Device.device_kind`. Figures without structured sparsity.
# TPU: cloud.google.com/tpu/docs, one page per generation. A v3 device is one of the chip's two cores; one
# of a v4 or v5p is both. Vector memory: jax.experimental.pallas.tpu.get_tpu_info.
# A TPU's link: the page's "bidirectional ICI bandwidth per chip" over its ports (4 in 2 dimensions, 6 in 3) over 2.
# Its network: v5e 6.4 Tbit/s a pod of 256, v5p 50 Gbit/s a chip; v6e is not stated there and taken from 25.6 Tbit/s a
# pod (four 200 Gbit/s ports for eight chips), which we could not confirm.
# NVIDIA: the data sheets of the H200, H100, A100, B200, GH200, L40S and L4 (nvidia.com); where a sheet gives only
# figures with sparsity, half of them. Links: NVLink 4, 900 GB/s both ways together. Network: one 400 Gbit/s port a GPU,
# as in NVIDIA's DGX H100 and H200; other machines have less.
CHIPS = {
    "TPU v3": _tpu(61.5e12, 16, 450e9, vmem=16),
    "TPU v4": _tpu(275e12, 32, 1228e9, cores=2, vmem=16),
    "TPU v5 lite": _tpu(197e12, 16, 819e9, 50e9, 3.125e9, vmem=128),
    "TPU v5e": _tpu(197e12, 16, 819e9, 50e9, 3.125e9, vmem=128),
    "TPU v5": _tpu(459e12, 95, 2765e9, 100e9, 6.25e9, cores=2, vmem=64),
    "TPU v5p": _tpu(459e12, 95, 2765e9, 100e9, 6.25e9, cores=2, vmem=64),
    "TPU v6 lite": _tpu(918e12, 32, 1640e9, 100e9, 12.5e9, vmem=128),
    "TPU v6e": _tpu(918e12, 32, 1640e9, 100e9, 12.5e9, vmem=128),
    "NVIDIA H200": _gpu(989e12, 494.5e12, 141e9, 4.8e12, 450e9, 50e9, cores=132, smem=_HOPPER, l2=60),
    "NVIDIA H100 80GB HBM3": _gpu(989e12, 494.5e12, 80e9, 3.35e12, 450e9, 50e9, cores=132, smem=_HOPPER, l2=50),
    "NVIDIA H100 PCIe": _gpu(756e12, 378e12, 80e9, 2.0e12, cores=114, smem=_HOPPER, l2=50),
    "NVIDIA H100 NVL": _gpu(835e12, 417.5e12, 94e9, 3.9e12, cores=132, smem=_HOPPER, l2=60),
    "NVIDIA GH200 480GB": _gpu(989e12, 494.5e12, 96e9, 4.0e12, cores=132, smem=_HOPPER, l2=60),
    "NVIDIA B200": _gpu(2250e12, 1125e12, 180e9, 7.7e12, cores=148, smem=_HOPPER, l2=126),
    "NVIDIA A100-SXM4-40GB": _gpu(312e12, 156e12, 40e9, 1.555e12, cores=108, smem=_AMPERE, l2=40),
    "NVIDIA A100-PCIE-40GB": _gpu(312e12, 156e12, 40e9, 1.555e12, cores=108, smem=_AMPERE, l2=40),
    "NVIDIA A100-SXM4-80GB": _gpu(312e12, 156e12, 80e9, 2.039e12, cores=108, smem=_AMPERE, l2=40),
    "NVIDIA A100 80GB PCIe": _gpu(312e12, 156e12, 80e9, 1.935e12, cores=108, smem=_AMPERE, l2=40),
    "NVIDIA L40S": _gpu(362e12, 183e12, 48e9, 864e9, cores=142, smem=_ADA, l2=96),
    "NVIDIA L4": _gpu(121e12, 60e12, 24e9, 300e9, cores=58, smem=_ADA, l2=48),
}

# Two names that JAX has had for one chip.
ALIASES = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}


def chip_of(device_kind: str | None) -> Chip | None:
    """The figures of a device; ``None`` if unknown (a CPU, a chip not in `CHIPS`)."""
    return None if device_kind is None else CHIPS.get(device_kind)


def peak_flops(device_kind: str, dtype: Any) -> float | None:
    """Dense matrix FLOP/s of one device for operands of ``dtype``; ``None`` if unknown (a CPU, a chip not in `CHIPS`).

    Args:
      device_kind: of a `jax.Device`.
      dtype: bfloat16, float16 or float32.
    """
    chip = chip_of(device_kind)
    if chip is None:
        return None
    return {"bfloat16": chip.bf16_flops, "float16": chip.bf16_flops, "float32": chip.float32_flops}.get(
        jnp.dtype(dtype).name
    )
