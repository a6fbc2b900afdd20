"""The models of the table of files, in Keras: built, trained, saved, and trained further.

Runs under every generation, TensorFlow 2.4 on Python 3.8 included, and needs no more than TensorFlow, Keras and NumPy. As
a script, ``python tests/keras_table_models.py GENERATION FOLDER [MODEL …]``, it writes the files of one generation.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import tensorflow as tf

STEPS = 5  # before the file is written, and `FURTHER` after it
FURTHER = 3

KINDS = {
    "tf24": ("h5", "checkpoint", "weights_checkpoint"),
    "legacy": ("h5", "checkpoint", "weights_checkpoint", "keras"),
    "new": ("h5", "checkpoint", "weights_checkpoint", "keras", "weights.h5"),
    "keras3": ("h5", "checkpoint", "keras", "weights.h5"),
}

INPUTS = {
    "recurrent": (5, 4),
    "attention": (5, 8),
    "channels first": (2, 6, 5),
    "maps": (6, 8, 3),
    "sequences": (12, 3),
    "volumes": (4,),
    "gates": (3, 2),
}
TOKENS = 42


def library(generation):
    """The module that has the layers of a generation."""
    if generation == "tf24":
        return tf.keras
    if generation == "keras3":
        import keras

        return keras
    import tf_keras

    return tf_keras


def _dense(K, name, units=5, **options):
    return K.layers.Dense(units, name=name, activation="tanh" if units > 1 else None, **options)


def _chain(K, **options):
    return K.Sequential([K.Input((5,)), _dense(K, "a", **options), _dense(K, "b"), _dense(K, "c", 1)])


def _branches(K):
    x = K.Input((5,))
    return K.Model(x, _dense(K, "c", 1)(K.layers.Add()([_dense(K, "b")(x), _dense(K, "a")(x)])))


def _nested(K):
    x = K.Input((5,))
    inner = K.Sequential([K.Input((5,)), _dense(K, "up"), _dense(K, "down")], name="inner")
    return K.Model(x, _dense(K, "out", 1)(inner(_dense(K, "first")(x))))


def _shared(K):
    x, shared = K.Input((5,)), _dense(K, "shared")
    return K.Model(x, _dense(K, "out", 1)(shared(_dense(K, "between")(shared(x)))))


def _subclassed(K):
    class Net(K.Model):
        def __init__(self):
            super().__init__(name="net")
            self.up = _dense(K, "up")
            self.down = _dense(K, "down")
            self.out = _dense(K, "out", 1)

        def call(self, x):
            return self.out(self.down(self.up(x)))

        def get_config(self):
            return {}

    model = Net()
    model(tf.zeros((1, 5), "float64"))
    return model


def _custom(K):
    class Block(K.layers.Layer):
        def __init__(self, **options):
            super().__init__(**options)
            self.up = _dense(K, "up")
            self.down = _dense(K, "down")

        def call(self, x):
            return self.down(self.up(x))

        def get_config(self):
            return {"name": self.name}

    x = K.Input((5,))
    return K.Model(x, _dense(K, "out", 1)(Block(name="block")(x)))


def _recurrent(K):
    L = K.layers
    layers = [L.Bidirectional(L.GRU(3, return_sequences=True), name="gru"), L.LSTM(4, name="lstm"), _dense(K, "out", 1)]
    return K.Sequential([K.Input((5, 4)), *layers])


def _attention(K):
    L = K.layers
    x = K.Input((5, 8))
    attended = L.Add()([x, L.MultiHeadAttention(2, 4, name="attention")(x, x)])
    return K.Model(x, _dense(K, "out", 1)(L.GlobalAveragePooling1D()(attended)))


def _channels_first(K):
    L, first = K.layers, {"data_format": "channels_first"}
    layers = [
        # Without a bias, which Keras 3 on TensorFlow's CPU adds to the wrong axis where it runs eagerly.
        L.Conv2D(4, 2, activation="tanh", use_bias=False, name="conv", **first),
        L.BatchNormalization(axis=1, epsilon=1e-5, momentum=0.9, name="norm"),
        L.AveragePooling2D(2, strides=1, name="pool", **first),
        L.Flatten(name="flatten", **first),
        _dense(K, "out", 1),
    ]
    return K.Sequential([K.Input((2, 6, 5)), *layers])


def _maps(K):
    L = K.layers
    layers = [
        L.Conv2D(4, (3, 2), activation="relu"),
        L.BatchNormalization(epsilon=1e-3, momentum=0.9),
        L.SeparableConv2D(6, (3, 1), padding="same"),
        L.DepthwiseConv2D((1, 3), padding="same", depth_multiplier=2),
        L.GroupNormalization(2, epsilon=1e-5),
        L.Conv2DTranspose(5, (2, 3), strides=2),
        L.Flatten(),
        L.Dense(5),
        L.LayerNormalization(epsilon=1e-5),
        _dense(K, "out", 1),
    ]
    return K.Sequential([K.Input((6, 8, 3)), *layers])


def _sequences(K):
    L = K.layers
    layers = [
        # Keras 3 compiles a convolution in groups with XLA, which takes a minute.
        L.Conv1D(6, 3, groups=3 if "tf_keras" in K.__name__ else 1),
        L.SeparableConv1D(4, 3, depth_multiplier=2),
        L.DepthwiseConv1D(2),
        L.Conv1DTranspose(5, 2, strides=2),
        L.GlobalAveragePooling1D(),
        _dense(K, "out", 1),
    ]
    return K.Sequential([K.Input((12, 3)), *layers])


def _volumes(K):
    L = K.layers
    layers = [
        L.Dense(2 * 3 * 2 * 3, name="enter"),
        L.Reshape((2, 3, 2, 3)),
        L.Conv3DTranspose(4, (2, 3, 2), strides=2, name="up"),
        L.Conv3D(2, (3, 2, 1), name="conv"),
        L.Flatten(),
        L.BatchNormalization(epsilon=1e-3, momentum=0.9, name="norm"),
        _dense(K, "out", 1),
    ]
    return K.Sequential([K.Input((4,)), *layers])


def _tokens(K):
    L = K.layers
    layers = [L.Embedding(TOKENS, 6, name="embed"), L.SimpleRNN(4, name="rnn"), _dense(K, "out", 1)]
    return K.Sequential([K.Input((None,), dtype="int32"), *layers])


def _gates(K):
    return K.Sequential([K.Input((3, 2)), K.layers.GRU(2, name="gru"), _dense(K, "out", 1)])


def _freeze(model):
    model.layers[0].trainable = False


def _rename(model):
    layer = model.layers[0]
    if isinstance(getattr(type(layer), "name", None), property) and type(layer).name.fset is None:
        layer._name = "renamed"
    else:
        layer.name = "renamed"


# Each with what is done to it after some training.
MODELS = {
    "chain": (_chain, None),
    "branches": (_branches, None),
    "nested": (_nested, None),
    "shared": (_shared, None),
    "subclassed": (_subclassed, None),
    "custom layer": (_custom, None),
    "recurrent": (_recurrent, None),
    "attention": (_attention, None),
    "frozen before": (lambda K: _chain(K, trainable=False), None),
    "frozen after": (_chain, _freeze),
    "renamed": (_chain, _rename),
    "channels first": (_channels_first, None),
    "mixed precision": (_chain, None),
    "loss scaled": (_chain, None),
    "maps": (_maps, None),
    "sequences": (_sequences, None),
    "volumes": (_volumes, None),
    "tokens": (_tokens, None),
    "bfloat16": (_chain, None),
    "gates": (_gates, None),
}

# What the newer classes add to Adadelta, apart from the defaults; after `STEPS` calls, gradients wait for their update.
ADDED = {"new": {"weight_decay": 0.02, "use_ema": True, "ema_momentum": 0.8, "ema_overwrite_frequency": 3}}
ADDED["keras3"] = dict(ADDED["new"], gradient_accumulation_steps=2, loss_scale_factor=2.0)
ADDED_MODEL = "gates"  # is recorded with these, and not in the table

# With what TensorFlow 2.4 does not have, such as some layers: they are not recorded, but written by a running Keras only.
LIVE = ("maps", "sequences", "volumes", "tokens", "bfloat16")

# What Keras itself does not write, or compute: TensorFlow 2.4 has no channels first on a CPU.
UNWRITTEN = {("tf24", "h5", "subclassed"), ("legacy", "h5", "subclassed"), ("new", "h5", "subclassed")}
UNKNOWN = {("tf24", "channels first")}


def trained(model, generation, data):
    """Trains eagerly, and returns the losses."""
    losses, optimizer = [], model.optimizer
    scaled = {"tf24": "get_scaled_loss", "legacy": "get_scaled_loss", "new": "get_scaled_loss"}.get(
        generation, "scale_loss"
    )
    is_scaled = "LossScale" in type(optimizer).__name__
    for x, y in data:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(tf.cast(model(tf.constant(x), training=True), y.dtype) - y))
            target = getattr(optimizer, scaled)(loss) if is_scaled else loss
        variables = model.trainable_variables
        gradients = tape.gradient(target, [v.value if generation == "keras3" else v for v in variables])
        if is_scaled and generation != "keras3":  # which does it itself
            gradients = optimizer.get_unscaled_gradients(gradients)
        optimizer.apply_gradients(zip(gradients, variables))  # noqa: B905
        losses.append(float(loss))
    return losses


STATE = {
    "square_avg": ("accum_grad", "_accumulated_grads"),
    "acc_delta": ("accum_var", "_accumulated_delta_vars"),
    "average": ("", "_model_variables_moving_average"),
    "gradient_accumulator": ("", "_accumulated_gradients"),
}


def has_channels_first():
    """Whether TensorFlow has a convolution with the channels first, which oneDNN gives it on some processors."""
    try:
        tf.nn.conv2d(tf.ones((1, 1, 3, 3)), tf.ones((2, 2, 1, 1)), 1, "VALID", data_format="NCHW")
    except tf.errors.UnimplementedError:
        return False
    return True


def state_of(model, generation):
    """That of the weights that are trained, sorted: its numbers, whatever their layout."""
    optimizer, found = getattr(model.optimizer, "inner_optimizer", model.optimizer), {}
    for slot, (key, name) in STATE.items():
        if not key and not hasattr(optimizer, name):
            continue
        arrays = []
        for variable in model.trainable_variables:
            if generation in ("tf24", "legacy"):
                arrays.append(optimizer.get_slot(variable, key).numpy())
            elif generation == "new":
                arrays.append(getattr(optimizer, name)[optimizer._index_dict[optimizer._var_key(variable)]].numpy())
            else:
                arrays.append(np.array(getattr(optimizer, name)[optimizer._get_variable_index(variable)]))
        found[slot] = np.sort(np.concatenate([array.ravel() for array in arrays]))
    return found


@contextlib.contextmanager
def precision(generation, name):
    """The library of a generation, in which all numbers are float64.

    TensorFlow computes with the channels first on the CPU in float32 only.
    """
    K = library(generation)

    def set_dtype(dtype):
        K.backend.set_floatx("float32" if "mixed" in dtype else dtype)
        if generation == "keras3":
            K.config.set_dtype_policy(dtype)
        else:
            K.mixed_precision.set_global_policy(dtype)

    policies = {"channels first": "float32", "mixed precision": "mixed_float16", "bfloat16": "mixed_bfloat16"}
    set_dtype(policies.get(name, "float64"))
    try:
        yield K
    finally:
        set_dtype("float32")


def optimizer_of(K, generation, **options):
    """Adadelta with options apart from the defaults, so that a value that did not come over is seen."""
    optimizers = K.optimizers.legacy if generation == "legacy" else K.optimizers
    return optimizers.Adadelta(**dict({"learning_rate": 0.5, "rho": 0.9, "epsilon": 1e-6}, **options))


def job(K, generation, name, count=STEPS + FURTHER, **options):
    """A compiled model whose weights, biases too, are random numbers; and batches of inputs and targets."""
    rng = np.random.RandomState(0)
    model = MODELS[name][0](K)
    names = [variable.name for variable in model.weights]
    model.set_weights(
        [
            rng.uniform(0.2, 0.8, w.shape) * (1 if "variance" in own else rng.choice([-1, 1], w.shape))
            for w, own in zip(model.get_weights(), names)  # noqa: B905
        ]
    )
    optimizer = optimizer_of(K, generation, **options)
    if name == "loss scaled":  # as mixed_float16 does it, in all precision
        optimizer = (K.optimizers if generation == "keras3" else K.mixed_precision).LossScaleOptimizer(optimizer)
    model.compile(optimizer=optimizer, loss=K.losses.MeanSquaredError())
    dtype = model.weights[0].numpy().dtype
    # Every batch has every token once: what becomes of a row that comes twice differs between generations.
    if name == "tokens":
        x = np.stack([rng.permutation(TOKENS).reshape(6, -1) for _ in range(count)]).astype("int32")
    else:
        x = rng.standard_normal((count, 6, *INPUTS.get(name, (5,)))).astype(dtype)
    y = rng.standard_normal((count, 6, 1)).astype(dtype)
    return model, list(zip(x, y))  # noqa: B905


def write(generation, name, folder, **options):
    """Writes a file of each kind, and ``truth.npz``: what Keras had when it wrote them, and did in further steps."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with precision(generation, name) as K:
        model, data = job(K, generation, name, **options)
        if name == "loss scaled":  # a step that is skipped, which tf_keras counts
            trained(model, generation, [(data[0][0] * np.nan, data[0][1])])
        trained(model, generation, data[: STEPS - 1])
        if MODELS[name][1] is not None:
            MODELS[name][1](model)
        trained(model, generation, data[STEPS - 1 : STEPS])
        for kind in KINDS[generation]:
            if (generation, kind, name) not in UNWRITTEN:
                save(model, kind, folder)
        state = state_of(model, generation)
        np.savez(
            str(folder / "truth.npz"),
            x=np.stack([x for x, _ in data]),
            y=np.stack([y for _, y in data]),
            outputs=np.array(tf.cast(model(data[0][0], training=False), data[0][1].dtype)),
            config=np.array("" if name == "subclassed" else model.to_json()),
            iterations=int(model.optimizer.iterations),
            losses=trained(model, generation, data[STEPS:]),
            **state,
        )


def path_of(kind, folder):
    """Where the file of a kind is."""
    names = {"checkpoint": "ckpt-1", "weights_checkpoint": "weights"}
    return Path(folder) / names.get(kind, "model." + kind)


def save(model, kind, folder):
    """Saves a model with its optimizer; returns where."""
    path = str(path_of(kind, folder))
    if kind in ("h5", "keras"):
        model.save(path)
    elif kind == "checkpoint":
        tf.train.Checkpoint(net=model, opt=model.optimizer).save(path[: -len("-1")])
    else:
        model.save_weights(path)
    return Path(path)


def restored(K, path, kind, generation, name, **options):
    """A model that Keras made from a file, with its optimizer to go on with."""
    if kind == "h5" or (kind == "keras" and generation == "new"):
        return K.models.load_model(str(path))
    # Keras 3 leaves the optimizer out of the configuration in a .keras file, so it is compiled again.
    model, _ = job(K, generation, name, **options)
    model.optimizer.build(model.trainable_variables)
    model.load_weights(str(path))
    return model


if __name__ == "__main__":
    if sys.argv[1] in ADDED and not sys.argv[3:]:
        write(sys.argv[1], ADDED_MODEL, Path(sys.argv[2]) / "added" / sys.argv[1], **ADDED[sys.argv[1]])
    for model_name in sys.argv[3:] or MODELS:
        if (sys.argv[1], model_name) not in UNKNOWN and model_name not in (*LIVE, ADDED_MODEL):
            write(sys.argv[1], model_name, Path(sys.argv[2]) / sys.argv[1] / model_name.replace(" ", "_"))
            print(json.dumps([sys.argv[1], model_name]))
