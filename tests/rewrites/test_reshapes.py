import onnx
import onnx_ir as ir
import pytest

from clip_deploy.rewrites.reshapes import drop_idle_reshapes, join_shapes


def graph(body, inputs="float[batch, sequence, 8] x, float[batch, sequence] mask", output="float[n, m, k] y"):
    text = f'<ir_version: 9, opset_import: ["" : 18]> g ({inputs}) => ({output}) {{ {body} y = Identity(r) }}'
    model = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    return ir.from_proto(model)


IDLE = {
    "its own sizes": "s = Shape(x) r = Reshape(x, s)",
    "one size left open": "o = Constant<value_ints = [-1]>() s = Shape<start = 1>(x) t = Concat<axis = 0>(o, s) "
    "r = Reshape(x, t)",
    "a size of the same name": "a = Shape<start = 0, end = 2>(mask) w = Constant<value_ints = [8]>() "
    "t = Concat<axis = 0>(a, w) r = Reshape(x, t)",
    "a size that is copied": "t = Constant<value_ints = [0, -1, 8]>() r = Reshape(x, t)",
}
NEEDED = {
    "two sizes open": "t = Constant<value_ints = [-1, 4, 8]>() r = Reshape(x, t)",
    "sizes exchanged": "s = Shape(x) p = Constant<value_ints = [1, 0, 2]>() t = Gather(s, p) r = Reshape(x, t)",
    "another rank": "t = Constant<value_ints = [-1, 8]>() r = Reshape(x, t)",
}


@pytest.mark.parametrize("name", IDLE)
def test_a_reshape_to_the_shape_that_is_there_goes(name):
    model = graph(IDLE[name])
    assert drop_idle_reshapes(model) == 1
    assert "Reshape" not in [node.op_type for node in model.graph]


@pytest.mark.parametrize("name", NEEDED)
def test_a_reshape_that_may_change_the_shape_stays(name):
    assert drop_idle_reshapes(graph(NEEDED[name])) == 0


WHOLE = "z = Constant<value_int = 0>() o = Constant<value_int = 1>() a = Constant<value_ints = [0]>() s = Shape(mask) "
SIZES = "b = Gather(s, z) c = Gather(s, o) d = Unsqueeze(b, a) e = Unsqueeze(c, a) "


@pytest.mark.parametrize(("order", "joined"), [("d, e", 1), ("e, d", 0), ("d, d", 0)])
def test_sizes_that_are_put_together_as_they_were_are_the_shape_itself(order, joined):
    model = graph(f"{WHOLE} {SIZES} t = Concat<axis = 0>({order}) r = Identity(t)", output="int64[2] y")
    assert join_shapes(model) == joined
    assert ("Concat" in [node.op_type for node in model.graph]) == (not joined)
