"""PyTorch's attention on the same numbers: JAX's arrays are handed over without a copy."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from kernel_bench.timing import Program


def available() -> bool:
    """Whether torch can be imported."""
    return importlib.util.find_spec("torch") is not None


def tensor(array: Any) -> Any:
    """A JAX array as a tensor on the same device."""
    import torch

    return torch.from_dlpack(array)


def sdpa(name: str, sets: Sequence[tuple], **options: Any) -> Program:
    """`torch.nn.functional.scaled_dot_product_attention` on arrays ``[batch, heads, tokens, head_dim]``."""
    import torch

    def attend(query: Any, key: Any, value: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)

    tensors = [tuple(tensor(array) for array in arguments) for arguments in sets]
    return Program(name, attend, tensors, "torch")


def sdpa_backward(name: str, sets: Sequence[tuple], **options: Any) -> Program:
    """Forward and backward; each set has the gradient of the result behind query, key and value."""
    import torch

    def attend(query: Any, key: Any, value: Any, gradient: Any) -> Any:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)
        return torch.autograd.grad(out, (query, key, value), gradient)

    tensors = []
    for *operands, gradient in sets:
        leaves = [tensor(array).detach().requires_grad_() for array in operands]
        tensors.append((*leaves, tensor(gradient)))
    return Program(name, attend, tensors, "torch")


def flex(name: str, sets: Sequence[tuple], mask: Callable[..., Any], length: int) -> Program:
    """`flex_attention`, compiled, with a block mask from ``mask(batch, head, query, key)``. Needs a GPU."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    blocks = create_block_mask(mask, None, None, length, length, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(query: Any, key: Any, value: Any) -> Any:
        return compiled(query, key, value, block_mask=blocks, enable_gqa=query.shape[1] != key.shape[1])

    return Program(name, attend, [tuple(tensor(array) for array in arguments) for arguments in sets], "torch")
