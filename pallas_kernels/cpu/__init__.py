"""Headers of the kernels in C++ for CPUs, which `pallas_kernels.native` compiles."""
