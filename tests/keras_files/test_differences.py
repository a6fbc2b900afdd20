"""What a report tells of a model that computes or trains otherwise than that of Keras."""

import warnings
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("h5py", reason="needs the extra 'keras'")
import h5py
from keras_stored import (
    DATA,
    Net,
    assert_is,
    attention,
    build,
    dense,
    edited,
    load,
    recurrent,
    sequential,
    truth,
    without_state,
    write_h5,
)

from torch_adadelta import AdadeltaKeras
from torch_adadelta.keras import freeze_second_biases, load_keras, save_keras

pytestmark = pytest.mark.filterwarnings("ignore:.*not in the file, so that training goes on")


def warnings_of(path: Path, model: nn.Module, **options: Any) -> str:
    """What a load warns of, without the path."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(path, model, **options)
    assert len(caught) <= 1
    return "".join(str(warning.message).removeprefix(f"{path}: ") for warning in caught)


OWN: Final = {"clipnorm": 2.0, "learning_rate": 0.125, "rho": 0.5, "epsilon": 1e-3}


NORMS: Final = "clipnorm=2.0, clipvalue=None, global_clipnorm=None"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("new.weights.h5", f"{NORMS}, learning_rate=0.125, decay=0.0, rho=0.5, epsilon=0.001, and no weight decay"),
        ("k3.weights.h5", f"{NORMS}, decay=0.0, rho=0.5, epsilon=0.001, and no weight decay"),
        ("k3.keras", f"{NORMS}, decay=0.0, rho=0.5, epsilon=0.001, and no weight decay"),
        ("new_tfck2/c-1", f"{NORMS}, decay=0.0, rho=0.5, epsilon=0.001, and no weight decay"),
        ("tf24_tfck2/c-1", f"{NORMS}, epsilon=0.001"),
        *((name, None) for name in ("tf24.h5", "new.h5", "new.keras", "k3.h5")),
    ],
)
def test_what_the_file_cannot_confirm_is_told(name: str, options: str | None) -> None:
    model, optimizer = build(**OWN)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = load_keras(DATA / name, optimizer, model)
    expected = [] if options is None else [
        f"not in the file, so that training goes on with what the optimizer has: {options}; see that Keras had the same"
    ]  # fmt: skip
    assert report.notes == expected
    assert str(report).count("\nnote: not in the file") == len(expected)
    assert [str(warning.message) for warning in caught] == [f"{DATA / name}: {note}" for note in expected]
    assert caught == [] or caught[0].filename == __file__
    # Who keeps his own knows.
    model, optimizer = build(**OWN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_keras(DATA / name, optimizer, model, hyperparameters=False).notes == []


def without_rate(file: Any) -> None:
    """Keras 3 leaves the learning rate away where it is a schedule."""
    states = file["optimizer/vars"]
    del states["1"]
    for number in range(2, 10):
        states.move(str(number), str(number - 1))


def test_a_schedule_that_is_not_in_the_file_is_told(tmp_path: Path) -> None:
    path = edited(tmp_path, without_rate, "k3.weights.h5")
    model, optimizer = build(**OWN)
    with pytest.warns(
        UserWarning, match=r"learning_rate=0\.125.* see that Keras had the same \(Keras had a schedule\)"
    ):
        load_keras(path, optimizer, model)
    assert_is(optimizer.state[model[0].weight]["square_avg"], truth("k3")[1][0].T)


def test_differences_between_the_models_are_told(tmp_path: Path) -> None:
    norm = {"gamma": np.ones(4), "beta": np.zeros(4), "moving_mean": np.zeros(4), "moving_variance": np.ones(4)}
    layers = {"norm": norm, "lstm": recurrent(4, 2, 4, (8,)), "embed": {"embeddings": np.ones((5, 4))}}

    def path_with(epsilon: float, momentum: float, activation: Any) -> Path:
        config = sequential(
            ("embed", "Embedding", {}),
            ("norm", "BatchNormalization", {"epsilon": epsilon, "momentum": momentum}),
            ("lstm", "LSTM", {"activation": "tanh", "recurrent_activation": activation}),
        )
        return write_h5(tmp_path / "m.h5", layers, config)

    def model(sparse: bool) -> nn.Module:
        return freeze_second_biases(
            Net(norm=nn.BatchNorm1d(4), lstm=nn.LSTM(4, 2), embed=nn.Embedding(5, 4, sparse=sparse))
        )

    assert warnings_of(path_with(0.001, 0.99, "hard_sigmoid"), model(False)) == (
        "norm has eps=1e-05, and norm epsilon=0.001; norm has momentum=0.1, and norm momentum=0.99, which is "
        "momentum=0.01 in PyTorch; lstm has recurrent_activation='hard_sigmoid', and lstm has sigmoid; embed: this Keras "
        "updates only the rows that a batch uses of an embedding, as sparse=True does"
    )
    assert warnings_of(path_with(1e-5, 0.9, {"config": "sigmoid"}), model(True)) == ""
    assert "'Softsign'" in warnings_of(path_with(1e-5, 0.9, {"class_name": "Softsign"}), model(True))


def test_an_rnn_of_another_activation_is_told(tmp_path: Path) -> None:
    for activation, nonlinearity, expected in (
        ("relu", "relu", ""), ("tanh", "tanh", ""), ("relu", "tanh", "rnn has activation='relu', and rnn has tanh"),
        ("tanh", "relu", "rnn has activation='tanh', and rnn has relu"),
    ):  # fmt: skip
        config = sequential(("rnn", "SimpleRNN", {"activation": activation}))
        path = write_h5(tmp_path / "m.h5", {"rnn": recurrent(3, 2, 1, (2,))}, config)
        for cls in (nn.RNN, nn.RNNCell):
            assert warnings_of(path, freeze_second_biases(Net(rnn=cls(3, 2, nonlinearity=nonlinearity)))) == expected


def test_a_gru_without_biases_and_configuration_is_told(tmp_path: Path) -> None:
    kernels = {name: value for name, value in recurrent(3, 2, 3, ()).items() if "bias" not in name}
    path = write_h5(tmp_path / "m.h5", {"gru": kernels})
    expected = "the file does not say whether gru has reset_after=True, as gru does"
    assert warnings_of(path, Net(gru=nn.GRU(3, 2, bias=False))) == expected


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_recurrent_layers_that_go_another_way(is_wrapped: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"go_backwards": True, "stateful": True}
    weights, more = recurrent(3, 2, 4, (8,)), ""
    if is_wrapped:
        options = {"layer": {"class_name": "LSTM", "config": options}, "merge_mode": "sum"}
        weights = {f"{side}_lstm/{k}": v for side in ("forward", "backward") for k, v in weights.items()}
        more = "; lstm has merge_mode='sum', and rnn concatenates both directions"
    path = write_h5(
        tmp_path / "m.h5", {"lstm": weights}, sequential(("lstm", "Bidirectional" if is_wrapped else "LSTM", options))
    )
    assert warnings_of(path, freeze_second_biases(Net(rnn=nn.LSTM(3, 2, bidirectional=is_wrapped)))) == (
        f"lstm has go_backwards=True, and rnn goes forwards; lstm has stateful=True, and rnn begins each batch anew{more}"
    )


@pytest.mark.parametrize(
    ("version", "backend"), [("3.15.1", "tensorflow"), ("3.15.1", "torch"), ("2.21.0", "tensorflow")]
)
def test_repeated_indices_of_an_embedding(version: str, backend: str, tmp_path: Path) -> None:
    path = write_h5(tmp_path / "m.h5", {"embed": {"embeddings": np.ones((5, 4))}, "one": dense(4, 3)})
    with h5py.File(path, "r+") as file:
        file.attrs["keras_version"], file.attrs["backend"] = version, backend
    model = Net(embed=nn.Embedding(5, 4, sparse=version < "3"), one=nn.Linear(4, 3))
    assert warnings_of(path, model) == (
        "embed: Keras 3 on TensorFlow adds the squares of the gradients of rows that a batch uses more than once, where "
        "AdadeltaKeras squares their sum; with such batches training goes on differently"
        if (version, backend) == ("3.15.1", "tensorflow")
        else ""
    )
    with h5py.File(path, "r+") as file:
        without_state("embed")(file)
    model.embed.requires_grad_(False)
    assert warnings_of(path, model) == ""


def test_norms_of_parameters_that_are_not_one_to_one(tmp_path: Path) -> None:
    layers = {"attend": attention(), "gru": recurrent(3, 2, 3, (2, 6)), "one": dense(4, 3)}
    path = write_h5(tmp_path / "m.h5", layers, clipnorm=1.0)

    def model() -> nn.Module:
        return Net(attend=nn.MultiheadAttention(4, 2), gru=nn.GRU(3, 2), one=nn.Linear(4, 3))

    rows = [
        (f"attend/{part}/{role}", f"attend.in_proj_{name}[{first}:{first + 4}]")
        for first, part in ((0, "query"), (4, "key"), (8, "value"))
        for role, name in (("kernel", "weight"), ("bias", "bias"))
    ] + [("gru/bias", "gru.bias_ih_l0 and gru.bias_hh_l0")]
    ours = model()
    optimizer = AdadeltaKeras(ours.named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = load_keras(path, optimizer, ours, weights=True)
    assert report.norm_variables == rows
    assert (
        "\nnorm_variables:\n"
        "  attend/query/kernel → attend.in_proj_weight[0:4]\n  attend/query/bias → attend.in_proj_bias[0:4]\n"
    ) in str(report)

    # A step clips the gradient of each weight of Keras by its own norm.
    rng = np.random.default_rng(1)
    params = dict(ours.named_parameters())
    grads = {name: rng.standard_normal(param.shape) for name, param in params.items()}
    for name, param in params.items():
        param.grad = torch.from_numpy(grads[name])
    thirds = (slice(0, 4), slice(4, 8), slice(8, 12))
    pieces = [[(f"attend.in_proj_{name}", own)] for name in ("weight", "bias") for own in thirds]
    pieces += [[("gru.bias_ih_l0", slice(None)), ("gru.bias_hh_l0", slice(None))]]
    pieces += [[(name, slice(None))] for name in grads if "in_proj" not in name and "gru.bias" not in name]
    optimizer.rho = 0.0  # so that square_avg is the square of the clipped gradient
    optimizer.step()
    for own in pieces:
        norm = np.sqrt(sum(np.square(grads[name][where]).sum() for name, where in own))
        for name, where in own:
            square_avg = optimizer.state[params[name]]["square_avg"].numpy()[where]
            np.testing.assert_allclose(square_avg, np.square(grads[name][where] / max(norm, 1.0)), rtol=1e-6)

    # Written back and loaded again, it is the same; and the optimizer's own clipnorm, of which the file knows nothing.
    save_keras(tmp_path / "back.h5", optimizer, ours, path)
    other = model()
    again = AdadeltaKeras(other.parameters(), clipnorm=3.0, norm_variables=[[other.one.weight, other.one.bias]])
    load_keras(tmp_path / "back.h5", again, other, hyperparameters=False)
    assert [group["norm_variables"] for group in again.param_groups] == [
        group["norm_variables"] for group in optimizer.param_groups
    ]
    # A bias that is frozen has no part in a norm.
    other.gru.bias_hh_l0.requires_grad_(False)
    other.attend.in_proj_weight.requires_grad_(False)
    assert [label for label, _ in load_keras(path, again, other).norm_variables] == [
        f"attend/{part}/bias" for part in ("query", "key", "value")
    ]
    # Where each process has a part of the parameters, norms are those of parameters, which is told.
    for options in ({"clipnorm": 3.0}, {}):
        other = model()
        part = AdadeltaKeras(other.parameters(), norm_group="world", **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = load_keras(path, part, other, hyperparameters=False)
        assert (part.norm_variables, report.norm_variables) == (None, [])
        expected = "; ".join(f"{names} (in Keras {weight})" for weight, names in rows)
        assert [str(warning.message) for warning in caught] == [
            f"{path}: clipnorm=3 takes the norm of each parameter, and Keras of each of its weights, which are not the "
            f"same for {expected}: there gradients are clipped differently, for norm_variables is not for norm_group, nor "
            "for ZeroRedundancyOptimizer"
        ] * len(options)
    other = Net(one=nn.Linear(4, 3))
    plain = write_h5(tmp_path / "p.h5", {"one": layers["one"]}, clipnorm=1.0)
    assert load_keras(plain, AdadeltaKeras(other.parameters(), norm_group="world"), other).notes == []
    for options in ({"clipvalue": 1.0}, {"global_clipnorm": 1.0}, {}):
        assert warnings_of(write_h5(tmp_path / "n.h5", layers, **options), model()) == ""
    lstm = write_h5(tmp_path / "l.h5", {"lstm": recurrent(3, 2, 4, (8,))}, clipnorm=1.0)
    assert warnings_of(lstm, freeze_second_biases(Net(rnn=nn.LSTM(3, 2)))) == ""
