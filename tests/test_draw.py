"Drawn artists match the genotype, labels fit their boxes, nothing leaves the picture, whatever the cell."
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg

from sparsedarts.core import ParameterError, UnknownName, expect_error
from sparsedarts.space.catalogue import catalogue, genotype
from sparsedarts.space.cells import derive
from sparsedarts.space.darts import supernet
from sparsedarts.space.draw import BOX, CellGraph, box_width, cell_graphs, column_halves, draw, gallery, lanes, layout, save_drawing
from sparsedarts.space.genotypes import Genotype
from sparsedarts.sparse.layers import masked_layers

NB201 = "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|avg_pool_3x3~0|nor_conv_1x1~1|none~2|"


def named(axes, prefix):
    "Patches of axes whose name begins so."
    return [p for p in axes.patches if (p.get_gid() or "").startswith(prefix)]


@pytest.mark.parametrize("name", catalogue())
def test_every_published_cell_is_drawn_edge_by_edge(name):
    value, figure = genotype(name), draw(name)
    assert len(figure.axes) == 2 and name in figure.alt
    for axes, cell in zip(figure.axes, ("normal", "reduce")):
        edges, concat = value.edges(cell), value.concat(cell)
        nodes = max([t for *_, t in edges] + list(concat)) + 1
        assert [len(named(axes, f"{cell}-{part}-")) for part in ("edge", "end", "box", "node", "concat")] == [len(edges)] * 3 + [nodes, len(concat)]
        labels = {t.get_gid(): t.get_text() for t in axes.texts if t.get_gid()}
        for k, (op, source, target) in enumerate(edges):
            label = labels[f"{cell}-label-{k}"]
            assert sorted(re.sub(r"\D", "", label)) == sorted(re.sub(r"\D", "", op)) and label[:3] == ("1×7" if op == "conv_7x1_1x7" else op[:3])
            (path,), (end,) = named(axes, f"{cell}-edge-{k}"), named(axes, f"{cell}-end-{k}")
            (start,), (stop,) = ([p for p in axes.patches if p.get_gid() == f"{cell}-node-{v}"] for v in (source, target))
            assert tuple(path.get_path().vertices[0]) == start.center
            assert end.get_path().vertices[-1].tolist() == pytest.approx([stop.center[0] - stop.radius, stop.center[1]])


def extents(figure):
    "Every label's place in pixels with its axes' place, and the renderer."
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    return renderer, [(axes, text, text.get_window_extent(renderer)) for axes in figure.axes for text in axes.texts if text.get_text()]


def a_supernet():
    "With clear preferences."
    torch.manual_seed(0)
    return supernet("darts", channels=4, layers=3, alpha_scale=1.0)


@pytest.mark.parametrize("source, scale", [("DARTS_V2", 1.0), ("NASNet_5block", 0.6), ("AmoebaNet_5block", 2.0), ("FairDARTS_b", 1.0),
                                           (NB201, 1.0), (a_supernet, 1.0)])
def test_letters_stay_in_boxes_and_boxes_in_the_picture(source, scale):
    figure = draw(source() if callable(source) else source, scale=scale)
    renderer, found = extents(figure)
    whole = figure.bbox
    for axes, text, place in found:
        box = next((p for p in axes.patches if p.get_gid() == (text.get_gid() or "").replace("label", "box") and p.get_gid()), None)
        inside = axes.bbox if box is None else box.get_window_extent(renderer)
        assert inside.x0 - 0.5 <= place.x0 and place.x1 <= inside.x1 + 0.5 and inside.y0 - 0.5 <= place.y0 and place.y1 <= inside.y1 + 0.5, text.get_text()
        assert axes.bbox.x0 >= whole.x0 and axes.bbox.x1 <= whole.x1 and axes.bbox.y0 >= whole.y0 and axes.bbox.y1 <= whole.y1
        for patch in axes.patches:
            around = patch.get_path().transformed(patch.get_transform()).get_extents()
            assert around.x0 >= axes.bbox.x0 and around.x1 <= axes.bbox.x1 and around.y0 >= axes.bbox.y0 and around.y1 <= axes.bbox.y1, patch.get_gid()
    for i, (_, one, a) in enumerate(found):
        assert not any(a.overlaps(b) for _, other, b in found[:i]), one.get_text()


@st.composite
def graphs(draw_value):
    "Cells with one or two inputs and any edges, several between two nodes too."
    inputs, last = draw_value(st.integers(1, 2)), draw_value(st.integers(2, 7))
    ends = st.integers(inputs, last).flatmap(lambda t: st.tuples(st.integers(0, t - 1), st.just(t)))
    edges = draw_value(st.lists(ends, min_size=1, max_size=16))
    return CellGraph(tuple(("sep_conv_3x3", s, t) for s, t in edges), (), inputs)


@settings(max_examples=80, deadline=None)
@given(graphs())
def test_lanes_are_free(graph):
    heights, half, placed = lanes(graph), column_halves(graph), layout(graph, box_width(graph))
    spans = [(max(s, graph.inputs - 1), t) for _, s, t in graph.edges]
    for k, (a, b) in enumerate(spans):
        assert (heights[k] == 0) == (b - a == 1)
        if heights[k]: assert all(abs(heights[k]) > half[v] for v in range(a + 1, b)) and placed.low < heights[k] < placed.high
        assert all(heights[k] == 0 or heights[k] != heights[o] or b <= c or d <= a for o, (c, d) in enumerate(spans[:k]))
    for i, (x, y) in enumerate(placed.boxes):
        assert placed.nodes[spans[i][0]][0] < x < placed.nodes[spans[i][1]][0]
        assert all(x != x2 or abs(y - y2) > BOX for x2, y2 in placed.boxes[:i])


@settings(max_examples=60, deadline=None)
@given(graphs(), st.data())
def test_alive_is_reachability(graph, data):
    weights = tuple(data.draw(st.sampled_from([0, 1])) for _ in graph.edges)
    cell = CellGraph(graph.edges, graph.concat, graph.inputs, weights)
    links = {(s, t) for (_, s, t), w in zip(cell.edges, weights) if w}
    def routes(path):
        if path[-1] == cell.last: yield path
        for s, t in links:
            if s == path[-1]: yield from routes((*path, t))
    found = set()
    for v in range(cell.inputs):
        for path in set(routes((v,))): found |= set(path)
    assert cell.alive() == found


def width_of(figure, mark):
    return next(p.get_linewidth() for axes in figure.axes for p in axes.patches if p.get_gid() == mark)


def test_widths_follow_weights():
    figure = draw("PDARTS", "normal", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0])
    widths = [width_of(figure, f"normal-edge-{k}") for k in range(1, 8)]
    assert widths == sorted(widths) and len(set(widths)) == 7
    assert "50 %" in figure.alt
    net = derive("PDARTS", channels=4, layers=3, layer_type="masked")
    for name, layer in masked_layers(net).items():
        mask = torch.zeros_like(layer.mask)
        mask.view(-1)[:mask.numel() // (2 if "cells.0._ops.1." in name else 1)] = 1
        layer.set_mask(mask)
    figure = draw(net, "normal")
    assert width_of(figure, "normal-edge-1") < width_of(figure, "normal-edge-3")


def test_supernet_marks_the_edges_it_would_keep():
    net = a_supernet()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    graph = cell_graphs(net)
    for cell in ("normal", "reduce"):
        kept = {edge for edge, stays in zip(graph[cell].edges, graph[cell].kept) if stays}
        assert kept == set(net.genotype().edges(cell))
        assert graph[cell].weights == pytest.approx([max(row[1:]) for row in net.weights()[cell].tolist()])
    draw(net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and all(a.grad is None for a in net.alphas.values())


def test_gallery_and_files(tmp_path):
    figure = gallery(["DARTS_V2", NB201, Genotype([("none", 0, 2), ("skip_connect", 1, 2)], [2], [("sep_conv_7x7", 0, 4)], [4])], columns=3)
    assert sum(bool(axes.patches) for axes in figure.axes) == 5
    svg = save_drawing(figure, tmp_path / "new" / "cells.svg").read_text()
    ids = re.findall(r'id="(\d-[a-z]+-(?:edge|box)-\d+)"', svg)
    assert len(ids) == len(set(ids)) == 2 * (16 + 6 + 3) and not list((tmp_path / "new").glob(".*"))
    assert save_drawing(figure, tmp_path / "cells.png", dpi=40).stat().st_size > 1000
    expect_error(lambda: save_drawing(figure, tmp_path / "cells"), ParameterError, "saved as .svg or .png")
    expect_error(lambda: gallery(["DARTS_V2", "no such"]), UnknownName, "unknown published cell 'no such'")
