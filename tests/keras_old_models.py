"""Writes the files of old Keras with nested models and embeddings, and what that Keras knew: keras_old_models.py FOLDER

Runs under standalone Keras 2.0.8, 2.2.4 and 2.3.1, and, with TFKERAS=1, under the Keras of TensorFlow 1.15. Each model is
trained for four steps. Two of them are loaded in the same session, trained for one more, and saved again, so that
their weights have other names than their layers. In one, a layer is frozen after training.
"""

# ruff: noqa: B905, UP032 (Python 3.7)
import os
import sys

import numpy as np

if os.environ.get("TFKERAS"):
    from tensorflow import keras
else:
    import keras

L, M, K = keras.layers, keras.models, keras.backend
rng = np.random.RandomState(0)


def drawn(*shape):
    return rng.normal(size=shape).astype("float32")


def siamese():
    layers = [
        L.Dense(4, activation="tanh", input_shape=(3,), name="ea"),
        L.BatchNormalization(name="en"),
        L.Dense(4, activation="tanh", name="eb"),
        L.Dense(4, name="ec"),
    ]
    encoder = M.Sequential(layers, name="encoder")
    encoder.layers[2].trainable = False
    a, b = L.Input((3,), name="a"), L.Input((3,), name="b")
    h = L.Dense(4, activation="tanh", name="h")(L.concatenate([encoder(a), encoder(b)], name="cat"))
    return M.Model([a, b], L.Dense(4, name="o")(h)), [drawn(8, 3), drawn(8, 3)], drawn(8, 4)


def nested():
    start = L.Input((3,), name="ni")
    deep = [L.Dense(3, input_shape=(3,), activation="tanh", name="p"), L.Dense(3, name="q")]
    h = M.Sequential(deep, name="deep")(L.Dense(3, name="y", activation="tanh")(start))
    inner = M.Model(start, L.Dense(3, name="z")(h), name="func")
    first = L.Dense(3, input_shape=(3,), name="first", activation="tanh")
    return M.Sequential([first, inner, L.Dense(3, name="last")], name="outer"), [drawn(8, 3)], drawn(8, 3)


def embedding():
    start = L.Input((5,), name="i", dtype="int32")
    h = L.Embedding(6, 3, name="e")(start)
    h = L.Bidirectional(L.LSTM(3, recurrent_activation="sigmoid"), name="bi")(h)
    return M.Model(start, L.Dense(2, name="o")(h)), [rng.randint(0, 6, size=(8, 5))], drawn(8, 2)


def truth(model, inputs, targets):
    found = {"y": targets, "predict": model.predict(inputs), "names": [w.name for w in model.trainable_weights]}
    found.update(("x{}".format(k), x) for k, x in enumerate(inputs))
    for k, (weight, array) in enumerate(zip(model.weights, K.batch_get_value(model.weights))):
        found["weight:{:02d}:{}".format(k, weight.name)] = array
    found.update(("optimizer:{:03d}".format(k), array) for k, array in enumerate(model.optimizer.get_weights()))
    return found


def record(folder, name, build, **options):
    model, inputs, targets = build()
    model.compile(loss="mse", optimizer=keras.optimizers.Adadelta(1.0, **options))
    for _ in range(4):
        model.train_on_batch(inputs, targets)
    path = os.path.join(folder, name)
    if name in ("siamese", "nested"):
        model.save(path + ".h5")
        model = M.load_model(path + ".h5")
        model.train_on_batch(inputs, targets)
    found = truth(model, inputs, targets)
    if name == "frozen":
        model.get_layer("encoder").layers[0].trainable = False
    model.save(path + ".h5")
    if name != "frozen":  # with which Keras loses its state when it loads it
        later = M.load_model(path + ".h5")
        found["losses"] = [float(np.ravel(later.train_on_batch(inputs, targets))[0]) for _ in range(5)]
        found["iterations"] = K.get_value(later.optimizer.iterations)
    np.savez(path + ".npz", **found)


if __name__ == "__main__":
    for job, builder, given in (
        ("siamese", siamese, {}),
        ("frozen", siamese, {}),
        ("nested", nested, {}),
        ("embedding", embedding, {"clipnorm": 0.1}),
    ):
        record(sys.argv[1], job, builder, **given)
