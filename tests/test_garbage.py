import gc

import pytest

from big_vision_lite import garbage


def test_what_there_is_is_set_aside_until_the_end():
    with garbage.set_aside():
        before = gc.get_freeze_count()
        assert before > 10_000 and len(gc.get_objects()) < before / 10
        with garbage.set_aside():  # a training inside an evaluator
            assert gc.get_freeze_count() == before
        assert gc.get_freeze_count() == before
    assert gc.get_freeze_count() == 0
    with pytest.raises(KeyError), garbage.set_aside():
        raise KeyError
    assert gc.get_freeze_count() == 0


def test_what_comes_later_is_still_collected():
    class Circle:
        pass

    with garbage.set_aside():
        circle = Circle()
        circle.itself = circle
        del circle
        assert gc.collect() >= 1
