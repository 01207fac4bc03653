"""Who attends where: what `auto` takes, and that it is said."""

import jax.numpy as jnp
import pytest

from big_vision_lite.models.blocks import attention
from big_vision_lite.models.blocks.attention import Attention, Shapes
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.layers import Dtype
from big_vision_lite.models.distilled import Distilled
from big_vision_lite.models.vit import ViT
from big_vision_lite.models.vit_variants import hybrid

PLAIN = dict(dtype="bfloat16", queries=196, memory=196, num_heads=6, head_dim=64)


@pytest.fixture
def with_cudnn(monkeypatch):
    """As where JAX finds a GPU since Ampere and cuDNN."""
    monkeypatch.setattr(attention, "_no_cudnn", lambda: None)


@pytest.mark.parametrize(
    ("platform", "changed", "expected", "reason"),
    [
        ("cuda", {}, Attention.CUDNN, None),
        ("gpu", {"dtype": "float32"}, Attention.XLA, "float32"),
        ("gpu", {"head_dim": 66}, Attention.XLA, "head dimension 66"),
        ("gpu", {"queries": 197, "memory": 197}, Attention.XLA, "odd number of tokens"),
        ("gpu", {"queries": 1}, Attention.XLA, "odd number of tokens (1)"),
        ("tpu", {}, Attention.PALLAS, None),
        ("tpu", {"dtype": "float32"}, Attention.XLA, "float32"),
        ("tpu", {"queries": 1}, Attention.XLA, "1 queries for 196 tokens"),
        ("cpu", {}, Attention.XLA, None),
    ],
)
def test_auto_takes_what_the_platform_has_for_these_arrays(
    with_cudnn, platform, changed, expected, reason
):
    shapes = Shapes(**{**PLAIN, **changed})
    choice = attention.choose(platform, shapes)
    assert choice.attention == expected
    (line,) = attention.describe({(Attention.AUTO, shapes): None}, platform, "kind")
    assert line.startswith(f"attention: {expected} on kind (")
    assert (reason is None) == (choice.reason is None)
    assert reason is None or reason in line


def test_without_cudnn_a_gpu_takes_xla_and_says_why():
    choice = attention.choose("gpu", Shapes(**PLAIN))
    assert choice.attention == Attention.XLA
    assert "cuDNN" in (choice.reason or "")


def test_calls_are_collected_once_a_kind_while_a_model_is_traced():
    q = jnp.ones((1, 3, 2, 8))
    with attention.calls() as found:
        for _ in range(3):
            attention.attend(q, q, q, Attention.AUTO)
    assert len(found) == 1
    ((_, shapes),) = found
    assert (shapes.queries, shapes.num_heads, shapes.dtype) == (3, 2, "float32")


def test_deterministic_runs_on_a_gpu_get_models_without_a_fused_kernel():
    head = Classifier(num_classes=2)
    for model in (
        ViT.of("Ti/16", head=head, dtype=Dtype.BFLOAT16),
        hybrid("R26+S/32", head=head),
    ):
        plain = attention.without_fused(model)
        assert plain.attention == Attention.XLA
        assert plain == model.clone(attention=Attention.XLA)
    teachers = (ViT.of("Ti/16"), ViT.of("S/16"))
    both = Distilled(student=ViT.of("Ti/8"), teachers=teachers)
    plain = attention.without_fused(both)
    models = (plain.student, *plain.teachers)
    assert [model.attention for model in models] == [Attention.XLA] * 3
    chosen = ViT.of("Ti/16", attention=Attention.CUDNN)
    assert attention.without_fused(chosen) is chosen
