"""The export of a run."""

from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from datamodules.files.run_folders import EXPORT
from models.learning.training import BackboneModule
from models.networks.network_options import ExportDtype
from models.networks.sharding import gather
from models.reporting.export_folders import export_model, refuse_other_folder
from models.reporting.run_record import tested_record


class ExportModel(Callback):
    """Writes `export/` atomically after the test.

    Args:
        folder: The run folder.
        dtype: The dtype of the weights; that of the network if None.
    """

    def __init__(self, folder: Path, dtype: ExportDtype | None = None) -> None:
        self.folder = folder
        self.dtype = dtype

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_other_folder(self.folder / EXPORT)  # before training, not after it

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, BackboneModule)
        assert pl_module.network is not None
        weights = gather(pl_module.network)  # a collective
        if trainer.is_global_zero:
            data = trainer.datamodule  # type: ignore[attr-defined]
            record = tested_record(trainer, pl_module)
            export_model(pl_module, data, record, self.folder / EXPORT, weights, self.dtype)
