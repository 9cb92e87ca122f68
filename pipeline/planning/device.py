"""A device and ranks that are only planned: real code, without storage and without other processes.

PyTorch's meta tensors know shape, type and storage size but hold nothing, so a model of any size
runs on a laptop, forward and backward. Two things are added. Code asks tensors for their device and
chooses by it, so here they answer with the planned one; and scaled dot product attention, which on
meta tensors becomes its textbook form with a T x T matrix, becomes the operation with linear memory
that the planned device would run. Tensors that steer Python loops stay real, on the CPU.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # collectives of tensors without data
import torch.nn.functional as F
import torch.utils.checkpoint as checkpointing
from megatron.core import parallel_state
from torch import Tensor
from torch.overrides import TorchFunctionMode

from allmem_megatron.parallel import destroy_model_parallel, init_model_parallel
from pipeline.planning.gpu_kernels import named_only

# Megatron-Core calls collectives by names that PyTorch 2.13 would rather not see.
warnings.filterwarnings(
    "ignore",
    message=r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
    category=FutureWarning,
    module=r"torch\.distributed\.c10d_logger",
)

META = torch.device("meta")
BIAS_ALIGNMENT = 8
"""CUDA's attention pads the rows of its bias to a multiple of this."""

_DEVICE = Tensor.device.__get__  # type: ignore[attr-defined]
_IS_CUDA = Tensor.is_cuda.__get__  # type: ignore[attr-defined]
_IS_META = Tensor.is_meta.__get__  # type: ignore[attr-defined]
_ASK_WHERE = frozenset((_DEVICE, _IS_CUDA))
_NAMES_OF_DEVICES = (torch.device, str)


class PlannedDevice(TorchFunctionMode):
    """While active, meta tensors say that they are on `device`, and `device` makes meta tensors.

    The planned device is number 0 of its kind, so the plain `cpu` of real tensors is another one.

    Args:
        kind: `cuda` or `cpu`.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.device = torch.device(kind, 0)
        self._names = {self.device, str(self.device), *(("cuda",) if kind == "cuda" else ())}

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _ASK_WHERE:
            if not _IS_META(args[0]):
                return func(*args)
            return self.device if func == _DEVICE else self.device.type == "cuda"
        kwargs = kwargs or {}
        if func is torch.device:  # it makes a name, not a tensor
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention and _IS_META(args[0]):
            return attention(self.device.type, *args, **kwargs)
        if self._is_planned(kwargs.get("device")):
            kwargs = {**kwargs, "device": META}
        if any(map(self._is_planned, args)):
            args = tuple(META if self._is_planned(value) else value for value in args)
        return func(*args, **kwargs)

    def _is_planned(self, value: Any) -> bool:
        return type(value) in _NAMES_OF_DEVICES and value in self._names


def attention(
    kind: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What `scaled_dot_product_attention` keeps on a device of this kind, in linear memory.

    On the CPU and on CUDA (flash without a mask, memory-efficient with one) the fused operations
    keep q, k, v, the output, one number for each query and head, and the mask as a bias in q's
    type. The CPU's stands for all of them here; `enable_gqa` is its own way with fewer key heads.
    """
    del dropout_p, enable_gqa
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, q.new_zeros(()), q.new_full((), -torch.inf))
        if kind == "cuda" and (rest := -attn_mask.shape[-1] % BIAS_ALIGNMENT):
            attn_mask = F.pad(attn_mask, (0, rest))[..., :-rest]
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return out


def backward(loss: Tensor) -> None:
    """`loss.backward()` with the planned device on.

    The public calls hand themselves to a function mode, which is off while it answers; what the
    backward pass runs (recomputation, hooks) would then see the meta device. So: the engine itself.
    """
    torch.autograd.graph._engine_run_backward(
        (loss,),
        (torch.ones_like(loss),),
        False,  # retain_graph
        False,  # create_graph
        (),  # all leaves
        allow_unreachable=True,
        accumulate_grad=True,
    )


@contextlib.contextmanager
def planned_ranks(*, tp: int, cp: int, rank: int) -> Iterator[None]:
    """This process as one rank of a world of tp x cp whose collectives return at once.

    Data-parallel ranks are left out: no part of a forward or backward pass depends on them.

    Args:
        tp: tensor-parallel ranks.
        cp: context-parallel ranks.
        rank: which one to be; Megatron's order, TP first.

    Raises:
        ValueError: this process already has process groups, or the program refuses the sizes.
    """
    if dist.is_initialized() or parallel_state.model_parallel_is_initialized():
        raise ValueError(
            "stage=plan cannot run in a process that already has ranks; start it without torchrun"
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore

    real_new_group = dist.new_group

    def new_group(*args: Any, **kwargs: Any) -> Any:
        # core also makes gloo groups, which would wait for the other ranks
        return real_new_group(*args, **{**kwargs, "backend": "fake"})

    hook = sys.excepthook
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=tp * cp)
    sys.excepthook = hook  # PyTorch would put the rank before every line of an error
    dist.new_group = new_group
    try:
        init_model_parallel(tp=tp, cp=cp)
        yield
    finally:
        dist.new_group = real_new_group
        destroy_model_parallel()


def _flex(
    q: Tensor, k: Tensor, v: Tensor, *, block_mask: Any, scale: float | None, enable_gqa: bool
) -> Tensor:
    """What FlexAttention keeps: as fused attention without a mask; blocks have been made."""
    del block_mask
    return attention("cuda", q, k, v, scale=scale, enable_gqa=enable_gqa)


@contextlib.contextmanager
def planned(kind: str, *, num_processors: int = 0, tell: Callable[[], None]) -> Iterator[None]:
    """Everything inside computes on the planned device.

    Megatron-Core allocates on `torch.cuda.current_device()`; here that is the planned one. And
    checkpointing compares the devices of what was saved and what is recomputed, half of them read
    where a function mode cannot answer: only shape and type are compared here.

    Args:
        kind: `cuda` or `cpu`.
        num_processors: streaming multiprocessors of a GPU.
        tell: is called at every launch of a kernel that is no operation of PyTorch's.
    """
    mode = PlannedDevice(kind)
    checks = checkpointing._allowed_determinism_checks_to_fns
    real, real_check = torch.cuda.current_device, checks["default"]
    torch.cuda.current_device = lambda: mode.device  # type: ignore[assignment,return-value]
    checks["default"] = lambda tensor: {"shape": tensor.shape, "dtype": tensor.dtype}
    on_gpu = kind == "cuda"
    gpu = named_only(_flex, num_processors, tell) if on_gpu else contextlib.nullcontext()
    try:
        with gpu, mode:
            yield
    finally:
        torch.cuda.current_device = real
        checks["default"] = real_check
