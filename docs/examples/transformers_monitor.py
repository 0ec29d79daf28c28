"""A callback for the Trainer of transformers that logs what an equivariance monitor measures."""

from transformers import TrainerCallback


class WatchEquivariance(TrainerCallback):
    """Measure in the first process, before the optimizer steps that are due."""

    def __init__(self, trainer, encoder, monitor):
        self.trainer, self.encoder, self.monitor = trainer, encoder, monitor

    def on_step_begin(self, args, state, control, **others):
        first, step = state.is_world_process_zero, state.global_step
        if first and (scalars := self.monitor(self.encoder, step)):
            self.trainer.log(scalars)
