"""Architectures in every form that people have them in: read once, by one function, or refused in words that help."""
import json
import warnings
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import sparsedarts as sd
from sparsedarts.core import DataError, ParameterError, UnknownName
from sparsedarts.space.catalogue import ALIASES, catalogue, fits
from sparsedarts.space.cells import derived_size
from sparsedarts.space.draw import cell_graphs
from sparsedarts.space.genotypes import TopologyWarning
from sparsedarts.space.nb201_strings import NB201_OPERATIONS, format_nb201
from sparsedarts.space.ops import operations
from sparsedarts.space.reading import read_architecture
from sparsedarts.strategy.sampling import genotype_text
from sparsedarts.training.retraining import changed, retraining_network

V2 = catalogue()["DARTS_V2"].genotype
BENCH = "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|avg_pool_3x3~0|nor_conv_1x1~1|none~2|"
FIELDS = ("normal", "normal_concat", "reduce", "reduce_concat")


def fields(g, cell=lambda edges: [list(edge) for edge in edges]):
    "The four fields as plain values, the cells in a form of their own."
    return dict(normal=cell(g.normal), normal_concat=list(g.normal_concat), reduce=cell(g.reduce), reduce_concat=list(g.reduce_concat))


def call(values): return f"Genotype({', '.join(f'{name}={value}' for name, value in values.items())})"


def per_node(edges):
    "Edges nested per node; an empty list where a node has none."
    triples = [edge if len(edge) == 3 else (*edge, 2 + i // 2) for i, edge in enumerate(edges)]
    return [[(name, source) for name, source, target in triples if target == node] for node in range(2, 1 + max(end for *_, end in triples) + 1)]


def quiet(fn):
    "What a call returns, and the texts of its warnings."
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        return fn(), [str(one.message) for one in found if issubclass(one.category, TopologyWarning)]


# ---------------------------------------------------------------- forms of one cell
def test_edges_nested_per_node():
    nested = fields(V2, per_node)
    assert sd.Genotype(**nested) == V2 == read_architecture(call(nested)) == read_architecture(json.dumps(nested))
    uneven = [[("sep_conv_3x3", 0)], [("skip_connect", 0), ("skip_connect", 1), ("max_pool_3x3", 2)], []]
    g = sd.Genotype(uneven, [2, 3], uneven, [3])
    assert g.edges("normal") == (("sep_conv_3x3", 0, 2), ("skip_connect", 0, 3), ("skip_connect", 1, 3), ("max_pool_3x3", 2, 3))
    with pytest.raises(ParameterError, match=r"normal_concat names nodes \[5\], but the edges end at nodes 2 to 4"): sd.Genotype(uneven, [3, 5], uneven, [3])


def test_triples_either_way_round():
    forward = [("sep_conv_3x3", 0, 2), ("skip_connect", 2, 3), ("max_pool_3x3", 1, 3)]
    backward = [(name, target, source) for name, source, target in forward]
    assert sd.Genotype(forward, [2, 3], forward, [3]) == sd.Genotype(backward, [2, 3], forward, [3])
    with pytest.raises(ParameterError, match="leads from 3 to 1"): sd.Genotype(forward[:2] + backward[2:], [3], forward, [3])


def test_fields_that_others_leave_empty():
    assert sd.Genotype(**fields(V2), connectN=None, connects=None) == V2
    assert read_architecture(call(fields(V2) | dict(connectN=None, connects=None))) == V2
    with pytest.raises(ParameterError, match="connectN"): sd.Genotype(**fields(V2), connectN=2)
    with pytest.raises(ParameterError, match="connectN"): read_architecture(call(fields(V2) | dict(connectN=2)))


@pytest.mark.parametrize("number", [np.int64, np.uint8, np.array, torch.tensor])
def test_numbers_of_other_libraries(number):
    cell = [(np.str_(name), number(source)) for name, source in V2.normal]
    g = sd.Genotype(cell, np.arange(2, 6), V2.reduce, torch.arange(2, 6))
    assert g == V2 and all(type(source) is int and type(name) is str for name, source in g.normal) and json.loads(g.to_json())


def test_printed_numpy_numbers():
    text = call(fields(V2)).replace(", 0]", ", np.int64(0)]").replace("[2, 3, 4, 5]", "array([2, 3, np.int32(4), numpy.int64(5)])")
    assert "np.int64(0)" in text and "array(" in text and read_architecture(text) == V2


@pytest.mark.parametrize("front", ["", "genotypes.", "DARTS = ", "x = gt.", "2024-01-01 12:00:00,000 INFO genotype = ", "[2024-01-01] found: models.genotypes."])
def test_lines_in_front(front):
    assert read_architecture(front + str(V2)) == read_architecture(f"  {front}{call(fields(V2))}\n") == V2


def test_named_tuples_dictionaries_and_lists():
    row = namedtuple("Genotype", FIELDS)(*fields(V2).values())
    more = namedtuple("Cell", (*FIELDS, "connectN", "connects"))(*row, None, None)
    for form in (row, more, tuple(row), list(more), row._asdict(), more._asdict(), {"genotype": row}, {"genotype": fields(V2)}): assert read_architecture(form) == V2
    assert read_architecture(str(row)) == read_architecture(str(more)) == read_architecture(json.dumps(row)) == V2
    with pytest.raises(ParameterError, match="reduce_concat missing"): read_architecture({name: fields(V2)[name] for name in FIELDS[:3]})
    with pytest.raises(ParameterError, match="others only if they are None"): read_architecture(fields(V2) | dict(epoch=3))


def test_the_last_line_of_a_log_counts():
    other = catalogue()["PDARTS"].genotype
    log = f"epoch 1\n12:01 PM genotype = {other}\n12:01 PM valid 0.5 (top-1)\n12:02 PM genotype = {call(fields(V2))}\n12:02 PM tensor([0.1, 0.2])\n"
    assert read_architecture(log) == read_architecture(log.replace("\n", "\r\n")) == V2
    spread = call(fields(V2)).replace(", normal_concat", ",  # isn't (yet) final\n  normal_concat")
    assert read_architecture(f"import x\n\nDARTS = {spread}\n") == V2
    with pytest.raises(ParameterError, match="not closed"): read_architecture(log[:log.rindex("tensor") - 30])
    with pytest.raises(ParameterError, match="holds 2 genotypes: A, B"): read_architecture(f"A = {other}\nB = {V2}\n")


def test_bench_strings():
    spaced = BENCH.replace("+", " + ")
    for text in (BENCH, f"  {spaced}\n", f"genotype: {BENCH}", f"Structure(4 nodes with {BENCH})", json.dumps(BENCH), json.dumps({"genotype": BENCH}), BENCH.encode()):
        assert read_architecture(text) == BENCH
    assert read_architecture(f"{V2}\nthen {BENCH}\n") == BENCH and read_architecture(f"{BENCH.join('ab')}\n{V2}\n") == V2
    with pytest.raises(UnknownName, match="unknown NAS-Bench-201 operation 'nor_conv_5x5'; did you mean"): read_architecture(BENCH.replace("3x3", "5x5", 1))
    for wrong in ("|none~0|", BENCH.replace("~2", "~1"), BENCH[:-8], BENCH + "+|none~0|", "|", "||"):
        with pytest.raises(ParameterError, match="not a NAS-Bench-201 cell"): read_architecture(wrong)


def test_the_line_of_a_table():
    for entry in catalogue().values(): assert read_architecture(entry.genotype.short()) == entry.genotype, entry.name
    wide = [("skip_connect", 0), ("skip_connect", 1)] * 10
    g = sd.Genotype(wide, range(2, 12), wide, range(2, 12))
    assert g.short() == g.to_json() and read_architecture(g.short()) == g, "nodes above 9 have no letter"
    assert genotype_text(g) == g.short() and genotype_text(BENCH) == BENCH
    a, b = (quiet(lambda: sd.Genotype(V2.normal, concat, V2.reduce, [2, 3, 4, 5]))[0] for concat in ([4, 5], [5, 4]))
    assert genotype_text(a) != genotype_text(b), "cells that differ only in what they concatenate are told apart"


# ---------------------------------------------------------------- everything asks the same reader
def test_python_functions_take_every_form(tmp_path):
    file, line = tmp_path / "cell.json", call(fields(V2, per_node))
    file.write_text(json.dumps(dict(genotype=fields(V2), seconds=1.0)))
    result = namedtuple("Result", "genotype history")(V2, None)
    for form in (V2, "DARTS", line, line.encode(), file, str(file), fields(V2), result):
        assert sd.genotype(form) == V2
        assert sd.derive(form, 2, 1).genotype == V2
        assert cell_graphs(form, "normal")["normal"].edges == V2.edges("normal")
    assert sd.genotype(BENCH) == BENCH and sd.derive({"genotype": BENCH}, 2, 1).genotype == BENCH and "conv 1×1" in sd.draw(BENCH.encode()).alt


def test_training_takes_every_form(tmp_path):
    (tmp_path / "train.log").write_text(f"12:00 genotype = {V2}\n")
    data = SimpleNamespace(classes=range(3), shape=(1, 8, 8))
    plan = changed("laptop", channels=2, layers=1)
    for form in (tmp_path / "train.log", "DARTS", fields(V2)): assert retraining_network(form, data, plan, 0).genotype == V2


def test_titles_of_drawings():
    assert sd.draw("DARTS_V2").alt.startswith("DARTS_V2. ") and sd.draw(str(V2)).alt.startswith("Normal cell: ")


# ---------------------------------------------------------------- files
def test_files_and_folders(tmp_path, monkeypatch):
    folder = tmp_path / "runs (1)"
    folder.mkdir()
    for name, text in {"genotype.json": V2.to_json(), "found.json": json.dumps(dict(genotype=fields(V2), metrics={"a": [1, {"b": 2}]}), indent=2),
                       "out.txt": f"{V2.to_json()}\n3.2 s; genotype, picture and history in search\n", "log": f"\ufeffINFO genotype = {V2}",
                       "late.json": "step 1\nstep 2\n" + json.dumps(dict(genotype=fields(V2)), indent=1), "name.txt": "DARTS\n",
                       "printed.log": f"12:00 genotype: {fields(V2)} after 3 s\n"}.items():
        (folder / name).write_text(text)
        assert read_architecture(folder / name) == read_architecture(str(folder / name)) == V2, name
    assert read_architecture(folder) == read_architecture(f"{folder}/") == V2
    monkeypatch.chdir(folder)
    assert read_architecture("log") == read_architecture("found.json") == V2
    Path("PDARTS").write_text(str(V2))
    assert read_architecture("PDARTS") == catalogue()["PDARTS"].genotype, "a published name is a name"


@pytest.mark.parametrize("content, error, words", [
    (b"", DataError, "holds no cell that can be read"), (b"[]", DataError, "if it holds normal, normal_concat"), (b"null", UnknownName, "unknown"),
    (b"\xff\xfe{", DataError, "is not text in UTF-8"), (b'{"normal": [', DataError, "holds no cell"), (b"[" * 100_000, DataError, "holds no cell"),
    (b'{"genotype": ' * 5000 + b"1" + b"}" * 5000, (DataError, ParameterError), "nested|no cell"), (b'{"genotype": 3}', DataError, "got int"), (b"\x00" * 9, DataError, "holds no cell"),
    (b'{"normal": [["skip", 0]], "normal_concat": [2], "reduce": [], "reduce_concat": []}', UnknownName, "did you mean 'skip_connect'"),
])
def test_damaged_files(tmp_path, content, error, words):
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(error, match=words): read_architecture(tmp_path / "bad.json")


def test_missing_and_odd_files(tmp_path):
    for wrong in ("none.json", "a/b", str(tmp_path / "x.log"), tmp_path / "x", tmp_path): pytest.raises(DataError, read_architecture, wrong).match("no file")
    pytest.raises(DataError, read_architecture, "/dev/zero").match("not an ordinary file")
    with (tmp_path / "huge.log").open("wb") as file: file.truncate(2 ** 27)
    pytest.raises(DataError, read_architecture, tmp_path / "huge.log").match("has 134,217,728 bytes")


# ---------------------------------------------------------------- two readings, and edges without effect
def every_edge(nodes): return [("sep_conv_3x3", source) for node in range(nodes) for source in range(node + 2)]


def test_all_edges_as_pairs_are_refused_with_both_readings():
    e = every_edge(4)
    for make in (lambda: sd.Genotype(e, range(2, 6), e, range(2, 6)), lambda: read_architecture(call(dict(normal=e, normal_concat=[2, 3, 4, 5], reduce=e, reduce_concat=[2])))):
        with pytest.raises(ParameterError, match="14 edges of the normal cell can be read as 7 nodes with two inputs each, or as all edges of 4 nodes"): make()
    nested = [e[:2], e[2:5], e[5:9], e[9:]]
    whole = sd.Genotype(nested, range(2, 6), nested, range(2, 6))
    assert whole == sd.Genotype(whole.edges("normal"), range(2, 6), whole.edges("reduce"), range(2, 6)) and len(whole.normal[0]) == 3
    net = sd.derive(whole, channels=4, layers=3)
    net(torch.randn(2, 3, 8, 8)).square().sum().backward()
    assert all(p.grad is not None for p in net.parameters()), "every parameter learns"


def test_all_edges_in_another_order_and_other_sizes():
    e = every_edge(4)
    with pytest.raises(ParameterError, match="all edges of 4 nodes"): sd.Genotype([e[1], e[0], *e[2:]], range(2, 6), V2.reduce, range(2, 6))
    with pytest.raises(ParameterError, match="all edges of 5 nodes"): sd.Genotype(V2.normal, range(2, 6), every_edge(5), range(2, 7))
    with pytest.raises(ParameterError, match="come two a node, but the normal cell has 5; nest them"): sd.Genotype(every_edge(2), [2, 3], e[:4], [2, 3])
    seven = sd.Genotype(e, range(2, 9), e, range(2, 9))
    assert len(seven.normal) == 14 and len(seven.normal[0]) == 2, "seven nodes, if all seven are concatenated"


def test_seven_nodes_that_were_meant_round_trip():
    nested = [every_edge(4)[2 * i:2 * i + 2] for i in range(7)]
    g, said = quiet(lambda: sd.Genotype(nested, range(2, 6), V2.reduce, range(2, 6)))
    assert len(said) == 1 and "nodes [6, 7, 8] of the normal cell do not reach its output" in said[0]
    for text in (str(g), g.to_json()): assert quiet(lambda: read_architecture(text))[0] == g


def test_a_node_that_nobody_reads_is_named():
    five = [*V2.normal, ("skip_connect", 0), ("skip_connect", 1)]
    with pytest.warns(TopologyWarning, match=r"nodes \[6\] of the normal cell do not reach its output, so their operations never learn") as said:
        sd.Genotype(five, range(2, 6), V2.reduce, range(2, 6))
    assert said[0].filename == __file__, "the warning points at the caller"
    none = [("skip_connect", 0), ("skip_connect", 1), ("none", 2), ("skip_connect", 1)]
    assert quiet(lambda: sd.Genotype(none, [3], V2.reduce, range(2, 6)))[1], "none carries nothing"
    assert not quiet(lambda: [entry.genotype for entry in (catalogue.cache_clear(), catalogue())[1].values()])[1], "no published cell has one"


# xiaomi-automl/FairDARTS: fairdarts/genotypes.py; sizes as printed there and in README.md, in millions
FAIR_C = """Genotype(normal=[('max_pool_3x3', 2, 0), ('sep_conv_5x5', 2, 1), ('dil_conv_3x3', 4, 0), ('dil_conv_5x5', 4, 2), ('skip_connect', 5, 3), ('sep_conv_3x3', 5, 0)],
normal_concat=range(2, 6), reduce=[('dil_conv_3x3', 2, 1), ('dil_conv_5x5', 2, 0), ('dil_conv_3x3', 3, 0), ('sep_conv_3x3', 3, 1), ('sep_conv_5x5', 4, 0),
('sep_conv_5x5', 4, 3), ('sep_conv_5x5', 5, 0), ('skip_connect', 5, 1)], reduce_concat=range(2, 6))"""
FAIR_G = """Genotype(normal=[('sep_conv_3x3', 2, 0), ('sep_conv_3x3', 2, 1), ('skip_connect', 4, 3), ('sep_conv_5x5', 4, 1), ('dil_conv_3x3', 5, 0), ('sep_conv_3x3', 5, 1)],
normal_concat=range(2, 6), reduce=[('avg_pool_3x3', 2, 1), ('skip_connect', 2, 0), ('skip_connect', 3, 2), ('max_pool_3x3', 3, 1), ('sep_conv_5x5', 4, 3),
('max_pool_3x3', 4, 0), ('dil_conv_3x3', 5, 1), ('dil_conv_3x3', 5, 4)], reduce_concat=range(2, 6))"""


@pytest.mark.parametrize("text, printed, auxiliary", [(FAIR_C, "2.59", False), (FAIR_G, "3.38", True), (FAIR_G, "3.375", True)])
def test_published_cells_with_an_empty_node(text, printed, auxiliary):
    g, said = quiet(lambda: read_architecture(text))
    assert len(said) == 1 and "starts at node 3, which has no input; it is dropped, and normal_concat loses [3]" in said[0]
    assert g.normal_concat == (2, 4, 5) and len(g.normal) == 5 and fits(derived_size(g, auxiliary=auxiliary), printed)
    net = sd.derive(g, 36, 20, auxiliary=auxiliary)
    assert sum(p.numel() for p in net.parameters()) == derived_size(g, auxiliary=auxiliary)
    assert quiet(lambda: read_architecture(str(g))) == (g, []), "what was read is whole"


def test_dropping_cascades():
    chain = [("sep_conv_3x3", 0, 2), ("skip_connect", 3, 4), ("skip_connect", 4, 5), ("skip_connect", 2, 5)]
    g, said = quiet(lambda: sd.Genotype(chain, range(2, 6), V2.reduce, range(2, 6)))
    assert g.edges("normal") == (chain[0], chain[3]) and g.normal_concat == (2, 5) and len(said) == 2 and "loses [3, 4]" in said[1]
    with pytest.raises(ParameterError, match="the normal cell is empty"): quiet(lambda: sd.Genotype(chain[1:3], range(2, 6), V2.reduce, range(2, 6)))
    with pytest.raises(ParameterError, match="the reduce cell is empty"): quiet(lambda: sd.Genotype(V2.normal, range(2, 6), chain[:3], [4, 5]))


# ---------------------------------------------------------------- what no cell is
@pytest.mark.parametrize("source", [-1, 2, 99, 10 ** 30, 0.0, 0.5, True, np.bool_(False), float("nan"), "0", None, [0], np.float64(0), np.array([0, 1])])
def test_impossible_sources(source):
    with pytest.raises(ParameterError, match="leads from|whole numbers"): sd.Genotype([("none", 0), ("none", source)], [2], V2.reduce, range(2, 6))
    with pytest.raises(ParameterError, match="leads from|whole numbers"): sd.Genotype([("none", 0, 2), ("none", 1, 3), ("none", source, 2)], [2, 3], V2.reduce, range(2, 6))


@pytest.mark.parametrize("concat", [[], [2, 2], [1], [-3], [7], [2.0], [True], [float("nan")], ["2"], "2345", None, 4, {2, 3}, range(10 ** 12), range(3, 2), [[2]]])
def test_impossible_concatenations(concat):
    with pytest.raises(ParameterError, match="normal"): sd.Genotype(V2.normal, concat, V2.reduce, range(2, 6))


@pytest.mark.parametrize("edges", [[], None, 3, "s30 s31", [("none",)], ["none", 0], [(0, "none")], [("none", 0, 2, 3)], [None], {"none": 0}, [[]], [[], []],
                                   [("none", 0), ("none", 0, 2)], [[("none", 0)], ("none", 1)], (("none", 0) for _ in iter(int, 1)), [([], 0)], np.array(0)])
def test_impossible_edges(edges):
    with pytest.raises(ParameterError): sd.Genotype(edges, [2], V2.reduce, range(2, 6))


def test_deep_and_endless_values():
    deep, own = [], {}
    for _ in range(100_000): deep = [deep]
    own["genotype"] = own
    for wrong in (deep, own, [deep] * 4, {"genotype": deep}): pytest.raises(ParameterError, read_architecture, wrong)
    pytest.raises(ParameterError, sd.Genotype, deep, [2], deep, [2])
    while deep: deep = deep[0]  # unwound by hand: freeing it at once would be as deep


@pytest.mark.parametrize("wrong", ["", " ", "\x00", "DARTS_V22", "Genotype", "Genotype(", "Genotype()", "Genotype(1, 2, 3, 4, 5)", "(", "{}", "[1]", "a" * 10 ** 6, "[" * 10 ** 6,
                                   "Genotype(" + "[" * 10 ** 6, "Genotype(" * 10 ** 5, "Genotype(normal=" + "-" * 90_000 + "1)", "Genotype(normal=" + "1+" * 40_000 + "1)",
                                   "|" * 10 ** 6, "{" * 10 ** 6, '{"normal":' * 20_000, "'" * 10 ** 5, "Genotype(**x)", "Genotype(*x)", "Genotype(normal=range(10**9))",
                                   "Genotype(normal=__import__('os').system('true'), normal_concat=[2], reduce=[], reduce_concat=[2])",
                                   "Genotype(normal=[], normal=[], normal_concat=[2], reduce=[], reduce_concat=[2])", b"\xff", 42, None, object(), 1.5, [], {}])
def test_what_is_no_architecture(wrong):
    with pytest.raises(ParameterError) as caught: read_architecture(wrong)
    assert 10 < len(str(caught.value)) < 4000


def test_unknown_names_have_a_nearest_one():
    for wrong, near in (("DART", "DARTS"), ("PC_DART", "PC_DARTS"), ("FairDARTS", "FairDARTS_a")): pytest.raises(UnknownName, read_architecture, wrong).match(near)
    pytest.raises(UnknownName, read_architecture, str(V2).replace("sep_conv_3x3", "sep_conv3x3")).match("did you mean 'sep_conv_3x3'")
    pytest.raises(UnknownName, read_architecture, str(V2).replace("skip_connect", "identity")).match("unknown operation 'identity'")


# ---------------------------------------------------------------- the command line
@pytest.fixture(scope="module")
def run():
    from sparsedarts.cli import app
    def call_it(*words): return CliRunner().invoke(app, list(map(str, words)))
    return call_it


@pytest.mark.parametrize("name", ["DARTS", "PC_DARTS", "DASS", "GDAS"])
def test_aliases_on_the_command_line(run, name):
    alias, own = (json.loads(run("cost", word, "--channels", 2, "--cells", 1, "--shape", "3,8,8", "--json").stdout) for word in (name, ALIASES[name]))
    assert alias == own


def test_the_command_line_reads_what_it_wrote(run, tmp_path):
    (tmp_path / "found.json").write_text(json.dumps(dict(genotype=fields(V2), seconds=3.25, metrics={"valid_accuracy": 50.0}, folder="search"), indent=1))
    (tmp_path / "genotype.json").write_text(V2.to_json())
    (tmp_path / "bench.json").write_text(json.dumps(dict(genotype=BENCH, seconds=1.0)))
    sizes = ("--channels", 2, "--cells", 1, "--shape", "3,8,8", "--json")
    wanted = json.loads(run("cost", "DARTS_V2", *sizes).stdout)["params"]
    for source in (tmp_path / "found.json", tmp_path, f"12:00 genotype = {V2}"): assert json.loads(run("cost", source, *sizes).stdout)["params"] == wanted
    assert json.loads(run("cost", tmp_path / "bench.json", *sizes).stdout)["params"] == json.loads(run("cost", BENCH, *sizes).stdout)["params"]
    done = run("draw", tmp_path / "found.json", "--out", tmp_path / "cell.svg")
    assert done.exit_code == 0 and (tmp_path / "cell.svg").exists()


# ---------------------------------------------------------------- every genotype, in every form
@st.composite
def cells(draw):
    "Edges of a cell with 2 to 5 nodes and any numbers of inputs, and concatenated nodes, in which nothing is empty."
    triples, active = [], [0, 1]
    for node in range(2, 2 + draw(st.integers(2, 5))):
        inputs = draw(st.lists(st.tuples(st.sampled_from(list(operations)), st.sampled_from(active)), min_size=not triples, max_size=4))
        triples += [(name, source, node) for name, source in inputs]
        if inputs: active.append(node)
    if draw(st.booleans()): triples = [(name, source, 2 + i // 2) for i, (name, source, _) in enumerate(triples[:len(triples) // 2 * 2]) if source < 2 + i // 2] or triples
    reached = sorted({target for *_, target in triples})
    return triples, draw(st.lists(st.sampled_from(reached), min_size=1, unique=True))


@settings(max_examples=60, deadline=None)
@given(cells(), cells())
def test_every_form_of_every_genotype_is_read_back(normal, reduce):
    g, _ = quiet(lambda: sd.Genotype(normal[0], normal[1], reduce[0], reduce[1]))
    turned = lambda edges: [(name, target, source) for name, source, target in edges]
    free = dict(zip(FIELDS, (list(g.edges("normal")), g.normal_concat, list(g.edges("reduce")), g.reduce_concat)))
    nested, back = fields(g, per_node), free | dict(normal=turned(free["normal"]), reduce=turned(free["reduce"]))
    numpy_text = call(fields(g, lambda edges: [(edge[0], *map(np.int64, edge[1:])) for edge in edges]))
    texts = [str(g), repr(g), g.to_json(), g.short(), f"genotypes.{g}", f"12:00 genotype = {g}\nmore (lines)", json.dumps(dict(genotype=fields(g))), str(fields(g)),
             call(free), call(nested), call(back), json.dumps(nested), numpy_text, str(namedtuple("Genotype", FIELDS)(*fields(g).values()))]
    assert ("np.int64(" in numpy_text) == (np.__version__ >= "2")
    values = [g, fields(g), free, nested, back, tuple(nested.values()), [*free.values(), None, None], namedtuple("G", FIELDS)(**fields(g))]
    assert all(quiet(lambda: read_architecture(form))[0] == g for form in texts + values)
    assert quiet(lambda: sd.Genotype.from_json(g.to_json()))[0] == g and hash(g) == hash(quiet(lambda: sd.Genotype(**nested))[0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(NB201_OPERATIONS), min_size=6, max_size=6))
def test_every_bench_cell_is_read_back(names):
    text = format_nb201(names)
    for form in (text, text.encode(), f" {text}\n", text.replace("+", " + "), f"12:00 arch={text} 94.3", json.dumps(text), {"genotype": text}): assert read_architecture(form) == text
