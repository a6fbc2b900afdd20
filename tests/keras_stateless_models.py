"""A model that is saved in all ways without the state of an Adadelta: weights alone, no optimizer, another optimizer.

Runs under every generation, as keras_table_models.py does, whose chain it saves. As a script, ``python
tests/keras_stateless_models.py GENERATION FOLDER``, it writes the files of one generation.
"""

import json
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
from keras_table_models import KINDS, job, library, precision, save, trained


def write(generation, folder):
    """Writes ``OPTIMIZER/`` with a file of each kind for each optimizer, ``weights.h5`` and ``truth.npz``."""
    folder = Path(folder)
    K = library(generation)
    optimizers = K.optimizers.legacy if generation == "legacy" else K.optimizers
    with precision(generation, "chain"):
        model, data = job(K, generation, "chain")
        weights = model.get_weights()
        for name in ("none", "Adadelta", "Adam", "SGD", "RMSprop"):
            model = job(K, generation, "chain")[0]
            options = {"learning_rate": 0.5}
            if name == "SGD":  # in mixed precision
                options["momentum"] = 0.5
            optimizer = None if name == "none" else getattr(optimizers, name)(**options)
            if name == "SGD":
                scaled = K.optimizers if generation == "keras3" else K.mixed_precision
                optimizer = scaled.LossScaleOptimizer(optimizer)
            if name == "none":
                model = type(model).from_config(model.get_config())  # which is not compiled
            else:
                model.compile(optimizer=optimizer, loss="mse")
            if name not in ("none", "Adadelta"):  # which takes no step
                trained(model, generation, data[:2])
            model.set_weights(weights)
            own = folder / name
            own.mkdir(parents=True, exist_ok=True)
            for kind in KINDS[generation]:
                if kind == "checkpoint" and name == "none":
                    tf.train.Checkpoint(net=model).save(str(own / "ckpt"))
                else:
                    save(model, kind, own)
            if generation != "keras3":
                model.save_weights(str(own / "alone.h5"))
        np.savez(
            str(folder / "truth.npz"), config=np.array(model.to_json()), **{str(n): w for n, w in enumerate(weights)}
        )


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]) / sys.argv[1])
    print(json.dumps(sys.argv[1]))
