"""Checkpoints of TensorFlow, as each generation has its objects in them: whose state is whose, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from keras_bundles import graph, node

from torch_adadelta.keras import KerasFileError
from torch_adadelta.keras.checkpoints import opened
from torch_adadelta.keras.contents import KERAS3, LEGACY, NEW, Checkpoint

Edit = Callable[["Objects"], Any]


class Objects:
    """The graph of a model and its optimizer, to be changed before it is written.

    A weight is full of a number of its own, its square_avg of that times 10, and its acc_delta of that times 100.
    """

    def __init__(self, generation: str, weights: list[str]) -> None:
        self.generation = generation
        self.nodes: list[dict[str, Any]] = [{"children": []} for _ in range(3)]  # root, model, optimizer
        self.root, self.model, self.optimizer = self.nodes
        self.root["children"] = [("model", 1), ("optimizer", 2)]
        self.values: dict[str, np.ndarray] = {}
        self.slots: list[tuple[int, str, int]] = []
        scalars = {"iter": np.int64(7), "learning_rate": np.float32(0.5), "rho": np.float32(0.75)}
        if generation != LEGACY:
            scalars = {"_iterations": np.int64(7), "_learning_rate": np.float32(0.5)}
        for name, value in scalars.items():
            own = name.lstrip("_").replace("iterations", "iteration")
            self.optimizer["children"].append((name, self.add(f"Adadelta/{own}", np.array(value))))
        numbers = [self.add(name, np.full((2, 3), n + 1, "f4")) for n, name in enumerate(weights)]
        self.model["children"] = [(f"layer-{n}", number) for n, number in enumerate(numbers)]
        self.trainable = {name: number for name, number in zip(weights, numbers, strict=True) if "moving" not in name}
        self.states = []
        for name, number in self.trainable.items():
            for n, (slot, tf_keras, keras3) in enumerate(
                (("accum_grad", "grad", "accumulated_grad"), ("accum_var", "delta_var", "accumulated_delta_var"))
            ):
                full = {
                    LEGACY: f"Adadelta/{name}/{slot}",
                    NEW: f"Adadelta/accumulated_{tf_keras}/{name}",
                    KERAS3: f"adadelta/{name.replace('/', '_')}_{keras3}",
                }[generation]
                value = self.values[self.nodes[number]["variable"][1]] * 10 ** (n + 1)
                self.states.append(self.add(full, value))
                self.slots.append((number, slot, self.states[-1]))
        if generation == LEGACY:
            self.optimizer["slots"] = self.slots
        else:
            self.optimizer["children"].append(("_variables", self.group(self.states)))
        if generation == KERAS3:
            self.optimizer["children"].append(("_trainable_variables", self.group([*self.trainable.values()])))

    def add(self, name: str, value: np.ndarray) -> int:
        key = f"v{len(self.nodes)}"
        self.values[key] = value
        self.nodes.append({"children": [], "variable": (name, key)})
        return len(self.nodes) - 1

    def group(self, numbers: list[int]) -> int:
        self.nodes.append({"children": [(str(n), number) for n, number in enumerate(numbers)]})
        return len(self.nodes) - 1

    def write(self, folder: Path) -> Path:
        nodes = [node(*n["children"], variable=n.get("variable"), slots=n.get("slots", ())) for n in self.nodes]
        graph(folder, *nodes, tensors=self.values)
        return folder / "c"


def assert_right(checkpoint: Checkpoint, expected: dict[str, list[str]]) -> None:
    assert {layer.path: [v.role for v in layer.variables] for layer in checkpoint.layers} == expected
    for layer, variable in checkpoint.variables():
        value = variable.value.read()
        if not variable.role.startswith("moving"):
            assert variable.square_avg is not None, (layer, variable)
            assert variable.acc_delta is not None
            np.testing.assert_array_equal(variable.square_avg.read(), value * 10)
            np.testing.assert_array_equal(variable.acc_delta.read(), value * 100)


GENERATIONS = (LEGACY, NEW, KERAS3)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_objects_of_each_generation(generation: str, tmp_path: Path) -> None:
    weights = ["dense/kernel", "norm/moving_mean", "norm/gamma", *(f"d{n}/kernel" for n in range(12))]
    objects = Objects(generation, weights)
    # What a saved model has beside its layers.
    for name in (
        *("save_counter", "keras_api", "metrics", "compiled_metrics", "_metrics", "signatures", "seed_generator"),
        "train_function",
    ):
        objects.root["children"].append((name, objects.add(f"other/{name}", np.ones(1, "f4"))))
    objects.model["children"].append(("drop", objects.add("drop/seed_generator/state", np.ones(1, "i8"))))
    objects.root["children"].append(("step", objects.optimizer["children"][0][1]))  # the iterations
    if generation != LEGACY:  # numbers that only the list of all variables has
        listed = objects.nodes[dict(objects.optimizer["children"])["_variables"]]["children"]
        for name in ("learning_rate", "iteration"):
            listed.append((str(len(listed)), objects.add(f"adadelta/{name}", np.array(0.25, "f4"))))
    with opened(objects.write(tmp_path)) as checkpoint:
        assert (checkpoint.generation, checkpoint.count(), checkpoint.is_ordered) == (generation, 7, True)
        assert checkpoint.hyperparameters == {"learning_rate": 0.5, **({"rho": 0.75} if generation == LEGACY else {})}
        paths = ["dense", "norm", *(f"d{n}" for n in range(12))]
        assert_right(checkpoint, {p: ["gamma", "moving_mean"] if p == "norm" else ["kernel"] for p in paths})
        assert [layer.path for layer in checkpoint.layers] == paths


def test_the_legacy_class_keeps_its_decay_beside_the_learning_rate(tmp_path: Path) -> None:
    objects = Objects(LEGACY, ["dense/kernel"])
    objects.optimizer["children"].append(("decay", objects.add("Adadelta/decay", np.array(0.25, "f4"))))
    with opened(objects.write(tmp_path)) as checkpoint:
        assert checkpoint.hyperparameters == {"learning_rate": 0.5, "rho": 0.75, "decay": 0.25}


def test_a_configuration_says_what_the_layers_are(tmp_path: Path) -> None:
    layers = [{"class_name": "Dense", "config": {"name": "dense"}}]
    config = {"class_name": "Sequential", "config": {"layers": layers}}
    with opened(Objects(LEGACY, ["dense/kernel"]).write(tmp_path), config) as checkpoint:
        assert [layer.class_name for layer in checkpoint.layers] == ["Dense"]


def test_keras_3_has_what_is_frozen_behind_what_is_trained(tmp_path: Path) -> None:
    objects = Objects(KERAS3, ["dense/kernel"])
    objects.model["children"].insert(0, ("frozen", objects.add("frozen/kernel", np.ones((2, 2), "f4"))))
    with opened(objects.write(tmp_path)) as checkpoint:
        assert ([layer.path for layer in checkpoint.layers], checkpoint.is_ordered) == (["dense", "frozen"], False)


def test_a_root_that_all_names_have_is_no_layer(tmp_path: Path) -> None:
    for names, paths in (
        (["net/a/kernel", "net/b/kernel"], ["a", "b"]),
        (["net/a/kernel", "net/bias"], ["net/a", "net"]),
        (["net/a/kernel", "b/c/kernel"], ["net/a", "b/c"]),
    ):
        with opened(Objects(LEGACY, names).write(tmp_path)) as checkpoint:
            assert [layer.path for layer in checkpoint.layers] == paths


def rename(objects: Objects, number: int, name: str) -> None:
    objects.nodes[number]["variable"] = (name, objects.nodes[number]["variable"][1])


def slot_without_value(objects: Objects) -> None:
    objects.nodes.append({"children": []})
    objects.slots.append((objects.slots[0][0], "accum_var", len(objects.nodes) - 1))


def without(objects: Objects, name: str) -> None:
    objects.optimizer["children"] = [child for child in objects.optimizer["children"] if child[0] != name]


@pytest.mark.parametrize(
    ("generation", "edit", "message"),
    [
        (LEGACY, lambda o: (o.optimizer["children"].clear(), o.slots.clear()), "there is no optimizer in it"),
        (LEGACY, lambda o: o.nodes.append({"children": [], "slots": [o.slots[0]]}), "it holds 2 optimizers"),
        (LEGACY, lambda o: without(o, "iter"), "its optimizer has no iterations"),
        (NEW, lambda o: o.optimizer["children"].__setitem__(0, ("_iterations", 1)), "its optimizer has no iterations"),
        (LEGACY, lambda o: o.slots.clear(), "no step was taken"),
        (NEW, lambda o: without(o, "_variables"), "no step was taken"),
        (LEGACY, lambda o: o.slots.append((o.slots[0][0], "momentum", 3)), "has the slot momentum; it is not Adadelta"),
        (LEGACY, lambda o: slot_without_value(o), "acc_delta of a/kernel has no value"),
        (LEGACY, lambda o: o.slots.pop(), "square_avg of b/kernel, and not acc_delta"),
        (LEGACY, lambda o: o.slots.extend([(3, "accum_grad", 4), (3, "accum_var", 4)]), "has state of no weight"),
        (
            NEW,
            lambda o: rename(o, o.states[0], "Adadelta/accumulated_grad/b/kernel"),
            "accumulated_grad/b/kernel twice",
        ),
        (NEW, lambda o: rename(o, o.states[0], "Adadelta/accumulated_grad/c/kernel"), "belongs to no weight"),
        (NEW, lambda o: rename(o, o.states[0], "Adadelta/average/a/kernel"), r"drop=\{'ema'\}"),
        (KERAS3, lambda o: rename(o, o.trainable["a/kernel"], "b/kernel"), "two weights named b/kernel"),
        (LEGACY, lambda o: o.values.update({"v8": np.ones((3, 2), "f4")}), r"has shape \(3, 2\), its weight a/kernel"),
        (LEGACY, lambda o: o.values.update({"v4": np.array(np.inf, "f4")}), "v4 is inf"),
        (LEGACY, lambda o: o.values.pop("v6"), "it holds no v6"),
    ],
    ids=range(17),
)
def test_objects_that_do_not_fit_are_refused(generation: str, edit: Edit, message: str, tmp_path: Path) -> None:
    objects = Objects(generation, ["a/kernel", "b/kernel"])
    with opened(objects.write(tmp_path)) as checkpoint:
        assert_right(checkpoint, {"a": ["kernel"], "b": ["kernel"]})
    edit(objects)
    with pytest.raises(KerasFileError, match=message), opened(objects.write(tmp_path)):
        pass


@pytest.mark.parametrize("generation", GENERATIONS)
def test_weights_alone_are_found_beside_several_optimizers(generation: str, tmp_path: Path) -> None:
    """Where it cannot be told which optimizer is meant, none of them has weights, and no option is taken."""
    objects = Objects(generation, ["dense/kernel", "norm/moving_mean", "norm/gamma"])
    names = {"iter": np.int64(3), "learning_rate": np.float32(0.25)}
    if generation != LEGACY:
        names = {f"_{name.replace('iter', 'iterations')}": value for name, value in names.items()}
    children = [(name, objects.add(f"SGD/{name}", np.array(value))) for name, value in names.items()]
    objects.nodes.append({"children": children})
    objects.root["children"].append(("other", len(objects.nodes) - 1))
    path = objects.write(tmp_path)
    with (
        pytest.raises(KerasFileError, match="it holds 2 optimizers, and which one is meant cannot be told"),
        opened(path),
    ):
        pass
    with opened(path, has_state=False) as checkpoint:
        roles = {layer.path: [v.role for v in layer.variables] for layer in checkpoint.layers}
        assert roles == {"dense": ["kernel"], "norm": ["gamma", "moving_mean"]}
        assert not any(variable.slots for _, variable in checkpoint.variables())
        assert (checkpoint.hyperparameters, checkpoint.iterations, checkpoint.optimizer) == ({}, None, None)
        assert checkpoint.source == "TensorFlow checkpoint"


def by_attributes(generation: str, paths: list[str], names: list[str]) -> Objects:
    """The objects of a subclass, whose weights have their places by attributes, and names besides."""
    objects = Objects(generation, names if generation != KERAS3 else [f"w{number}" for number in range(len(paths))])
    numbers = [number for _, number in objects.model["children"]]
    objects.model["children"] = []
    for path, number, name in zip(paths, numbers, names, strict=True):
        objects.nodes[number]["variable"] = (name, objects.nodes[number]["variable"][1])
        parent = objects.model
        for part in path.split("/")[:-1]:
            if part not in dict(parent["children"]):
                objects.nodes.append({"children": []})
                parent["children"].append((part, len(objects.nodes) - 1))
            parent = objects.nodes[dict(parent["children"])[part]]
        parent["children"].append((path.rpartition("/")[2], number))
    if generation == KERAS3:
        for number, name in enumerate(("_accumulated_grads", "_accumulated_delta_vars")):
            objects.optimizer["children"].append((name, objects.group(objects.states[number::2])))
    return objects


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_layers_of_a_subclass_have_the_names_of_its_attributes(generation: str, tmp_path: Path) -> None:
    """Keras 3 leaves layers out of the names of weights: the lists of its optimizer say whose state is whose."""
    first = ["encoder/up/kernel", "encoder/attend/_query_dense/kernel", "blocks/0/down/kernel", "head/_kernel"]
    own = [f"net/dense_{n}/kernel" for n in range(4)]
    names = ["net/kernel"] * 4 if generation == KERAS3 else own
    paths = ["encoder/up", "encoder/attend/query", "blocks/0/down", "head"]
    with opened(by_attributes(generation, first, names).write(tmp_path)) as checkpoint:
        assert_right(checkpoint, {path: ["kernel"] for path in paths})
    # Of what Keras names itself, such as layer-1 and the lists of a SavedModel, the names of the weights say more.
    named = [f"dense_{n}/kernel" for n in range(4)]
    for kept in ("layer-1/kernel", "b/variables/0") if generation != KERAS3 else ():
        mixed = ["encoder/up/kernel", kept, "x/kernel", "y/kernel"]
        with opened(by_attributes(generation, mixed, named).write(tmp_path)) as checkpoint:
            assert_right(checkpoint, {f"dense_{n}": ["kernel"] for n in range(4)})


@pytest.mark.parametrize("generation", [LEGACY, NEW])
def test_a_checkpoint_may_be_of_the_model_itself(generation: str, tmp_path: Path) -> None:
    """``save_weights`` writes no object around the model: the names of the attributes are all there."""
    objects = by_attributes(generation, ["up/kernel", "down/kernel"], ["net/dense/kernel", "net/dense_1/kernel"])
    objects.root["children"] = [*objects.model["children"], ("optimizer", 2)]
    with opened(objects.write(tmp_path)) as checkpoint:
        assert_right(checkpoint, {"up": ["kernel"], "down": ["kernel"]})


def test_two_weights_of_one_name_have_no_state_that_is_named_after_them(tmp_path: Path) -> None:
    objects = by_attributes(NEW, ["a/kernel", "b/kernel"], ["net/one/kernel", "net/two/kernel"])
    for number in objects.trainable.values():
        objects.nodes[number]["variable"] = ("net/one/kernel", objects.nodes[number]["variable"][1])
    path = objects.write(tmp_path)
    with pytest.raises(KerasFileError, match="it holds two weights of one name"), opened(path):
        pass


def test_the_configuration_says_what_is_frozen(tmp_path: Path) -> None:
    layers = [{"class_name": "Dense", "config": {"name": name, "trainable": name == "b"}} for name in "ab"]
    config = {"class_name": "Sequential", "config": {"name": "s", "layers": layers}}
    path = Objects(LEGACY, ["a/kernel", "b/kernel"]).write(tmp_path)
    for given, expected in ((config, [True, False]), (None, [False, False])):
        with opened(path, given) as checkpoint:
            assert [variable.is_frozen for _, variable in checkpoint.variables()] == expected
