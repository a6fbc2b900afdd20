"""The modules of a model, and what an nn.Sequential shows."""

import numpy as np
import pytest
from torch import nn

pytest.importorskip("h5py", reason="needs the extra 'keras'")
import pytest
from keras_memory import checkpoint_of, layer_of
from keras_stored import Net

from torch_adadelta.keras.matching import match, torch_layers_of

pytest.importorskip("h5py", reason="needs the extra 'keras'")


def test_the_modules_of_a_model() -> None:
    shared = nn.Linear(2, 2)
    model = Net(
        stack=nn.GRU(4, 3, num_layers=2, bidirectional=True),
        attend=nn.MultiheadAttention(4, 2),
        norm=nn.BatchNorm1d(4),
        first=shared,
        again=shared,
        act=nn.PReLU(),
    )
    found, loose = torch_layers_of(model)
    assert [torch_layer.path for torch_layer in found] == ["stack[0]", "stack[1]", "attend", "norm", "first"]
    assert set(found[1].tensors) == {
        f"{kind}{way}" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh") for way in ("", "_reverse")
    }
    assert found[1].names["weight_ih_reverse"] == "stack.weight_ih_l1_reverse"
    assert found[1].tensors["weight_ih_reverse"] is model.stack.weight_ih_l1_reverse
    assert set(found[2].tensors) == {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}
    assert set(found[3].tensors) == {"weight", "bias", "running_mean", "running_var"}
    assert str(found[4]) == "first (Linear): weight (2, 2), bias (2,)"
    assert str(torch_layers_of(nn.Linear(2, 3))[0][0]) == "(the model) (Linear): weight (3, 2), bias (3,)"
    assert list(loose) == ["act.weight"]
    # Twelve layers, of which the second is not the eleventh; and a parameter that two modules share.
    deep, _ = torch_layers_of(Net(rnn=nn.RNN(1, 1, num_layers=12, bias=False)))
    assert [sorted(torch_layer.names.values()) for torch_layer in deep] == [
        [f"rnn.weight_hh_l{number}", f"rnn.weight_ih_l{number}"] for number in range(12)
    ]
    tied = nn.RNN(3, 3, bias=False)
    tied.weight_hh_l0 = tied.weight_ih_l0
    assert set(torch_layers_of(Net(tied=tied))[0][0].tensors) == {"weight_ih", "weight_hh"}
    table, output = nn.Embedding(3, 2), nn.Linear(2, 3)  # which has a bias of its own
    output.weight = table.weight
    assert [torch_layer.path for torch_layer in torch_layers_of(Net(table=table, out=output))[0]] == ["table", "out"]
    one, two = nn.PReLU(), nn.PReLU()
    two.weight = one.weight
    assert list(torch_layers_of(Net(one=one, two=two))[1]) == ["one.weight"]
    found = match(
        checkpoint_of(None, [layer_of("one", "Dense", {}, {"kernel": np.ones((2, 3))})]), Net(a=nn.Linear(2, 3))
    )
    assert [name for name, _ in found.neutral] == ["a.bias"]


def test_modules_that_are_no_layers_of_keras() -> None:
    with pytest.raises(ValueError, match="rnn has proj_size=2, which no layer of Keras has"):
        torch_layers_of(Net(rnn=nn.LSTM(4, 3, proj_size=2)))
    with pytest.raises(ValueError, match=r"a\.weight is not initialised yet; run the model on a batch first"):
        torch_layers_of(nn.ModuleDict({"a": nn.LazyLinear(3)}))
    weighted = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    found, loose = torch_layers_of(nn.ModuleDict({"a": weighted}))
    assert found == []
    assert set(loose) == {"a.bias", "a.parametrizations.weight.original0", "a.parametrizations.weight.original1"}


@pytest.mark.parametrize(
    "module",
    [
        *(nn.Conv1d(1, 2, 1), nn.ConvTranspose3d(1, 2, 1), nn.MaxPool1d(1), nn.AvgPool2d(1), nn.AdaptiveMaxPool2d(1)),
        *(nn.AdaptiveAvgPool3d(1), nn.LPPool2d(2, 1), nn.ZeroPad2d(1), nn.ReflectionPad2d(1), nn.ReplicationPad3d(1)),
        *(nn.Upsample(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.GroupNorm(1, 2)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules_that_take_maps(module: nn.Module) -> None:
    found, _ = torch_layers_of(nn.Sequential(module, nn.Flatten(), nn.Linear(2, 2)))
    assert [torch_layer.path for torch_layer in found if torch_layer.is_flattened] == ["2"]


@pytest.mark.parametrize(
    ("modules", "flattened", "unflattened"),
    [
        ([nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(2, 2)], "2", ""),
        ([nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Identity(), nn.Linear(2, 2)], "5", ""),
        ([nn.MaxPool2d(2), nn.Flatten(), nn.BatchNorm1d(2), nn.Linear(2, 2), nn.Linear(2, 2)], "2 3", ""),
        ([nn.Sequential(nn.Conv1d(1, 2, 1), nn.BatchNorm1d(2)), nn.Flatten(), nn.LayerNorm(2)], "2", ""),
        ([nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(2, 2)], "2", ""),
        ([nn.Flatten(), nn.Linear(2, 2)], "", ""),
        ([nn.Conv2d(1, 2, 1), nn.Flatten(2), nn.Linear(2, 2)], "", ""),
        ([nn.Conv2d(1, 2, 1), nn.Flatten(1, 2), nn.Linear(2, 2)], "", ""),
        ([nn.Conv2d(1, 2, 1), Net(), nn.Flatten(), nn.Linear(2, 2)], "", ""),
        ([nn.Conv2d(1, 2, 1), nn.Flatten(2), nn.Flatten(), nn.Linear(2, 2)], "", ""),
        ([nn.Conv2d(1, 2, 1), nn.Linear(2, 2), nn.Flatten(), nn.Linear(2, 2)], "", ""),
        ([nn.Conv2d(1, 2, 1), nn.MultiheadAttention(2, 1), nn.Flatten(), nn.Linear(2, 2)], "", ""),
        ([nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Sequential(nn.Linear(2, 2))], "2.0", ""),
        ([nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Sequential(nn.BatchNorm1d(2))], "2.0", ""),
        ([nn.Conv2d(1, 2, 1), nn.LayerNorm(2), nn.Flatten(), nn.Linear(2, 2)], "", ""),
        ([nn.Conv2d(1, 2, 1), nn.Flatten(), nn.LayerNorm(2, elementwise_affine=False), nn.Linear(2, 2)], "", ""),
        (
            [nn.Conv2d(1, 2, 1), nn.Flatten(), nn.BatchNorm1d(2), nn.Unflatten(1, (2, 1, 1)), nn.Conv2d(2, 2, 1)],
            "2",
            "",
        ),
        ([nn.Linear(2, 8), nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 2, 1)], "", "0"),
        ([nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Unflatten(-1, (2, 4)), nn.BatchNorm1d(2)], "", "0 1"),
        ([nn.Linear(2, 8), nn.Unflatten(2, (2, 4)), nn.Conv2d(2, 2, 1)], "", ""),
        ([nn.Linear(2, 8), nn.Unflatten(1, (2, 2, 2)), Net(), nn.Conv2d(2, 2, 1)], "", ""),
        ([nn.Linear(2, 8), nn.Linear(8, 8), nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 2, 1)], "", "1"),
    ],
    ids=range(22),
)
def test_what_a_sequential_shows(modules: list[nn.Module], flattened: str, unflattened: str) -> None:
    found, _ = torch_layers_of(nn.ModuleDict({"m": nn.Sequential(*modules)}))
    assert [
        torch_layer.path.partition(".")[2] for torch_layer in found if torch_layer.is_flattened
    ] == flattened.split()
    assert [
        torch_layer.path.partition(".")[2] for torch_layer in found if torch_layer.is_unflattened
    ] == unflattened.split()
