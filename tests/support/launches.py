"""What a training step launches on a GPU, told without one: it is taken on FakeTensors, Triton's launches are noted.

Nothing is computed. PyTorch's operators are those that it dispatches on ``cuda``; its engine, which wants the GPU, is
replaced by a walk over the graph of gradients.
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from densenet_dist.model import DenseNet
from densenet_dist.model.fused import operator

NO_LAUNCH = """
_record_function_enter_new _record_function_exit alias as_strided detach device empty empty_like empty_strided expand
new_empty new_empty_strided permute prim select slice split split_with_sizes squeeze t transpose unbind unsqueeze view
_unsafe_view
"""
MOST_TENSORS = (110, 64, 48, 36, 30)
"""How many tensors, by the number of lists, a multi-tensor operator of PyTorch works on in one launch."""


class Launches(TorchDispatchMode):
    """`counts` operators that launch a kernel, and Triton's kernels; `waits` are those that copy from the CPU.

    Of passes that rectify, `read` is how often a thread reads so many channels at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.read: Counter[int] = Counter()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name.split("::")[1], kwargs or {}
        if name in ("dense_block", "dense_block_backward"):
            with self:
                return getattr(operator, name)._init_fn(*args, **kwargs)
        if func.namespace == "aten" and func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        lists = [value for value in args if isinstance(value, list) and value and isinstance(value[0], Tensor)]
        if name.startswith(("_foreach", "_fused")):
            self.counts[name] += math.ceil(len(lists[0]) / MOST_TENSORS[len(lists) - 1])
        elif name not in NO_LAUNCH.split():
            self.counts[name] += 1
        if name.startswith("_fused"):  # in place, and unknown to FakeTensors
            return None
        made = func(*args, **kwargs)
        if name == "convolution" and made.is_cuda:
            return _as_cudnn(made)
        if name == "convolution_backward":
            return [_as_cudnn(each) for each in made]
        if isinstance(made, Tensor) and made.is_cuda and any(isinstance(v, Tensor) and not v.is_cuda for v in args):
            self.waits.append(name)
        return made

    def note(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        """Stand in for the launch of a kernel of Triton's, whose launcher takes no None for an annotated float."""
        for parameter, value in zip(kernel.params, args, strict=False):
            assert not parameter.annotation_type.startswith("fp") or isinstance(value, float), parameter.name
        self.counts[kernel.__name__] += 1
        width = constants["READ"] if kernel.__name__ == "bn_relu" else constants.get("BN_READ", 0)
        if kernel.__name__ == "bn_relu" or constants.get("BN_BLOCK_R", 1) > 1:
            self.read[width] += 1


def _as_cudnn(made: Tensor | None) -> Tensor | None:
    """In the memory format that cuDNN chooses."""
    return None if made is None else torch.empty_like(made, memory_format=torch.channels_last)


@contextmanager
def pretended_gpu() -> Iterator[Launches]:
    """A GPU on which nothing is computed."""
    from triton.runtime.jit import JITFunction

    from densenet_dist.model.kernels import triton_kernels

    def address(self: Tensor) -> int:
        return 4096 + self.storage_offset() * self.element_size()

    launches = Launches()
    triton_kernels._table.cache_clear()
    with (
        mock.patch.object(JITFunction, "run", lambda self, *args, **options: launches.note(self, *args, **options)),
        mock.patch.object(Tensor, "data_ptr", address),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        FakeTensorMode(),
        launches,
    ):
        yield launches
    triton_kernels._table.cache_clear()


def launches_of_a_step(model: DenseNet, batch_size: int) -> Launches:
    """The second step, in bfloat16."""
    with pretended_gpu() as launches:
        for module in model.train().modules():
            for tensors in (module._parameters, module._buffers):
                for name, value in tensors.items():
                    if value is not None:
                        like = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
                        tensors[name] = nn.Parameter(like) if isinstance(value, nn.Parameter) else like
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True)
        images = torch.empty(batch_size, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
        labels = torch.zeros(batch_size, dtype=torch.int64, device="cuda")
        for _ in range(2):
            for noted in (launches.counts, launches.read, launches.waits):
                noted.clear()
            with torch.autocast("cuda", torch.bfloat16):
                logits = model(images)
            _go_back(torch.nn.functional.cross_entropy(logits.float(), labels))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return launches


def _go_back(loss: Tensor) -> None:
    """What ``loss.backward()`` does."""
    nodes, gradients = {loss.grad_fn}, {(loss.grad_fn, 0): torch.ones_like(loss)}
    while nodes:
        node: Any = max(nodes, key=lambda node: node._sequence_nr())  # type: ignore[union-attr]
        nodes.remove(node)
        if hasattr(node, "variable"):
            gradient = gradients[node, 0]
            same = gradient.stride() == node.variable.stride()
            node.variable.grad = gradient if same else torch.empty_like(node.variable).copy_(gradient)
            continue
        come = [gradients.get((node, i)) for i in range(len(node._input_metadata))]
        made = getattr(node, "apply", node)(*come)
        # Of this project's operator the tensors come first; the rest has no gradients.
        for value, (into, i) in zip(made if isinstance(made, tuple) else [made], node.next_functions, strict=False):
            if into is not None and value is not None:
                nodes.add(into)
                value, before = value.sum_to_size(into._input_metadata[i].shape), gradients.get((into, i))
                gradients[into, i] = value if before is None else before + value
