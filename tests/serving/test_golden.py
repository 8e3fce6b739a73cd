import numpy as np

from clip_deploy.serving.golden import distinct_rows


def test_a_text_that_comes_again_is_asked_once():
    ids = np.array([[5, 1, 0], [3, 2, 0], [5, 1, 0], [5, 1, 0]])
    mask = np.array([[1, 1, 0], [1, 1, 0], [1, 1, 0], [1, 1, 1]])
    assert distinct_rows(ids, mask).tolist() == [0, 1, 3]  # in their order, and by their mask too
