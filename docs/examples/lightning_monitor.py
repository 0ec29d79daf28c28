"""A callback for Lightning that logs what an equivariance monitor measures."""

import pytorch_lightning as pl


class WatchEquivariance(pl.Callback):
    """Measure in the first process, before the optimizer steps that are due."""

    def __init__(self, monitor):
        self.monitor = monitor

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.is_global_zero and (scalars := self.monitor(module, trainer.global_step)):
            for logger in trainer.loggers:
                logger.log_metrics(scalars, trainer.global_step)
