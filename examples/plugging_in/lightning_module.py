"""The fused loss in Lightning: `python examples/plugging_in/lightning_module.py`, seconds on a CPU.

Model and data are those of plain_pytorch.py; Lightning is `pip install lightning`.
"""

import copy

import lightning
import torch
from plain_pytorch import Model, make_batch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


class ContrastModule(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        # In a tuple, so that the reference is neither trained nor saved with the module.
        self.reference = (copy.deepcopy(self.model).eval().requires_grad_(False),)

    def on_fit_start(self) -> None:
        self.reference[0].to(self.device)

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        with torch.no_grad():
            ref_logps = self.reference[0](*batch).logps
        out = self.model(*batch, ref_logps)
        self.log_dict({"loss": out.loss.detach(), "accuracy": out.accuracy, "margin": out.margin})
        return out.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2)


if __name__ == "__main__":
    lightning.seed_everything(0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **quiet)
    trainer.fit(ContrastModule(), DataLoader(TensorDataset(*make_batch(6400)), batch_size=64))
    shown = {name: round(float(value), 4) for name, value in trainer.logged_metrics.items()}
    print(f"after {trainer.global_step} steps: {shown}")
