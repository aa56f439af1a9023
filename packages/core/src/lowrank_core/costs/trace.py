"""The FLOPs of a forward pass, counted from shapes on the meta device, and what each layer is given."""

# torch's overrides are untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LayerCall:
    """What a layer was given in one forward of the model, call by call, and the FLOPs of all of them."""

    inputs: tuple[Shape, ...]
    flops: int


@dataclass(frozen=True)
class ForwardCost:
    """FLOPs of one forward, a multiply-add as two: products and convolutions, as torch's FlopCounterMode counts."""

    flops: int
    layers: Mapping[str, LayerCall]


def trace(model: nn.Module, *inputs: Any, **named: Any) -> ForwardCost:
    """Run `model`, whose weights and inputs are on the meta device, once in evaluation mode.

    Only layers with a weight that are called with a tensor first are in `layers`.
    """
    names = {module: name for name, module in model.named_modules() if _has_weight(module)}
    shapes: dict[str, list[Shape]] = {}
    flops: dict[str, int] = {}
    started: list[int] = []
    training = [module for module in model.modules() if module.training]
    with CountFlops() as counter:

        def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            started.append(counter.total)
            if arguments and isinstance(arguments[0], Tensor):
                shapes.setdefault(names[module], []).append(tuple(arguments[0].shape))

        def after(module: nn.Module, *_: Any) -> None:
            flops[names[module]] = flops.get(names[module], 0) + counter.total - started.pop()

        hooks = [module.register_forward_pre_hook(before) for module in names]
        hooks += [module.register_forward_hook(after) for module in names]
        try:
            model.eval()
            with torch.no_grad():
                model(*inputs, **named)
        finally:
            for hook in hooks:
                hook.remove()
            for module in training:
                module.training = True
    return ForwardCost(counter.total, {name: LayerCall(tuple(s), flops[name]) for name, s in shapes.items()})


def flops_of(compute: Callable[[], object]) -> int:
    """The FLOPs of what `compute` does on the meta device, without gradients."""
    with torch.no_grad(), CountFlops() as counter:
        compute()
    return counter.total


class CountFlops(TorchFunctionMode):
    """Adds up in `total` the FLOPs of the products and convolutions inside the block.

    Most of torch's functions on the meta device import its compiler, four seconds, for nothing but a shape. Those
    that networks use get their shape here; any other is torch's. Nothing is drawn at random.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(getattr(func, "__name__", ""))
        if name in _DRAWN:
            drawn = args[0] if args else kwargs["tensor"]
            return drawn if drawn.is_meta else func(*args, **kwargs)
        if not any(isinstance(each, Tensor) and each.is_meta for each in args):
            return func(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            return self._attention(*args, **kwargs)
        if name == "lstm" and isinstance(args[2], list | tuple):
            return self._lstm(*args)
        if name == "multi_head_attention_forward":
            self.total += _multi_head_attention(*args)
        shape = _SHAPES.get(name) if kwargs.get("out") is None and kwargs.get("dtype") is None else None
        # An embedding's first argument are numbers of rows, the second has the result's dtype.
        like = args[1] if name == "embedding" else args[0]
        result = like.new_empty(shape(*args, **kwargs)) if shape else func(*args, **kwargs)
        formula = _FORMULAS.get(name)
        if formula:
            self.total += formula(result, *args)
        return result

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """Both products over all pairs of positions, whatever kernel computes them; masks save nothing."""
        *batch, tokens, width = query.shape
        pairs = math.prod(batch) * tokens * key.shape[-2]
        self.total += 2 * pairs * (width + value.shape[-1])
        return query.new_empty(*batch, tokens, value.shape[-1])

    def _lstm(self, input: Tensor, state: tuple[Tensor, Tensor], weights: Sequence[Tensor], *options: Any) -> Any:
        """Every weight matrix once for each element of each sequence."""
        elements = input.shape[0] * input.shape[1]
        self.total += 2 * elements * sum(weight.numel() for weight in weights if weight.dim() == 2)
        directions = 2 if options[4] else 1
        output = input.new_empty(*input.shape[:2], directions * state[0].shape[-1])
        return output, state[0].new_empty(state[0].shape), state[1].new_empty(state[1].shape)


def _has_weight(module: nn.Module) -> bool:
    return isinstance(module, nn.RNNBase) or isinstance(getattr(module, "weight", None), Tensor)


def _first(tensor: Tensor, *_: Any, **__: Any) -> Shape:
    return tuple(tensor.shape)


def _broadcast(left: Any, right: Any, *others: Any, **_: Any) -> Shape:
    tensors = [each for each in (left, right, *others) if isinstance(each, Tensor)]
    if len(tensors) == 1:
        return tuple(tensors[0].shape)
    length = max(tensor.dim() for tensor in tensors)
    padded = [(1,) * (length - tensor.dim()) + tuple(tensor.shape) for tensor in tensors]
    # Of sizes 1 and n the result has n, even where n is 0.
    return tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*padded, strict=True))


def _product(left: Tensor, right: Tensor) -> Shape:
    if left.dim() == 1 or right.dim() == 1:
        return tuple(left.shape[:-1] if right.dim() == 1 else (*right.shape[:-2], right.shape[-1]))
    batch = _broadcast(left[..., 0, 0], right[..., 0, 0])
    return (*batch, left.shape[-2], right.shape[-1])


def _added_product(_added: Tensor, left: Tensor, right: Tensor, **_: Any) -> Shape:
    return _product(left, right)


def _kronecker(left: Tensor, right: Tensor) -> Shape:
    return tuple(a * b for a, b in zip(left.shape, right.shape, strict=True))


def _linear(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Shape:
    return (*input.shape[:-1], weight.shape[0])


def _embedded(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Shape:
    return (*input.shape, weight.shape[1])


def _convolved(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Shape:
    kernel = weight.shape[2:]
    pixels = _slid(input.shape[-len(kernel) :], kernel, stride, padding, dilation)
    return (*input.shape[: -len(kernel) - 1], weight.shape[0], *pixels)


def _max_pooled(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Shape:
    kernel = _each(kernel_size, 2)
    pixels = _slid(input.shape[-2:], kernel, stride or kernel, padding, dilation, round_up=ceil_mode)
    return (*input.shape[:-2], *pixels)


def _slid(
    sizes: Sequence[int], kernel: Sequence[int], stride: Any, padding: Any, dilation: Any, *, round_up: bool = False
) -> Shape:
    """How many places a kernel takes along each dimension; "same" padding adds what the kernel spans."""
    places: list[int] = []
    steps, gaps = _each(stride, len(kernel)), _each(dilation, len(kernel))
    for number, (size, width, step, gap) in enumerate(zip(sizes, kernel, steps, gaps, strict=True)):
        span = gap * (width - 1)
        added = (
            {"same": span, "valid": 0}[padding] if isinstance(padding, str) else 2 * _each(padding, len(kernel))[number]
        )
        room = size + added - span - 1
        places.append((-(-room // step) if round_up else room // step) + 1)
    return tuple(places)


def _each(value: Any, dimensions: int) -> list[Any]:
    """One number for every dimension, or the numbers given; torch also takes one in a tuple."""
    if not isinstance(value, tuple | list):
        return [value] * dimensions
    return list(cast(Any, value)) * (dimensions if len(cast(Any, value)) == 1 else 1)


def _reduced(input: Tensor, *_: Any, dim: int | None = None, keepdim: bool = False, **__: Any) -> Shape:
    shape = list(input.shape)
    if dim is None:
        return ()
    shape[dim] = 1
    if not keepdim:
        del shape[dim]
    return tuple(shape)


def _pooled(input: Tensor, size: Any, *_: Any) -> Shape:
    wanted = list(cast(Any, size)) if isinstance(size, tuple | list) else [size, size]
    kept = input.shape[-2:]
    return (*input.shape[:-2], *(each or old for each, old in zip(wanted, kept, strict=True)))


_ELEMENTWISE = """relu relu_ relu6 silu silu_ gelu leaky_relu elu hardswish hardsigmoid mish sigmoid sigmoid_ tanh tanh_
    exp sin cos softmax log_softmax dropout dropout_ group_norm layer_norm rms_norm batch_norm instance_norm normalize
    clamp_min rsqrt sqrt neg __neg__ pow square""".split()
_BROADCAST = """add mul sub div __add__ __mul__ __sub__ __truediv__ __radd__ __rmul__ __rsub__ true_divide
    addcmul __iadd__ __imul__ add_ mul_ addmm_""".split()
_DRAWN = {
    *("normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_", "xavier_uniform_", "xavier_normal_", "orthogonal_"),
    *("trunc_normal_", "constant_", "zeros_", "ones_", "zero_", "fill_"),
}
_SHAPES: dict[str, Callable[..., Shape]] = {
    **dict.fromkeys(_ELEMENTWISE, _first),
    **dict.fromkeys(_BROADCAST, _broadcast),
    **dict.fromkeys(("matmul", "mm", "bmm", "__matmul__"), _product),
    "addmm": _added_product,
    "baddbmm": _added_product,
    "linear": _linear,
    "kron": _kronecker,
    "embedding": _embedded,
    "max_pool2d": _max_pooled,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolved),
    "norm": _reduced,
    "adaptive_avg_pool2d": _pooled,
}


def _of_matmul(out: Tensor, left: Tensor, *_: Any) -> int:
    return 2 * out.numel() * left.shape[-1]


def _of_addmm(out: Tensor, _added: Tensor, left: Tensor, *_: Any) -> int:
    return _of_matmul(out, left)


def _of_conv(out: Tensor, _input: Tensor, weight: Tensor, *_: Any) -> int:
    return 2 * out.numel() * math.prod(weight.shape[1:])


def _of_transposed_conv(_out: Tensor, input: Tensor, weight: Tensor, *_: Any) -> int:
    return 2 * input.numel() * math.prod(weight.shape[1:])


_FORMULAS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("matmul", "mm", "bmm", "__matmul__", "linear"), _of_matmul),
    **dict.fromkeys(("addmm", "baddbmm", "addmm_"), _of_addmm),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _of_conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _of_transposed_conv),
}


def _multi_head_attention(query: Tensor, key: Tensor, value: Tensor, width: int, *_: Any) -> int:
    """nn.MultiheadAttention's four projections and two products; inputs are `(time, batch, width)`."""
    batch = query.shape[1] if query.dim() == 3 else 1
    targets, sources = query.shape[0] * batch, key.shape[0] * batch
    projections = 2 * width * (2 * targets * width + sources * (key.shape[-1] + value.shape[-1]))
    return projections + 4 * targets * key.shape[0] * width
