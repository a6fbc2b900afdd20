"""Jobs that move in and out: state, weights, options, notes; and that a refused load leaves nothing behind."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("h5py", reason="needs the extra 'keras'")
import h5py
from keras_stored import (
    CLIPPING,
    DATA,
    KERNEL,
    SCHEDULE,
    Net,
    assert_is,
    assert_refused,
    assert_same_datasets,
    assert_untouched,
    attention,
    build,
    dense,
    edited,
    load,
    recurrent,
    replaced,
    sequential,
    truth,
    with_options,
    without_state,
    write_h5,
)

from torch_adadelta import AdadeltaKeras, schedules
from torch_adadelta.keras import KerasFileError, freeze_second_biases, load_keras, save_keras

pytestmark = pytest.mark.filterwarnings("ignore:.*not in the file, so that training goes on")


def test_weights_stay_unless_asked_for() -> None:
    model, optimizer = build(clipnorm=1.0, rho=0.5)
    before = [param.clone() for param in model.parameters()]
    report = load_keras(DATA / "tf24.h5", optimizer, model)
    assert all(map(torch.equal, model.parameters(), before))
    assert optimizer.rho == 0.949999988079071
    assert optimizer.clipnorm is None  # the file's configuration has none
    assert optimizer.norm_variables is None
    assert str(report).replace(str(DATA), "DATA") == (
        """\
DATA/tf24.h5: .h5 of TensorFlow 2.4 or the legacy class of tf_keras
iterations: 4
decay: 0.0
clipvalue: None
clipnorm: None
global_clipnorm: None
learning_rate: 0.5
rho: 0.949999988079071
epsilon: 1e-07

Keras      PyTorch   layout          state
d1/kernel  0.weight  permute (1, 0)  yes
d1/bias    0.bias    as it is        yes
d2/kernel  1.weight  permute (1, 0)  yes
d2/bias    1.bias    as it is        yes"""
    )


def test_options_can_stay() -> None:
    model, optimizer = build(learning_rate=0.125, clipnorm=1.0)
    report = load_keras(DATA / "tf24.h5", optimizer, model, hyperparameters=False)
    assert (optimizer.learning_rate, optimizer.clipnorm, optimizer.iterations) == (0.125, 1.0, 4)
    assert report.hyperparameters == {}


def test_options_of_the_file_replace_all(tmp_path: Path) -> None:
    """One norm takes the place of the other, and a schedule that of a number."""
    path = write_h5(tmp_path / "m.h5", {"a": dense(3, 2)}, learning_rate=SCHEDULE, global_clipnorm=2.0, decay=0.25)
    model = Net(a=nn.Linear(3, 2))
    optimizer = AdadeltaKeras(model.parameters(), clipnorm=1.0, clipvalue=3.0)
    report = load_keras(path, optimizer, model)
    assert [getattr(optimizer, name) for name in CLIPPING] == [None, None, 2.0]
    assert (optimizer.decay, optimizer.learning_rate.get_config()) == (0.25, SCHEDULE["config"])
    assert f"learning_rate: ExponentialDecay {SCHEDULE['config']}\n" in str(report)
    load_keras(write_h5(path, {"a": dense(3, 2)}, clipnorm=1.0), optimizer, model)
    assert [getattr(optimizer, name) for name in CLIPPING] == [None, 1.0, None]
    assert (optimizer.decay, optimizer.learning_rate) == (0.0, 1.0)

    class Mine(schedules.ExponentialDecay):
        pass

    own = {**SCHEDULE, "class_name": "Mine"}
    write_h5(path, {"a": dense(3, 2)}, learning_rate=own)
    with pytest.raises(KerasFileError, match=r"schedule cannot be made.*Pass custom_objects, or hyperparameters=False"):
        load_keras(path, optimizer, model)
    load_keras(path, optimizer, model, custom_objects={"Mine": Mine})
    assert type(optimizer.learning_rate) is Mine


def test_transformers_and_clip_options_of_the_file_exclude_each_other(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "m.h5", {"a": dense(3, 2)}, clipnorm=1.0)
    model = Net(a=nn.Linear(3, 2))
    optimizer = AdadeltaKeras(model.parameters(), gradient_transformers=[list])
    with pytest.raises(ValueError, match="clip"):
        load_keras(path, optimizer, model)
    assert (optimizer.iterations, optimizer.clipnorm) == (0, None)


def test_dtypes_of_parameters() -> None:
    model, optimizer = build()
    model.double()
    model[1].weight.requires_grad_(False)
    with pytest.raises(KerasFileError, match=r"Keras trained"):
        load_keras(DATA / "k3.keras", AdadeltaKeras(model[0].parameters()), model)
    load_keras(DATA / "k3.keras", optimizer, model, weights=True)
    assert optimizer.state[model[0].weight]["acc_delta"].dtype is torch.float64
    model, optimizer = build()
    model.half()
    with pytest.warns(UserWarning, match="the state of 0.bias, 0.weight, 1.bias, 1.weight was rounded") as caught:
        load_keras(DATA / "tf24.h5", optimizer, model, weights=True)
    assert "; 0.weight was rounded to its dtype, torch.float16; " in str(caught[0].message)
    assert_is(optimizer.state[model[0].weight]["square_avg"], truth("tf24")[1][0].T.astype("f2"))


def test_a_loaded_job_is_saved_and_loaded_by_pytorch() -> None:
    model, optimizer = build()
    load_keras(DATA / "new.h5", optimizer, model, weights=True)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    _, other = build()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.iterations == 4
    assert all(torch.equal(a["square_avg"], b["square_avg"])
               for a, b in zip(optimizer.state.values(), other.state.values(), strict=True))  # fmt: skip


@pytest.mark.parametrize("weights", [False, True])
def test_statistics_come_with_the_weights(weights: bool, tmp_path: Path) -> None:
    norm = {
        "gamma": np.ones(3),
        "beta": np.zeros(3),
        "moving_mean": np.arange(3, dtype=">f8"),
        "moving_variance": np.full(3, 2.0),
    }
    model = Net(norm=nn.BatchNorm1d(3))
    model.register_buffer("calls", torch.zeros(2, dtype=torch.int64))
    path = write_h5(tmp_path / "m.h5", {"norm": norm, "count": {"moving_calls": np.array([5, 6])}})
    mapping = {"count/moving_calls": "calls"}
    load_keras(path, AdadeltaKeras(model.parameters()), model, weights=weights, mapping=mapping)
    assert_is(model.calls, np.array([5, 6]) * weights)
    assert_is(model.norm.running_mean, np.arange(3.0) * weights)
    assert_is(model.norm.running_var, np.full(3, 1.0 + weights))


def test_arguments_are_checked() -> None:
    model, optimizer = build()
    path = DATA / "k3.h5"
    for function in (load_keras, lambda *args: save_keras("out.h5", *args[1:], args[0])):
        with pytest.raises(TypeError, match="optimizer must be an AdadeltaKeras, got SGD"):
            function(path, torch.optim.SGD(model.parameters()), model)
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
            function(path, optimizer, {})
        averaging = AdadeltaKeras(model.parameters(), use_ema=True)
        with averaging.swap_averages(), pytest.raises(RuntimeError, match="no file of Keras can be read or written"):
            function(path, averaging, model)
    for own, kind in ((nn.Linear(1, 1, device="meta"), "on meta"), (nn.Linear(1, 1, dtype=torch.complex64), "complex")):
        with pytest.raises(ValueError, match=f"weight.* is {kind}; load into a plain model first"):
            load_keras(path, AdadeltaKeras(own.named_parameters()), own)


def test_the_optimizer_must_have_what_keras_trained_and_no_more(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "m.h5", {"one": dense(4, 3), "two": dense(3, 1)})
    model = Net(a=nn.Linear(4, 3), b=nn.Linear(3, 1))
    optimizer = AdadeltaKeras(model.a.parameters())
    with pytest.raises(
        KerasFileError, match=r"Keras trained two/kernel, but b.weight is no parameter of the optimizer"
    ):
        load_keras(path, optimizer, model)
    optimizer = AdadeltaKeras([*model.parameters(), nn.Parameter(torch.ones(5))])
    with pytest.raises(KerasFileError, match=r"parameter 4 of group 0 of shape \(5,\) is in the optimizer and corresp"):
        load_keras(path, optimizer, model)
    assert (optimizer.iterations, len(optimizer.state)) == (0, 0)


def test_what_keras_froze_is_frozen(tmp_path: Path) -> None:
    """Before the first step, so that there is no state; or later, so that there is some."""
    config = sequential(("one", "Dense", {"trainable": False}), ("two", "Dense", {}))
    path = write_h5(tmp_path / "later.h5", {"one": dense(4, 3), "two": dense(3, 1)}, config)
    before = tmp_path / "before.h5"
    before.write_bytes(path.read_bytes())
    with h5py.File(before, "r+") as file:
        without_state("/one/")(file)
    model = Net(a=nn.Linear(4, 3), b=nn.Linear(3, 1))
    for own, message in (
        (path, "Keras does not train one/kernel, but a.weight"),
        (before, "Keras did not train one/kern"),
    ):
        model.requires_grad_(True)
        with pytest.raises(KerasFileError, match=message):
            load(own, model)
        model.a.requires_grad_(False)
        optimizer = load(own, model)
        assert set(optimizer.state) == set(model.parameters() if own == path else model.b.parameters())
    # Without a configuration, too, what has no state need not be in the optimizer.
    with h5py.File(before, "r+") as file:
        del file.attrs["model_config"]
    load_keras(before, AdadeltaKeras(model.b.parameters()), model)


def test_a_second_bias_must_be_frozen_at_zero(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "m.h5", {"lstm": recurrent(3, 2, 4, (8,))})
    model = Net(rnn=nn.LSTM(3, 2))
    with pytest.raises(KerasFileError, match=r"rnn.bias_hh_l0 would be trained.*freeze_second_biases\(model\)"):
        load(path, model)
    model.rnn.bias_hh_l0.requires_grad_(False)
    with pytest.raises(KerasFileError, match=r"rnn.bias_hh_l0 is not 0"):
        load_keras(path, AdadeltaKeras(model.parameters()), model)
    load(path, model)
    assert not model.rnn.bias_hh_l0.any()  # set with the weights
    load_keras(path, AdadeltaKeras(model.parameters()), model)


def test_second_biases_are_frozen() -> None:
    model = Net(
        a=nn.LSTM(3, 2, num_layers=2, bidirectional=True),
        b=nn.RNN(3, 2),
        c=nn.LSTMCell(3, 2),
        d=nn.RNNCell(3, 2),
        e=nn.GRU(3, 2),
    )
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    assert freeze_second_biases(model) is model
    for name, param in model.named_parameters():
        is_second = "bias_hh" in name and not name.startswith("e.")
        assert (param.requires_grad, param.grad is None, not param.any()) == (not is_second, is_second, is_second), name


def test_a_weight_that_keras_does_not_have_must_be_neutral(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "m.h5", {"one": {"kernel": np.ones((3, 2))}, "norm": {"beta": np.ones(5)}}, sequential(
        ("one", "Dense", {"use_bias": False}), ("norm", "LayerNormalization", {"scale": False})
    ))  # fmt: skip
    model = Net(a=nn.Linear(3, 2), n=Net(m=nn.LayerNorm(5)))
    load_keras(path, AdadeltaKeras([model.a.weight, model.n.m.bias]), model, weights=True)
    with pytest.raises(KerasFileError, match=r"a\.bias would be trained. Keras has no such weight. Set it to 0"):
        load(path, model)
    model.a.bias.requires_grad_(False)
    with pytest.raises(KerasFileError, match=r"n\.m\.weight would be trained. Keras has no such weight. Set it to 1"):
        load(path, model)
    model.n.m.weight.requires_grad_(False).fill_(3)
    with pytest.raises(KerasFileError, match=r"is not [01]\. Keras has no such weight"):
        load_keras(path, AdadeltaKeras(model.parameters()), model)
    load(path, model)
    assert (model.a.bias.any(), bool((model.n.m.weight == 1).all())) == (False, True)


def test_parts_of_one_parameter_are_trained_together(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "m.h5", {"attend": attention()})
    with h5py.File(path, "r+") as file:
        without_state("/key/kernel")(file)
    with pytest.raises(KerasFileError, match=r"Keras trained a part of attend\.in_proj_weight, and froze the rest"):
        load(path, Net(attend=nn.MultiheadAttention(4, 2)))


def test_state_that_cannot_be_is_refused(tmp_path: Path) -> None:
    for edit, message in (
        (replaced(KERNEL, -np.ones((3, 2), "f4")), r"square_avg of 0\.weight has negative numbers"),
        (with_options(rho=2), "Invalid rho"),
        (with_options(rho="much"), "rho must be a number"),
        (with_options(clipnorm=1.0, global_clipnorm=1.0), "Cannot accept both"),
    ):
        assert_refused(edited(tmp_path, edit), message)


def test_state_of_what_is_frozen_by_now_is_left_out(tmp_path: Path) -> None:
    """Where the parameter is not in the optimizer; and it stays in the file that is written."""
    config = sequential(("one", "Dense", {"trainable": False}), ("two", "Dense", {}))
    path = write_h5(tmp_path / "m.h5", {"one": dense(4, 3), "two": dense(3, 1)}, config)
    model = Net(a=nn.Linear(4, 3), b=nn.Linear(3, 1))
    model.a.requires_grad_(False)
    optimizer = AdadeltaKeras(model.b.parameters())
    load_keras(path, optimizer, model, weights=True)
    assert set(optimizer.state) == set(model.b.parameters())
    save_keras(tmp_path / "back.h5", optimizer, model, path)
    model.a.float()
    note = "left out: the state of one/kernel, one/bias, which are frozen, and not in the optimizer"
    assert load_keras(path, optimizer, model).notes == [note]  # nothing was rounded
    assert_same_datasets(path, tmp_path / "back.h5")


@pytest.mark.parametrize(("name", "is_newer"), [("tf24.h5", False), ("new.h5", True), ("k3.h5", True)])
def test_clip_options_that_do_nothing_in_newer_keras(name: str, is_newer: bool, tmp_path: Path) -> None:
    model, optimizer = build(global_clipnorm=3.0)
    report = load_keras(edited(tmp_path, with_options(clipvalue=0.0, clipnorm=1.0), name), optimizer, model)
    assert [getattr(optimizer, key) for key in CLIPPING] == [None if is_newer else 0.0, 1.0, None]
    assert report.notes == ["clipvalue=0 means no clipping in this Keras, and is left out"] * is_newer


def test_an_epsilon_of_zero_is_refused_where_it_stays_zero(tmp_path: Path) -> None:
    for name in ("new.h5", "k3.h5"):
        path = edited(tmp_path, with_options(epsilon=0.0), name)
        assert_refused(path, r"epsilon=0\.0, which stays 0 in this Keras, and means 1e-7 for AdadeltaKeras")
        model, optimizer = build(epsilon=1e-30, learning_rate=0.5)
        load_keras(path, optimizer, model, hyperparameters=False)
        assert (optimizer.iterations, optimizer.epsilon) == (4, 1e-30)
    model, optimizer = build()
    load_keras(edited(tmp_path, with_options(epsilon=0)), optimizer, model)
    assert optimizer.epsilon == 1e-7


def test_a_load_that_fails_amid_the_writes_leaves_nothing(tmp_path: Path) -> None:
    """The statistics of the norm share one element, so that writing them fails when all else is set."""
    norm = {"gamma": np.ones(3), "beta": np.zeros(3), "moving_mean": np.ones(3), "moving_variance": np.ones(3)}
    layers = {"one": dense(4, 3), "norm": norm}
    path = write_h5(tmp_path / "m.h5", layers, learning_rate=SCHEDULE, clipnorm=5.0, rho=0.75)
    model = Net(one=nn.Linear(4, 3), norm=nn.BatchNorm1d(3))
    model.norm.running_mean = torch.zeros(1, dtype=torch.float64).expand(3)
    optimizer = AdadeltaKeras(model.one.named_parameters(), learning_rate=0.125, clipvalue=2.0)
    optimizer.add_param_group({"params": list(model.norm.named_parameters()), "lr": 0.25})
    optimizer.iterations = 2
    before = [param.clone() for param in (*model.parameters(), *model.buffers())]
    state, defaults = optimizer.state_dict(), dict(optimizer.defaults)
    with pytest.raises(RuntimeError, match="single memory location"):
        load_keras(path, optimizer, model, weights=True)
    assert all(map(torch.equal, (*model.parameters(), *model.buffers()), before))
    assert optimizer.state_dict() == state
    assert dict(optimizer.defaults) == defaults
    assert (optimizer.iterations, optimizer.learning_rate) == (2, 0.125)
    assert [getattr(optimizer, name) for name in CLIPPING] == [2.0, None, None]
    # A group that comes later has the learning rate of before, not the schedule.
    extra = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer.add_param_group({"params": [("extra", extra)]})
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.25, 0.125]
    for param in (*model.parameters(), extra):
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.25, 0.125]
    other = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    other.grad = torch.ones_like(other)
    AdadeltaKeras([other], learning_rate=0.125, clipvalue=2.0).step()
    assert torch.equal(extra, other)


def test_a_warning_that_is_an_error_leaves_nothing() -> None:
    model, optimizer = build(learning_rate=0.125)
    before = [param.clone() for param in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="not in the file"):
            load_keras(DATA / "k3.weights.h5", optimizer, model, weights=True)
    assert_untouched(model, optimizer, before)


def test_state_of_before_does_not_stay(tmp_path: Path) -> None:
    """That of a layer that Keras froze before its first step is gone."""
    config = sequential(("one", "Dense", {"trainable": False}), ("two", "Dense", {}))
    path = write_h5(tmp_path / "m.h5", {"one": dense(4, 3), "two": dense(3, 1)}, config)
    with h5py.File(path, "r+") as file:
        without_state("/one/")(file)
    model = Net(a=nn.Linear(4, 3), b=nn.Linear(3, 1))
    optimizer = AdadeltaKeras(model.parameters())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    model.a.requires_grad_(False)
    load_keras(path, optimizer, model)
    assert set(optimizer.state) == set(model.b.parameters())
