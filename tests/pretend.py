"""A device that is not a CPU, made of tensors of the CPU: `pytest --device pretend`.

Tests on it find without a GPU what fails on one: operations that mix devices raise as on CUDA. Only
copies may mix, indices, and tensors without dimensions. It computes what a CPU computes, also in
the backward. It has no generators of its own, no forward mode and no torch.compile, and needs a
torch that has backends written in Python (2.13 and 2.14 have them).
"""

from functools import partial
from types import SimpleNamespace

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default, aten._copy_from.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
BEYOND = ("benchmarks", "compile", "generator", "graphs", "moments", "adam", "gigabyte")
BEYOND += ("differences", "forward_mode", "forward_over", "gradcheck", "second_order")


class Pretended(torch.Tensor):
    """A tensor of the device, which holds one of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        place = {"dtype": held.dtype, "device": torch.device(NAME, 0)}
        found = torch.Tensor._make_wrapper_subclass(cls, held.size(), **layout, **place)
        found.held = held
        return found

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return run(operation, *args, **(kwargs or {}))

    def __repr__(self):
        return f"{self.held} on {NAME}"

    def tolist(self):
        return self.held.tolist()

    def data_ptr(self):
        return self.held.data_ptr()

    def numpy(self):
        raise TypeError(f"can't convert a tensor of the device {NAME} to numpy")


def run(operation, *args, **kwargs):
    """Run an operation on the tensors that are held, and hold what it returns."""
    counted = args[::2] if operation in INDEXED else (args, kwargs)  # indices may be anywhere
    tensors = [x for x in tree_leaves(counted) if isinstance(x, torch.Tensor)]
    ours = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Pretended)]
    others = [x for x in tensors if not isinstance(x, Pretended)]
    if operation._schema.is_mutable:  # nothing of the device goes into a tensor of the CPU
        mixed = any(x.ndim or x is tensors[0] for x in others)
    else:
        mixed = any(x.ndim for x in others)
    if ours and mixed and operation not in COPIES:
        raise RuntimeError(f"{operation} mixes tensors of the CPU and of the device {NAME}")
    stays = torch.device(kwargs.get("device") or NAME).type == NAME
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    by_held = {id(x.held): x for x in ours}  # what is changed in place is returned as it is
    args, kwargs = tree_map(lambda x: x.held if isinstance(x, Pretended) else x, (args, kwargs))

    def hold(x):
        return by_held.get(id(x), Pretended(x)) if stays and isinstance(x, torch.Tensor) else x

    return tree_map(hold, operation(*args, **kwargs))


_setup_privateuseone_for_python_backend(
    NAME,
    SimpleNamespace(
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
        manual_seed_all=lambda seed: None,  # it draws from the generator of the CPU
        _is_in_bad_fork=lambda: False,
    ),
)
everything = torch.library.Library("_", "IMPL")
everything.fallback(run, "PrivateUse1")  # operations without tensors, which make some
everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # it does nothing
some = torch.library.Library("aten", "IMPL")
some.impl("_to_copy", partial(run, aten._to_copy.default), "PrivateUse1")
# The kernels of torch resize what they have made, which a held tensor does alone.
for name in ("arange", "arange.start", "arange.start_step", "eye", "eye.m"):
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(aten, packet), overload or "default")
    some.impl(name, partial(run, operation), "PrivateUse1")
