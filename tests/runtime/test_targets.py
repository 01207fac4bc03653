"""Machines by their names, and what is said of those that nobody can compile for."""

import jax
import pytest

from big_vision_lite.runtime import plugins, targets

pytestmark = pytest.mark.compilers

needs_compilers = pytest.mark.skipif(
    not plugins.compilers_installed(), reason="needs pip install -e '.[plan]'"
)


@pytest.mark.parametrize(
    ("name", "kind", "tflops"),
    [
        ("v5e:2x4", "tpu", 197.0),
        ("v5p:4x4x4", "tpu", 459.0),
        ("v4:2x2x1", "tpu", 137.5),  # described as single cores
        ("tpu7x:2x2x1", "tpu", 1153.5),
        ("h100:8", "gpu", 989.4),
        ("H100:2x8", "gpu", 989.4),
        ("a100:1", "gpu", 312.0),
        ("b200:8", "gpu", 2250.0),
    ],
)
def test_a_target_has_the_rates_of_its_data_sheet(name, kind, tflops):
    target = targets.parse(name)
    assert target.kind == kind
    assert target.chip.flops == pytest.approx(tflops * 1e12)
    assert 0 < target.memory <= target.chip.memory


def test_a_cpu_has_no_data_sheet():
    target = targets.parse("cpu:8")
    assert target.chip is None and target.memory is None
    assert target.describe() == jax.devices("cpu")[:8]


@pytest.mark.parametrize("name", ["h10:8", "v7:2x2", "gpu", ""])
def test_an_unknown_target_is_refused_with_those_known(name):
    with pytest.raises(ValueError) as error:
        targets.parse(name)
    said = str(error.value)
    assert f'Unknown target "{name}"' in said
    for known in ("v5e:2x4", "tpu7x", "a100", "h100:8", "b200", "cpu:8"):
        assert known in said
    if name == "h10:8":
        assert 'Did you mean "h100"?' in said


@pytest.mark.parametrize("name", ["v5e", "h100:", "h100:eight", "v5e:2x0", "cpu:1x2x3"])
def test_a_target_without_a_number_of_devices_is_refused(name):
    with pytest.raises(ValueError, match="does not say how many devices.*h100:8"):
        targets.parse(name)


def test_more_cpus_than_this_process_has_are_refused_with_the_setting():
    with pytest.raises(ValueError, match="set JAX_NUM_CPU_DEVICES=64 before"):
        targets.parse("cpu:64").describe()


@pytest.mark.parametrize("name", ["v5e:2x4", "h100:8"])
def test_a_missing_compiler_is_refused_with_what_to_install(name, monkeypatch):
    monkeypatch.setattr(plugins, "importable", lambda module: False)
    with pytest.raises(ValueError) as error:
        targets.parse(name).describe()
    said = str(error.value)
    assert f"{name} cannot be compiled for" in said
    assert "pip install -e '.[plan]'" in said and "--on cpu:8" in said


def test_cudnn_is_asked_for_its_version_only_while_lowering_for_a_described_gpu():
    import jax._src.cudnn.fused_attention_stablehlo as fused

    asked = fused.check_cudnn_version
    with targets.lowering_without_gpu(targets.parse("a100:8")):
        assert fused.check_cudnn_version() == 90800
        assert fused.check_compute_capability("8.0")
        assert not fused.check_compute_capability("9.0")
    with targets.lowering_without_gpu(targets.parse("v5e:2x4")):
        assert fused.check_cudnn_version is asked
    assert fused.check_cudnn_version is asked


def test_the_machine_at_hand_is_a_target():
    here = targets.here()
    assert here.kind == "cpu" and here.describe() == jax.devices()
    assert here.compiler_options == {}
