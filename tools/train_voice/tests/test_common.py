"""Recorded speech, and interruptible training runs."""

import json

import pytest
import torch

import common
from common import Training


def test_a_label_is_the_sound_in_the_middle_of_its_step(tmp_path, write_speech):
    phones = [("", 100), ("\u02c8b", 1300), ("?", 1500), ("a", 1900)]
    write_speech([dict(phones=phones)], num_frames=1)
    assert common.Speech(tmp_path).sounds == [" ", "a", "b"]
    assert common.Speech(tmp_path).labels(0, 480).tolist() == [2, 2, 2, 1]  # the last sound goes on
    (tmp_path / "phones.txt").write_text("a\n ")  # of the data before b was added
    assert common.Speech(tmp_path).labels(0, 480).tolist() == [-100, -100, -100, 0]


def test_validation_has_both_speakers(tmp_path, write_speech):
    write_speech([dict(speaker=i % 2) for i in range(500)], num_frames=1)
    speech = common.Speech(tmp_path)
    assert {speech.rows[i]["speaker"] for i in speech.validation} == {0, 1}
    assert sorted(speech.train + speech.validation) == list(range(500))


def test_training_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "plot", lambda path: None)
    monkeypatch.setattr(common, "LOG_STEPS", 1)
    clock = iter(range(0, 10_000, 30))
    monkeypatch.setattr(Training, "clock_s", lambda self: next(clock))

    def run(minutes):
        weight = torch.nn.Linear(1, 1, bias=False)
        states = {"weight": weight, "sgd": torch.optim.SGD(weight.parameters(), lr=0.1)}
        training = Training(tmp_path, "toy", minutes, states, warmup=1)
        rates = []
        for _ in training.steps():
            rates.append(states["sgd"].param_groups[0]["lr"])
            weight.weight.data += 1
            training.log(loss=weight.weight)
        return training.step, rates, weight.weight.item()

    steps, rates, value = run(2)
    assert (steps, rates[0]) == (4, 0.1)
    assert rates == sorted(rates, reverse=True)
    more, rates, after = run(4)  # starts from the first run's peak rate, not from its decayed rate
    assert (more, after) == (8, pytest.approx(value + 4))
    assert rates[0] == 0.1
    rows = [json.loads(line) for line in (tmp_path / "toy.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
