"""AdadeltaKeras beside Keras 3 on torch: each option, each pair that may be combined, and all at once."""

import warnings
from typing import Any

import pytest
import torch
from keras3_training import (
    CALLS,
    MARKS,
    SHAPES,
    TOLERANCE,
    all_options,
    gradients_of,
    on_torch,
    optimizer_of,
    variables_of,
)
from torch.nn import Parameter

from torch_adadelta import AdadeltaKeras, schedules

pytestmark = MARKS

PATHS: dict[str, dict[str, bool]] = {
    "single_tensor": {"foreach": False},
    "multi_tensor": {"foreach": True},
    "fused": {"fused": True},
}


def ours_of(options: dict[str, Any], variables: list[Any], path: dict[str, bool]) -> AdadeltaKeras:
    options = {"learning_rate": 1.0, **options}
    if options["learning_rate"] == "schedule":
        options["learning_rate"] = schedules.ExponentialDecay(1.0, 4, 0.5)
    elif options["learning_rate"] == "callable":
        options["learning_rate"] = lambda: 0.5
    excluded = options.pop("exclude", None)
    named = [(v.name, Parameter(v._value.detach().clone())) for v in variables]
    if options.get("clipnorm") == 0:  # which means none in Keras 3
        options["clipnorm"] = None
    optimizer = AdadeltaKeras(named, **options, **path)
    if excluded:
        optimizer.exclude_from_weight_decay(var_names=excluded)
    return optimizer


def error_of(actual: torch.Tensor, expected: Any) -> float:
    expected = expected._value.detach().double()
    if not expected.numel():
        return 0.0
    return float((actual.detach().double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize("path", PATHS)
@on_torch
def test_numbers_are_those_of_keras_3(path: str) -> None:
    import keras

    for options in all_options():
        variables = variables_of()
        ours = ours_of(options, variables, PATHS[path])
        params = ours.param_groups[0]["params"]
        theirs = optimizer_of(keras.optimizers.Adadelta, options)
        theirs.build(variables)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for call in range(CALLS):
                grads = gradients_of(variables, call)
                ours.apply_gradients(zip(grads, params, strict=True))
                theirs.apply(grads, variables)
        assert ours.iterations == int(theirs.iterations), options
        assert ours.param_groups[0]["iterations"] == int(theirs._iterations.value), options
        for i in range(len(SHAPES)):
            state = ours.state[params[i]]
            pairs = {"param": (params[i], variables[i])}
            pairs["square_avg"] = (state["square_avg"], theirs._accumulated_grads[i])
            pairs["acc_delta"] = (state["acc_delta"], theirs._accumulated_delta_vars[i])
            if options.get("use_ema"):
                pairs["average"] = (state["average"], theirs._model_variables_moving_average[i])
            if "gradient_accumulation_steps" in options:
                pairs["sum"] = (state["gradient_accumulator"], theirs._accumulated_gradients[i])
            for what, (actual, expected) in pairs.items():
                assert error_of(actual, expected) <= TOLERANCE, (options, i, what)
