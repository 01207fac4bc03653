"""Words that many messages need."""

from big_vision_lite import messages


def test_did_you_mean_suggests_only_close_words():
    allowed = ["weight_decay", "clip_norm"]
    assert messages.did_you_mean("weigth_decay", allowed) == (
        ' Did you mean "weight_decay"?'
    )
    assert messages.did_you_mean("zzz", allowed) == ""


def test_what_was_meant_is_found_whatever_the_case():
    assert messages.did_you_mean("TRIAN", ["train", "val"]) == ' Did you mean "train"?'
    assert messages.did_you_mean("cat", ["Cat"]) == ' Did you mean "Cat"?'


def test_long_lists_are_cut_and_counted():
    assert messages.some([]) == "none"
    assert messages.some("abc") == "a, b, c"
    assert messages.some(map(str, range(11)), most=3) == "0, 1, 2 and 8 more"
