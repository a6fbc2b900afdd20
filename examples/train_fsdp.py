"""Trains a small transformer on handwritten digits in several processes, with FSDP2 and checkpoints.

Each process holds a part of every parameter, of its gradient and of its state, and sees a part of every batch. The loss
is that of one process which sees the whole batch, but for the order in which gradients are added. With `--checkpoint`
model and optimizer are saved after each epoch, and a later run goes on after the last one, in any number of processes.
The digits are those of scikit-learn: nothing is downloaded. Run it, where torch_adadelta is installed with its extra
"examples", with

    torchrun --standalone --nproc-per-node 2 examples/train_fsdp.py

or, in one process, with `python examples/train_fsdp.py`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from torch_adadelta import AdadeltaKeras


class Transformer(nn.Module):
    """Reads an image row by row: 8 tokens of 8 pixels."""

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, width)
        self.positions = nn.Parameter(torch.randn(8, width) / 4)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embedding(images.view(-1, 8, 8)) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(dim=1))


def sharded_model(device: torch.device, mixed_precision: bool) -> Transformer:
    """A model with the same initial values in any number of processes, each of which keeps its part."""
    model = Transformer().to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # Parameters, state and the sums of gradients stay in float32.
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed_precision else MixedPrecisionPolicy()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


def state_of(model: nn.Module, optimizer: AdadeltaKeras) -> dict[str, Any]:
    """What a checkpoint holds, or is to be loaded into."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def resume(folder: Path, model: nn.Module, optimizer: AdadeltaKeras) -> int:
    """Loads the last checkpoint that is complete, and returns its epoch; 0 if there is none."""
    # What is written last is .metadata.
    epoch = max((int(path.parent.name.removeprefix("epoch-")) for path in folder.glob("epoch-*/.metadata")), default=0)
    if epoch:
        state = state_of(model, optimizer)
        dcp.load(state, checkpoint_id=folder / f"epoch-{epoch}")
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return epoch


# ---- Training -------------------------------------------------------------------------------------------------------


def train(
    device: torch.device,
    epochs: int = 10,
    batch_size: int = 32,
    learning_rate: float = 1.0,
    seed: int = 0,
    mixed_precision: bool = False,
    checkpoint: Path | None = None,
) -> list[float]:
    """Trains in all processes of the default group, and returns the mean loss of each epoch of this run."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    digits = common.load()
    images, labels = (torch.from_numpy(x).to(device) for x in (digits.train_images, digits.train_labels))
    torch.manual_seed(seed)
    model = sharded_model(device, mixed_precision)
    optimizer = AdadeltaKeras(model.parameters(), learning_rate=learning_rate, global_clipnorm=1.0)
    done = resume(checkpoint, model, optimizer) if checkpoint else 0
    if done and rank == 0:
        print(f"{checkpoint}: goes on after epoch {done}", flush=True)
    losses = []
    for epoch in range(done + 1, epochs + 1):
        # The batches of an epoch are the same in any number of processes, and after a checkpoint.
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed + epoch))
        total = torch.zeros((), dtype=torch.float64, device=device)
        for batch in order.split(batch_size):
            part = batch.tensor_split(world_size)[rank].to(device)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[part]).float(), labels[part], reduction="sum")
            # FSDP takes the mean over the processes.
            (loss * world_size / len(batch)).backward()
            optimizer.step()
            total += loss.detach()
        dist.all_reduce(total)
        losses.append(total.item() / len(labels))
        if rank == 0:
            print(f"epoch {epoch}: loss {losses[-1]:.6f}", flush=True)
        if checkpoint:
            dcp.save(state_of(model, optimizer), checkpoint_id=checkpoint / f"epoch-{epoch}")
    return losses


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Runs the example as the command line says, and returns the mean loss of each epoch."""
    parser = common.parser(
        "Train a small transformer on handwritten digits with FSDP2, in the processes that torchrun starts.",
        epochs=10,
        batch_size=32,
    )
    parser.add_argument("--learning-rate", type=float, default=1.0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--mixed-precision", action="store_true", help="compute in bfloat16, keep float32")
    parser.add_argument(
        "--checkpoint", type=Path, help="the folder to save to, and to go on from if there is one in it"
    )
    options = parser.parse_args(arguments)

    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    # Without torchrun it is one process by itself.
    alone: dict[str, Any] = (
        {} if dist.is_torchelastic_launched() else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    )
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **alone)
    try:
        with common.one_thread():
            return train(
                device,
                options.epochs,
                options.batch_size,
                options.learning_rate,
                options.seed,
                options.mixed_precision,
                options.checkpoint,
            )
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
