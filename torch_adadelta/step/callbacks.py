"""What the user's functions make of the gradients of a step: the aggregator first, then the transformers, in order."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from torch_adadelta.backends import functional
from torch_adadelta.backends.opmath import as_real, opmath_dtype
from torch_adadelta.options import CLIP_OPTIONS

Pairs = list[tuple[Tensor, Tensor]]
Callback = Callable[[Pairs], Pairs]


class Callbacks:
    """The callbacks of an optimizer, checked."""

    def __init__(self, aggregator: Callback | None, transformers: Iterable[Callback] | None) -> None:
        self.aggregator = _checked_aggregator(aggregator)
        self.transformers = _checked_transformers(transformers)

    @property
    def names(self) -> list[str]:
        """What a state_dict names them by, which cannot hold them."""
        given = {"gradient_aggregator": self.aggregator is not None, "gradient_transformers": bool(self.transformers)}
        return [name for name, is_given in given.items() if is_given]

    def check_known(self, groups: list[dict[str, Any]]) -> None:
        """Raises ValueError if groups to be taken over were saved with callbacks that are not there."""
        for name in ("gradient_aggregator", "gradient_transformers"):
            if name not in self.names and any(name in group.get("callables", ()) for group in groups):
                raise ValueError(
                    f"what is to be loaded was saved with {name}, and functions are not saved: set optimizer.{name} "
                    "first"
                )

    def check_clip_options(self, options: dict[str, Any]) -> None:
        """Raises ValueError if there are transformers and a clip option, as Keras does."""
        for key in CLIP_OPTIONS if self.transformers else ():
            if options[key] is not None:
                raise ValueError(
                    f"`{key}` cannot be set when `gradient_transformers` is set. Instead, use the "
                    f"`gradient_transformers` to specify clipping and other transformations. Received: "
                    f"{key}={options[key]!r}"
                )

    def run(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        aggregates: bool,
        grad_scale: Tensor | None,
        loss_scale_factor: float | None,
        name_of: Callable[[Tensor], str],
    ) -> list[Tensor]:
        """The gradients that they return for these, which they are given as copies in T, unscaled.

        The aggregator is called for an empty list too: other processes may have gradients, and wait for this one.
        """
        grads = [
            copied_to_T(param, grad, grad_scale, loss_scale_factor) for param, grad in zip(params, grads, strict=True)
        ]
        if aggregates and self.aggregator is not None:
            grads = _run(self.aggregator, "gradient_aggregator:", params, grads, name_of)
        for transformer in self.transformers if params else ():
            grads = _run(transformer, "gradient_transformers:", params, grads, name_of)
        return grads


def _checked_aggregator(callback: Any) -> Any:
    if callback is not None and not callable(callback):
        raise TypeError(f"gradient_aggregator must be callable, got {callback!r}")
    return callback


def _checked_transformers(transformers: Any) -> list[Callback]:
    if callable(transformers) or isinstance(transformers, str):
        raise TypeError(f"gradient_transformers must be a list of callables, got {transformers!r}")
    transformers = list(transformers or ())
    for transformer in transformers:
        if not callable(transformer):
            raise TypeError(f"gradient_transformers must be callables, got {transformer!r}")
    return transformers


def copied_to_T(
    param: Tensor, grad: Tensor, grad_scale: Tensor | None = None, loss_scale_factor: float | None = None
) -> Tensor:
    """A copy of a gradient in the parameter's opmath dtype, unscaled: a callback may overwrite it."""
    if grad.layout is torch.sparse_coo:
        values = copied_to_T(param, grad._values(), grad_scale, loss_scale_factor)
        return torch.sparse_coo_tensor(
            grad._indices().clone(), values, grad.shape, is_coalesced=grad.is_coalesced(), check_invariants=False
        )
    T = opmath_dtype(param.dtype)
    dtype = T.to_complex() if grad.is_complex() else T
    g = grad.to(dtype, copy=True).resolve_conj().resolve_neg()
    if grad_scale is not None:
        as_real(g).div_(grad_scale.to(g.device, T, non_blocking=g.device.type != "cpu").reshape(()))
    return functional.divided(g, loss_scale_factor or 1.0)


def _run(
    callback: Callback, kind: str, params: list[Tensor], grads: list[Tensor], name_of: Callable[[Tensor], str]
) -> list[Tensor]:
    """The gradients that a callback returns for these, checked.

    Raises:
        TypeError: it did not return a list of (gradient, parameter) tuples.
        ValueError: the list has another length or other parameters, or a gradient does not fit its parameter.
    """
    who = f"{kind} {getattr(callback, '__qualname__', callback)!s}"
    returned: Any = callback(list(zip(grads, params, strict=True)))
    try:
        if not isinstance(returned, list | tuple):  # to run a generator here would replace what it raises
            raise TypeError
        pairs = [(grad, param) for grad, param in returned]
    except (TypeError, ValueError):
        raise TypeError(
            f"{who} must return a list of (gradient, parameter) tuples, as it was given; got {_abridged(returned)}"
        ) from None
    if len(pairs) != len(params):
        raise ValueError(f"{who} was given {len(params)} (gradient, parameter) tuples and returned {len(pairs)}")
    for index, ((grad, returned_param), param) in enumerate(zip(pairs, params, strict=True)):
        if returned_param is not param:
            raise ValueError(
                f"{who} returned another parameter than {name_of(param)} in tuple {index}; keep their order"
            )
        _check_returned(who, grad, param, name_of)
    return [grad for grad, _ in pairs]


def _check_returned(who: str, grad: Any, param: Tensor, name_of: Callable[[Tensor], str]) -> None:
    if not isinstance(grad, Tensor):
        raise TypeError(f"{who} returned {_abridged(grad)} as the gradient of {name_of(param)}, not a Tensor")
    for what, got, wanted in (
        ("shape", tuple(grad.shape), tuple(param.shape)),
        ("device", grad.device, param.device),
    ):
        if got != wanted:
            raise ValueError(f"{who} returned a gradient of {what} {got} for {name_of(param)} of {what} {wanted}")
    if grad.layout not in (torch.strided, torch.sparse_coo):
        raise ValueError(
            f"{who} returned a gradient of layout {grad.layout} for {name_of(param)}; it must be dense or "
            "torch.sparse_coo. Use .to_sparse_coo()"
        )
    if grad.is_complex() != param.is_complex() or not (grad.is_complex() or grad.is_floating_point()):
        raise ValueError(f"{who} returned a gradient of {grad.dtype} for {name_of(param)} of {param.dtype}")


def _abridged(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}... of type {type(value).__name__}"
