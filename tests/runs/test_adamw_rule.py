import dataclasses

import pytest

from big_vision_lite.config import Init
from big_vision_lite.data.ops import Decode, FlipLeftRight
from big_vision_lite.data.sources import Digits
from big_vision_lite.evaluators.finetune import FineTune, Rule
from big_vision_lite.models.vit import ViT
from big_vision_lite.objectives.classification import SigmoidClassification
from big_vision_lite.runs.adamw_rule import AdamWRule
from big_vision_lite.runs.hyperrule import HyperRule, Repeated

PREPROCESS = (Decode(channels=1),)


def config(rule, **fields):
    model = ViT(width=8, depth=1, mlp_dim=8, num_heads=1, patch_size=4, dropout=0.1)
    init = (Init(path="runs/x"),)
    return rule.config(model, Digits(), {}, PREPROCESS, init=init, **fields)


def test_the_training_has_the_settings_of_the_rule():
    rule = AdamWRule(num_steps=50, peak=2e-3, layer_decay=0.6, label_smoothing=0.2)
    found = config(rule, seed=3, fsdp=2)
    assert (found.num_steps, found.seed, found.mesh.fsdp) == (50, 3, 2)
    assert found.model.head.num_classes == 10 and found.model.dropout == 0
    optimizer = found.optimizer
    assert (optimizer.schedule.peak, optimizer.schedule.warmup_steps) == (2e-3, 5)
    assert (optimizer.layer_decay, optimizer.weight_decay) == (0.6, 5e-5)
    assert found.objective.label_smoothing == 0.2
    assert found.data.ops == found.preprocess == PREPROCESS
    assert found.init[0].path == "runs/x"


def test_ops_and_objective_replace_those_of_the_pretrained_model():
    ops = (Decode(channels=1), FlipLeftRight())
    rule = AdamWRule(num_steps=5, ops=ops)
    found = config(rule, objective=SigmoidClassification())
    assert found.data.ops == ops and found.preprocess == PREPROCESS
    assert isinstance(found.objective, SigmoidClassification)


def test_from_scratch_nothing_is_held_back():
    rule = AdamWRule(num_steps=5)
    pretrained = config(rule)
    scratch = rule.from_scratch(pretrained)
    assert scratch.init == () and scratch.optimizer.layer_decay is None
    assert pretrained.optimizer.layer_decay == 0.75
    same = dataclasses.replace(
        scratch, init=pretrained.init, optimizer=pretrained.optimizer
    )
    assert same == pretrained


def test_a_set_smaller_than_a_batch_is_repeated():
    found = config(AdamWRule(num_steps=5, batch_size=2000))
    assert isinstance(found.data.source, Repeated) and len(found.data.source) >= 2000


@pytest.mark.parametrize(
    "fields", [{"num_steps": 0}, {"batch_size": 0}, {"warmup": 1.0}], ids=repr
)
def test_numbers_that_mean_nothing_are_refused(fields):
    with pytest.raises(ValueError, match="warmup is a share below 1"):
        AdamWRule(**{"num_steps": 5} | fields)


def test_both_rules_serve_the_evaluator():
    for rule in (AdamWRule(num_steps=5), HyperRule()):
        assert isinstance(rule, Rule)
        assert FineTune(train=Digits(), test=Digits(), rule=rule).rule is rule
