"""Counts optimizer steps and launches the dash phase at the right one."""

from __future__ import annotations

from torch import nn

from .inject import dash_layers, dash_state
from .prelaunch import LayerReport, prelaunch
from .spectral import SpectralCache


class DashSchedule:
    """Call `step()` once after every `optimizer.step()`; at `config.prelaunch_steps` it launches the directions.

    The count lives on the model (`dash_state`), so `save_adapter` and `load_adapter` carry it: a resumed run goes on
    where it stopped. All parameters, Δσ included, exist from the start; the optimizer needs no new group.

    Args:
        cache: decompositions of the frozen weights: `SpectralCache().start(model)` fills it while the first steps train.

    Attributes:
        reports: what `prelaunch` found, once launched in this process.
    """

    def __init__(self, model: nn.Module, progress: bool = True, cache: SpectralCache | None = None) -> None:
        self.state = dash_state(model)
        self.model = model
        self.progress = progress
        self.cache = cache
        self.reports: list[LayerReport] = []
        self._settled = False

    @property
    def launched(self) -> bool:
        """Has any layer its directions?"""
        return any(bool(layer.launched) for layer in dash_layers(self.model).values())

    def step(self) -> bool:
        """Counts one optimizer step. Returns True at the step that launches.

        A launch that failed or was interrupted is tried again at the next step.
        """
        self.state.step += 1
        if self.state.step < self.state.config.prelaunch_steps or self._settled:
            return False
        if self.launched:
            self._settled = True
            return False
        self.reports = prelaunch(self.model, self.progress, self.cache)
        self._settled = True
        return True
