"""A tensor that stands in for a module's weight during its forward and hands every product with it to somebody else.

A module that owns its weight as a bare parameter, as the experts of a mixture do, is never called per matrix, so there
is no module to wrap and no hook to hang in. Seen from inside, though, all that happens to such a weight is that it is
indexed by expert, transposed and multiplied. The stand-in answers the first two with another stand-in and passes the
products on, each as `x` times one matrix.

Shape suffixes: E experts, T tokens, S samples, N outputs and K inputs of a product.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only


class Products(Protocol):
    """Who computes with the weight that a stand-in replaces.

    Attributes:
        name: full name of the parameter, for messages.
        weight: the parameter itself, one matrix `(rows, cols)` or one per expert `(E, rows, cols)`.
    """

    name: str
    weight: Tensor

    def product(self, x: Tensor, expert: int | None, flipped: bool, bias: Tensor | None) -> Tensor:
        """`x M^T + bias` for the stored matrix M, or `x M` when `flipped`; `x` is `(..., K)`."""

    def grouped(self, x_TK: Tensor, counts: list[int], flipped: bool, gemm: Callable) -> Any:
        """All experts' products in one call, or NotImplemented.

        Args:
            x_TK: `counts[e]` rows of expert `e` after one another.
            gemm: `(T, K), (E, K, N) -> (T, N)`, how the module computes them.
        """

    def dense(self, operation: str) -> Tensor:
        """The whole weight as an ordinary tensor, for an operation that is no product known here."""


@contextmanager
def replaced(module: nn.Module, stand_ins: Mapping[str, Tensor]) -> Iterator[None]:
    """Put tensors in the place of parameters of `module`, and the parameters back, also when something raises."""
    found = {name: module._parameters[name] for name in stand_ins}
    module._parameters.update(stand_ins)
    try:
        yield
    finally:
        module._parameters.update(found)


class _View(NamedTuple):
    """What a stand-in shows of the weight.

    Args:
        plain: an alias of the weight of the same shape; for samples, of no further use than its shape.
        expert: number of the one expert shown.
        samples: expert of each sample, int `(S,)`.
        transposed: whether rows and columns are exchanged.
    """

    plain: Tensor
    expert: int | None = None
    samples: Tensor | None = None
    transposed: bool = False

    @property
    def is_matrix(self) -> bool:
        return self.plain.ndim == 2

    def of(self, weight: Tensor) -> Tensor:
        """The same view of another tensor of the weight's shape."""
        if self.expert is not None:
            weight = weight[self.expert]
        elif self.samples is not None:
            weight = weight[self.samples]
        return weight.mT if self.transposed else weight


class StandIn(Tensor):
    """Has the shape, dtype and device of a weight and no memory: code that reads memory directly raises."""

    @staticmethod
    def __new__(cls, products: Products, view: _View | None = None) -> StandIn:
        plain = products.weight.detach() if view is None else view.plain
        # Without storage nothing can read past the products, as a kernel called by pointer would.
        return Tensor._make_wrapper_subclass(
            cls, plain.shape, strides=plain.stride(), dtype=plain.dtype, device=plain.device
        )

    def __init__(self, products: Products, view: _View | None = None):
        self.products = products
        self.view_of = _View(products.weight.detach()) if view is None else view

    def _show(self, plain: Tensor, **changes: Any) -> StandIn:
        return StandIn(self.products, self.view_of._replace(plain=plain, **changes))

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            name = _name(func)
            answer = _KNOWN[name](func, *args, **kwargs) if name in _KNOWN else NotImplemented
        if answer is not NotImplemented:
            return answer
        stand_in = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, StandIn))
        if name in ("data_ptr", "untyped_storage", "__set__"):
            raise RuntimeError(_opaque(stand_in.products.name, name))
        args, kwargs = tree_map_only(
            StandIn, lambda other: other.view_of.of(other.products.dense(name)), (args, kwargs)
        )
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        stand_in = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, StandIn))
        raise RuntimeError(_opaque(stand_in.products.name, str(func)))


def _opaque(name: str, operation: str) -> str:
    return (
        f"{name}: {operation} reads the weight past PyTorch's operations, so its blocks would silently have no effect; "
        "use experts_implementation='eager', 'batched_mm' or 'grouped_mm'"
    )


def _name(func: Callable) -> str:
    name = getattr(func, "__name__", str(func))
    return func.__self__.__name__ if name == "__get__" else name


def _metadata(func: Callable, weight: StandIn, *args: Any, **kwargs: Any) -> Any:
    return func(weight.view_of.plain, *args, **kwargs)


def _data_ptr(func: Callable, weight: StandIn) -> Any:
    # Asked for alignment by Transformers on the CPU, where nothing computes by pointer.
    return func(weight.view_of.plain) if weight.view_of.plain.device.type == "cpu" else NotImplemented


def _index(func: Callable, weight: StandIn, index: Any) -> Any:
    view = weight.view_of
    if view.is_matrix or view.samples is not None:
        return NotImplemented
    if isinstance(index, Tensor) and index.ndim == 1 and index.dtype in (torch.int32, torch.int64):
        return weight._show(view.plain[:1].expand(len(index), -1, -1), samples=index)
    if isinstance(index, bool) or (isinstance(index, Tensor) and (index.ndim or index.dtype == torch.bool)):
        return NotImplemented
    try:
        expert = operator.index(index)
    except TypeError:
        return NotImplemented
    return weight._show(view.plain[expert], expert=expert % len(view.plain))


def _transpose(func: Callable, weight: StandIn, *dims: Any) -> Any:
    plain = func(weight.view_of.plain, *dims)
    turned = weight.view_of.plain.mT
    if plain.shape != turned.shape or plain.stride() != turned.stride():
        return NotImplemented
    return weight._show(plain, transposed=not weight.view_of.transposed)


def _same(func: Callable, weight: StandIn, *args: Any, **kwargs: Any) -> Any:
    """`to`, `contiguous` and the like where they change nothing, which PyTorch says by giving back what it got."""
    plain = weight.view_of.plain
    return weight if func(plain, *args, **kwargs) is plain else NotImplemented


def _product(compute: Callable) -> Callable:
    """Operands by position, whatever the operation calls them; NotImplemented where it is told more, such as `out`."""
    names = ("input", "mat_a", "other", "mat2", "mat_b", "weight", "bias", "offs")

    def answer(func: Callable, *args: Any, **kwargs: Any) -> Any:
        named = [kwargs.pop(name) for name in names if name in kwargs and kwargs[name] is not None]
        if any(value is not None for value in kwargs.values()):
            return NotImplemented
        return compute(func, *args, *named)

    return answer


@_product
def _linear(func: Callable, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not _can_multiply(x, weight) or isinstance(bias, StandIn) or not weight.view_of.is_matrix:
        return NotImplemented
    view = weight.view_of
    return weight.products.product(x, view.expert, view.transposed, bias)


@_product
def _matmul(func: Callable, left: Tensor, right: Tensor) -> Any:
    stand_in = right if isinstance(right, StandIn) else left
    if not stand_in.view_of.is_matrix:
        return _bmm(func, left, right) if left.ndim == right.ndim == 3 else NotImplemented
    if stand_in is left:
        if isinstance(right, StandIn) or not _can_multiply(right, left) or right.ndim != 2:
            return NotImplemented
        return left.products.product(right.mT, left.view_of.expert, left.view_of.transposed, None).mT
    if not _can_multiply(left, right):
        return NotImplemented
    return right.products.product(left, right.view_of.expert, not right.view_of.transposed, None)


@_product
def _rmatmul(func: Callable, right: Tensor, left: Tensor) -> Any:
    return _matmul(func, left, right)


@_product
def _bmm(func: Callable, left: Tensor, right: Tensor) -> Any:
    if isinstance(left, StandIn):
        # W x = (x^T W^T)^T
        y = NotImplemented if isinstance(right, StandIn) else _batched(right.mT, left, left.view_of.transposed)
        return y if y is NotImplemented else y.mT
    return _batched(left, right, not right.view_of.transposed)


def _batched(x_STK: Tensor, weight: StandIn, flipped: bool) -> Any:
    """One matrix per sample: all experts in their order, or the expert that each sample names."""
    view, products = weight.view_of, weight.products
    if not _can_multiply(x_STK, weight) or x_STK.ndim != 3 or view.is_matrix or len(x_STK) != len(view.plain):
        return NotImplemented
    samples, tokens = x_STK.shape[:2]
    if view.samples is None:

        def bmm(x_TK: Tensor, weight_EKN: Tensor) -> Tensor:
            return torch.bmm(x_TK.unflatten(0, (samples, tokens)), weight_EKN).flatten(0, 1)

        y_TN = _by_expert(products, x_STK.flatten(0, 1), [tokens] * samples, flipped, bmm)
        return y_TN.unflatten(0, (samples, tokens))
    order = view.samples.argsort(stable=True)
    counts = torch.bincount(view.samples, minlength=len(products.weight)).tolist()
    x_TK = x_STK.index_select(0, order).flatten(0, 1)
    y_TN = _by_expert(products, x_TK, [count * tokens for count in counts], flipped)
    back = torch.empty_like(order).index_copy_(0, order, torch.arange(samples, device=order.device))
    return y_TN.unflatten(0, (samples, tokens)).index_select(0, back)


@_product
def _grouped(func: Callable, x_TK: Tensor, weight: Tensor, offs: Tensor | None = None) -> Any:
    """Rows sorted by expert; `offs` `(E,)` says where each expert's rows end."""
    if not _can_multiply(x_TK, weight, autocast=False):
        return NotImplemented
    view = weight.view_of
    if view.is_matrix or view.samples is not None or x_TK.ndim != 2 or offs is None:
        return NotImplemented
    ends = _even_ends(len(x_TK), len(offs)) if offs.is_meta else offs.tolist()
    counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    # The operation itself takes no part in autocast.
    with torch.autocast(x_TK.device.type, enabled=False):
        return _by_expert(
            weight.products, x_TK, counts, not view.transposed, lambda x, weight: func(x, weight, offs=offs)
        )


def _even_ends(rows: int, experts: int) -> list[int]:
    """Where each expert's rows end when all have as many: on the meta device nothing tells how they are routed."""
    return [rows * (expert + 1) // experts for expert in range(experts)]


def _by_expert(
    products: Products, x_TK: Tensor, counts: list[int], flipped: bool, gemm: Callable | None = None
) -> Tensor:
    """Products of runs of rows, `counts[e]` rows of expert `e`; what rows beyond the last run give means nothing."""
    y_TN = NotImplemented if gemm is None else products.grouped(x_TK, counts, flipped, gemm)
    if y_TN is not NotImplemented:
        return y_TN
    parts = x_TK.split([*counts, x_TK.shape[0] - sum(counts)])
    pieces = [products.product(x, e, flipped, None) for e, x in enumerate(parts[:-1]) if len(x)]
    if len(parts[-1]) or not pieces:
        outputs = products.weight.shape[2 if flipped else 1]
        like = pieces[0] if pieces else x_TK
        pieces.append(like.new_zeros(len(parts[-1]), outputs))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _can_multiply(x: Any, weight: Any, autocast: bool = True) -> bool:
    """Whether `x` is an ordinary tensor in the weight's dtype; else PyTorch itself is asked, which may refuse."""
    if not isinstance(weight, StandIn) or type(x) not in (Tensor, nn.Parameter):
        return False
    dtypes = {x.dtype, weight.view_of.plain.dtype}
    return len(dtypes) == 1 or (
        autocast and torch.is_autocast_enabled(x.device.type) and torch.float64 not in dtypes and x.is_floating_point()
    )


_KNOWN: dict[str, Callable] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "__matmul__", "mm"), _matmul),
    "__rmatmul__": _rmatmul,
    "bmm": _bmm,
    **dict.fromkeys(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"), _grouped),
    "__getitem__": _index,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "permute", "t", "T", "mT"), _transpose),
    **dict.fromkeys(("to", "contiguous", "float", "double", "half", "bfloat16", "cuda", "cpu"), _same),
    "data_ptr": _data_ptr,
    **dict.fromkeys(
        (
            *("shape", "dtype", "device", "ndim", "layout", "itemsize", "is_cuda", "is_cpu", "is_meta", "is_sparse"),
            *("is_nested", "is_quantized", "requires_grad", "is_leaf", "grad_fn", "size", "dim", "stride", "numel"),
            *("nelement", "element_size", "is_contiguous", "is_floating_point", "is_complex", "storage_offset"),
            *("__len__", "get_device", "is_inference"),
        ),
        _metadata,
    ),
}
