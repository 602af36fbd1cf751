import numpy as np

from selfsight.stream.compiled import compiled


def test_where_nothing_can_be_kept_a_function_is_compiled_all_the_same():
    """Code without a file has no place for a cache, as a read-only installation without a home has none."""
    space = {}
    exec("def twice(x):\n    return 2 * x", space)
    assert compiled(space["twice"])(np.float32(4)) == 8
