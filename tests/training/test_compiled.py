"""Compiled programs are read: small texts by hand, small programs against JAX."""

import dataclasses
import json

import compile_report
import jax
import jax.numpy as jnp
import pytest
from tiny_runs import Net, filled, rows, start

from big_vision_lite.runtime import compiled, hlo, kernels, targets

pytestmark = pytest.mark.compilers

LOOP = """HloModule looped, is_scheduled=true

%body (state: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %state = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)S(1)}) parameter(0)
  %one = s32[] constant(STEP)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,8]{1,0:T(8,128)S(1)} get-tuple-element(%state), index=1
  %next = s32[] add(%i, %one)
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %sum = f32[8,8]{1,0} all-reduce(%y), channel_id=3, to_apply=%add
  ROOT %out = (s32[], f32[8,8]{1,0}) tuple(%next, %sum)
}

%condition (state: (s32[], f32[8,8])) -> pred[] {
  %state = (s32[], f32[8,8]) parameter(0)
  %n = s32[] constant(8)
  %i = s32[] get-tuple-element(%state), index=0
  ROOT %more = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  %zero = s32[] constant(FIRST)
  %first = (s32[], f32[8,8]{1,0}) tuple(%zero, %p)
  %loop = (s32[], f32[8,8]{1,0}) while(%first), condition=%condition, body=%bodyKNOWN
  ROOT %r = f32[8,8]{1,0} get-tuple-element(%loop), index=1
}
"""


@dataclasses.dataclass
class Text:
    """A compiled program of which only the text is there."""

    text: str

    def as_text(self):
        return self.text

    def cost_analysis(self):
        return None

    def memory_analysis(self):
        names = ("argument", "temp", "output", "alias", "generated_code")
        return type("Memory", (), {f"{n}_size_in_bytes": 0 for n in names})


def looped(first=0, step=1, known="") -> str:
    text = LOOP.replace("FIRST", str(first)).replace("STEP", str(step))
    return text.replace("KNOWN", known)


@pytest.mark.parametrize(
    ("first", "step", "known", "turns"),
    [
        (0, 1, "", 8),
        (2, 1, "", 6),
        (0, 2, "", 4),  # XLA unrolls, then the counter takes two at a time
        (0, 3, "", 3),
        (0, 1, ', backend_config={"known_trip_count":{"n":"5"}}', 5),
    ],
)
def test_what_a_loop_holds_counts_as_often_as_it_turns(first, step, known, turns):
    figures = compiled.read(Text(looped(first, step, known)))
    assert figures.flops == turns * 2 * 8**3
    found = figures.collectives["all-reduce"]
    assert (found.count, found.bytes) == (turns, turns * 256)
    (product,) = (k for k in figures.kernels if k.flops)
    # Two operands and a result; the operands stay in the core's own memory.
    assert (product.bytes, product.from_memory) == (3 * 256, 256)


def test_a_type_is_read_with_its_layout():
    (array,) = hlo.arrays_of("bf16[128,6,64]{2,1,0:T(8,128)(2,1)S(1)}")
    assert (array.dtype, array.shape, array.bytes) == ("bf16", (128, 6, 64), 98304)
    assert compiled.main_memory(array) == 0
    assert [a.bytes for a in hlo.arrays_of("(f32[], s8[7]{0})")] == [4, 7]


def test_what_is_no_compiled_program_is_refused():
    with pytest.raises(ValueError, match="has no ENTRY"):
        hlo.parse("HloModule nothing")


def compile_(function, *shapes):
    return jax.jit(function).lower(*shapes).compile()


def test_flops_of_a_product_are_those_of_the_cost_analysis():
    x = jax.ShapeDtypeStruct((64, 96), jnp.float32)
    y = jax.ShapeDtypeStruct((96, 32), jnp.float32)
    found = compile_(lambda x, y: x @ y, x, y)
    assert compiled.read(found).flops == 2 * 64 * 96 * 32
    assert compiled.read(found).flops == found.cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("strides", "padding", "dilation"),
    [(1, "SAME", 1), (2, "VALID", 1), (1, "SAME", 2)],
)
def test_flops_of_a_convolution_are_those_of_the_cost_analysis(
    strides, padding, dilation
):
    image = jax.ShapeDtypeStruct((2, 9, 11, 4), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 4, 8), jnp.float32)

    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x,
            w,
            (strides,) * 2,
            padding,
            rhs_dilation=(dilation,) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    found = compile_(convolve, image, kernel)
    assert compiled.read(found).flops == found.cost_analysis()["flops"]


def test_a_scan_counts_every_turn():
    x = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    found = compile_(
        lambda x: jax.lax.scan(lambda c, _: (c @ x, None), x, length=7)[0], x
    )
    assert compiled.read(found).flops == 7 * 2 * 32**3


def test_four_micro_batches_count_the_flops_of_one():
    def flops(micro_batches):
        run = start(Net(width=64, depth=2), devices=2, micro_batches=micro_batches)
        with jax.set_mesh(run.mesh):
            batch = run.put(rows())
            return compiled.read(run.step.lower(filled(run.abstract), batch).compile())

    whole, parts = flops(1), flops(4)
    assert parts.flops == pytest.approx(whole.flops, rel=0.03)
    # Data-parallel: however many parts, the gradients are summed up once.
    assert parts.collectives["all-reduce"].count <= 2


def test_a_step_moves_at_least_what_goes_in_and_comes_out():
    run = start(Net(), devices=2)
    with jax.set_mesh(run.mesh):
        step = run.step.lower(run.state, run.put(rows())).compile()
    figures = compiled.read(step)
    memory = figures.memory
    assert figures.bytes_moved >= memory.arguments
    assert memory.aliased > 0, "the state is donated"
    assert memory.total >= memory.arguments + memory.temporaries


def test_a_kernel_of_our_own_counts_by_what_it_computes_not_by_what_it_says():
    from jax.experimental import pallas as pl

    def body(x, o):
        o[...] = jnp.exp(x[...] @ x[...])

    lies = pl.CostEstimate(flops=1, transcendentals=1, bytes_accessed=1)
    call = pl.pallas_call(
        body,
        grid=(4,),
        in_specs=[pl.BlockSpec((16, 16), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((16, 16), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((64, 16), jnp.float32),
        cost_estimate=lies,
        interpret=True,
    )
    traced = jax.jit(call).trace(jax.ShapeDtypeStruct((64, 16), jnp.float32))
    ((signature, work),) = kernels.pallas_kernels(traced.jaxpr.jaxpr).items()
    assert signature == (("f32", (64, 16)), ("f32", (64, 16)))
    assert work == kernels.Work(flops=4 * 2 * 16**3, exponentials=4 * 256)
    text = (
        "HloModule k\n\nENTRY %main (p: f32[64,16]) -> f32[64,16] {\n"
        "  %p = f32[64,16]{1,0} parameter(0)\n"
        '  ROOT %k = f32[64,16]{1,0} custom-call(%p), custom_call_target="'
        'tpu_custom_call", backend_config={"cost":{"flops":1}}\n}\n'
    )
    figures = compiled.read(Text(text), None, {signature: work})
    assert (figures.flops, figures.bytes_moved) == (work.flops, 2 * 4 * 1024)
    chip = targets.parse("v5e:2x4").chip
    by_share = {
        "flops": work.flops / (0.4 * chip.flops),
        "bytes": 8192 / (0.7 * chip.bandwidth),
        "exponentials": 1024 / (1024 * chip.clock),
    }
    (kernel,) = figures.kernels
    assert compiled.kernel_seconds(kernel, chip) == max(by_share.values())


GOLDEN = json.loads(compile_report.GOLDEN.read_text())


# The compilers of TPUs and GPUs heed what tests want of the CPU's, too.
@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("case", compile_report.CASES)
def test_the_step_costs_what_is_recorded(case):
    recorded = GOLDEN.get(compile_report.versions())
    if recorded is None:
        pytest.skip(
            f"recorded for {', '.join(GOLDEN)}; here: {compile_report.versions()}. "
            "Install these, or record: python tools/compile_report.py --golden --write"
        )
    for name, found in compile_report.case(case).items():
        now = json.loads(json.dumps(found))
        assert not compile_report.differences(recorded[name], now), name


# A batch of 1,024 a device: its pairs take 4 MB, more than all else of this model; the
# towers' own attention is small, and its kernel another test's.
PAIRS = (
    "--config.model.image_tower.depth=1",
    "--config.model.text_tower.depth=1",
    "--config.model.text_tower.length=8",
    "--config.data.ops[2].length=8",
    "--config.model.image_tower.attention=xla",
    "--config.model.text_tower.attention=xla",
)


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_pairs_take_as_much_memory_on_twice_the_devices_with_twice_the_batch():
    if compile_report.versions() is None:
        pytest.skip("needs the compilers of TPUs: pip install -e '.[plan]'")
    recipe = compile_report.ROOT / "configs" / "siglip.py"
    four, eight = (
        compile_report.estimates(
            [
                f"{recipe}:size=Ti/16,image_px=32",
                *PAIRS,
                f"--config.data.batch_size={1024 * devices}",
            ],
            [machine],
        )[0]
        for machine, devices in (("v5e:2x2", 4), ("v5e:2x4", 8))
    )
    for name in ("activations and gradients",):
        assert 4 * 1024**2 < eight.memory[name] <= 1.3 * four.memory[name]
    assert eight.memory_needed <= 1.3 * four.memory_needed
    # Chunks of texts travel, and no device gathers them.
    for found in (four, eight):
        assert found.collectives.keys() <= {"all-reduce", "collective-permute"}
