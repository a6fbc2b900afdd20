"""Answers a question about a story: the words of the question choose, by attention, among those of the story."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from keras_jobs import KINDS, Batch, Job, check
from torch import Tensor, nn

from torch_adadelta.keras import freeze_second_biases

WORDS, STORY, QUESTION = 120, 7, 4


def keras_model(K: Any) -> Any:
    L = K.layers
    story, question = (
        K.Input((STORY,), dtype="int32", name="story"),
        K.Input((QUESTION,), dtype="int32", name="question"),
    )
    memory = K.Sequential([L.Embedding(WORDS, 6)], name="memory")(story)
    answers = K.Sequential([L.Embedding(WORDS, QUESTION)], name="answers")(story)
    asked = K.Sequential([L.Embedding(WORDS, 6)], name="asked")(question)
    match = L.Activation("softmax")(L.Dot((2, 2))([memory, asked]))
    chosen = L.Permute((2, 1))(L.Add()([match, answers]))
    read = L.LSTM(8, name="read")(L.Concatenate()([chosen, asked]))
    return K.Model([story, question], L.Dense(WORDS, activation="softmax", name="word")(read))


class MemoryNetwork(nn.Module):
    def __init__(self, is_sparse: bool) -> None:
        super().__init__()
        self.memory = nn.Embedding(WORDS, 6, sparse=is_sparse)
        self.answers = nn.Embedding(WORDS, QUESTION, sparse=is_sparse)
        self.asked = nn.Embedding(WORDS, 6, sparse=is_sparse)
        self.read = nn.LSTM(STORY + 6, 8, batch_first=True)
        self.word = nn.Linear(8, WORDS)
        freeze_second_biases(self)

    def forward(self, story: Tensor, question: Tensor) -> Tensor:
        asked = self.asked(question)
        match = (self.memory(story) @ asked.mT).softmax(-1)
        chosen = (match + self.answers(story)).mT
        return self.word(self.read(torch.cat([chosen, asked], -1))[0][:, -1]).softmax(-1)


def batch(rng: np.random.Generator) -> Batch:
    """No word comes twice in a batch: what becomes of a row that does differs between the generations."""
    words = rng.permutation(WORDS)[: 8 * (STORY + QUESTION)].reshape(8, -1).astype("int32")
    return [words[:, :STORY], words[:, STORY:]], np.eye(WORDS)[rng.integers(WORDS, size=8)]


@pytest.mark.slow
@pytest.mark.parametrize("generation", KINDS)
def test_a_memory_network(generation: str, tmp_path: Path) -> None:
    options = {"": {"mapping": {"memory": "memory", "asked": "asked"}}}
    job = Job(keras_model, lambda: MemoryNetwork(generation == "legacy"), batch, options=options)
    check(job, generation, tmp_path)
