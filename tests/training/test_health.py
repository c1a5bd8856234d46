"""How fast a step was is in a log of its own, under names that say what it is, and never beside what must be equal."""

import pytest
import torch

from alignkit.training.distributed import start_process
from alignkit.training.health import Clock
from alignkit.training.loop import train, train_folder
from alignkit.training.metrics import read_metrics

TOKENS = 3 * 8 * 8 // 4  # 9 frames of 32 × 32: latents of 3 × 8 × 8, by the shipped VAE's factors of 4 and 4
RATES = ("seconds", "pairs_per_second", "tokens_per_second")


@pytest.mark.parametrize(
    ("settings", "parts", "sides"),
    [
        ((), ("data", "reference", "policy", "optimizer"), 2),
        (("objective={name: sft}",), ("data", "policy", "optimizer"), 1),
    ],
    ids=["preference", "sft"],
)
def test_each_step_has_its_rates_and_where_its_time_went(run_with_pairs, settings, parts, sides):
    config, _ = run_with_pairs("run", "train.steps=2", *settings)
    train(config, start_process(), at_peak=lambda config, process, later: 0.5)
    rows = read_metrics(train_folder(config) / "timings.jsonl")
    names = {"step", *RATES, "mfu", "process_peak_memory_gb", *(f"seconds/{part}" for part in parts)}
    if torch.cuda.is_available():
        names = names - {"process_peak_memory_gb"} | {"gpu_peak_memory_gb"}
    assert [row["step"] for row in rows] == [1, 2] and all(row.keys() == names for row in rows)
    for row in rows:
        spent = [row[f"seconds/{part}"] for part in parts]
        assert min(spent) > 0 and sum(spent) <= row["seconds"]
        assert row["pairs_per_second"] == 4 / row["seconds"] and row["mfu"] == 0.5 / row["seconds"]
        assert row["tokens_per_second"] == pytest.approx(sides * TOKENS * row["pairs_per_second"])
    for row in read_metrics(train_folder(config) / "metrics.jsonl"):
        assert row["grad_norm"] > 0 and row.keys() & names == {"step"}


def test_without_a_known_peak_there_is_no_utilization(run_with_pairs):
    config, _ = run_with_pairs("run", "train.steps=1")
    train(config, start_process())
    (row,) = read_metrics(train_folder(config) / "timings.jsonl")
    assert row.keys() >= set(RATES) and "mfu" not in row


def test_a_part_that_comes_twice_is_counted_twice_and_the_next_step_begins_anew(monkeypatch):
    clock, now = Clock(torch.device("cpu")), iter([0.0, 1.0, 3.0, 7.0, 20.0, 21.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    for part in ("a", "b", "a"):
        clock.at(part)
    assert clock.stop() == {"a": 5.0, "b": 2.0}
    clock.at("b")
    assert clock.stop() == {"b": 1.0}
