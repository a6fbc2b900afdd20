"""Lightning, Accelerate, the Trainer of Hugging Face, skorch and fastai drive AdadeltaKeras as a loop by hand does, bit by bit."""

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_same_bits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torch_adadelta import AdadeltaKeras, schedules
from torch_adadelta.backends import kernels

STEPS = 4

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # the frameworks' own, of which there are many
]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No telemetry, no progress bars, no look at the network."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DISABLE_MLFLOW_INTEGRATION"):
        monkeypatch.setenv(name, "1")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def make_data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(STEPS * 5, 6, generator=generator), torch.randn(STEPS * 5, 1, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=5, shuffle=False)


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return nn.functional.mse_loss(model(x), y)


def by_hand(
    options: dict[str, Any],
    epochs: int = 1,
    before_step: Callable[[nn.Module], Any] = lambda model: None,
    autocast: torch.dtype | None = None,
    scaler: Any = None,
) -> tuple[nn.Module, AdadeltaKeras]:
    model = make_model()
    optimizer = AdadeltaKeras(model.parameters(), **options)
    for _ in range(epochs):
        for batch in make_data():
            optimizer.zero_grad()
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                loss = loss_of(model, batch)
            if scaler is None:
                loss.backward()
                before_step(model)
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
    return model, optimizer


def assert_same(model: nn.Module, optimizer: Any, expected: tuple[nn.Module, AdadeltaKeras]) -> None:
    for p, q in zip(model.parameters(), expected[0].parameters(), strict=True):
        assert_same_bits(p, q)
        for key, state in expected[1].state[q].items():
            assert_same_bits(optimizer.state[p][key], state)
    assert int(optimizer.param_groups[0]["iterations"]) == expected[1].iterations


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"learning_rate": 1.0},
    "schedule, global_clipnorm": {"learning_rate": schedules.ExponentialDecay(1.0, 2, 0.5), "global_clipnorm": 0.1},
}

# ---- Lightning ------------------------------------------------------------------------------------------------------


def lightning_module(options: dict[str, Any]) -> Any:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return loss_of(self.model, batch)

        def configure_optimizers(self) -> AdadeltaKeras:
            return AdadeltaKeras(self.parameters(), **options)

    return Module()


def lightning_trainer(folder: Path, epochs: int = 1, **options: Any) -> Any:
    lightning = pytest.importorskip("lightning")
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_lightning(tmp_path: Path, options: dict[str, Any]) -> None:
    module = lightning_module(options)
    trainer = lightning_trainer(tmp_path)
    trainer.fit(module, make_data())
    assert_same(module.model, trainer.optimizers[0], by_hand(options))


@pytest.mark.parametrize(
    ("algorithm", "clip"),
    [
        ("norm", lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.05)),
        ("value", lambda model: nn.utils.clip_grad_value_(model.parameters(), 0.05)),
    ],
)
def test_lightning_clips_gradients(tmp_path: Path, algorithm: str, clip: Any) -> None:
    module = lightning_module({"learning_rate": 1.0})
    trainer = lightning_trainer(tmp_path, gradient_clip_val=0.05, gradient_clip_algorithm=algorithm)
    trainer.fit(module, make_data())
    assert_same(module.model, trainer.optimizers[0], by_hand({"learning_rate": 1.0}, before_step=clip))


def test_lightning_in_bfloat16(tmp_path: Path) -> None:
    module = lightning_module({"learning_rate": 1.0})
    trainer = lightning_trainer(tmp_path, precision="bf16-mixed")
    trainer.fit(module, make_data())
    assert_same(module.model, trainer.optimizers[0], by_hand({"learning_rate": 1.0}, autocast=torch.bfloat16))


@pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")
def test_lightning_with_a_scaler(tmp_path: Path) -> None:
    """With fused=True the update unscales by itself. Lightning then cannot clip, and says so; the optimizer can."""
    pytest.importorskip("lightning")
    from lightning.pytorch.plugins.precision import MixedPrecision

    def plugin() -> Any:
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))

    options = {"learning_rate": 1.0, "fused": True, "global_clipnorm": 0.05}
    module = lightning_module(options)
    trainer = lightning_trainer(tmp_path, plugins=[plugin()])
    trainer.fit(module, make_data())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert_same(module.model, trainer.optimizers[0], by_hand(options, autocast=torch.float16, scaler=scaler))
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        lightning_trainer(tmp_path, plugins=[plugin()], gradient_clip_val=0.05).fit(
            lightning_module(options), make_data()
        )


def test_lightning_resumes(tmp_path: Path) -> None:
    options = {"learning_rate": schedules.ExponentialDecay(1.0, 2, 0.5)}
    first = lightning_trainer(tmp_path)
    module = lightning_module(options)
    first.fit(module, make_data())
    first.save_checkpoint(tmp_path / "checkpoint")
    again = lightning_module(options)
    second = lightning_trainer(tmp_path, epochs=2)
    second.fit(again, make_data(), ckpt_path=tmp_path / "checkpoint")
    assert_same(again.model, second.optimizers[0], by_hand(options, epochs=2))


# ---- Accelerate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_accelerate(tmp_path: Path, options: dict[str, Any]) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)

    def train(model: nn.Module, optimizer: Any, data: Any) -> None:
        for batch in data:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, batch))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()

    model = make_model()
    ours, optimizer, data = accelerator.prepare(model, AdadeltaKeras(model.parameters(), **options), make_data())
    train(ours, optimizer, data)
    accelerator.save_state(str(tmp_path))
    saved = copy.deepcopy(ours.state_dict())
    train(ours, optimizer, data)

    expected = make_model()
    plain = AdadeltaKeras(expected.parameters(), **options)
    for _ in range(2):
        for index, batch in enumerate(make_data()):
            (loss_of(expected, batch) / 2).backward()
            if index % 2:
                nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
                plain.step()
                plain.zero_grad()
    assert_same(accelerator.unwrap_model(ours), optimizer, (expected, plain))

    accelerator.load_state(str(tmp_path))
    assert all(map(torch.equal, ours.state_dict().values(), saved.values()))
    assert int(optimizer.param_groups[0]["iterations"]) == 2
    train(ours, optimizer, data)
    assert_same(accelerator.unwrap_model(ours), optimizer, (expected, plain))
    accelerator.free_memory()


# ---- Hugging Face Trainer -------------------------------------------------------------------------------------------


class WithLoss(nn.Module):
    """A model as the Trainer wants it: it takes labels and returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_model()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.mse_loss(self.model(x), labels)}


@pytest.mark.parametrize(("max_grad_norm", "weight_decay"), [(0.0, 0.0), (0.05, 0.25)])
def test_trainer(tmp_path: Path, max_grad_norm: float, weight_decay: float) -> None:
    """`optimizer_cls_and_kwargs`, with the Trainer's own scheduler, clipping and groups of weight decay."""
    transformers = pytest.importorskip("transformers")
    batch = next(iter(make_data()))
    samples = [{"x": batch[0][0], "labels": batch[1][0]}] * (2 * STEPS)  # all alike, for the Trainer shuffles

    def trainer() -> Any:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            max_steps=STEPS,
            per_device_train_batch_size=2,
            lr_scheduler_type="linear",
            max_grad_norm=max_grad_norm,
            weight_decay=weight_decay,
            report_to=[],
            save_strategy="steps",
            save_steps=2,
            disable_tqdm=True,
            logging_strategy="no",
            dataloader_pin_memory=False,
        )
        return transformers.Trainer(
            WithLoss(),
            arguments,
            train_dataset=samples,
            optimizer_cls_and_kwargs=(AdadeltaKeras, {"lr": 1.0, "rho": 0.9, "global_clipnorm": 0.5}),
        )

    ours = trainer()
    ours.train()

    model = WithLoss()
    matrices = [param for param in model.parameters() if param.dim() > 1]  # biases do not decay there
    vectors = [param for param in model.parameters() if param.dim() == 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = AdadeltaKeras(groups, 1.0, 0.9, global_clipnorm=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, (STEPS - step) / STEPS))
    x = torch.stack([samples[0]["x"]] * 2)
    labels = torch.stack([samples[0]["labels"]] * 2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(x, labels)["loss"].backward()
        if max_grad_norm:
            nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        scheduler.step()
    assert_same(ours.model, ours.optimizer, (model, optimizer))

    resumed = trainer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(resumed.model, resumed.optimizer, (model, optimizer))


def test_trainer_and_a_schedule(tmp_path: Path) -> None:
    """The Trainer has a scheduler of its own, which would be written over: it is refused, and says what to do."""
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=2, report_to=[])
    batch = next(iter(make_data()))
    trainer = transformers.Trainer(
        WithLoss(),
        arguments,
        train_dataset=[{"x": batch[0][0], "labels": batch[1][0]}] * 8,
        optimizer_cls_and_kwargs=(AdadeltaKeras, {"lr": schedules.ExponentialDecay(1.0, 2, 0.5)}),
    )
    with pytest.raises(RuntimeError, match=r"learning_rate is given by the schedule .* which would overwrite that"):
        trainer.train()


# ---- fastai and skorch ----------------------------------------------------------------------------------------------


def _rows() -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    return x, x.sum(1, keepdim=True)


def _trained_by_hand(groups: Any, model: nn.Module, epochs: int) -> AdadeltaKeras:
    """On all rows at once."""
    optimizer = AdadeltaKeras(groups, 1.0)
    x, y = _rows()
    for _ in range(epochs):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return optimizer


def test_skorch() -> None:
    skorch = pytest.importorskip("skorch")
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    expected = copy.deepcopy(model)
    net = skorch.NeuralNetRegressor(
        model,
        optimizer=AdadeltaKeras,
        lr=1.0,
        optimizer__weight_decay=0.1,
        optimizer__param_groups=[("bias", {"weight_decay": 0.0})],
        max_epochs=5,
        batch_size=-1,
        train_split=None,
        verbose=0,
    )
    net.fit(*(tensor.numpy() for tensor in _rows()))
    groups = [{"params": [expected.bias]}, {"params": [expected.weight], "weight_decay": 0.1}]
    _trained_by_hand(groups, expected, 5)
    assert net.optimizer_.iterations == 5
    for actual, wanted in zip(net.module_.parameters(), expected.parameters(), strict=True):
        assert_same_bits(actual, wanted.detach())


def test_fastai() -> None:
    """`wd` is the weight decay of all parameters."""
    pytest.importorskip("fastai")
    from fastai.basics import DataLoader as FastaiLoader
    from fastai.basics import DataLoaders, Learner, OptimWrapper

    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    expected = copy.deepcopy(model)
    loader = FastaiLoader(list(zip(*_rows(), strict=True)), bs=16)
    learner = Learner(
        DataLoaders(loader, loader),
        model,
        loss_func=nn.MSELoss(),
        opt_func=functools.partial(OptimWrapper, opt=AdadeltaKeras),
        lr=1.0,
        wd=0.1,
    )
    learner.fit(5)
    _trained_by_hand([{"params": list(expected.parameters()), "weight_decay": 0.1}], expected, 5)
    assert learner.opt.opt.iterations == 5
    for actual, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert_same_bits(actual, wanted.detach())
