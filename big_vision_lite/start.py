"""The state before step 1: fresh, or with weights from elsewhere."""

from collections.abc import Callable, Mapping
from typing import Any

from big_vision_lite import adapt, loaded_weights
from big_vision_lite import state as state_lib
from big_vision_lite.config import TrainConfig
from big_vision_lite.state import TrainState


def first_state(
    config: TrainConfig,
    fresh: TrainState,
    first_params: Mapping[str, Any] | None,
    log: Callable[[str], None],
    *,
    note_origin: Callable[[Any], None],
) -> TrainState:
    """Returns the state before step 1: fresh, or with parameters from elsewhere."""
    if config.init is None and first_params is None:
        return fresh
    init = config.init or adapt.Init(path="memory")
    ours = state_lib.variables(fresh)
    same_classes = True
    loaded = first_params
    if loaded is None:
        opened = loaded_weights.open_weights(init.path, log)
        opened = loaded_weights.scaled_like(opened, config.model, ours, log)
        note_origin(opened.origin)
        loaded = opened.variables
        same_classes = opened.class_names == tuple(config.data.source.class_names)
        for line in loaded_weights.model_differences(config.model, opened.model):
            log(f"init: {line}")
    adapted = adapt.adapt(loaded, ours, init, same_classes=same_classes, log=log)
    return state_lib.with_variables(fresh, adapted)
