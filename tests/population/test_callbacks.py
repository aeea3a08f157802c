"""The callbacks within the real trainers, where these are installed; what is said where they are not."""

import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from steadynorm.errors import MissingDependencyError, ModelError
from steadynorm.population import lightning_callback, recalibrate_, trainer_callback
from support_population import images, network, norms


def batches():
    return [(b, torch.zeros(len(b), dtype=torch.long)) for b in images(24).split(8)]


def states(model):
    return [(m.running_mean.clone(), m.running_var.clone()) for m in norms(model).values()]


def same(a, b):
    return all(torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


def test_lightning_validates_with_the_statistics_of_the_population(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    seen = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, _):
            return cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, _):
            if not self.trainer.sanity_checking:
                before = states(self)
                recalibrate_(self, batches(), progress=False)
                seen.append(same(before, states(self)))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    given = torch.utils.data.DataLoader(batches(), batch_size=None)
    callback, module = lightning_callback(batches(), progress=False), Module()
    trainer = lightning.Trainer(
        callbacks=[callback], max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, given, given)
    assert seen
    assert all(seen)
    assert callback.report.examples == 24
    trained = states(module)
    trainer.validate(module, given, verbose=False)
    assert same(trained, states(module))


def test_the_hugging_face_trainer_ends_with_the_statistics_of_the_population(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, pixels, labels=None):
            logits = self.net(pixels)
            return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}

    loader = [{"pixels": x, "labels": y} for x, y in batches()]
    callback, model = trainer_callback(loader, progress=False), Model()
    rows = [{"pixels": x, "labels": torch.tensor(0)} for x in images(24)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=1, per_device_train_batch_size=8, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    assert callback.report.examples == 24
    trained = states(model)
    recalibrate_(model, loader, progress=False)
    assert same(trained, states(model))
    with pytest.raises(ModelError, match="no model"):
        callback.on_train_end(None, None, None, model=None)


@pytest.mark.parametrize("make", [lightning_callback, trainer_callback])
def test_a_missing_trainer_is_said(make, monkeypatch):
    for name in ("lightning.pytorch", "pytorch_lightning", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match="pip install"):
        make([])
