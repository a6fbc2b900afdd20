"""The gradient pipeline of Keras: clipping on every path against the oracle, callbacks, and what is refused."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import direct
import expecttest
import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    LAYOUTS,
    PATHS,
    REAL_DTYPES,
    Path,
    assert_same_bits,
    assert_unchanged,
    dtype_name,
    gradients,
    randn,
    snapshot,
    to_numpy,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import oracle
from reference.oracle import OracleOptimizer
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter

from torch_adadelta import AdadeltaKeras, schedules
from torch_adadelta.backends import kernels
from torch_adadelta.backends.functional import global_factor, square_sums

# Every option, and every pair of options that may be combined.
CLIPS: list[dict[str, float]] = [
    {"clipvalue": 0.5},
    {"clipnorm": 0.7},
    {"global_clipnorm": 0.9},
    {"clipvalue": 0.5, "clipnorm": 0.7},
    {"clipvalue": 0.5, "global_clipnorm": 0.9},
]


def clip_id(clip: dict[str, float]) -> str:
    return "+".join(clip)


def oracle_of(params: Sequence[Tensor], **options: Any) -> OracleOptimizer:
    dtypes = [dtype_name(p.dtype) for p in params]
    # NumPy keeps the strides, and with them the order in which squares are summed.
    return OracleOptimizer([to_numpy(p) for p in params], dtypes=dtypes, **options)


def assert_like_oracle(optimizer: AdadeltaKeras, expected: OracleOptimizer, what: str = "") -> None:
    """All parameters and both accumulators, bit by bit."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, (param, one) in enumerate(zip(params, expected.oracles, strict=True)):
        state = optimizer.state.get(param) or {
            "square_avg": torch.zeros_like(param),
            "acc_delta": torch.zeros_like(param),
        }
        for name, actual, wanted in (
            ("square_avg", state["square_avg"], one.square_avg),
            ("acc_delta", state["acc_delta"], one.acc_delta),
            ("param", param, one.p),
        ):
            assert_same_bits(actual, wanted, f"{name} of parameter {index} {what}")
    assert optimizer.iterations == expected.iterations


def set_gradients(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad


def numpy_or_none(grads: Sequence[Tensor | None]) -> list[np.ndarray | None]:
    return [None if g is None else to_numpy(g) for g in grads]


# ---- Clipping against the oracle ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clip", "dtype"),
    # clipvalue is for real numbers.
    [(clip, dtype) for clip in CLIPS for dtype in (REAL_DTYPES if "clipvalue" in clip else DTYPES)],
    ids=lambda value: clip_id(value) if isinstance(value, dict) else dtype_name(value),
)
def test_clipped_steps_are_those_of_the_oracle(path: Path, clip: dict[str, float], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(5, 3), (), (0, 2), (4099,), (2, 3, 4)]
    params = [Parameter(randn(shape, dtype, generator)) for shape in shapes]
    optimizer = AdadeltaKeras([{"params": params[:2]}, {"params": params[2:]}], 1.0, **clip, **path.options)
    expected = oracle_of(params, learning_rate=1.0, **clip)
    for step in range(3):
        grads: list[Tensor | None] = [gradients(s, dtype, 1, seed=10 * step + i)[0] for i, s in enumerate(shapes)]
        if step == 1:
            grads[1] = None
        set_gradients(params, grads)
        optimizer.step()
        expected.step(numpy_or_none(grads))
        assert_like_oracle(optimizer, expected, f"at step {step}")


@pytest.mark.parametrize("clip", CLIPS, ids=clip_id)
def test_mixed_dtypes(path: Path, clip: dict[str, float]) -> None:
    """global_clipnorm works in the widest T, the others in the T of each parameter."""
    generator = torch.Generator().manual_seed(2)
    dtypes = REAL_DTYPES if "clipvalue" in clip else DTYPES
    params = [Parameter(randn((7, 5), dtype, generator)) for dtype in (*dtypes, *reversed(dtypes))]
    optimizer = AdadeltaKeras(params, 1.0, decay=0.3, **clip, **path.options)
    expected = oracle_of(params, learning_rate=1.0, decay=0.3, **clip)
    for step in range(3):
        grads = [gradients((7, 5), p.dtype, 1, seed=10 * step + i)[0] for i, p in enumerate(params)]
        set_gradients(params, grads)
        optimizer.step()
        expected.step(numpy_or_none(grads))
        assert_like_oracle(optimizer, expected, f"at step {step}")


def test_a_gradient_is_rounded_to_its_T_before_its_norm_is_taken_in_the_widest(path: Path) -> None:
    """float64 gradients of float32 parameters, and a clipvalue that float32 does not hold, beside a float64 parameter."""
    params = [Parameter(torch.zeros(50)), Parameter(torch.zeros(3, dtype=torch.float64)), Parameter(torch.zeros(40))]
    clip = {"clipvalue": 0.1, "global_clipnorm": 0.3}
    optimizer = AdadeltaKeras(params, 1.0, **clip, **path.options)  # type: ignore[arg-type]
    expected = oracle_of(params, learning_rate=1.0, **clip)
    for step in range(20):
        grads = [gradients(p.shape, torch.float64, 1, seed=10 * step + i)[0] for i, p in enumerate(params)]
        optimizer.apply_gradients(zip(grads, params, strict=True))
        expected.step(numpy_or_none(grads))
        assert_like_oracle(optimizer, expected, f"at step {step}")


@pytest.mark.parametrize("clip", CLIPS, ids=clip_id)
@pytest.mark.parametrize(("layout", "grad_layout"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_layouts(path: Path, clip: dict[str, float], layout: str, grad_layout: str) -> None:
    shape = (3, 17, 1, 90)
    generator = torch.Generator().manual_seed(3)
    param = LAYOUTS[layout](randn(shape, torch.float32, generator)).requires_grad_()
    optimizer = AdadeltaKeras([param], 1.0, **clip, **path.options)
    expected = oracle_of([param], learning_rate=1.0, **clip)
    for step in range(2):
        param.grad = LAYOUTS[grad_layout](gradients(shape, torch.float32, 1, seed=step)[0])
        optimizer.step()
        expected.step([to_numpy(param.grad)])
        assert_like_oracle(optimizer, expected, f"at step {step}")


# One each of what clipping can meet; a norm that overflows float32 in its square among them.
SPECIAL = {
    "inf": [1.0, math.inf, -2.0],
    "-inf": [1.0, -math.inf, -2.0],
    "nan": [1.0, math.nan, -2.0],
    "overflow": [1e20, 1.0, -2.0],
    "zero": [0.0, -0.0, 0.0],
    "tiny": [1e-30, -1e-38, 1e-45],
    "huge": [3e38, -3e38, 3e38],
}


@pytest.mark.parametrize("c", [0.0, 1e-30, 0.5, 1e30])
@pytest.mark.parametrize("option", ["clipvalue", "clipnorm", "global_clipnorm"])
@pytest.mark.parametrize("values", SPECIAL.values(), ids=SPECIAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_name)
def test_special_values(path: Path, dtype: torch.dtype, values: list[float], option: str, c: float) -> None:
    params = [Parameter(torch.zeros(3, dtype=dtype)), Parameter(torch.zeros(2, dtype=dtype))]
    optimizer = AdadeltaKeras(params, 1.0, **{option: c}, **path.options)
    expected = oracle_of(params, learning_rate=1.0, **{option: c})
    grads = [torch.tensor(values, dtype=dtype), torch.tensor([0.25, -4.0], dtype=dtype)]
    set_gradients(params, grads)
    for _ in range(2):
        optimizer.step()
        expected.step(numpy_or_none(grads))
        assert_like_oracle(optimizer, expected)


def test_the_rules_of_the_edges() -> None:
    """What the page of semantics says in words, on the oracle's own functions."""
    g = np.array([1e20, 1.0], np.float32)
    assert (oracle.clip_by_norm(g, 0.5, oracle.square_sum(g)) == 0).all()  # the norm overflows
    g = np.array([np.inf, 1.0], np.float32)
    np.testing.assert_array_equal(oracle.clip_by_norm(g, 0.5, oracle.square_sum(g)), [np.nan, 0])
    g = np.zeros(2, np.float32)
    assert np.isnan(oracle.clip_by_norm(g, 0.0, oracle.square_sum(g))).all()
    assert np.isnan(oracle.global_factor(0.5, np.float64(np.inf), np.float32))
    # Below the threshold the gradient is still multiplied and divided.
    g = np.float32([0.1, 0.2, 0.3])
    np.testing.assert_array_equal(
        oracle.clip_by_norm(g, 7.3, oracle.square_sum(g)), g * np.float32(7.3) / np.float32(7.3)
    )


@settings(max_examples=100, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("path", PATHS[:2] + PATHS[-1:], ids=lambda path: path.name)
def test_drawn_options(path: Path, data: st.DataObject) -> None:
    """Options, dtypes and shapes in any combination, over several steps with some gradients missing."""
    clip = dict(data.draw(st.sampled_from([{}, *CLIPS]), "clip"))
    for key in clip:
        clip[key] = data.draw(st.floats(0, 100, width=32), key)
    dtypes = REAL_DTYPES if "clipvalue" in clip else DTYPES
    shapes = st.lists(st.integers(0, 150), max_size=2).map(tuple)
    layout = st.lists(st.tuples(shapes, st.sampled_from(dtypes)), min_size=1, max_size=5)
    kinds = data.draw(layout, "shapes and dtypes")
    options: dict[str, Any] = {
        "learning_rate": data.draw(st.floats(0, 10), "learning_rate"),
        "rho": data.draw(st.floats(0, 1), "rho"),
        "epsilon": data.draw(st.floats(1e-10, 1), "epsilon"),
        "decay": data.draw(st.sampled_from([0.0, 0.01, 3.0]), "decay"),
        "maximize": data.draw(st.booleans(), "maximize"),
        **clip,
    }
    seed = data.draw(st.integers(0, 2**16), "seed")
    generator = torch.Generator().manual_seed(seed)
    params = [Parameter(randn(shape, dtype, generator)) for shape, dtype in kinds]
    groups = [{"params": params[: len(params) // 2]}, {"params": params[len(params) // 2 :]}]
    optimizer = AdadeltaKeras([group for group in groups if group["params"]], **options, **path.options)
    expected = oracle_of(params, **options)
    for step in range(3):
        grads: list[Tensor | None] = [
            gradients(shape, dtype, 1, seed=seed + 10 * step + i)[0] if data.draw(st.integers(0, 4)) else None
            for i, (shape, dtype) in enumerate(kinds)
        ]
        set_gradients(params, grads)
        optimizer.step()
        expected.step(numpy_or_none(grads))
        assert_like_oracle(optimizer, expected, f"at step {step}")


# ---- Sums of squares ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 127, 128, 129, 255, 4095, 4096, 4097, 8192, 65537, 200_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=dtype_name)
def test_square_sums_over_the_fixed_tree(size: int, dtype: torch.dtype) -> None:
    (grad,) = gradients((size,), dtype, 1, seed=size)
    param = torch.empty_like(grad)
    expected = oracle.square_sum(to_numpy(grad))
    assert square_sums([param], [grad]).tolist() == [expected]
    if kernels.is_loaded:
        assert direct.square_sums([param], [grad]).tolist() == [expected]


@pytest.mark.parametrize("T", [torch.float32, torch.float64], ids=dtype_name)
@pytest.mark.parametrize("c", [0.0, 1e-30, 0.7, 1.0, 3e38])
@pytest.mark.parametrize("total", [0.0, 1e-90, 1e-40, 0.3, 1.0, 1e30, 1e77, math.inf, math.nan])
def test_global_factor_by_numbers_and_by_tensors(T: torch.dtype, c: float, total: float) -> None:
    """The CPU computes with Python numbers; devices, and autograd, with tensors: the same bits."""
    sums = torch.tensor([total], dtype=torch.float64)
    expected = float(oracle.global_factor(c, np.float64(total), np.float64 if T is torch.float64 else np.float32))
    by_number = global_factor(c, sums, T)
    by_tensor = global_factor(c, sums.clone().requires_grad_(), T)
    assert isinstance(by_number, float)
    assert isinstance(by_tensor, Tensor)
    np.testing.assert_array_equal([by_number, by_tensor.item()], [expected, expected])


def test_threads_do_not_change_the_bits(path: Path) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            param = Parameter(torch.zeros(300_001))
            optimizer = AdadeltaKeras([param], 1.0, global_clipnorm=0.1, **path.options)
            (param.grad,) = gradients((300_001,), torch.float32, 1)
            optimizer.step()
            results.append(param.detach())
    finally:
        torch.set_num_threads(before)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


# ---- Options --------------------------------------------------------------------------------------------------------


def test_options_can_be_set_and_read(path: Path) -> None:
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(2))]
    optimizer = AdadeltaKeras([{"params": params[:1]}, {"params": params[1:]}], 1.0, **path.options)
    expected = oracle_of(params, learning_rate=1.0)
    assert (optimizer.clipvalue, optimizer.clipnorm, optimizer.global_clipnorm, optimizer.decay) == (None,) * 3 + (0.0,)
    changes: list[dict[str, Any]] = [
        {"clipvalue": 0.5},
        {"clipnorm": 2.0},
        {"clipvalue": None},
        {"clipnorm": None, "global_clipnorm": 1.5},
        {"decay": 0.7},
        {"global_clipnorm": None},
    ]
    for step, change in enumerate(changes):
        for key, value in change.items():
            setattr(optimizer, key, value)
            setattr(expected, key, value)
            assert getattr(optimizer, key) == value
            assert [group[key] for group in optimizer.param_groups] == [value, value]
        grads = [gradients(p.shape, p.dtype, 1, seed=step + i)[0] for i, p in enumerate(params)]
        set_gradients(params, grads)
        optimizer.step()
        expected.step(numpy_or_none(grads))
        assert_like_oracle(optimizer, expected, f"after {change}")


class TestRefusedOptions(expecttest.TestCase):
    def refused(self, error: type[Exception], **options: Any) -> str:
        dtype = options.pop("dtype", torch.float32)
        with pytest.raises(error) as caught:
            AdadeltaKeras([torch.zeros(2, dtype=dtype)], **options)
        return str(caught.value)

    def test_negative_numbers(self) -> None:
        for key in ("clipvalue", "clipnorm", "global_clipnorm", "decay"):
            assert self.refused(ValueError, **{key: -1.0}) == f"Expected {key} >= 0, received: -1.0"

    def test_numbers_that_are_none(self) -> None:
        messages = [
            self.refused(ValueError, clipvalue=math.nan),
            self.refused(ValueError, clipnorm=math.inf),
            self.refused(ValueError, global_clipnorm=1e39),
            self.refused(ValueError, decay=math.inf),
            self.refused(TypeError, decay=None),
            self.refused(TypeError, clipnorm="1"),
            self.refused(TypeError, clipvalue=True),
            self.refused(TypeError, clipvalue=torch.tensor(1.0)),
        ]
        self.assertExpectedInline(
            "\n".join(messages),
            """\
Invalid clipvalue: nan; it must be a number >= 0
Invalid clipnorm: inf; it must be a finite number >= 0 that fits float32
Invalid global_clipnorm: 1e+39; it must be a finite number >= 0 that fits float32
Invalid decay: inf; it must be a finite number >= 0 that fits float32
decay must be a number, got None of type NoneType
clipnorm must be a number, got '1' of type str
clipvalue must be a number, got True of type bool
clipvalue must be a number, got a Tensor; use .item()""",
        )

    def test_options_that_exclude_each_other(self) -> None:
        messages = [
            self.refused(ValueError, clipnorm=1.0, global_clipnorm=2.0),
            self.refused(ValueError, clipvalue=1.0, gradient_transformers=[list]),
            self.refused(ValueError, clipvalue=1.0, dtype=torch.complex64),
        ]
        self.assertExpectedInline(
            "\n".join(messages),
            """\
Cannot accept both `clipnorm` and `global_clipnorm`. Received: `clipnorm`=1.0, `global_clipnorm`=2.0.
`clipvalue` cannot be set when `gradient_transformers` is set. Instead, use the `gradient_transformers` to specify clipping and other transformations. Received: clipvalue=1.0
parameter 0 of group 0 has dtype torch.complex64, and clipvalue=1.0 is for real numbers; use clipnorm or global_clipnorm""",
        )

    def test_callbacks_that_are_none(self) -> None:
        messages = [
            self.refused(TypeError, gradient_aggregator=1),
            self.refused(TypeError, gradient_transformers=list),
            self.refused(TypeError, gradient_transformers=[1]),
        ]
        self.assertExpectedInline(
            "\n".join(messages),
            """\
gradient_aggregator must be callable, got 1
gradient_transformers must be a list of callables, got <class 'list'>
gradient_transformers must be callables, got 1""",
        )

    def test_an_unknown_keyword_is_named(self) -> None:
        with pytest.raises(TypeError, match="momentum"):
            AdadeltaKeras([torch.zeros(2)], momentum=0.9)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"clipnorm": -1.0}, "Expected clipnorm >= 0, received: -1.0"),
        ({"clipnorm": 1.0}, "Cannot accept both"),
        ({"decay": math.nan}, "Invalid decay: nan"),
        ({"gradient_transformers": [list]}, "`global_clipnorm` cannot be set when"),
        ({"clipvalue": 1.0}, "parameter 0 of group 1 has dtype torch.complex64, and clipvalue=1.0 is for real"),
    ],
)
def test_a_refused_assignment_changes_nothing(change: dict[str, Any], error: str) -> None:
    optimizer = AdadeltaKeras(
        [{"params": [torch.zeros(2)]}, {"params": [torch.zeros(2, dtype=torch.complex64)]}], global_clipnorm=1.0
    )
    before = snapshot(optimizer)
    ((key, value),) = change.items()
    with pytest.raises((ValueError, TypeError), match=error):
        setattr(optimizer, key, value)
    assert_unchanged(optimizer, before)
    assert optimizer.gradient_transformers == []


def test_options_belong_to_the_whole_optimizer(path: Path) -> None:
    with pytest.raises(
        ValueError, match="clipnorm belongs to the whole optimizer, which has None; a param group cannot"
    ):
        AdadeltaKeras([{"params": [torch.zeros(2)], "clipnorm": 1.0}], **path.options)
    params = [Parameter(torch.ones(2)), Parameter(torch.ones(2))]
    optimizer = AdadeltaKeras([{"params": params[:1]}, {"params": params[1:]}], **path.options)
    set_gradients(params, [torch.ones(2), torch.ones(2)])
    optimizer.step()
    optimizer.param_groups[1]["clipnorm"] = 1.0
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"group 0 has None and group 1 has 1.0\. Set optimizer\.clipnorm"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_clipvalue_in_a_group_of_complex_parameters_is_refused(path: Path) -> None:
    param = Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = AdadeltaKeras([param], **path.options)
    optimizer.param_groups[0]["clipvalue"] = 1.0
    param.grad = torch.full((2,), 5 + 5j)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"clipvalue=1\.0 is for real numbers"):
        optimizer.step()
    assert_unchanged(optimizer, before)


# ---- Callbacks ------------------------------------------------------------------------------------------------------


def doubled(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(2 * grad, param) for grad, param in pairs]


def halved_in_place(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    for grad, _ in pairs:
        grad.mul_(0.5)
    return pairs


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_callbacks_see_the_gradients_in_T_and_may_overwrite_them(path: Path, dtype: torch.dtype) -> None:
    params = [Parameter(torch.ones(3, dtype=dtype)), Parameter(torch.ones(2, dtype=dtype)), Parameter(torch.ones(1))]
    seen: list[list[tuple[torch.dtype, int]]] = []

    def look(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        assert isinstance(pairs, list)
        seen.append([(grad.dtype, next(i for i, p in enumerate(params) if p is param)) for grad, param in pairs])
        return pairs

    optimizer = AdadeltaKeras(
        [{"params": params[:1]}, {"params": params[1:]}],
        1.0,
        gradient_aggregator=halved_in_place,
        gradient_transformers=[look, doubled, halved_in_place, halved_in_place],
        **path.options,
    )
    expected = oracle_of(params, learning_rate=1.0)
    grads: list[Tensor | None] = [gradients(p.shape, p.dtype, 1, seed=i)[0] for i, p in enumerate(params)]
    grads[2] = None
    set_gradients(params, grads)
    before = [None if g is None else g.clone() for g in grads]
    optimizer.step()
    wide = {torch.float64: torch.float64, torch.complex128: torch.complex128}
    T = wide.get(dtype, torch.complex64 if dtype.is_complex else torch.float32)
    assert seen == [[(T, 0), (T, 1)]]
    for grad, was in zip(grads, before, strict=True):
        if grad is not None and was is not None:
            assert_same_bits(grad, was, "the user's gradient")
    expected.step([None if g is None else oracle.scaled(to_numpy(g), to_numpy(g).real.dtype.type(0.25)) for g in grads])
    assert_like_oracle(optimizer, expected)


@pytest.mark.parametrize("clip", CLIPS, ids=clip_id)
def test_the_aggregator_comes_before_clipping(path: Path, clip: dict[str, float]) -> None:
    params = [Parameter(torch.ones(300)), Parameter(torch.ones(2))]
    optimizer = AdadeltaKeras(params, 1.0, gradient_aggregator=doubled, **clip, **path.options)
    expected = oracle_of(params, learning_rate=1.0, **clip)
    grads = [gradients(p.shape, p.dtype, 1, seed=i)[0] for i, p in enumerate(params)]
    set_gradients(params, grads)
    optimizer.step()
    expected.step([2 * to_numpy(g) for g in grads])
    assert_like_oracle(optimizer, expected)


def test_maximize_comes_last(path: Path) -> None:
    param = Parameter(torch.zeros(3))
    seen = []

    def look(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        seen.append(pairs[0][0].tolist())
        return pairs

    optimizer = AdadeltaKeras([param], 1.0, maximize=True, gradient_transformers=[look], **path.options)
    param.grad = torch.tensor([1.0, -2.0, 3.0])
    optimizer.step()
    assert seen == [[1.0, -2.0, 3.0]]
    assert (param * param.grad > 0).all()


@pytest.mark.parametrize("kind", ["gradient_aggregator", "gradient_transformers"])
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (
            lambda pairs: None,
            TypeError,
            "must return a list of .gradient, parameter. tuples, as it was given; got None",
        ),
        (lambda pairs: [g for g, _ in pairs], (TypeError, ValueError), "must return a list of"),
        (lambda pairs: pairs[:-1], ValueError, "was given 2 .gradient, parameter. tuples and returned 1"),
        (lambda pairs: pairs[::-1], ValueError, "returned another parameter than parameter 0 of group 0 in tuple 0"),
        (
            lambda pairs: [(None, p) for _, p in pairs],
            TypeError,
            "returned None as the gradient of parameter 0 of group 0",
        ),
        (
            lambda pairs: [(g[:1], p) for g, p in pairs],
            ValueError,
            r"a gradient of shape \(1,\) for parameter 0 of group",
        ),
        (lambda pairs: [(g.to("meta"), p) for g, p in pairs], ValueError, "a gradient of device meta for parameter 0"),
        (lambda pairs: [(g.long(), p) for g, p in pairs], ValueError, "a gradient of torch.int64 for parameter 0"),
        (lambda pairs: [(g + 0j, p) for g, p in pairs], ValueError, "a gradient of torch.complex64 for parameter 0"),
        (lambda pairs: 1 / 0, ZeroDivisionError, "division"),
    ],
)
def test_what_a_callback_returns_is_checked(path: Path, kind: str, wrong: Any, error: Any, message: str) -> None:
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(2))]
    option: Any = wrong if kind == "gradient_aggregator" else [doubled, wrong]
    optimizer = AdadeltaKeras(params, 1.0, **{kind: option}, **path.options)
    set_gradients(params, [torch.ones(3), torch.ones(2)])
    before = snapshot(optimizer)
    with pytest.raises(error, match=message) as caught:
        optimizer.step()
    if error is not ZeroDivisionError:
        assert str(caught.value).startswith(f"{kind}")
        assert "lambda" in str(caught.value)
    assert_unchanged(optimizer, before)
    assert optimizer.iterations == 0


def test_a_callback_may_return_another_dtype(path: Path) -> None:
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(3))]
    optimizer = AdadeltaKeras(
        params, 1.0, gradient_transformers=[lambda pairs: [(g.bfloat16(), p) for g, p in pairs]], **path.options
    )
    grads = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.1, 0.2, 0.3])]
    set_gradients(params, grads)
    optimizer.step()
    expected = oracle_of([torch.ones(3)] * 2, learning_rate=1.0)
    expected.step([to_numpy(g.bfloat16()) for g in grads])
    assert_like_oracle(optimizer, expected)


def test_a_gradient_that_does_not_fit_is_refused_before_the_callback(path: Path) -> None:
    param = Parameter(torch.ones(3))
    optimizer = AdadeltaKeras([param], gradient_transformers=[doubled], **path.options)
    with pytest.raises(RuntimeError, match=r"has shape \(3,\), but its gradient has shape \(2,\)"):
        optimizer.apply_gradients([(torch.ones(2), param)])
    assert optimizer.iterations == 0


# ---- Differentiable -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [*CLIPS, {"transform": 1.0}], ids=clip_id)
def test_a_clipped_step_is_differentiable(clip: dict[str, float]) -> None:
    options: dict[str, Any] = dict(clip)
    if options.pop("transform", None):
        options["gradient_transformers"] = [lambda pairs: [(g.sin(), p) for g, p in pairs]]

    def stepped(start: Tensor, grad: Tensor) -> Tensor:
        param = start.clone()
        param.grad = grad
        optimizer = AdadeltaKeras([param], 1.0, epsilon=0.1, differentiable=True, decay=0.5, **options)
        optimizer.step()
        optimizer.step()
        return param

    start = torch.tensor([1.0, -2.0, 0.3], dtype=torch.float64, requires_grad=True)
    grad = torch.tensor([0.3, -2.0, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(stepped, (start, grad))
    plain = AdadeltaKeras([other := start.detach().clone()], 1.0, epsilon=0.1, decay=0.5, **options)
    other.grad = grad.detach()
    plain.step()
    plain.step()
    assert_same_bits(stepped(start, grad), other)


@pytest.mark.parametrize("option", ["clipnorm", "global_clipnorm"])
def test_the_derivative_at_a_gradient_of_zero_is_finite(option: str) -> None:
    param = torch.ones(3, dtype=torch.float64, requires_grad=True).clone()
    grad = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    param.grad = grad
    optimizer = AdadeltaKeras([param], 1.0, differentiable=True, **{option: 0.5})  # type: ignore[arg-type]
    optimizer.step()
    param.sum().backward()
    assert grad.grad is not None
    assert grad.grad.isfinite().all()


@pytest.mark.parametrize("clip", [{}, *CLIPS, {"gradient_transformers": [doubled]}], ids=clip_id)
def test_distributed_tensors(clip: dict[str, Any]) -> None:
    """A DTensor takes the for-loop, and gets the bits of a plain tensor."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        ours = Parameter(distribute_tensor(torch.ones(6, 4), mesh, [Shard(0)]))
        plain = Parameter(torch.ones(6, 4))
        optimizers = [AdadeltaKeras([p], 1.0, **clip) for p in (ours, plain)]
        for step in range(2):
            (grad,) = gradients((6, 4), torch.float32, 1, seed=step)
            ours.grad, plain.grad = distribute_tensor(grad, mesh, [Shard(0)]), grad
            for optimizer in optimizers:
                optimizer.step()
        assert_same_bits(ours.full_tensor(), plain)  # type: ignore[operator]
        for key, state in optimizers[0].state[ours].items():
            assert_same_bits(state.full_tensor(), optimizers[1].state[plain][key])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("clip", [{}, {"clipnorm": 0.7}, {"global_clipnorm": 0.9}], ids=clip_id)
def test_distributed_and_plain_tensors_in_a_group(clip: dict[str, float]) -> None:
    """They are updated apart; but a parameter and its gradient are of one kind."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        ours = [Parameter(torch.ones(4)), Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))]
        plain = [Parameter(torch.ones(4)), Parameter(torch.ones(4))]
        optimizers = [AdadeltaKeras(params, 1.0, **clip) for params in (ours, plain)]  # type: ignore[arg-type]
        grads = [gradients((4,), torch.float32, 1, seed=i)[0] for i in range(2)]
        set_gradients(plain, grads)
        set_gradients(ours, [grads[0], distribute_tensor(grads[1], mesh, [Shard(0)])])
        for optimizer in optimizers:
            optimizer.step()
        assert_same_bits(ours[0], plain[0])
        assert_same_bits(ours[1].full_tensor(), plain[1])  # type: ignore[operator]
        before = ours[0].detach().clone()
        with pytest.raises(RuntimeError, match="parameter 1 of group 0 is a DTensor, but its gradient is a Tensor"):
            optimizers[0].apply_gradients(zip(grads, ours, strict=True))
        assert_same_bits(ours[0], before)
        assert optimizers[0].iterations == 1
    finally:
        dist.destroy_process_group()


def test_clipping_keeps_a_scheduled_step_on_one_device(path: Path) -> None:
    """A schedule, decay and clipping together, and a group of two opmath dtypes."""
    schedule = schedules.ExponentialDecay(1.0, 2, 0.5)
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(3, dtype=torch.float64))]
    optimizer = AdadeltaKeras(params, schedule, decay=0.1, clipvalue=0.5, clipnorm=0.7, **path.options)
    expected = oracle_of(
        params, learning_rate=lambda t: np.float32(schedule(float(t))), decay=0.1, clipvalue=0.5, clipnorm=0.7
    )
    for step in range(4):
        grads = [gradients(p.shape, p.dtype, 1, seed=step + i)[0] for i, p in enumerate(params)]
        set_gradients(params, grads)
        optimizer.step()
        expected.step(numpy_or_none(grads))
        assert_like_oracle(optimizer, expected, f"at step {step}")
