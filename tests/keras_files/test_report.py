"""What a report says of a job that was moved."""

from torch_adadelta.keras import Report
from torch_adadelta.schedules import ExponentialDecay


def test_a_report_is_a_table() -> None:
    report = Report(
        "job.h5: .h5 of Keras 3",
        16,
        {"rho": 0.95, "learning_rate": ExponentialDecay(1.0, 10, 0.5)},
        [
            ("dense/kernel", "0.weight", "permute (1, 0)", True),
            ("norm/moving_mean", "1.running_mean", "as it is", False),
        ],
        ["left out: weight decay"],
        [("gru/bias", "bias_ih and bias_hh")],
    )
    schedule = ExponentialDecay(1.0, 10, 0.5).get_config()
    assert str(report) == (
        "job.h5: .h5 of Keras 3\n"
        "iterations: 16\n"
        "rho: 0.95\n"
        f"learning_rate: ExponentialDecay {schedule}\n"
        "norm_variables:\n"
        "  gru/bias → bias_ih and bias_hh\n"
        "\n"
        "Keras             PyTorch         layout          state\n"
        "dense/kernel      0.weight        permute (1, 0)  yes\n"
        "norm/moving_mean  1.running_mean  as it is        no\n"
        "note: left out: weight decay"
    )
