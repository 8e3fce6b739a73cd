import random
from itertools import pairwise

from clip_deploy.report.labels import DOT, LETTER, LINE, place_labels, spread


def test_no_name_covers_a_dot_or_another_name():
    dice = random.Random(0)
    dots = [(dice.uniform(10, 330), dice.uniform(90, 130)) for _ in range(18)]
    names = [f"torch-compile-fp{index}" for index in range(18)]
    boxes = [(x - DOT, y - DOT, x + DOT, y + DOT) for x, y in dots]
    for label, name in zip(place_labels(dots, names, 340, 432), names, strict=True):
        boxes.append((label.x, label.y - LINE / 2, label.x + LETTER * len(name), label.y + LINE / 2))
        assert boxes[-1][0] >= 0
        assert boxes[-1][2] <= 340
    for place, one in enumerate(boxes[len(dots) :], len(dots)):
        for other in boxes[:place]:
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def test_a_name_stands_right_beside_a_dot_that_is_alone():
    (label,) = place_labels([(100.0, 50.0)], ["ort-fp32"], 340, 240)
    assert (label.y, 100 < label.x < 115) == (50.0, True)


def test_without_room_a_name_stands_at_its_dot_all_the_same():
    (label,) = place_labels([(5.0, 5.0)], ["a-name-that-is-too-long"], 20, 20)
    assert abs(label.y - 5.0) < LINE


def test_names_at_the_ends_of_lines_are_a_line_apart_and_in_order():
    heights = [100.0, 101.0, 239.0, 240.0, 102.0]
    found = spread(heights, 0, 240)
    assert sorted(range(5), key=lambda place: found[place]) == sorted(range(5), key=lambda place: heights[place])
    ordered = sorted(found)
    assert all(after - before >= LINE - 1e-9 for before, after in pairwise(ordered))
    assert ordered[-1] <= 240
