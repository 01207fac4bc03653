"""Fine-tuning transfer of a backbone to another data set by BiT-HyperRule."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from big_vision_lite import train, trees
from big_vision_lite.config import TrainConfig
from big_vision_lite.evaluators.classification import Classification
from big_vision_lite.recipes import serialize
from big_vision_lite.runs import controls, integrity, records, step_folder
from big_vision_lite.runs.class_pairs import class_table
from big_vision_lite.runs.evaluations import Context
from big_vision_lite.runs.hyperrule import HyperRule, start
from big_vision_lite.runs.scores import check_fields
from big_vision_lite.runtime import processes
from big_vision_lite.training import state as state_lib
from big_vision_lite.training.state import TrainState
from big_vision_lite.types import Array, Evaluator, Runner, Source, backbone_of

FOLDER = "finetune"
TEST = "test"


@runtime_checkable
class Rule(Protocol):
    """What chooses the settings of a fine-tuning: HyperRule, AdamWRule, your own."""

    batch_size: int

    def config(self, *args: Any, **kwargs: Any) -> TrainConfig:
        """Returns the training of a model with a new head; see `HyperRule.config`."""
        ...

    def from_scratch(self, config: TrainConfig) -> TrainConfig:
        """Returns the training from random parameters, which is the control."""
        ...


@dataclasses.dataclass(kw_only=True)
class FineTune:
    """Test accuracy after fine-tuning the state on `train`, once per seed.

    Scores: "accuracy" (mean over seeds; with several also "accuracy_sd", the sample
    standard deviation); `controls` adds "control_untrained", the same training from
    random parameters, computed once per run and kept in WORKDIR/<name>_controls.json.
    `rule` chooses the settings: HyperRule, or AdamWRule for transformers. The averaged
    parameters (EMA) are used if there are any. Each training is a separate run in
    WORKDIR/finetune/<name>/<step>_<digest>/seed_<seed>, which keeps its newest
    checkpoint until it ends, then only its records.
    """

    train: Source
    test: Source
    rule: Rule = dataclasses.field(default_factory=HyperRule)
    seeds: tuple[int, ...] = (0,)
    every_steps: int = 25_000
    eval_batch_size: int = 256
    controls: bool = True

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"FineTune: seeds={self.seeds} must be there and differ, for example "
                "(0, 1, 2)."
            )
        check_fields(self)

    def prepare(self, context: Context) -> Runner:
        context.check_set(
            self.train,
            self.rule.batch_size,
            what="its training set",
            option="rule.batch_size",
        )
        context.check_set(
            self.test,
            self.eval_batch_size,
            what="its test set",
            option="eval_batch_size",
        )
        class_table(
            self.test.class_names,
            self.train.class_names,
            name=f"{context.name} test",
            ours_is=f"{context.name} train",
        )
        # Built once, because the rule reads a sample of the images.
        config = self.training(context, self.seeds[0])
        pretrained = [dataclasses.replace(config, seed=seed) for seed in self.seeds]
        untrained = [self.rule.from_scratch(config) for config in pretrained]
        root = context.workdir / FOLDER / context.name

        def run(state: TrainState) -> dict[str, float]:
            params = state_lib.variables(state, averaged=True)
            params = trees.inside(params, backbone_of(context.model)[0])
            folder = root / f"{int(state.step)}_{digest(params)}"
            forget_others(context, folder)
            found = [fine_tune(context, c, folder, params) for c in pretrained]
            scores = summarise("accuracy", found)
            if self.controls:
                protocol = [_protocol(config) for config in untrained]
                scores |= controls.once(
                    context, protocol, lambda: control(root / "untrained")
                )
            return scores

        def control(folder: epath.Path) -> dict[str, float]:
            found = [fine_tune(context, c, folder, None) for c in untrained]
            return summarise("control_untrained", found)

        return run

    def training(self, context: Context, seed: int) -> TrainConfig:
        evaluators: dict[str, Evaluator] = {}
        config = self.rule.config(
            context.backbone,
            self.train,
            evaluators,
            context.preprocess,
            init=start("memory", context.backbone),
            seed=seed,
            fsdp=context.mesh.shape["fsdp"],
        )
        assert config.num_steps is not None, "the rule gives steps"
        # Once, at the end: nothing may be selected on the test images.
        evaluators[TEST] = Classification(
            source=self.test,
            batch_size=self.eval_batch_size,
            every_steps=config.num_steps,
            per_class=False,
        )
        return config


def fine_tune(
    context: Context,
    config: TrainConfig,
    folder: epath.Path,
    params: dict[str, Array] | None,
) -> float:
    """Runs or resumes one training below `folder` and returns its test accuracy.

    `params` are the initial parameters, None for random ones.
    """
    folder = folder / f"seed_{config.seed}"
    num_steps = config.num_steps
    assert num_steps is not None, "the rule gives steps"
    if not processes.on_first(lambda: _is_same(folder, config)):
        # Left by a run with another recipe or other parameters.
        _remove(folder)
    if not processes.on_first(lambda: _accuracy(folder, num_steps) is not None):
        first = None
        if params is not None:
            # Training donates its first parameters: copy them from the outer run's.
            first = {name: jnp.copy(leaf) for name, leaf in params.items()}
        train.train(config, folder, first_params=first)
        processes.barrier(f"finetuned_{folder.parent.name}_{config.seed}")
    accuracy = _accuracy(folder, num_steps)
    assert accuracy is not None, f"{folder} has no test score at its last step"
    for name in (step_folder.FOLDER, step_folder.TRASH):
        _remove(folder / name)
    return accuracy


def digest(params: dict[str, Array]) -> str:
    """Returns 8 characters that change with any bit of the parameters."""
    sums = np.asarray(jax.device_get(integrity.checksums(params)))
    return hashlib.sha256(sums.tobytes()).hexdigest()[:8]


def _accuracy(folder: epath.Path, num_steps: int) -> float | None:
    """Returns the test accuracy of a finished training, else None."""
    for record in records.read_history(folder):
        if record["step"] == num_steps and f"{TEST}/accuracy" in record:
            return record[f"{TEST}/accuracy"]
    return None


def _is_same(folder: epath.Path, config: TrainConfig) -> bool:
    known = folder / step_folder.CONFIG
    return not known.exists() or (
        json.loads(known.read_text())["config"] == _document(config)
    )


def _document(config: TrainConfig) -> Any:
    return json.loads(serialize.to_json(config))["config"]


def forget_others(context: Context, folder: epath.Path) -> None:
    """Removes fine-tuning runs of the same step that began with other parameters."""
    step = folder.name.split("_")[0]
    for other in folder.parent.glob(f"{step}_*"):
        if other.name != folder.name and jax.process_index() == 0:
            context.log(f"{context.name}: removing {other}, of other parameters")
            other.rmtree()


def _remove(folder: epath.Path) -> None:
    """Removes a folder, if it exists, on behalf of all processes."""
    if jax.process_index() == 0 and folder.exists():
        folder.rmtree()
    processes.barrier(f"removed_{folder.name}")


def _protocol(config: TrainConfig) -> list[Any]:
    """Returns everything that training from random parameters depends on."""
    evaluator = config.evaluators[TEST]
    assert isinstance(evaluator, Classification), "made above"
    sources = config.data.source.fingerprint, evaluator.source.fingerprint
    return [_document(config), *sources]


def summarise(name: str, accuracies: Sequence[float]) -> dict[str, float]:
    scores = {name: float(np.mean(accuracies))}
    if len(accuracies) > 1:
        scores[f"{name}_sd"] = float(np.std(accuracies, ddof=1))
    return scores
