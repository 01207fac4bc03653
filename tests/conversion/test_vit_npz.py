"""ViT archives of big_vision and vision_transformer, against timm."""

import dataclasses
import functools
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import torch_libraries
from foreign_models import relative_difference

from big_vision_lite import trees
from big_vision_lite.conversion import export, foreign, formats
from big_vision_lite.conversion import files as weights
from big_vision_lite.conversion.families import vit_archives
from big_vision_lite.conversion.formats import Library
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.patches import Positions
from big_vision_lite.models.blocks.pooling import Pooling
from big_vision_lite.models.vit import ViT

pytestmark = pytest.mark.parity

torch_libraries.import_torchvision()

WIDTH, DEPTH, HEADS, HIDDEN, CLASSES, REPRESENTATION = 16, 3, 2, 64, 5, 12
BOUND = 1e-5  # of logits and pooled features in float32
BIG_VISION, STACKED, *_, VISION_TRANSFORMER = vit_archives.FORMATS
POOLINGS = (Pooling.CLASS_TOKEN, Pooling.AVERAGE, Pooling.ATTENTION)


@dataclasses.dataclass(frozen=True)
class Case:
    pooling: Pooling = Pooling.CLASS_TOKEN
    patch: int = 8
    image_size_px: tuple[int, int] = (24, 24)
    representation: bool = False
    positions: bool = True

    @property
    def patches(self) -> int:
        return (self.image_size_px[0] // self.patch) * (
            self.image_size_px[1] // self.patch
        )


CASES = {
    "token": Case(),
    "token, odd": Case(patch=7, image_size_px=(35, 35)),
    "token, not square": Case(image_size_px=(16, 32)),
    "token, representation": Case(representation=True),
    "average": Case(Pooling.AVERAGE),
    "average, not square": Case(Pooling.AVERAGE, image_size_px=(40, 16)),
    "average, representation": Case(Pooling.AVERAGE, representation=True),
    "attention": Case(Pooling.ATTENTION),
}


def dense(rng, name, rows, columns):
    """Returns a dense layer of Flax; `rows` and `columns` may be several axes."""
    kernel = rng.normal(size=(*rows, *columns)) / np.sqrt(np.prod(rows))
    bias = rng.normal(scale=0.3, size=columns)
    return {f"{name}/kernel": kernel, f"{name}/bias": bias}


def norm(rng, name):
    return {
        f"{name}/scale": rng.uniform(0.5, 1.5, WIDTH) * rng.choice((-1, 1), WIDTH),
        f"{name}/bias": rng.normal(scale=0.3, size=WIDTH),
    }


def attention_arrays(rng, name):
    heads = (HEADS, WIDTH // HEADS)
    parts = [dense(rng, f"{name}/{p}", (WIDTH,), heads) for p in ("query", "key")]
    parts += [dense(rng, f"{name}/value", (WIDTH,), heads)]
    return functools.reduce(
        dict.__or__, parts, dense(rng, f"{name}/out", heads, (WIDTH,))
    )


def mlp_arrays(rng, name):
    first = dense(rng, f"{name}/Dense_0", (WIDTH,), (HIDDEN,))
    return first | dense(rng, f"{name}/Dense_1", (HIDDEN,), (WIDTH,))


def big_vision(case: Case, seed: int = 0, token_size: float = 0.5):
    """Returns the arrays of a big_vision ViT file, by name."""
    rng = np.random.default_rng(seed)
    patch = (case.patch, case.patch, 3)
    arrays = dense(rng, "embedding", patch, (WIDTH,))
    arrays = {name: array * token_size for name, array in arrays.items()}
    if case.positions:
        size = (1, case.patches, WIDTH)
        arrays["pos_embedding"] = rng.normal(scale=token_size, size=size)
    if case.pooling == Pooling.CLASS_TOKEN:
        arrays["cls"] = rng.normal(scale=token_size, size=(1, 1, WIDTH))
    for index in range(DEPTH):
        block = f"Transformer/encoderblock_{index}"
        arrays |= norm(rng, f"{block}/LayerNorm_0") | norm(rng, f"{block}/LayerNorm_1")
        arrays |= attention_arrays(rng, f"{block}/MultiHeadDotProductAttention_0")
        arrays |= mlp_arrays(rng, f"{block}/MlpBlock_0")
    arrays |= norm(rng, "Transformer/encoder_norm")
    if case.pooling == Pooling.ATTENTION:
        arrays["MAPHead_0/probe"] = rng.normal(size=(1, 1, WIDTH))
        arrays |= attention_arrays(rng, "MAPHead_0/MultiHeadDotProductAttention_0")
        arrays |= norm(rng, "MAPHead_0/LayerNorm_0")
        arrays |= mlp_arrays(rng, "MAPHead_0/MlpBlock_0")
    features = WIDTH
    if case.representation:
        features = REPRESENTATION
        arrays |= dense(rng, "pre_logits", (WIDTH,), (features,))
    arrays |= dense(rng, "head", (features,), (CLASSES,))
    return {name: np.float32(array) for name, array in arrays.items()}


def stack(arrays):
    """Returns the layout of big_vision's scan: all blocks in one array a name."""
    first = "Transformer/encoderblock_0/"
    leaves = [n.removeprefix(first) for n in arrays if n.startswith(first)]
    blocks = [f"Transformer/encoderblock_{index}" for index in range(DEPTH)]
    stacked = {
        f"Transformer/encoderblock/{leaf}": np.stack(
            [arrays[f"{block}/{leaf}"] for block in blocks]
        )
        for leaf in leaves
    }
    rest = {n: a for n, a in arrays.items() if "encoderblock" not in n}
    return rest | stacked


def vision_transformer(case: Case, seed: int = 0):
    """Returns the arrays of section 18.2 and those of 18.1 that they amount to."""
    arrays = big_vision(case, seed)
    renamed = {
        name.replace("MlpBlock_0", "MlpBlock_3")
        .replace("LayerNorm_1", "LayerNorm_2")
        .replace("MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1"): a
        for name, a in arrays.items()
    }
    positions = renamed.pop("pos_embedding")
    if case.pooling == Pooling.CLASS_TOKEN:
        row = np.random.default_rng(seed + 1).normal(size=(1, 1, WIDTH))
        row = np.float32(row)
        positions = np.concatenate([row, positions], axis=1)
        arrays["cls"] = arrays["cls"] + row
    renamed["Transformer/posembed_input/pos_embedding"] = positions
    return renamed, arrays


def timm_model(case: Case, arrays, epsilon=1e-6, activation="gelu_tanh"):
    """Builds timm's model and puts the arrays of 18.1 into it by the rules of 18.3."""
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    torch = pytest.importorskip("torch")
    pools = {Pooling.CLASS_TOKEN: "token", Pooling.AVERAGE: "avg"}
    model = timm_vit.VisionTransformer(
        img_size=case.image_size_px,
        patch_size=case.patch,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=HIDDEN / WIDTH,
        num_classes=CLASSES,
        global_pool=pools.get(case.pooling, "map"),
        class_token=case.pooling == Pooling.CLASS_TOKEN,
        no_embed_class=True,
        fc_norm=False,
        act_layer=activation,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=epsilon),
    )
    if case.representation:
        model.head = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, REPRESENTATION),
            torch.nn.Tanh(),
            torch.nn.Linear(REPRESENTATION, CLASSES),
        )
    state = {
        "patch_embed.proj.weight": arrays["embedding/kernel"].transpose(3, 2, 0, 1),
        "patch_embed.proj.bias": arrays["embedding/bias"],
        "pos_embed": arrays["pos_embedding"],
    }
    if case.pooling == Pooling.CLASS_TOKEN:
        state["cls_token"] = arrays["cls"]

    def linear(theirs, name):
        state[f"{theirs}.weight"] = arrays[f"{name}/kernel"].T
        state[f"{theirs}.bias"] = arrays[f"{name}/bias"]

    def layer_norm(theirs, name):
        state[f"{theirs}.weight"] = arrays[f"{name}/scale"]
        state[f"{theirs}.bias"] = arrays[f"{name}/bias"]

    def joined(theirs, name, parts):
        kernels = [arrays[f"{name}/{p}/kernel"].reshape(WIDTH, -1).T for p in parts]
        biases = [arrays[f"{name}/{part}/bias"].reshape(-1) for part in parts]
        state[f"{theirs}.weight"] = np.concatenate(kernels)
        state[f"{theirs}.bias"] = np.concatenate(biases)

    def output(theirs, name):
        state[f"{theirs}.weight"] = arrays[f"{name}/out/kernel"].reshape(-1, WIDTH).T
        state[f"{theirs}.bias"] = arrays[f"{name}/out/bias"]

    for index in range(DEPTH):
        ours, theirs = f"Transformer/encoderblock_{index}", f"blocks.{index}"
        attention = f"{ours}/MultiHeadDotProductAttention_0"
        layer_norm(f"{theirs}.norm1", f"{ours}/LayerNorm_0")
        layer_norm(f"{theirs}.norm2", f"{ours}/LayerNorm_1")
        joined(f"{theirs}.attn.qkv", attention, ("query", "key", "value"))
        output(f"{theirs}.attn.proj", attention)
        linear(f"{theirs}.mlp.fc1", f"{ours}/MlpBlock_0/Dense_0")
        linear(f"{theirs}.mlp.fc2", f"{ours}/MlpBlock_0/Dense_1")
    layer_norm("norm", "Transformer/encoder_norm")
    if case.pooling == Pooling.ATTENTION:
        attention = "MAPHead_0/MultiHeadDotProductAttention_0"
        state["attn_pool.latent"] = arrays["MAPHead_0/probe"]
        joined("attn_pool.q", attention, ("query",))
        joined("attn_pool.kv", attention, ("key", "value"))
        output("attn_pool.proj", attention)
        layer_norm("attn_pool.norm", "MAPHead_0/LayerNorm_0")
        linear("attn_pool.mlp.fc1", "MAPHead_0/MlpBlock_0/Dense_0")
        linear("attn_pool.mlp.fc2", "MAPHead_0/MlpBlock_0/Dense_1")
    if case.representation:
        linear("head.0", "pre_logits")
        linear("head.2", "head")
    else:
        linear("head", "head")
    model.load_state_dict(
        {name: torch.tensor(array) for name, array in state.items()}, strict=True
    )
    return model.eval()


def images(size, seed=7):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (2, *size, 3), np.uint8)


def timm_outputs(model, image):
    torch = pytest.importorskip("torch")
    scaled = (np.float32(image).transpose(0, 3, 1, 2) - 127.5) / 127.5
    with torch.no_grad():
        features = model.forward_features(torch.from_numpy(scaled))
        return {
            "logits": model.forward_head(features).numpy(),
            "pooled": model.pool(features).numpy(),
        }


def our_outputs(model, variables, image):
    params = trees.unflatten(variables)
    return jax.jit(lambda p, x: model.apply({"params": p}, x))(params, image)


def save(path, arrays, image_size_px=None):
    path.mkdir(exist_ok=True)
    np.savez(path / "model.npz", **arrays)
    if image_size_px is not None:
        config = json.dumps({"image_size": list(image_size_px)})
        (path / "config.json").write_text(config)
    return str(path)


def load(path, image_size_px):
    """Returns (model, our variables) of an archive, its format found by content."""
    found = weights.read(path)
    form = foreign.recognise(found)
    architecture = form.architecture(found)
    assert architecture.image_size_px in (image_size_px, None)
    assert architecture.channels == 3
    variables = formats.load(found, form, architecture, image_size_px)
    return architecture.model, variables


def differences(case, path, arrays, **timm_arguments):
    """Loads an archive and compares with timm's model of the 18.1 `arrays`."""
    model, variables = load(path, case.image_size_px)
    image = images(case.image_size_px)
    ours = our_outputs(model, variables, image)
    theirs = timm_outputs(timm_model(case, arrays, **timm_arguments), image)
    return {
        name: relative_difference(ours[name], theirs[name])
        for name in ("logits", "pooled")
    }


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "weights"


def square(case):
    return case.image_size_px[0] == case.image_size_px[1]


@pytest.mark.parametrize("name", CASES)
def test_big_vision_archives_give_the_numbers_of_timm(folder, name):
    case = CASES[name]
    arrays = big_vision(case)
    path = save(folder, arrays, None if square(case) else case.image_size_px)
    assert max(differences(case, path, arrays).values()) < BOUND


# vision_transformer has no attention pooling.
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"attention"}))
def test_vision_transformer_archives_give_the_numbers_of_timm(folder, name):
    case = CASES[name]
    renamed, arrays = vision_transformer(case)
    path = save(folder, renamed, None if square(case) else case.image_size_px)
    assert max(differences(case, path, arrays).values()) < BOUND


@pytest.mark.parametrize("name", ["token", "attention"])
def test_stacked_blocks_give_the_numbers_of_timm(folder, name):
    case = CASES[name]
    arrays = big_vision(case)
    path = save(folder, stack(arrays))
    assert foreign.recognise(weights.read(path)) == STACKED
    assert max(differences(case, path, arrays).values()) < BOUND


def test_stacked_blocks_in_another_order_are_another_model(folder):
    case = CASES["token"]
    arrays = big_vision(case)
    stacked = stack(arrays)
    name = "Transformer/encoderblock/MlpBlock_0/Dense_0/kernel"
    stacked[name] = stacked[name][::-1]
    assert differences(case, save(folder, stacked), arrays)["logits"] > BOUND


def test_a_stack_that_lacks_a_block_is_refused_by_name(folder):
    stacked = stack(big_vision(CASES["token"]))
    name = "Transformer/encoderblock/LayerNorm_1/bias"
    stacked[name] = stacked[name][:-1]
    with pytest.raises(ValueError, match=rf"{name}.*not 3 blocks"):
        load(save(folder, stacked), (24, 24))


def test_bfloat16_without_a_type_has_the_values_of_bfloat16(folder):
    case = CASES["token"]
    arrays = big_vision(case)
    name = "Transformer/encoderblock_1/MlpBlock_0/Dense_0/kernel"
    half = arrays[name].astype(ml_dtypes.bfloat16)
    path = save(folder, arrays | {name: half.view("V2")})
    with np.load(f"{path}/model.npz") as archive:
        assert archive[name].dtype == np.dtype("V2")  # as published archives have it
    arrays = arrays | {name: half.astype(np.float32)}
    assert max(differences(case, path, arrays).values()) < BOUND


def test_two_byte_voids_read_as_half_floats_are_another_model(folder):
    case = CASES["token"]
    arrays = big_vision(case)
    name = "Transformer/encoderblock_1/MlpBlock_0/Dense_0/kernel"
    half = arrays[name].astype(ml_dtypes.bfloat16).view("V2")
    path = save(folder, arrays | {name: half})
    arrays = arrays | {name: np.float32(half.view(np.float16))}
    assert differences(case, path, arrays)["logits"] > BOUND


def test_the_exact_gelu_is_another_model(folder):
    case = CASES["token"]
    arrays = big_vision(case)
    path = save(folder, arrays)
    assert differences(case, path, arrays, activation="gelu")["logits"] > BOUND


@pytest.mark.parametrize("epsilon", [1e-5, 1e-12])
def test_another_norm_constant_is_another_model(folder, epsilon):
    case = CASES["token"]
    # Tokens of the size that training starts with: constants show where variances
    # are small.
    arrays = big_vision(case, token_size=0.02)
    path = save(folder, arrays)
    assert differences(case, path, arrays)["logits"] < BOUND
    assert differences(case, path, arrays, epsilon=epsilon)["logits"] > BOUND


def test_the_position_of_the_class_token_is_not_lost(folder):
    case = CASES["token"]
    renamed, arrays = vision_transformer(case)
    path = save(folder, renamed)
    without = arrays | {"cls": renamed["cls"]}
    assert differences(case, path, without)["logits"] > BOUND


@pytest.mark.parametrize("swapped", [("query", "key"), ("key", "value")])
def test_the_order_of_query_key_value_matters(folder, swapped):
    case = CASES["token"]
    arrays = big_vision(case)
    path = save(folder, arrays)
    block = "Transformer/encoderblock_0/MultiHeadDotProductAttention_0"
    first, second = (f"{block}/{part}/kernel" for part in swapped)
    wrong = arrays | {first: arrays[second], second: arrays[first]}
    assert differences(case, path, wrong)["logits"] > BOUND


def test_heads_and_their_channels_do_not_trade_places(folder):
    case = CASES["token"]
    arrays = big_vision(case)
    path = save(folder, arrays)
    name = "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/value/kernel"
    kernel = arrays[name]  # [D, H, D/H], written as if it were [D, D/H, H]
    wrong = arrays | {name: kernel.transpose(0, 2, 1).reshape(kernel.shape)}
    assert differences(case, path, wrong)["logits"] > BOUND


def test_the_representation_layer_ends_in_a_tanh(folder):
    torch = pytest.importorskip("torch")
    case = CASES["token, representation"]
    arrays = big_vision(case)
    model, variables = load(save(folder, arrays), case.image_size_px)
    image = images(case.image_size_px)
    theirs = timm_model(case, arrays)
    theirs.head[1] = torch.nn.Identity()
    ours = our_outputs(model, variables, image)["logits"]
    wrong = timm_outputs(theirs, image)["logits"]
    assert relative_difference(ours, wrong) > BOUND


@pytest.mark.parametrize("prefix", ["params/", "opt/target/"])
@pytest.mark.parametrize("layout", [dict, stack])
def test_what_checkpoints_wrap_around_the_model_is_taken_off(folder, prefix, layout):
    arrays = big_vision(CASES["token"])
    wrapped = {f"{prefix}{name}": array for name, array in layout(arrays).items()}
    wrapped["opt/count"] = np.int32(3)
    _, found = load(save(folder, wrapped), (24, 24))
    _, plain = load(save(folder, layout(arrays)), (24, 24))
    assert found.keys() == plain.keys()
    assert all(np.array_equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize("layout", [dict, stack])
def test_the_image_tower_of_an_image_text_checkpoint_is_read(folder, layout):
    case = CASES["attention"]
    arrays = big_vision(case)
    both = {f"params/img/{name}": array for name, array in layout(arrays).items()}
    both |= {
        "params/txt/Embed_0/embedding": np.ones((7, WIDTH), np.float32),
        "params/t": np.ones((1,), np.float32),
        "params/b": np.ones((1,), np.float32),
    }
    path = save(folder, both)
    assert max(differences(case, path, arrays).values()) < BOUND


def test_no_positions_are_fixed_sines_and_cosines(folder):
    case = dataclasses.replace(CASES["average"], positions=False)
    arrays = big_vision(case)
    path = save(folder, arrays)
    model, _ = load(path, case.image_size_px)
    assert model.positions == Positions.SINCOS
    table = sincos_by_the_formula(3, 3)
    whole = arrays | {"pos_embedding": table[None]}
    assert max(differences(case, path, whole).values()) < BOUND


def sincos_by_the_formula(rows, columns):
    """Section 17: w/4 frequencies 10000^(-i/(w/4-1)); sin x, cos x, sin y, cos y."""
    quarter = WIDTH // 4
    omega = [10_000 ** (-i / (quarter - 1)) for i in range(quarter)]
    tokens = [
        [np.sin(x * w) for w in omega]
        + [np.cos(x * w) for w in omega]
        + [np.sin(y * w) for w in omega]
        + [np.cos(y * w) for w in omega]
        for y in range(rows)
        for x in range(columns)
    ]
    return np.float32(tokens)


def test_a_grid_that_is_no_square_is_asked_for(folder):
    arrays = big_vision(CASES["token, not square"])
    with pytest.raises(ValueError, match=r"8 patches, which are no square.*image_size"):
        load(save(folder, arrays), (16, 32))
    with pytest.raises(ValueError, match=r"8 patches of 8 px.*24x24.*Correct config"):
        load(save(folder, arrays, (24, 24)), (24, 24))


def test_a_representation_without_a_head_is_refused(folder):
    arrays = big_vision(CASES["token, representation"])
    arrays = {n: a for n, a in arrays.items() if not n.startswith("head/")}
    with pytest.raises(ValueError, match="pre_logits.*but no head.*remove"):
        load(save(folder, arrays), (24, 24))


def test_an_empty_representation_is_none(folder):
    renamed, _ = vision_transformer(CASES["token"])
    renamed["pre_logits"] = np.zeros((0,), np.float32)
    model, _ = load(save(folder, renamed), (24, 24))
    assert model.head == Classifier(num_classes=CLASSES)


def test_missing_and_left_over_names_are_listed(folder):
    arrays = big_vision(CASES["token"])
    del arrays["Transformer/encoder_norm/bias"]
    arrays["Transformer/extra"] = np.zeros((2,), np.float32)
    with pytest.raises(ValueError) as error:
        load(save(folder, arrays), (24, 24))
    assert "+ Transformer/encoder_norm/bias" in str(error.value)
    assert "- Transformer/extra" in str(error.value)


def ours(pooling, positions=Positions.LEARNED, **fields):
    sizes = {"width": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_dim": HIDDEN}
    head = Classifier(num_classes=CLASSES)
    return ViT(
        **sizes,
        **{"patch_size": 8, "head": head, **fields},
        pooling=pooling,
        positions=positions,
    )


@pytest.mark.parametrize(
    ("form", "pooling"),
    [
        (form, pooling)
        for form in vit_archives.FORMATS
        for pooling in POOLINGS
        if (form, pooling) != (VISION_TRANSFORMER, Pooling.ATTENTION)
    ],
)
@pytest.mark.parametrize("hidden_dim", [None, REPRESENTATION])
def test_there_and_back_gives_the_same_bits(folder, form, pooling, hidden_dim):
    head = Classifier(num_classes=CLASSES, hidden_dim=hidden_dim)
    model = ours(pooling, head=head)
    rng = np.random.default_rng(3)
    size = (16, 32)
    before = {
        name: np.float32(rng.normal(size=shape))
        for name, shape in formats.shapes(model, size, 3).items()
    }
    written = formats.write(form, model, size, before)
    path = save(folder, written, size)
    assert foreign.recognise(weights.read(path)) == form
    loaded, after = load(path, size)
    assert loaded == model
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("positions", Positions)
def test_fixed_positions_need_no_array(positions):
    model = ours(Pooling.AVERAGE, positions)
    shapes = formats.shapes(model, (16, 24), 3)
    variables = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    written = formats.write(BIG_VISION, model, (16, 24), variables)
    assert ("pos_embedding" in written) == (positions == Positions.LEARNED)


def to_archive(model):
    return export.find(model, Library.NPZ, (24, 24))


def test_archives_are_written_in_one_layout():
    head = Classifier(num_classes=2, hidden_dim=3)
    fits = ours(Pooling.ATTENTION, Positions.SINCOS, head=head)
    assert to_archive(fits) is to_archive(ours(Pooling.CLASS_TOKEN)) is BIG_VISION
    for form in vit_archives.FORMATS[1:]:
        with pytest.raises(ValueError, match="big_vision"):
            form.describe(ours(Pooling.CLASS_TOKEN), (24, 24), 3)
