import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_lite import trees

TREE = {
    "encoder": {
        "block_00": {"mlp": {"kernel": jnp.ones((2, 4)), "bias": jnp.zeros(4)}},
        "norm": {"scale": jnp.ones(2)},
    },
    "head": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)},
}
NAMES = [
    "encoder/block_00/mlp/bias",
    "encoder/block_00/mlp/kernel",
    "encoder/norm/scale",
    "head/bias",
    "head/kernel",
]


def test_names_follow_the_order_of_the_leaves():
    assert trees.names(TREE) == NAMES
    assert list(trees.flatten(TREE)) == NAMES
    for name, leaf in trees.flatten(TREE).items():
        node = TREE
        for part in name.split("/"):
            node = node[part]
        assert node is leaf


def test_unflatten_undoes_flatten():
    again = trees.unflatten(trees.flatten(TREE))
    assert trees.names(again) == NAMES
    assert again["head"]["kernel"] is TREE["head"]["kernel"]


def test_map_named_gives_each_leaf_its_name():
    mapped = trees.map_named(lambda name, leaf: (name, leaf.shape), TREE)
    assert mapped["head"]["kernel"] == ("head/kernel", (2, 3))
    assert mapped["encoder"]["norm"]["scale"] == ("encoder/norm/scale", (2,))


def test_the_first_matching_rule_wins_and_the_rest_take_the_default():
    rules = [("head/kernel", "a"), ("head/.*", "b"), (".*kernel", "c")]
    assert trees.match(rules, NAMES, default="d") == {
        "encoder/block_00/mlp/bias": "d",
        "encoder/block_00/mlp/kernel": "c",
        "encoder/norm/scale": "d",
        "head/bias": "b",
        "head/kernel": "a",
    }
    assert set(trees.match([], NAMES).values()) == {None}


def test_a_pattern_must_match_the_whole_name():
    with pytest.raises(ValueError, match='rule "head" matches no name'):
        trees.match([("head", 1)], NAMES)
    assert trees.match([("head.*", 1)], NAMES)["head/bias"] == 1


def test_an_unused_rule_is_an_error_with_a_suggestion():
    with pytest.raises(ValueError, match='"haed/kernel".*Did you mean "head/kernel"'):
        trees.match([("haed/kernel", 1)], NAMES)


def test_a_rule_shadowed_by_earlier_ones_is_an_error():
    with pytest.raises(ValueError, match='"head/bias" matches no name that an earlier'):
        trees.match([("head/.*", 1), ("head/bias", 2)], NAMES)


def test_an_unmatched_name_is_an_error_where_every_name_must_match():
    with pytest.raises(ValueError, match='No rule matches "encoder/block_00/mlp/bias"'):
        trees.match([("head/.*", 1)], NAMES, every_name=True)
    matched = trees.match([("head/.*", 1), (".*", 2)], NAMES, every_name=True)
    assert sorted(matched.values()) == [1, 1, 2, 2, 2]


def test_a_bad_regular_expression_is_named_with_its_purpose():
    with pytest.raises(ValueError, match=r'freeze pattern "\*head" is not a regular'):
        trees.match([("*head", 1)], NAMES, what="freeze pattern")


LAYERS = ("patches/.*|position_embedding|class_token", r"encoder/block_(\d+)/.*")


def test_layers_above_count_from_embeddings_to_head():
    names = [
        "patches/kernel",
        "position_embedding",
        "class_token",
        "encoder/block_00/norm_1/scale",
        "encoder/block_01/mlp/dense_1/kernel",
        "encoder/block_02/attention/query/kernel",
        "encoder/norm/scale",
        "head/kernel",
    ]
    expected = [4, 4, 4, 3, 2, 1, 0, 0]
    assert list(trees.layers_above(names, LAYERS).values()) == expected
    # A frozen lower part is not in the tree; what remains keeps its place.
    assert list(trees.layers_above(names[4:], LAYERS).values()) == expected[4:]
    # What surrounds a backbone, a decoder of its own, is above it.
    inside = [f"encoder/{name}" for name in names] + ["decoder/block_00/mlp/kernel"]
    layers = [f"encoder/(?:{LAYERS[0]})", f"encoder/{LAYERS[1]}"]
    assert list(trees.layers_above(inside, layers).values()) == [*expected, 0]


def test_layers_above_order_the_units_of_a_resnet_by_number_not_by_letter():
    names = [
        "root/kernel",
        "block1/unit01/conv1/kernel",
        "block1/unit02/conv2/kernel",
        "block2/unit01/conv_proj/kernel",
        "block2/unit10/gn1/scale",
        "block2/unit9/gn1/scale",
        "norm-pre-head/scale",
        "head/kernel",
    ]
    layers = ("root/.*", r"block(\d+)/unit(\d+)/.*")
    assert list(trees.layers_above(names, layers).values()) == [6, 5, 4, 3, 1, 2, 0, 0]


def test_layers_above_refuse_a_model_that_names_no_blocks():
    with pytest.raises(ValueError, match="layers=.. none with a number.*head/bias"):
        trees.layers_above(["head/bias", "conv2/kernel"], ())
    with pytest.raises(ValueError, match="none with a number is the name of a param"):
        trees.layers_above(["image/block_0/kernel"], LAYERS)


def test_difference_lists_both_sides_and_is_empty_for_equals():
    ours = {"a": np.ones((2, 3), np.float32), "head": np.ones((2, 5), np.float32)}
    theirs = {"head": np.ones((2, 9), np.float32), "fc": np.ones(4, np.float16)}
    assert trees.difference(ours, theirs, "the model", "the checkpoint") == [
        "  + a (2, 3) float32  only in the model",
        "  - fc (4,) float16  only in the checkpoint",
        "  + head (2, 5) float32  in the model",
        "  - head (2, 9) float32  in the checkpoint",
    ]
    assert trees.difference(ours, dict(ours), "x", "y") == []
