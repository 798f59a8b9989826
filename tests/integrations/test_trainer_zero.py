"""DeepSpeed's ZeRO under transformers' Trainer."""

from __future__ import annotations

import pytest
from loradash import dash_layers

transformers = pytest.importorskip("transformers")

from loradash.integrations.transformers import DashCallback  # noqa: E402

from benchmarks.front_ends.resume import own_door, rows  # noqa: E402


def test_its_engine_is_nothing_that_a_callback_sees(tmp_path):
    args = transformers.TrainingArguments(str(tmp_path), max_steps=1, report_to=[], disable_tqdm=True, use_cpu=True)
    callback = DashCallback(progress=False)
    trainer = transformers.Trainer(own_door(), args, train_dataset=rows(), callbacks=[callback])
    # What the stages 1 and 2 leave on every parameter that they train.
    next(iter(dash_layers(trainer.model).values())).lora_a._hp_mapping = None
    with pytest.raises(ValueError, match=r"ZeRO trains this model.*DashSchedule\(engine\)"):
        trainer.train()
